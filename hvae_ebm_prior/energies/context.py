"""Energies with context: f_i sees the noise of its layer, and the Gaussian that the layers above give it.

    f_i(u_i, phi; c_i) = cos(phi) o_i(phi, c_i) - cot(phi) Phi_i(u_i, phi; c_i)
    Phi_i(u_i, phi; c_i) = <a u_i, n_i(a u_i, phi, c_i)>

with the layer's noise level as an angle, u_phi = cos(phi) u + sin(phi) eps, the context c_i = (mean_i, log std_i), of
which and u_i the latent z_i is made, and a the activity of the layer's dimensions. The score at an angle is then -u -
cot(phi) grad Phi, and grad Phi is the velocity E[cos(phi) eps - sin(phi) u | u_phi] where the energy is exact. The last
layers of n_i and o_i start at zero, and f_i = 0 at phi = pi/2 whatever is learned: an untrained prior, and pure noise,
are N(0, I) exactly. The inner product keeps the gradient of a scalar as expressive as a network with as many outputs
(Du et al., "Reduce, Reuse, Recycle", 2023); the offset o_i is what the energy's gradient does not say. Levels are
continuous: energies that were learned at all angles serve any schedule.

Networks that give logits of labels are alike: l(u_i, phi; c_i) = b + cos(phi) r(a u_i, phi, c_i), with K numbers r that
a U-Net's way down ends in. They do not depend on pure noise.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.transform import LayerState
from .networks import NARROWEST, READOUT_SIZE, EnergyConfig, input_scale

# Frequencies of an angle's features, and features that blocks are scaled and shifted by.
FREQUENCIES = 8
CONDITION = 128
# Maps are folded 2x2 into channels where a side is longer than this.
FOLDED = 8
# Smallest angle, about a fiftieth of noise: below it the energy of a layer without noise would be infinite.
SMALLEST_ANGLE = 0.02


class AngleFeatures(nn.Module):
    """Features (N, CONDITION) of the angles (N, 2) of a layer's own noise and of the noise above it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * FREQUENCIES, CONDITION), nn.SiLU(), nn.Linear(CONDITION, CONDITION))

    def forward(self, angles: Tensor) -> Tensor:
        frequencies = torch.arange(1, FREQUENCIES + 1, device=angles.device, dtype=angles.dtype)
        # Over the quarter turn of an angle the slowest feature goes through half a turn.
        phases = (2 * angles[:, :, None] * frequencies).flatten(1)
        return F.silu(self.layers(torch.cat((phases.sin(), phases.cos()), dim=1)))


class Modulation(nn.Module):
    """Scale and shift of features by the condition, at first by 1 and 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(CONDITION, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.linear(condition).reshape(len(h), -1, *[1] * (h.ndim - 2)).chunk(2, dim=1)
        return h * (1 + scale) + shift


class Block(nn.Module):
    """Residual block of vectors or maps, modulated by the condition."""

    def __init__(self, width: int, layer: type[nn.Linear] | type[nn.Conv2d]) -> None:
        super().__init__()
        size = (3, 1, 1) if layer is nn.Conv2d else ()
        self.first = layer(width, width, *size)
        self.modulation = Modulation(width)
        self.second = layer(width, width, *size)
        # Half of what keeps the variance, so that blocks begin close to the identity.
        nn.init.normal_(self.second.weight, std=0.5 * self.second.weight[0].numel() ** -0.5)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return h + self.second(F.silu(self.modulation(self.first(F.silu(h)), condition)))


class Offset(nn.Module):
    """o_i: one number (N,) of a layer's context, averaged over the positions of a map, and of the condition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.context = nn.Linear(2 * channels, CONDITION)
        self.readout = zero(nn.Linear(CONDITION, 1))

    def forward(self, context: Tensor, condition: Tensor) -> Tensor:
        return self.readout(F.silu(self.context(context.reshape(*context.shape[:2], -1).mean(2)) + condition)).squeeze(
            1
        )


class VectorField(nn.Module):
    """n_i of a vector or small map, or logits: residual layers over all dimensions.

    Args:
        shape: shape of the latent.
        config: the network's size.
        categories: number of logits; None for n_i.
    """

    def __init__(self, shape: Sequence[int], config: EnergyConfig, categories: int | None) -> None:
        super().__init__()
        dim = math.prod(shape)
        self.logits = categories is not None
        self.inputs = nn.Linear(dim, config.vector_width)
        self.context = nn.Linear(2 * dim, config.vector_width, bias=False)
        self.blocks = nn.ModuleList(Block(config.vector_width, nn.Linear) for _ in range(config.blocks))
        self.readout = zero(nn.Linear(config.vector_width, categories or dim))

    def forward(self, u: Tensor, active: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """n_i (N, A), or logits.

        Args:
            u: inputs of the active dimensions alone (N, A).
            active: their numbers (A,).
            context: (N, 2 C, *sides).
            condition: (N, CONDITION).

        Returns:
            One number for each of these dimensions, or for each category.
        """
        h = F.linear(u, self.inputs.weight[:, active], self.inputs.bias) + self.context(context.flatten(1))
        for block in self.blocks:
            h = block(h, condition)
        h = F.silu(h)
        return self.readout(h) if self.logits else F.linear(h, *(x[active] for x in self.readout.parameters()))


class MapField(nn.Module):
    """n_i of a map, or logits: a U-Net whose coarsest maps, at most 4x4, are also read as one vector.

    Args:
        shape: shape of the latent.
        config: the network's size.
        categories: number of logits, for which the network has no way up; None for n_i.
    """

    def __init__(self, shape: Sequence[int], config: EnergyConfig, categories: int | None) -> None:
        super().__init__()
        channels, *sides = shape
        self.fold = 2 if max(sides) > FOLDED else 1
        self.halvings = math.ceil(math.log2(max(sides) / self.fold / READOUT_SIZE))
        # Sides that can be halved so often; maps are padded to them.
        unit = self.fold << self.halvings
        self.padded = [-(-side // unit) * unit for side in sides]
        # Finest to coarsest: half as many at each finer one.
        widths = [
            max(config.width >> finer, min(config.width, NARROWEST)) for finer in reversed(range(self.halvings + 1))
        ]
        folded = self.fold**2
        self.stem = nn.Conv2d(3 * channels * folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Block(width, nn.Conv2d) for width in widths[:-1])
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths))
        self.coarsest = nn.ModuleList(Block(widths[-1], nn.Conv2d) for _ in range(config.blocks - 1))
        size = widths[-1] * math.prod(side // unit for side in self.padded)
        self.pool = nn.Linear(size, config.vector_width)
        self.vector = Block(config.vector_width, nn.Linear)
        self.readout = None if categories is None else zero(nn.Linear(config.vector_width, categories))
        if categories is None:
            self.spread = zero(nn.Linear(config.vector_width, size))
            self.refine = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in itertools.pairwise(widths))
            self.up = nn.ModuleList(Block(width, nn.Conv2d) for width in widths[:-1])
            self.head = zero(nn.Conv2d(widths[0], channels * folded, 3, padding=1))

    def forward(self, u: Tensor, active: Tensor, context: Tensor, condition: Tensor) -> Tensor:
        """n_i (N, A, H, W), or logits.

        Args:
            u: inputs of the active channels alone (N, A, H, W).
            active: their numbers (A,).
            context: (N, 2 C, H, W).
            condition: (N, CONDITION).

        Returns:
            A map for each of these channels, or a number for each category.
        """
        height, width = u.shape[-2:]
        # By channel before folding: those of u, then those of the context. As two convolutions, since no gradient of
        # the context is asked for in training.
        weight = self.stem.weight.unflatten(1, (-1, self.fold**2))
        of_u, of_context = weight[:, active].flatten(1, 2), weight[:, -context.shape[1] :].flatten(1, 2)
        h = F.conv2d(self._folded(u), of_u, self.stem.bias, padding=1)
        h = h + F.conv2d(self._folded(context), of_context, padding=1)
        finer: list[Tensor] = []
        for block, halve in zip(self.down, self.halve, strict=True):
            finer.append(block(h, condition))
            h = halve(finer[-1])
        for block in self.coarsest:
            h = block(h, condition)
        vector = F.silu(self.vector(self.pool(F.silu(h).flatten(1)), condition))
        if self.readout is not None:
            return self.readout(vector)
        h = h + self.spread(vector).reshape(h.shape)
        for block, refine in zip(reversed(self.up), reversed(self.refine), strict=True):
            h = block(finer.pop() + F.pixel_shuffle(refine(h), 2), condition)
        weight, bias = (x.unflatten(0, (-1, self.fold**2))[active].flatten(0, 1) for x in self.head.parameters())
        return F.pixel_shuffle(F.conv2d(F.silu(h), weight, bias, padding=1), self.fold)[..., :height, :width]

    def _folded(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W), padded and folded into channels."""
        height, width = x.shape[-2:]
        return F.pixel_unshuffle(F.pad(x, (0, self.padded[1] - width, 0, self.padded[0] - height)), self.fold)


class ContextEnergy(nn.Module):
    """f_i with context; see the module's text.

    Args:
        shape: shape of the latent without batch; (C, H, W) with a side above 4 is read as a map, all else as a vector.
        config: the network's size.
        categories: numbers per sample, logits of as many categories; None for the energy.

    Attributes:
        activity: factor a on the noise, `shape`. Ones at first.
        context_mean: mean of the backbone's means and log stds over data, (2, *shape). Zeros at first.
        context_scale: their std over data, one for the positions of a map. Ones at first.
        active: numbers of the channels of a map, or of the dimensions of a vector, that have activity, which alone the
            network reads and answers for (A,). All where none has any.
        inactive: whether the activity is 0 everywhere, as of many layers of a deep VAE: the energy is 0 then, and its
            network is not run.
    """

    context = True
    active: Tensor
    activity: Tensor
    context_mean: Tensor
    context_scale: Tensor

    def __init__(self, shape: Sequence[int], config: EnergyConfig, categories: int | None = None) -> None:
        super().__init__()
        self.config, self.categories = config, categories
        self.angles = AngleFeatures()
        is_map = len(shape) == 3 and max(shape[1:]) > READOUT_SIZE
        self.network = (MapField if is_map else VectorField)(shape, config, categories)
        # What the network takes apart: the channels of a map, or the dimensions of a vector.
        self._parts = tuple(shape) if is_map else (math.prod(shape),)
        if categories is None:
            self.offset = Offset(shape[0])
        else:
            self.bias = nn.Parameter(torch.zeros(categories))
        self.register_buffer("activity", torch.ones(*shape))
        self.register_buffer("context_mean", torch.zeros(2, *shape))
        self.register_buffer("context_scale", torch.ones(2, *shape))
        self.register_buffer("active", torch.arange(self._parts[0]), persistent=False)
        self.inactive = False

    @torch.no_grad()
    def set_statistics(self, activity: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Set what the network's inputs are scaled by.

        Args:
            activity: share of every dimension's variance that images determine, `shape`, 0 (noise alone) to 1.
            mean: of the backbone's means and log stds over data, (2, *shape).
            scale: their std over data, positive, (2, *shape).
        """
        for buffer, value in ((self.activity, activity), (self.context_mean, mean), (self.context_scale, scale)):
            buffer.copy_(value)
        self._set_active()

    def _set_active(self) -> None:
        # Looked at here alone, as a look waits for a GPU.
        if not self.activity.is_meta:
            active = self.activity.reshape(self._parts[0], -1).any(1)
            self.inactive = not bool(active.any())
            now = (active | self.inactive).nonzero()[:, 0]
            # Where it is in memory graphs know it by.
            if now.device != self.active.device or not torch.equal(now, self.active):
                self.active = now

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_active()

    def load_statistics(self, other: "ContextEnergy") -> None:
        """Set the statistics of another network of the same shape."""
        self.set_statistics(other.activity, other.context_mean, other.context_scale)

    def forward(self, state: LayerState, angles: Tensor) -> Tensor:
        """f_i in nats, (N,), or logits (N, categories).

        Args:
            state: of the layer, each part (N, *shape).
            angles: of its own noise and of the noise in the layers above, 0 for none, (N, 2) in [0, pi/2].

        Returns:
            One energy or set of logits per sample.
        """
        if self.inactive and self.categories is None:
            return 0 * state.u.flatten(1).sum(1)
        angles = angles.clamp(min=SMALLEST_ANGLE)
        u = (self.activity * state.u).reshape(-1, *self._parts)[:, self.active]
        seen = u * input_scale(self.activity)
        context = torch.stack((state.mean, state.std.log()), dim=1)
        context = (context - self.context_mean) / self.context_scale
        condition, own = self.angles(angles.to(u.dtype)), angles[:, 0]
        values = self.network(seen, self.active, context.flatten(1, 2), condition)
        if self.categories is not None:
            return self.bias + own.cos()[:, None] * values
        potential = (u.flatten(1) * values.flatten(1)).sum(1)
        return own.cos() * self.offset(context.flatten(1, 2), condition) - potential / own.tan()


def takes_context(network: nn.Module) -> bool:
    """Whether a network is called with a layer's state and angles, as `ContextEnergy`, rather than with z and t."""
    return getattr(network, "context", False) is True


def zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """The layer with weights and biases of zero."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
