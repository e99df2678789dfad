"""A training run between two steps: all that the next one depends on."""

from dataclasses import dataclass, field

import torch

from .batches import Batches
from .config import TrainingConfig
from .guard import Guard
from .record import TrainingRecord
from .trainable import TrainablePrior


@dataclass
class Run:
    """A training run between two steps.

    Attributes:
        prior: holds the moving average.
        trainee: what the optimiser moves.
        config: the settings.
        batches: the data.
        guard: holds the snapshots to go back to.
        optimizer: Adam.
        generator: source of randomness; None for torch's global generators.
        history: one record per step.
        lr_scale: factor on the learning rate, halved by every return to a good state.
        first: step of the last such return, after which the learning rate warms up.
        saved: step of the last good checkpoint, 0 for none.
        micro_batch: images that are computed at a time; None for all of a batch.
    """

    prior: TrainablePrior
    trainee: TrainablePrior
    config: TrainingConfig
    batches: Batches
    guard: Guard
    optimizer: torch.optim.Optimizer
    generator: torch.Generator | None
    history: list[TrainingRecord] = field(default_factory=list)
    lr_scale: float = 1.0
    first: int = 0
    saved: int = 0
    micro_batch: int | None = None
