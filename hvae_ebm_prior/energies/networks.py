"""Energies without context, as in the paper: one small network f_i per latent layer, shared over the noise levels t.

    F(z, t) = sum_i f_i(z_i, t)                                                                             (Eq. 13)
    p(u_t | u_{t+1}) proportional to exp(F(T(u_t), t)) p0(u_t) N(u_{t+1}; alpha u_t, sigma^2)               (Eq. 9)

f_i is a correction to the log-density, high where the data are. Its last layer starts at zero, so an untrained prior is
the backbone's own Gaussian prior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from ..backbone.validation import set_integers

Architecture = Literal["default", "published-cifar10", "published-celebahq256"]
# Maps are halved until neither side is longer than this, then read out position by position; a network over all
# dimensions reads smaller ones, which learns fast, and would overfit and diverge on larger ones.
READOUT_SIZE = 4
# Fewest feature channels at fine resolutions.
NARROWEST = 16


@dataclass(frozen=True)
class EnergyConfig:
    """Shape of the default energy networks.

    Attributes:
        width: feature channels of maps at the coarsest resolution; half as many at each finer one, but no fewer than 16
            (or `width`). Of published architectures, that of all maps.
        vector_width: features of vectors and of maps up to 4x4, which are read as vectors.
        blocks: residual blocks at the coarsest resolution (with context the last of them over the whole map as one
            vector), and of vectors; finer resolutions have one each, with context one on the way down and one up.
        spectral_norm: divide the weight of every layer, but for the readout of the default architecture, by its largest
            singular value, estimated once per chain. For energies without context.
        context: whether f_i sees u_i and the Gaussian that the layers above give it
            (`hvae_ebm_prior.energies.context`), or z_i alone, as in the paper.
        architecture: "default", or one of the published code's (`hvae_ebm_prior.energies.published`), which have no
            context and take `width` and `spectral_norm` alone.
    """

    width: int = 64
    vector_width: int = 256
    blocks: int = 2
    spectral_norm: bool = False
    context: bool = True
    architecture: Architecture = "default"

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(
                f"architecture: expected one of {', '.join(get_args(Architecture))}, got {self.architecture!r}"
            )
        if self.context and self.architecture != "default":
            raise ValueError("architecture: the published networks have no context; set context=False as well")
        if self.context and self.spectral_norm:
            raise ValueError("spectral_norm: it is for energies without context; set context=False as well")
        set_integers(self, {"width": 1, "vector_width": 1, "blocks": 1})


def input_scale(activity: Tensor) -> Tensor:
    """Factor, (), on inputs that were multiplied by their activity, with which features of them vary as they would if
    all were active.
    """
    return activity.square().mean().clamp(min=1e-4).rsqrt()


class TimeConditionedBlock(nn.Module):
    """Residual block whose features are scaled and shifted by learned tables over t, at first by 1 and 0."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Embedding(steps, 2 * width)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.modulation(t)[:, :, None, None].chunk(2, dim=1)
        h = self.first(F.silu(x))
        return x + self.second(F.silu(h * (1 + scale) + shift))


class MapFeatures(nn.Module):
    """Features (N, size) of a map (N, C, H, W): convolutions down to at most 4x4."""

    def __init__(self, shape: tuple[int, int, int], steps: int, config: EnergyConfig) -> None:
        super().__init__()
        channels, height, width = shape
        halvings = math.ceil(math.log2(max(height, width) / READOUT_SIZE))
        self.layers = nn.ModuleList()
        for finer in reversed(range(halvings)):
            features = max(config.width >> finer, min(config.width, NARROWEST))
            self.layers.append(nn.Conv2d(channels, features, 3, stride=2, padding=1))
            self.layers.append(TimeConditionedBlock(features, steps))
            channels, height, width = features, -(-height // 2), -(-width // 2)
        self.layers.extend(TimeConditionedBlock(channels, steps) for _ in range(config.blocks - 1))
        self.size = channels * height * width

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        h = z
        for layer in self.layers:
            h = layer(h, t) if isinstance(layer, TimeConditionedBlock) else layer(h)
        return h.flatten(1)


class VectorFeatures(nn.Module):
    """Features (N, size) of a vector or small map: residual layers over all dimensions, shifted by a learned table of
    t.
    """

    def __init__(self, dim: int, steps: int, config: EnergyConfig) -> None:
        super().__init__()
        self.size = config.vector_width
        self.inputs = nn.Linear(dim, self.size)
        self.shift = nn.Embedding(steps, self.size)
        self.layers = nn.ModuleList(nn.Linear(self.size, self.size) for _ in range(config.blocks))
        nn.init.normal_(self.inputs.weight, std=dim**-0.5)
        nn.init.zeros_(self.shift.weight)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        h = self.inputs(z.flatten(1)) + self.shift(t)
        for layer in self.layers:
            h = h + layer(F.silu(h))
        return h


class LayerEnergy(nn.Module):
    """f_i: a network over one latent layer of any shape.

    Args:
        shape: shape of the latent without batch; (C, H, W) with a side above 4 is read as a map, all else as a vector.
        steps: number of conditional priors T.
        config: the network's size.
        categories: numbers per sample; None for one, without a dimension of its own.

    Attributes:
        activity: factor on every input, `shape`; see `set_activity`. Ones at first.
    """

    activity: Tensor

    def __init__(self, shape: Sequence[int], steps: int, config: EnergyConfig, categories: int | None = None) -> None:
        super().__init__()
        self.config, self.categories = config, categories
        self.features: MapFeatures | VectorFeatures
        if len(shape) == 3 and max(shape[1:]) > READOUT_SIZE:
            self.features = MapFeatures((shape[0], shape[1], shape[2]), steps, config)
        else:
            self.features = VectorFeatures(math.prod(shape), steps, config)
        self.readout = nn.Linear(self.features.size, steps * (categories or 1))
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        self.register_buffer("activity", torch.ones(*shape))
        if config.spectral_norm:
            for module in self.features.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    spectral_norm(module)

    @torch.no_grad()
    def set_activity(self, activity: Tensor) -> None:
        """Set the factor on a new network's inputs: the share of their variance that images determine, as most latent
        dimensions of a deep VAE are inactive.

        Args:
            activity: 0 (noise alone) to 1 (determined by the image), `shape`, or that of one of several latents stacked
                along its first dimension. An input times it is the best linear estimate of the determined part.
        """
        self.activity.copy_(torch.cat([activity] * (len(self.activity) // len(activity))))
        if isinstance(self.features, VectorFeatures) and not parametrize.is_parametrized(self.features.inputs):
            self.features.inputs.weight.mul_(input_scale(activity))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """f_i(z, t) in nats, (N,) or (N, categories), for latents `z` (N, *shape) at levels `t` (N,) long."""
        h = self.readout(F.silu(self.features(z * self.activity, t)))
        if self.categories is None:
            return h.gather(1, t[:, None]).squeeze(1)
        level = t[:, None, None].expand(-1, 1, self.categories)
        return h.unflatten(1, (-1, self.categories)).gather(1, level).squeeze(1)
