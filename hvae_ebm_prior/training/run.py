"""The state of a training run."""

from dataclasses import dataclass, field

import torch

from .batches import Batches
from .config import TrainingConfig
from .guard import Guard
from .record import TrainingRecord
from .trainable import TrainablePrior


@dataclass
class Run:
    """A training run between two steps: all that the next one depends on.

    Attributes:
        prior: holds the moving average.
        trainee: a copy of the prior, which the optimiser moves.
        config: the settings.
        batches: the data.
        guard: holds the snapshots to go back to.
        optimizer: Adam.
        generator: source of randomness; None for torch's global generators.
        history: one record per step.
        lr_scale: factor on the learning rate, halved by every return to a good state.
        warmup_from: step of the last such return, from which the learning rate warms up; 0 without one.
        last_checkpoint: step of the last checkpoint, 0 for none.
        micro_batch: images whose gradient is computed at a time; None for all of a batch.
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
    warmup_from: int = 0
    last_checkpoint: int = 0
    micro_batch: int | None = None
