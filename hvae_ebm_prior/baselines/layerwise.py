"""The diffusion prior layer by layer: every layer is diffused by itself, given the layers above it, and there are no
chains.

    p(u) = prod_i p(u_i | z_<i),      p(u_{t,i} | u_{t+1,i}, z_<i) proportional to exp f_i(z_{t,i}, t; z_<i) q(u_{t,i})
    q(u) = N(u; w u_{t+1,i}, 1/lambda), the Gaussian part N(u; 0, I) N(u_{t+1,i}; alpha u, sigma^2), drawn from exactly

with z_{t,i} = mean_i(z_<i) + std_i(z_<i) u_{t,i} and z_<i of level 0. Every factor has one layer's share of one level
of the prior hole to close, so its Gaussian part is near it, and a few draws u^1..u^M of that stand for the rest.
Learning is recovery likelihood (Eq. 11) with the normaliser estimated from them, the data among them so that the
estimate is bounded:

    loss_i = log [(exp f_i(u_{t,i}) + sum_m exp f_i(u^m)) / (M + 1)] - f_i(u_{t,i})

This is noise-contrastive estimation by ranking (Ma & Collins, 2018), which finds f_i for any M, up to what depends on
u_{t+1,i} and z_<i alone; that cancels, as proposals are compared under the same. Sampling goes down the layers, and
through the levels of each: of M proposals of q one is taken, with probability proportional to exp f_i. Either costs one
walk through the backbone, without its gradient, and passes of the networks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone.transform import BackboneAdapter, drive
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import gaussian_part
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import Streams, draw_key, open_streams
from ..density.energy_model import Shapes
from ..density.sampling import SamplingRequest
from ..energies.coupling import Coupling, Labels, check_labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..training.recovery import RecoveryLoss

# Latents that the networks see side by side: z, u, mean and log std.
STACKED = 4
# Numbers per sample that the proposals looked at together may hold. It bounds memory, and samples depend on it by
# rounding alone.
PROPOSED = 2**14


class LayerwisePrior(DiffusionEBMPrior):
    """A prior that is a product of diffusion priors over the layers; see the module's text.

    Training cannot run away and takes no gradient of the backbone; drawing takes `proposals` passes of every network
    per level. What it cannot do is what needs one density of all layers together: labels, observations
    (`posterior_sample`), and energies of different samples side by side, as its f_i are found up to offsets that depend
    on the layers above. Layers can be held.

    Args:
        backbone: as of `LatentPrior`.
        schedule: noise levels of the diffusion.
        proposals: number M of proposals of which one is drawn, per layer and level.
        negatives: number M of draws that a training sample is told from, per layer.
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of
            x, (N, *input_shapes[i]): z_i, u_i, mean_i and log std_i stacked along the first dimension.
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or `proposals` or `negatives` is no positive integer.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = {
        "schedule": DiffusionSchedule,
        "proposals": int,
        "negatives": int,
    }
    # Its f_i are found up to offsets that depend on the layers above.
    comparable: ClassVar[bool] = False
    # As errors call it.
    NAME = "a LayerwisePrior"

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = PRESETS["layerwise"].schedule,
        proposals: int = 128,
        negatives: int = 8,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        check_count(proposals, "proposals")
        check_count(negatives, "negatives")
        super().__init__(backbone, schedule=schedule, energy=energy, execution=execution)
        self.proposals, self.negatives = proposals, negatives

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("schedule", "proposals", "negatives", "execution")}

    @staticmethod
    def network_shapes(latent_shapes: Shapes) -> Shapes:
        """Shapes of what the networks see of latents of the given shapes, with `STACKED` times as many channels."""
        return tuple((STACKED * shape[0], *shape[1:]) for shape in latent_shapes)

    def inputs(self, z: Sequence[Tensor]) -> list[Tensor]:
        """What the networks see, (N, *input_shapes[i]) of all layers or of the first ones, by a teacher-forced walk."""
        return [
            stack(((z_i - mean) / std)[:, None], mean, std)
            for z_i, (mean, std) in zip(z, self.transform.gaussians(z), strict=True)
        ]

    @property
    def gradients_per_step(self) -> int:
        """One, as there are no chains in training."""
        return 1

    def couple(self, coupling: Coupling) -> None:
        """Raises TypeError: labels need a density of all layers together."""
        raise TypeError(f"{self.NAME} learns no labels; take a DiffusionEBMPrior")

    def batch_loss(
        self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None, rows: range | None = None
    ) -> RecoveryLoss:
        """The loss of posterior noise `u` (N, D): `total` is the sum over layers, `recovery` their mean; 0 while
        nothing is learned.
        """
        if labels is not None:
            check_labels(labels, self.coupling, len(u), u.device)
        streams = open_streams(
            draw_key(generator), range(len(u)) if rows is None else rows, u.device, u.dtype, self.execution.backend
        )
        t, *states = diffuse_from_first(self.schedule, u, streams)
        first, real, noisier = (self.split(state) for state in states)
        seen: list[Tensor] = []

        def show(i: int, mean: Tensor, std: Tensor) -> Tensor:
            false = self._propose(noisier[i], t, self.negatives, streams)
            seen.append(stack(torch.cat((real[i][:, None], false), dim=1), mean, std).to(self.dtype))
            return mean + std * first[i].to(mean)

        levels = t.repeat_interleave(self.negatives + 1)
        with self.execution.loss_precision(u.device):
            with torch.no_grad():
                drive(self.backbone, len(u), show, stop_after=len(first))
            f = torch.stack(
                [network(x, levels).unflatten(0, (len(u), -1)) for network, x in zip(self.energies, seen, strict=True)]
            ).to(u)
        losses = self.ranking_loss(f).T
        return RecoveryLoss(losses.sum(1), losses.mean(1), f.sum(0).square().mean(1), losses.new_zeros(len(u)), 0, t)

    def ranking_loss(self, f: Tensor) -> Tensor:
        """Loss (L, N) of the values `f` (L, N, 1 + negatives) of data, which come first, and of draws; 0 where all are
        alike.
        """
        return f.logsumexp(2) - math.log(f.shape[2]) - f[:, :, 0]

    def _propose(self, u_next: Tensor, t: Tensor, count: int, streams: Streams) -> Tensor:
        """`count` draws (N, count, ...) of the Gaussian part of a layer given u_{t+1,i} (N, ...)."""
        weight, precision = (
            x.reshape(-1, *[1] * u_next.ndim) for x in gaussian_part(t, self.schedule, self.langevin, u_next.dtype)
        )
        noise = streams.normal(count * u_next[0].numel()).reshape(len(u_next), count, *u_next.shape[1:])
        return weight * u_next[:, None] + noise * precision.rsqrt()

    def _sample_levels(self, request: SamplingRequest, key: int, samples: range) -> list[Tensor]:
        if request.condition is not None:
            raise ValueError(
                f"labels and observations need a density of all layers together, which {self.NAME} has not; take a DiffusionEBMPrior"
            )
        size, states = self.samples_per_chunk, []
        for start in range(0, len(samples), size):
            rows = slice(start, start + size)
            streams = open_streams(key, samples[rows], self.device, self.dtype, self.execution.backend)
            states.append(self._descend(streams, request.rows(rows).fixed, request.temperature))
        return [torch.cat(parts) for parts in zip(*states, strict=True)]

    @torch.no_grad()
    def _descend(self, streams: Streams, fixed: Mapping[int, Tensor], temperature: float) -> list[Tensor]:
        """States u_0..u_T, each (N, D); held layers are alike in all."""
        found: list[list[Tensor]] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if i in fixed:
                states = [fixed[i].to(self.dtype).expand(mean.shape)] * (self.schedule.steps + 1)
            else:
                states = [temperature * streams.normal(mean[0].numel()).reshape(mean.shape)]
                for level in reversed(range(self.schedule.steps)):
                    t = torch.full((len(mean),), level, dtype=torch.long, device=mean.device)
                    states.insert(0, self._choose(i, states[0], t, mean, std, temperature, streams))
            found.append(states)
            return mean + std * states[0].to(mean)

        drive(self.backbone, len(streams), draw, stop_after=len(self.latent_shapes))
        return [self.join(parts) for parts in zip(*found, strict=True)]

    def _choose(
        self, i: int, u_next: Tensor, t: Tensor, mean: Tensor, std: Tensor, temperature: float, streams: Streams
    ) -> Tensor:
        """One of `proposals` states of layer `i` per sample, (N, ...), drawn in proportion to exp f_i."""
        together = max(1, min(self.proposals, PROPOSED // mean[0].numel()))
        best, score = u_next, torch.full((len(mean),), -torch.inf, device=mean.device)
        for start in range(0, self.proposals, together):
            count = min(together, self.proposals - start)
            # In units of the temperature the Gaussians are those of temperature 1.
            u = temperature * self._propose(u_next / temperature, t, count, streams)
            f = self.energies[i](stack(u, mean, std).to(self.dtype), t.repeat_interleave(count))
            index, now = pick(f.unflatten(0, (len(mean), count)), streams.normal(count))
            taken = u[torch.arange(len(mean), device=u.device), index]
            best = torch.where((now > score).reshape(-1, *[1] * (best.ndim - 1)), taken, best)
            score = torch.maximum(now, score)
        return best


def diffuse_from_first(
    schedule: DiffusionSchedule, u: Tensor, streams: Streams
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels t (N,), drawn uniformly, and states u_0, u_t and u_{t+1} (N, D) of one diffusion of noise `u` (N, D)."""
    t = streams.levels(schedule.steps)
    alpha, sigma, alpha_bar, sigma_bar = (
        level.to(u)[:, None] for level in (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
    )
    first = alpha_bar[0] * u + sigma_bar[0] * streams.normal(u.shape[1])
    kept = alpha_bar[t] / alpha_bar[0]
    u_t = kept * first + (1 - kept**2).sqrt() * streams.normal(u.shape[1])
    return t, first, u_t, alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(u.shape[1])


def stack(u: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What a layer's network sees of M states `u` (N, M, C, ...) per sample: z, u, mean and log std, (N M, STACKED C,
    ...).
    """
    u = u.to(mean)
    # The logarithm is taken of N stds, not of the N M that they are repeated to.
    above = [part[:, None].expand_as(u) for part in (mean, std.log())]
    return torch.cat((mean[:, None] + std[:, None] * u, u, *above), dim=2).flatten(0, 1)


def pick(log_weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One of M proposals, the k-th with probability proportional to its weight: the largest log-weight after Gumbel
    noise is added.

    The largest of several calls' scores is one of all their proposals, so proposals may be looked at in parts.

    Args:
        log_weights: (N, M).
        noise: standard normal numbers (N, M).

    Returns:
        Index (N,) and score (N,) of the proposal taken.
    """
    score, index = (log_weights - torch.log(-torch.special.log_ndtr(noise))).max(dim=1)
    return index, score
