"""The networks of the published code of Cui & Han (2024), in our words: f_i(z_i, t) for the presets `paper-*`.

    CIFAR-10     strided 4x4 convolutions of one width down to 2x2, in residual blocks that see t, the latent too
    CelebA-HQ    plain ones down to 4x4, without t

and for both two residual fully connected blocks that see t, of half and a quarter of the features read out, sinusoids
of t, and no biases. CIFAR-10's weights are divided by their largest singular values, the last layer's too. So an
untrained prior is not the Gaussian prior: f is small beside the step, and F = f/s_t is not (`step_rule="published"`).

The published code takes square maps of 8 to 128. Here maps of any size are halved until neither side is longer than its
readout, or one is 1; smaller ones and vectors go to the fully connected blocks as they are.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .networks import EnergyConfig

TIME_FEATURES = 128
LONGEST_PERIOD = 10_000


def sinusoids(t: Tensor) -> Tensor:
    """Cosines and sines (N, TIME_FEATURES) of levels `t` (N,), of periods in geometric progression."""
    half = TIME_FEATURES // 2
    frequencies = LONGEST_PERIOD ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def time_network(size: int) -> nn.Sequential:
    """From sinusoids to `size` features of t."""
    return nn.Sequential(nn.Linear(TIME_FEATURES, size, bias=False), nn.SiLU(), nn.Linear(size, size, bias=False))


class TimeResidual(nn.Module):
    """A residual block, second(silu(first(x) + time(silu(e)))) + shortcut(x), of maps or vectors."""

    def __init__(self, first: nn.Module, second: nn.Module, shortcut: nn.Module, size: int) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut
        self.time = nn.Linear(TIME_FEATURES, size, bias=False)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.time(F.silu(e)).reshape(*h.shape[:2], *[1] * (h.ndim - 2))
        return self.second(F.silu(h)) + self.shortcut(x)


def halving(channels: int, width: int) -> nn.Conv2d:
    """A convolution to half the size."""
    return nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False)


def residual_map(channels: int, width: int) -> TimeResidual:
    """A block of maps to half the size."""
    second = nn.Conv2d(width, width, 3, padding=1, bias=False)
    return TimeResidual(halving(channels, width), second, halving(channels, width), width)


def residual_vector(inputs: int, outputs: int) -> TimeResidual:
    """A block of vectors."""
    first, second, shortcut = (nn.Linear(size, outputs, bias=False) for size in (inputs, outputs, inputs))
    return TimeResidual(first, second, shortcut, outputs)


class PublishedEnergy(nn.Module):
    """f_i of the published code.

    Args:
        shape: shape of the latent without batch.
        config: its `architecture`, `width` and `spectral_norm`.
        categories: numbers per sample; None for one, without a dimension of its own.
    """

    def __init__(self, shape: Sequence[int], config: EnergyConfig, categories: int | None = None) -> None:
        super().__init__()
        self.config, self.categories = config, categories
        # Whether maps see t and are residual.
        self.sees_time = sees_time = config.architecture == "published-cifar10"
        width = config.width
        self.embedding = time_network(TIME_FEATURES)
        self.maps = nn.ModuleList()
        sides, channels = (tuple(shape[1:]), shape[0]) if len(shape) == 3 else ((1, 1), math.prod(shape))
        while max(sides) > (2 if sees_time else 4) and min(sides) > 1:
            self.maps.append(residual_map(channels, width) if sees_time else halving(channels, width))
            sides, channels = tuple(side // 2 for side in sides), width
        self.shift = time_network(shape[0]) if sees_time and len(self.maps) else None
        size = channels * math.prod(sides)
        hidden = width * (4 if sees_time else 16)
        self.vectors = nn.ModuleList((residual_vector(size, hidden // 2), residual_vector(hidden // 2, hidden // 4)))
        self.readout = nn.Linear(hidden // 4, categories or 1, bias=False)
        if config.spectral_norm:
            for module in list(self.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear):
                    spectral_norm(module)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """f_i(z, t), (N,) or (N, categories), for latents `z` (N, *shape) at levels `t` (N,) long."""
        waves = sinusoids(t).to(z.dtype)
        e = self.embedding(waves)
        h = z if self.shift is None else z + self.shift(waves)[:, :, None, None]
        for i, layer in enumerate(self.maps):
            h = layer(h if i == 0 else F.silu(h), *((e,) if self.sees_time else ()))
        h = h.flatten(1)
        for block in self.vectors:
            h = block(F.silu(h), e)
        out = self.readout(F.silu(h))
        return out if self.categories else out.squeeze(1)
