"""NCP-VAE (Aneja et al., "A Contrastive Learning Approach for Training Variational Autoencoder Priors", NeurIPS 2021).

Layer by layer a binary classifier tells posterior latents from prior ones, given the same posterior latents above. Its logit is learned to be

    f_i(z_i, z_<i) = log q(z_i | z_<i) - log p(z_i | z_<i),      loss_i = softplus(-f_i(z_i)) + softplus(f_i(z_i^-)),      z_i^- ~ p(. | z_<i),

with q the aggregate posterior (noise-contrastive estimation, Gutmann & Hyvaerinen 2010); there are no chains in training. The prior is then
prod_i p(z_i | z_<i) exp f_i(z_i, z_<i), where every factor is normalised if the logits are right. Two ways to draw from it:

- "sir", sampling-importance-resampling: top to bottom, of M proposals z_i ~ p(. | z_<i) one is taken with probability proportional to exp f_i;
- "langevin": chains in u over all layers, on sum_i f_i - |u|^2 / 2.

What the original takes from its own decoder as a summary of z_<i is here what any backbone offers: the networks see z_i, u_i, mean_i and log std_i,
stacked along the first dimension. Neither more proposals nor more steps are always better: classifiers have seen the posterior and the prior, nothing
between or beyond, and the harder one looks for where f_i is high, the more one finds where it is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import BackboneAdapter, drive
from ..coupling import Coupling, Heads, Labels, check_labels
from ..energy import EnergyConfig
from ..execution import Corrections, ExecutionConfig
from ..langevin import LangevinConfig
from ..latent_prior import CHUNK_DIMENSIONS
from ..presets import PRESETS
from ..prior import DiffusionEBMPrior
from ..recovery import RecoveryLoss
from ..sampling import held_rows
from ..schedule import DiffusionSchedule
from ..streams import draw_key, open_streams
from ..validation import check_count

if TYPE_CHECKING:
    from ..composition import Condition

Sampler = Literal["sir", "langevin"]
# Latents that the networks see side by side: z, u, mean and log std.
STACKED = 4
# Numbers per sample that the proposals looked at together may hold. It bounds memory, and samples depend on it by rounding alone.
PROPOSED = 2**14


class NCPPrior(DiffusionEBMPrior):
    """Noise-contrastive priors over the layers of a hierarchical VAE; its `energy` is -sum_i f_i.

    Args:
        backbone: as of `LatentPrior`.
        sampler: "sir" or "langevin".
        proposals: number M of proposals per layer of "sir".
        langevin: the chain of "langevin".
        energy: settings of the default networks, or the user's own, one per layer: network(x, t) returns f_i, (N,), of x, (N, *input_shapes[i]).
        execution: as of `EnergyModel`.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or an unknown sampler or a wrong number of proposals.
    """

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        sampler: Sampler = "sir",
        proposals: int = 100,
        langevin: LangevinConfig = PRESETS["ncp"].langevin,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
    ) -> None:
        if sampler not in ("sir", "langevin"):
            raise ValueError(f'sampler: expected "sir" or "langevin", got {sampler!r}')
        check_count(proposals, "proposals")
        super().__init__(backbone, schedule=DiffusionSchedule.marginal(), langevin=langevin, energy=energy, execution=execution)
        self.sampler, self.proposals = sampler, proposals

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sampler", "proposals", "langevin", "execution")}

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the networks see, without batch, top to bottom: `STACKED` times as many channels as the latents."""
        return tuple((STACKED * shape[0], *shape[1:]) for shape in self.latent_shapes)

    @property
    def gradients_per_step(self) -> int:
        """One: there are no chains in training."""
        return 1

    def couple(self, coupling: Coupling) -> None:
        """Raises TypeError: there is nothing here for labels to be bound to."""
        raise TypeError("an NCPPrior learns no labels; take a DiffusionEBMPrior")

    def learned_corrections(
        self, z: Sequence[Tensor], t: Tensor, energies: Corrections | None = None, heads: Heads | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log q(z_i | z_<i) / p(z_i | z_<i), (N, L), as far as learned, of all layers or of the first ones, by a teacher-forced walk."""
        seen = [stack(z_i, mean, std) for z_i, (mean, std) in zip(z, self.transform.gaussians(z), strict=True)]
        return super().learned_corrections(seen, t, energies, heads)

    def batch_loss(self, u: Tensor, labels: Tensor | Labels | None, generator: torch.Generator | None) -> RecoveryLoss:
        """The classifiers' losses of posterior noise `u` (N, D): `total` is their sum, `recovery` their mean less that of chance, 2 log 2."""
        if labels is not None:
            check_labels(labels, self.coupling, len(u), u.device)
        noise = self.split(open_streams(draw_key(generator), range(len(u)), u.device, u.dtype, self.execution.backend).normal(self.dim))
        posterior, seen = self.split(u), []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            real, false = mean + std * posterior[i].to(mean), mean + std * noise[i].to(mean)
            seen.append(torch.cat((stack(real, mean, std), stack(false, mean, std))))
            return real

        with torch.no_grad():
            drive(self.backbone, len(u), draw, stop_after=len(noise))
        t = torch.zeros(len(u), dtype=torch.long, device=u.device)
        positive, negative = super().learned_corrections(seen, t.repeat(2))[0].chunk(2)
        losses = F.softplus(-positive) + F.softplus(negative)
        chance = F.softplus(torch.zeros(2)).sum().to(u)
        squares = (positive.sum(1) ** 2 + negative.sum(1) ** 2) / 2
        return RecoveryLoss(losses.sum(1), losses.mean(1) - chance, squares, torch.zeros_like(squares), 0, t)

    def _sample_levels(
        self,
        key: int,
        samples: range,
        fixed: Mapping[int, Tensor],
        temperature: float,
        condition: "Condition | None",
        langevin: LangevinConfig | None = None,
    ) -> list[Tensor]:
        if self.sampler == "langevin":
            return super()._sample_levels(key, samples, fixed, temperature, condition, langevin)
        if condition is not None:
            raise ValueError('conditions need chains: make the prior with sampler="langevin"')
        size, parts = max(1, CHUNK_DIMENSIONS // self.dim), []
        for first in range(0, len(samples), size):
            rows = slice(first, first + size)
            parts.append(self._resample(key, samples[rows], held_rows(fixed, rows), temperature))
        return [torch.cat(states) for states in zip(*parts, strict=True)]

    @torch.no_grad()
    def _resample(self, key: int, samples: range, fixed: Mapping[int, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Noise (N, D) by sampling-importance-resampling layer by layer, and every layer's first proposal."""
        streams = open_streams(key, samples, self.device, self.dtype, self.execution.backend)
        chosen: list[Tensor] = []
        firsts: list[Tensor] = []

        def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
            if i in fixed:
                chosen.append(fixed[i].to(self.dtype).expand(len(samples), *mean.shape[1:]))
                firsts.append(chosen[-1])
                return mean + std * chosen[-1].to(mean)
            size, together = mean[0].numel(), max(1, min(self.proposals, PROPOSED // mean[0].numel()))
            best, score = torch.empty(0), torch.empty(0)
            for first in range(0, self.proposals, together):
                count = min(together, self.proposals - first)
                u = temperature * streams.normal(count * size).reshape(len(samples) * count, *mean.shape[1:])
                above = [part.repeat_interleave(count, dim=0) for part in (mean, std)]
                x = stack(above[0] + above[1] * u.to(mean), *above).to(self.dtype)
                t = torch.zeros(len(x), dtype=torch.long, device=x.device)
                index, now = pick(self.energies[i](x, t).reshape(-1, count), streams.normal(count))
                taken = u.reshape(len(samples), count, *mean.shape[1:])[torch.arange(len(samples), device=u.device), index]
                if first == 0:
                    firsts.append(u.reshape(len(samples), count, *mean.shape[1:])[:, 0])
                    best, score = taken, now
                else:
                    better = now > score
                    best, score = torch.where(better.reshape(-1, *[1] * (best.ndim - 1)), taken, best), torch.where(better, now, score)
            chosen.append(best)
            return mean + std * best.to(mean)

        drive(self.backbone, len(samples), draw, stop_after=len(self.latent_shapes))
        return self.join(chosen), self.join(firsts)


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
