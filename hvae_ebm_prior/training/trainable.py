"""A prior that can be trained: energies, and a loss of posterior noise whose gradient is the learning gradient."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..backbone.posterior import Posterior
from ..density.energy_model import EnergyModel
from ..energies.coupling import Labels
from ..saving.config import TrainingSummary
from .config import TrainingConfig
from .objective import BatchLoss, Objective


class TrainablePrior(EnergyModel):
    """Energies with a loss.

    Attributes:
        trained: what `fit` did last, or what the file said of it; None before.
    """

    trained: TrainingSummary | None = None

    def objective(self, config: TrainingConfig, step: int) -> Objective | None:
        """What `fit` minimises at a step, from 0; None, as here, where a class has an objective of its own.

        Args:
            config: the settings.
            step: number of the step.

        Returns:
            The objective.

        Raises:
            ValueError: an objective that the energies cannot be learned by.
        """
        if config.objective is not None:
            raise ValueError(f"objective: {type(self).__name__} has one of its own, got {config.objective!r}")
        return None

    @abstractmethod
    def batch_loss(
        self,
        u: Tensor,
        labels: Tensor | Labels | None,
        generator: torch.Generator | None,
        rows: range | None = None,
        objective: Objective | None = None,
        posterior: Posterior | None = None,
    ) -> BatchLoss:
        """What a training step learns from.

        Args:
            u: posterior noise (N, D) of images.
            labels: of the images; None for none.
            generator: source of all further noise.
            rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
            objective: what to minimise, where `objective` gives a choice; None for the default.
            posterior: the Gaussians that the noise was drawn from, where they are known and the loss can use them.

        Returns:
            The loss of every sample.
        """

    @property
    @abstractmethod
    def gradients_per_step(self) -> int:
        """Gradients of the networks for a batch in one training step."""


def networks_by_layer(prior: EnergyModel) -> list[list[nn.Module]]:
    """Every layer's energy and the label networks that are bound to it, top to bottom."""
    heads = [networks for networks in prior.heads.values() if isinstance(networks, nn.ModuleDict)]
    return [
        [energy, *(networks[str(i)] for networks in heads if str(i) in networks)]
        for i, energy in enumerate(prior.energies)
    ]
