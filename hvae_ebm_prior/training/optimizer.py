"""Adam, its learning rate, and the moving average of the weights that it moves."""

import math

import torch
from torch import nn

from .config import TrainingConfig

# Iterations from which on the default learning rate, and warm-up, are those of a long run.
LONG = 2000
# Most that the default learning rate of a short run is of a long one's.
SHORT_RUN_FACTOR = 2.0


def make_optimizer(trainee: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """A fresh Adam; its learning rate is set at every step."""
    return torch.optim.Adam(
        trainee.parameters(), lr=peak_learning_rate(config), betas=config.betas, weight_decay=config.weight_decay
    )


def peak_learning_rate(config: TrainingConfig) -> float:
    """The largest learning rate of a run.

    A rate that falls to 0 is best in proportion to iterations^-1/2 (Defazio et al., "When, why and how much?", 2023): a
    short run must get as far in fewer steps (measured: docs/benchmarks.md, "Priors compared").

    Args:
        config: the settings.

    Returns:
        `config.learning_rate`, or its default for so many iterations.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return 2e-3 * min(max(1.0, math.sqrt(LONG / config.iterations)), SHORT_RUN_FACTOR)


def warmup_steps(config: TrainingConfig) -> int:
    """`config.warmup`, or its default for so many iterations."""
    return min(config.iterations, LONG) // 20 if config.warmup is None else config.warmup


def learning_rate(config: TrainingConfig, step: int, epoch: int, warmup_from: int = 0) -> float:
    """Learning rate of a step: warm-up, cosine decay and decay per pass over the data, multiplied.

    Args:
        config: the settings.
        step: number of the step, from 0.
        epoch: number of the pass over the data, from 0.
        warmup_from: step from which the rate warms up.

    Returns:
        The learning rate.
    """
    warmup = min(1.0, (step - warmup_from + 1) / (warmup_steps(config) + 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.iterations)
    decay = config.final_learning_rate + (1 - config.final_learning_rate) * cosine
    return peak_learning_rate(config) * warmup * decay * config.epoch_decay**epoch


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float, step: int) -> None:
    """Move the parameters of `average` towards those of `current`, and copy the buffers.

    Args:
        average: the moving average.
        current: what it follows.
        decay: the decay rate; at first it is less, so that the average is over the last tenth of few steps.
        step: number of the update, from 0.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - decay)
    for buffer, value in zip(average.buffers(), current.buffers(), strict=True):
        buffer.copy_(value)
