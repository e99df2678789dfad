"""The diffusion prior layer by layer: each conditional prior p(u_t | u_{t+1}) is a product over the layers, and there are no chains.

    p(u_t | u_{t+1}) = prod_i p(u_{t,i} | z_{t,<i}, u_{t+1,i}),      p(u_i | ...) proportional to exp f_i(z_i, t; z_<i) q(u_i)
    q(u_i) = N(w u_{t+1,i}, 1/lambda), the Gaussian part N(u_i; 0, I) N(u_{t+1,i}; alpha u_i, sigma^2), drawn from exactly

Every factor has one layer and one level of the prior hole to close, so the Gaussian part is near it, and a few draws u_i^1..u_i^M of it stand for the
rest. Learning is recovery likelihood (Eq. 11) with the normaliser estimated from them, the data among them so that the estimate is bounded:

    loss_i = log [(exp f_i(u_i) + sum_m exp f_i(u_i^m)) / (M + 1)] - f_i(u_i)

This is noise-contrastive estimation by ranking (Ma & Collins, 2018), which finds f_i for any M, up to what depends on u_{t+1} and z_<i alone: where
layers and levels hang together is in the conditioning, the offsets cancel. Sampling goes down the layers of each level and takes one of M proposals of
q with probability proportional to exp f_i. A step of either costs a walk through the backbone without its gradient, and gradients of the networks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backbone import BackboneAdapter, drive
from .coupling import Coupling, Labels, check_labels
from .energy import EnergyConfig
from .execution import ExecutionConfig
from .langevin import LangevinConfig, gaussian_part
from .latent_prior import CHUNK_DIMENSIONS
from .prior import DiffusionEBMPrior
from .recovery import RecoveryLoss, diffuse
from .sampling import Held, held_rows, held_states, sample_levels
from .schedule import DiffusionSchedule
from .streams import Streams, draw_key, open_streams
from .validation import check_count

if TYPE_CHECKING:
    from .composition import Condition

# Latents that the networks see side by side: z, u, mean and log std.
STACKED = 4
# Numbers per sample that the proposals looked at together may hold. It bounds memory, and samples depend on it by rounding alone.
PROPOSED = 2**14
# A little noise is left at level 0, as noise-free posteriors can be too sharp to learn.
SCHEDULE = DiffusionSchedule.from_snr((200, 15, 3, 0))


class LayerwisePrior(DiffusionEBMPrior):
    """A diffusion prior whose conditional priors are products over the layers; see the module's text.

    It learns and draws several times as fast as a `DiffusionEBMPrior`, and training cannot run away. What it cannot do is what needs one joint density
    of all layers: labels, observations (`posterior_sample`), and energies of different samples side by side, as its f_i are found up to offsets that
    depend on the layers above. Layers can be held.

    Args:
        backbone: as of `LatentPrior`.
        schedule: noise levels of the diffusion.
        proposals: number M of proposals of which one is drawn, per layer and level.
        negatives: number M of draws that a training sample is told from, per layer.
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of x, (N, *input_shapes[i]): z_i,
            u_i, mean_i and log std_i stacked along the first dimension.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or `proposals` or `negatives` is no positive integer.
    """

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        proposals: int = 128,
        negatives: int = 8,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        check_count(proposals, "proposals")
        check_count(negatives, "negatives")
        super().__init__(backbone, schedule=schedule, langevin=langevin, energy=energy, execution=execution)
        self.proposals, self.negatives = proposals, negatives

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"proposals": self.proposals, "negatives": self.negatives}

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the networks see, without batch, top to bottom: `STACKED` times as many channels as the latents."""
        return tuple((STACKED * shape[0], *shape[1:]) for shape in self.latent_shapes)

    def inputs(self, z: Sequence[Tensor]) -> list[Tensor]:
        """What the networks see, (N, *input_shapes[i]) of all layers or of the first ones, by a teacher-forced walk."""
        return [stack(z_i, mean, std) for z_i, (mean, std) in zip(z, self.transform.gaussians(z), strict=True)]

    @property
    def gradients_per_step(self) -> int:
        """One: there are no chains in training."""
        return 1

    def couple(self, coupling: Coupling) -> None:
        """Raises TypeError: labels need a density of all layers together."""
        raise TypeError(f"a {type(self).__name__} learns no labels; take a DiffusionEBMPrior")

    def batch_loss(self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None) -> RecoveryLoss:
        """The loss of posterior noise `u` (N, D): `total` is the sum over layers, `recovery` their mean; 0 while nothing is learned."""
        if labels is not None:
            check_labels(labels, self.coupling, len(u), u.device)
        streams = open_streams(draw_key(generator), range(len(u)), u.device, u.dtype, self.execution.backend)
        t, u_t, u_next = diffuse(self.schedule, u, streams)
        parts, below = self.split(u_t), self.split(u_next)
        seen: list[Tensor] = []

        def show(i: int, mean: Tensor, std: Tensor) -> Tensor:
            real = mean + std * parts[i].to(mean)
            false, above = self._propose(below[i], t, mean, std, self.negatives, streams)
            candidates = torch.cat((stack(real, mean, std)[:, None], stack(false, *above).unflatten(0, (len(u), self.negatives))), dim=1)
            seen.append(candidates.flatten(0, 1).to(self.dtype))
            return real

        with torch.no_grad():
            drive(self.backbone, len(u), show, stop_after=len(parts))
        levels = t.repeat_interleave(self.negatives + 1)
        f = torch.stack([network(x, levels).unflatten(0, (len(u), -1)) for network, x in zip(self.energies, seen, strict=True)])
        losses = self.ranking_loss(f).T
        return RecoveryLoss(losses.sum(1), losses.mean(1), f.sum(0).square().mean(1), losses.new_zeros(len(u)), 0, t)

    def ranking_loss(self, f: Tensor) -> Tensor:
        """Loss (L, N) of the values `f` (L, N, 1 + negatives) of data, which come first, and draws; 0 where all are alike."""
        return f.logsumexp(2) - torch.zeros_like(f[0, 0]).logsumexp(0) - f[:, :, 0]

    def _propose(
        self, u_next: Tensor, t: Tensor, mean: Tensor, std: Tensor, count: int, streams: Streams, temperature: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Latents of `count` draws of a layer's Gaussian part per sample, (N count, ...), and mean and std repeated as often."""
        weight, precision = (x.reshape(-1, 1, *[1] * (mean.ndim - 1)) for x in gaussian_part(t, self.schedule, self.langevin, u_next.dtype))
        noise = streams.normal(count * mean[0].numel()).reshape(len(mean), count, *mean.shape[1:])
        u = temperature * (weight * u_next.reshape(len(mean), 1, *mean.shape[1:]) + noise * precision.rsqrt()).flatten(0, 1)
        above = [part.repeat_interleave(count, dim=0) for part in (mean, std)]
        return above[0] + above[1] * u.to(mean), above

    def _sample_levels(
        self,
        key: int,
        samples: range,
        fixed: Mapping[int, Tensor],
        temperature: float,
        condition: "Condition | None",
        langevin: LangevinConfig | None = None,
    ) -> list[Tensor]:
        if condition is not None:
            raise ValueError(f"labels and observations need a density of all layers together, which a {type(self).__name__} has not; take a DiffusionEBMPrior")
        size, states = max(1, CHUNK_DIMENSIONS // self.dim), []
        for first in range(0, len(samples), size):
            rows = slice(first, first + size)
            streams = open_streams(key, samples[rows], self.device, self.dtype, self.execution.backend)
            part = held_rows(fixed, rows)
            held = held_states(part, self.transform, self.schedule, streams, temperature) if part else None

            def draw(v_next: Tensor, t: Tensor, /, *, hold: Held | None, streams: Streams = streams) -> Tensor:
                return self._descend(v_next, t, hold, temperature, streams)

            states.append(sample_levels(draw, self.schedule.steps, streams.normal(self.dim), held=held, temperature=temperature))
        return [torch.cat(parts) for parts in zip(*states, strict=True)]

    @torch.no_grad()
    def _descend(self, v_next: Tensor, t: Tensor, hold: Held | None, temperature: float, streams: Streams) -> Tensor:
        """States v_t (N, D) given v_{t+1}, layer by layer, divided by the temperature as `v_next` is."""
        below, held = self.split(v_next), None if hold is None else (self.transform.split(hold[0][None]), self.split(hold[1]))
        chosen: list[Tensor] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if held is not None and bool(held[0][i].all()):
                chosen.append(held[1][i])
                return mean + std * (temperature * held[1][i]).to(mean)
            z = self._choose(i, below[i], t, mean, std, temperature, streams)
            chosen.append(((z - mean) / (temperature * std)).to(self.dtype))
            return z

        drive(self.backbone, len(v_next), draw, stop_after=len(below))
        return self.join(chosen)

    def _choose(self, i: int, v_next: Tensor, t: Tensor, mean: Tensor, std: Tensor, temperature: float, streams: Streams) -> Tensor:
        """One of `proposals` latents of layer `i` per sample, drawn in proportion to exp f_i."""
        together = max(1, min(self.proposals, PROPOSED // mean[0].numel()))
        best, score = torch.empty(0), torch.empty(0)
        for first in range(0, self.proposals, together):
            count = min(together, self.proposals - first)
            z, above = self._propose(v_next, t, mean, std, count, streams, temperature)
            f = self.energies[i](stack(z, *above).to(self.dtype), t.repeat_interleave(count))
            index, now = pick(f.unflatten(0, (len(mean), count)), streams.normal(count))
            taken = z.unflatten(0, (len(mean), count))[torch.arange(len(mean), device=z.device), index]
            if first == 0:
                best, score = taken, now
            else:
                better = now > score
                best, score = torch.where(better.reshape(-1, *[1] * (best.ndim - 1)), taken, best), torch.where(better, now, score)
        return best


def stack(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What a layer's network sees, (N, STACKED C, ...): z, its noise u, and mean and log std of its Gaussian, each (N, C, ...)."""
    return torch.cat((z, (z - mean) / std, mean, std.log()), dim=1)


def pick(log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One of M proposals, the k-th with probability proportional to its weight: the largest log-weight after Gumbel noise is added.

    The largest of several calls' scores is one of all their proposals, so proposals may be looked at in parts.

    Args:
        log_weights: (N, M).
        noise: standard normal numbers (N, M).

    Returns:
        Index (N,) and score (N,) of the proposal taken.
    """
    score, index = (log_weights - torch.log(-torch.special.log_ndtr(noise))).max(dim=1)
    return index, score
