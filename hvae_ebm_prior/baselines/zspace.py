"""Diffusion of the latents themselves, z_{t+1} = alpha z_t + sigma eps, instead of their noise u (Cui & Han 2024, Sec.
3.1): an ablation.

    p(z_t | z_{t+1})  proportional to  exp(F(z_t, t)) p0(z_t) N(z_{t+1}; alpha z_t, sigma^2 I),      z_T ~ N(0, I),

with p0(z) = prod_i N(z_i; mean_i(z_<i), std_i(z_<i)^2) the backbone's own prior. All layers and dimensions get noise of
one size whatever their std given those above, and p0 is a density of very different scales, on which chains of one step
size creep or overshoot. That is what u is for.

Here the backbone is wrapped in an adapter whose layers are all N(0, 1): its noise is z, and log p0(z) - log N(z; 0, I)
is added to F.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..backbone.lock import backbone_modules
from ..backbone.posterior import Posterior
from ..backbone.registry import find_adapter
from ..backbone.transform import BackboneAdapter, LayerState, NoiseTransform, drive
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..density.energy_model import DEFAULT_SCHEDULE
from ..energies.build import without_context
from ..energies.coupling import Labels
from ..energies.networks import EnergyConfig
from ..training.learned_prior import LearnedPrior
from ..training.objective import BatchLoss, Objective
from ..training.recovery import gradients_of_recovery, recovery_loss

Base = Literal["backbone", "normal"]


class FlatAdapter:
    """A backbone whose layers are all N(0, 1), in the place of its own Gaussians: its noise is its latents.

    Args:
        transform: the backbone's own T.
    """

    def __init__(self, transform: NoiseTransform) -> None:
        self.transform = transform
        self.modules = backbone_modules(transform.adapter)

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Any]:
        z: list[Tensor] = []
        for shape in self.transform.latent_shapes:
            zeros = torch.zeros(batch_size, *shape, device=self.transform.device, dtype=self.transform.dtype)
            z.append((yield zeros, torch.ones_like(zeros)))
        return drive(self.transform.adapter, batch_size, lambda i, mean, std: z[i])[1]

    def infer(self, images: Tensor) -> Iterable[Tensor]:
        return self.transform.adapter.infer(images)

    def decode(self, features: Any) -> Tensor:
        return self.transform.adapter.decode(features)


class LatentDiffusionPrior(LearnedPrior):
    """A diffusion energy-based prior in z. Wherever a `DiffusionEBMPrior` has noise u, this one has latents z, all
    layers packed into one (N, D). It has no temperature, as there are no Gaussian layers here whose std that could
    multiply, and learns no labels.

    Args:
        backbone: as of `LatentPrior`.
        schedule: as of `EnergyModel`.
        langevin: as of `EnergyModel`; steps are in units of the Gaussian part N(z; 0, I) N(z_{t+1}; alpha z, sigma^2
            I).
        energy: as of `EnergyModel`.
        execution: as of `EnergyModel`.
        base: "backbone" for p0 the backbone's prior, "normal" for N(z; 0, I), where F learns the hierarchy as well.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or an unknown base.
    """

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        schedule: DiffusionSchedule = DEFAULT_SCHEDULE,
        langevin: LangevinConfig = LangevinConfig(),  # noqa: B008
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(context=False),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
        base: Base = "backbone",
    ) -> None:
        if base not in ("backbone", "normal"):
            raise ValueError(f'base: expected "backbone" or "normal", got {base!r}')
        flat = backbone if isinstance(backbone, FlatAdapter) else FlatAdapter(NoiseTransform(find_adapter(backbone)))
        super().__init__(
            flat,
            schedule=schedule,
            langevin=langevin,
            energy=without_context(energy, "LatentDiffusionPrior"),
            execution=execution,
        )
        self.base = base

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "base": self.base}

    def analytic_corrections(self, states: Sequence[LayerState]) -> Tensor | None:
        """log p0(z) - log N(z; 0, I) by layer, over the backbone's prior."""
        if self.base == "normal":
            return None
        flat: FlatAdapter = self.backbone  # type: ignore[assignment]
        z = [state.z for state in states]
        parts = [
            (z_i**2 - ((z_i - mean) / std) ** 2).flatten(1).sum(1) / 2 - std.log().flatten(1).sum(1)
            for z_i, (mean, std) in zip(z, flat.transform.gaussians(z), strict=True)
        ]
        return torch.stack(parts, dim=1)

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`."""
        return gradients_of_recovery(self.langevin)

    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """The loss that `fit` learns from; see `recovery_loss`."""
        return recovery_loss(self, u, labels, generator, rows)
