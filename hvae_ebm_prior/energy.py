"""The energies: one small network f_i per latent layer, shared over the noise levels t.

    F(z, t) = sum_i f_i(z_i, t),     p(u_t | u_{t+1}) proportional to exp(F(T(u_t), t)) p0(u_t) N(u_{t+1}; alpha u_t, sigma^2)      (Eq. 9, 13)

f_i is a correction to the log-density, high where the data are. Its last layer starts at zero, so an untrained prior is the backbone's own
Gaussian prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

# Maps are halved until neither side is longer than this, then read out position by position.
READOUT_SIZE = 4


@dataclass(frozen=True)
class EnergyConfig:
    """Shape of the default energy networks.

    Attributes:
        width: feature channels.
        blocks: residual blocks at the coarsest resolution; finer ones have one each.
        spectral_norm: divide the weight of every convolution by its largest singular value, estimated once per chain.
    """

    width: int = 64
    blocks: int = 2
    spectral_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "blocks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")


class TimeConditionedBlock(nn.Module):
    """Residual block whose features are scaled and shifted by learned tables over t, the identity modulation at initialisation."""

    def __init__(self, width: int, kernel: int, steps: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        self.modulation = nn.Embedding(steps, 2 * width)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.modulation(t)[:, :, None, None].chunk(2, dim=1)
        h = self.first(F.silu(x))
        return x + self.second(F.silu(h * (1 + scale) + shift))


class LayerEnergy(nn.Module):
    """f_i: a convolutional network over one latent layer of any shape; vectors and 1x1 maps are served by 1x1 convolutions.

    Args:
        shape: shape of the latent without batch; (C, H, W) is treated as a map, everything else as a vector.
        steps: number of conditional priors T.
        config: the network's size.
    """

    def __init__(self, shape: Sequence[int], steps: int, config: EnergyConfig) -> None:
        super().__init__()
        channels, height, width = shape if len(shape) == 3 else (torch.Size(shape).numel(), 1, 1)
        self.map_shape = (channels, height, width)
        kernel = 1 if height == width == 1 else 3
        self.layers = nn.ModuleList()
        while not self.layers or max(height, width) > READOUT_SIZE:
            stride = 2 if max(height, width) > READOUT_SIZE else 1
            self.layers.append(nn.Conv2d(channels, config.width, kernel, stride, padding=kernel // 2))
            self.layers.append(TimeConditionedBlock(config.width, kernel, steps))
            channels, height, width = config.width, -(-height // stride), -(-width // stride)
        self.layers.extend(TimeConditionedBlock(config.width, kernel, steps) for _ in range(config.blocks - 1))
        self.readout = nn.Linear(config.width * height * width, steps)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        if config.spectral_norm:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    spectral_norm(module)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """f_i(z, t) in nats, (N,), for latents `z` (N, *shape) at levels `t` (N,) long."""
        h = z.reshape(len(z), *self.map_shape)
        for layer in self.layers:
            h = layer(h, t) if isinstance(layer, TimeConditionedBlock) else layer(h)
        return self.readout(F.silu(h).flatten(1)).gather(1, t[:, None]).squeeze(1)


def build_energies(energy: EnergyConfig | Sequence[nn.Module], shapes: Sequence[Sequence[int]], steps: int, device: torch.device) -> nn.ModuleList:
    """One energy network per latent layer.

    Args:
        energy: settings of the default network, or the user's own networks, one per layer: network(z, t) returns f of shape (N,) for latents z
            (N, *shape) and levels t (N,) long.
        shapes: shapes of the latents without batch, top to bottom.
        steps: number of conditional priors T.
        device: where default networks are made.

    Returns:
        The networks, top to bottom.

    Raises:
        TypeError: `energy` is neither.
        ValueError: there is not one network per layer, or one returns another shape than (N,).
    """
    if isinstance(energy, EnergyConfig):
        return nn.ModuleList(LayerEnergy(shape, steps, energy) for shape in shapes).to(device)
    if not isinstance(energy, list | tuple | nn.ModuleList) or not all(isinstance(network, nn.Module) for network in energy):
        raise TypeError(f"energy: expected an EnergyConfig or a list of one nn.Module per layer, got {type(energy).__name__}")
    if len(energy) != len(shapes):
        raise ValueError(f"energy: expected one network per layer, {len(shapes)} in all, got {len(energy)}")
    for i, (network, shape) in enumerate(zip(energy, shapes, strict=True)):
        parameter = next(network.parameters(), torch.empty((), device=device))
        training = network.training
        with torch.no_grad():
            out = network.eval()(parameter.new_zeros(2, *shape), torch.zeros(2, dtype=torch.long, device=parameter.device))
        network.train(training)
        if tuple(out.shape) != (2,):
            raise ValueError(f"energy network {i}: for 2 latents of shape {tuple(shape)} expected an output of shape (2,), got {tuple(out.shape)}")
    return nn.ModuleList(energy)
