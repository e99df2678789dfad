"""Adam, its learning rate, and the moving average of the weights that it moves."""

import math

import torch
from torch import nn

from .config import TrainingConfig

# Steps of warm-up by default, where a twentieth of the iterations is more.
LONGEST_WARMUP = 100


def make_optimizer(trainee: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """A fresh Adam; its learning rate is set at every step."""
    return torch.optim.Adam(
        trainee.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )


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
    steps = min(config.iterations // 20, LONGEST_WARMUP) if config.warmup is None else config.warmup
    warmup = min(1.0, (step - warmup_from + 1) / (steps + 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.iterations)
    decay = config.final_learning_rate + (1 - config.final_learning_rate) * cosine
    return config.learning_rate * warmup * decay * config.epoch_decay**epoch


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
