"""A marginal energy-based model learned in stages of density-ratio estimation, in the manner of Xiao & Han (NeurIPS
2022) and of its successor for hierarchical models (TMLR 2026).

    p_k(u) proportional to exp[F_1(T(u)) + ... + F_k(T(u))] N(u; 0, I),      F_k(z) = sum_i f_i^k(z_i)
    loss of stage k = softplus(-F_k(T(u))) + softplus(F_k(T(u^-))),          u^- ~ p_{k-1}

Each stage is a binary classifier that tells posterior noise u from samples of the stage before, those of the first from
the Gaussian prior's, so every ratio that is learned is smaller than the whole (noise-contrastive estimation across one
large ratio learns little). No chain runs in training but to draw a stage's samples, once. Theirs finds the number of
stages while learning; here it is a setting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone.posterior import Posterior
from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count
from ..chains.execution import ExecutionConfig
from ..chains.langevin import LangevinConfig
from ..chains.schedule import DiffusionSchedule
from ..chains.streams import draw_key, open_streams
from ..energies.build import make_network, without_context
from ..energies.coupling import Labels
from ..energies.networks import EnergyConfig
from ..presets import PRESETS
from ..training.config import TrainingConfig
from ..training.learned_prior import LearnedPrior
from ..training.objective import BatchLoss, Objective
from .ncp import classification_loss


@dataclass(frozen=True)
class Stage(Objective):
    """The classification of one stage.

    Attributes:
        number: of the stage, from 0.
    """

    number: int = 0


class StagedEnergy(nn.Module):
    """f_i: the sum of one network per stage, of which those that have not begun are zero."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """f_i in nats, (N,), for latents `z` (N, *shape) at the only level `t` (N,)."""
        return torch.stack([stage(z, t) for stage in self.stages]).sum(0)


class MultiStagePrior(LearnedPrior):
    """One marginal energy-based model, learned by stages of binary classification. It learns no labels.

    Args:
        backbone: as of `LatentPrior`.
        stages: how many; `fit` gives each as many steps.
        langevin: the chains, from N(0, I).
        energy: settings of every stage's networks.
        execution: as of `EnergyModel`.
        pool: number of samples of the stage before that a stage learns from.

    Raises:
        TypeError, ValueError: as of `EnergyModel`, or a wrong number of stages or samples.
    """

    saved_settings: ClassVar[Mapping[str, Any] | None] = None

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        stages: int = 4,
        langevin: LangevinConfig = PRESETS["nce-stages"].langevin,
        energy: EnergyConfig | Sequence[nn.Module] = EnergyConfig(context=False),  # noqa: B008
        execution: ExecutionConfig = ExecutionConfig(),  # noqa: B008
        pool: int = 4000,
    ) -> None:
        stages = check_count(stages, "stages")
        pool = check_count(pool, "pool")
        super().__init__(
            backbone,
            schedule=DiffusionSchedule.marginal(),
            langevin=langevin,
            energy=without_context(energy, "MultiStagePrior"),
            execution=execution,
        )
        if isinstance(energy, EnergyConfig):
            more = [[make_network(shape, 1, energy) for _ in range(stages - 1)] for shape in self.latent_shapes]
            self.energies = nn.ModuleList(
                StagedEnergy([first, *rest]) for first, rest in zip(self.energies, more, strict=True)
            ).to(self.transform.device)
        self.stages = stages
        self.pool = pool
        # Samples (M, D) of the stage before, and the stage that they are for; a checkpoint of training saves both.
        self.samples: Tensor | None = None
        self.samples_for = torch.zeros((), device="cpu", dtype=torch.long)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stages", "langevin", "execution", "pool")}

    @property
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one step of `fit`: one, as training runs no chains."""
        return 1

    def objective(self, config: TrainingConfig, step: int) -> Stage:
        """What `fit` minimises at a step, from 0: the classification of its stage."""
        if config.objective is not None:
            raise ValueError(f"objective: a MultiStagePrior has one of its own, got {config.objective!r}")
        return Stage(number=step * self.stages // config.iterations)

    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """The classifier's loss of every sample, less that of chance.

        Args:
            u: posterior noise (N, D) of images.
            labels: none.
            generator: source of the samples it is told from.
            rows: None, as a stage's samples are drawn once for all.
            objective: the stage; None for the first.
            posterior: not used.

        Returns:
            The loss of every sample.

        Raises:
            ValueError: labels, or a part of a batch.
        """
        if labels is not None:
            raise ValueError("labels: a MultiStagePrior learns none; take a DiffusionEBMPrior")
        if rows is not None:
            raise ValueError("samples of a stage are drawn once: train in one process without micro_batch")
        n = len(u)
        stage = objective.number if isinstance(objective, Stage) else 0
        negative = self.negatives(n, stage, generator)
        levels = torch.zeros(2 * n, dtype=torch.long, device=u.device)
        with self.execution.loss_precision(u.device):
            with torch.no_grad():
                z = self.inputs(self.transform.states(torch.cat((u, negative))))
            f = torch.stack(
                [
                    energy.stages[stage](part, levels)  # type: ignore[index, operator]  # they are `StagedEnergy`
                    for energy, part in zip(self.energies, z, strict=True)
                ]
            ).sum(0)
        logits = torch.stack(f.to(u).chunk(2), dim=1)
        loss = classification_loss(logits)
        return BatchLoss(
            total=loss,
            recovery=loss,
            squares=logits.square().mean(1),
            cross_entropy=torch.zeros_like(loss),
            labelled=torch.zeros_like(loss, dtype=torch.long),
            levels=levels[:n],
        )

    def negatives(self, n: int, stage: int, generator: torch.Generator | None) -> Tensor:
        """Samples (n, D) of the stage before, which for the first one is the Gaussian prior."""
        key = draw_key(generator)
        if stage == 0:
            return open_streams(key, range(n), self.device, self.dtype, self.execution.backend).normal(self.dim)
        if self.samples is None or int(self.samples_for) != stage:
            # The stage's own networks are still zero.
            size = self.samples_per_chunk
            chunks = [range(first, min(first + size, self.pool)) for first in range(0, self.pool, size)]
            pool_key = draw_key(generator)
            self.samples = torch.cat([self._draw(pool_key, chunk) for chunk in chunks])
            self.samples_for = torch.tensor(stage, device="cpu", dtype=torch.long)
        chosen = torch.randint(len(self.samples), (n,), generator=torch.Generator().manual_seed(key), device="cpu")
        return self.samples[chosen.to(self.samples.device)]
