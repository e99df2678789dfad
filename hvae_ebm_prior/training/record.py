"""What is known of a training step, and who is told."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingRecord:
    """One training step.

    Attributes:
        iteration: number of the step, from 1.
        loss: mean loss in nats.
        gaps: mean energy gap E(chain) - E(data) in nats per level t; NaN where the batch held no sample of that level.
        gradient_norm: norm of the gradient before clipping.
        learning_rate: learning rate of the step.
        seconds: time since the start.
        cross_entropy: mean of -log p(y | u_t) in nats over the labels that were known; NaN where none was.
        gradient_norms: of every layer's networks, before clipping; the root of the sum of their squares is
            `gradient_norm`.
        displacement: mean over chains of |end - start| / sqrt(D), dimensionless, the start being u_{t+1}; NaN without
            chains.
        acceptance: mean acceptance probability of the Metropolis steps; NaN where `LangevinConfig.corrector_steps` is
            0.
        gradients_per_second: gradients of single images' energies per second of this step, those of the chain included.
    """

    iteration: int
    loss: float
    gaps: tuple[float, ...]
    gradient_norm: float
    learning_rate: float
    seconds: float
    cross_entropy: float = math.nan
    gradient_norms: tuple[float, ...] = ()
    displacement: float = math.nan
    acceptance: float = math.nan
    gradients_per_second: float = math.nan


# Called as callback(prior, record) after every step; `close` of those that have it, when training ends in whatever way.
Callback = Callable[[Any, TrainingRecord], object]
