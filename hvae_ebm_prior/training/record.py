"""What is recorded of a training step, and the callbacks that are given it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingRecord:
    """One training step.

    Attributes:
        iteration: number of the step, from 1.
        loss: mean loss without the labels' cross-entropy: that of recovery in nats, or `score` where there is that.
        gaps: mean energy gap E(chain) - E(data) in nats per level t; NaN where the batch held no sample of that level,
            and without chains.
        gradient_norm: norm of the gradient before clipping.
        learning_rate: learning rate of the step.
        seconds: time since the start.
        cross_entropy: mean of -log p(y | u_t) in nats over labels; NaN where no image of the batch has one.
        gradient_norms: of every layer's networks, before clipping; their squares add up to that of `gradient_norm`.
        displacement: mean of |end - start| / sqrt(D) over chains, the start being u_{t+1}; NaN without chains.
        acceptance: mean acceptance probability of the Metropolis steps; NaN without `LangevinConfig.corrector_steps`.
        score: mean squared error of the velocity, summed over dimensions, less that of an untrained prior: below 0
            where something was learned; NaN without score matching.
        calibration: mean cross-entropy of noise levels in nats; NaN without.
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
    score: float = math.nan
    calibration: float = math.nan


class StopTraining(Exception):  # no error
    """What a callback raises to end training early; the steps so far stand."""


# Called as callback(prior, record) after every step; its method `close`, if any, when training ends, however it ends.
Callback = Callable[[Any, TrainingRecord], object]
