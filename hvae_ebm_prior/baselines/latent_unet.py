"""A U-Net over the noise of all layers at once, whose scales are the latents' own, made of the blocks of our energies.

The noise of a layer enters on the way down and what is said of it leaves on the way up, at the layer's own resolution;
vectors and the smallest maps meet the others where these are coarsest.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..density.energy_model import Shapes
from ..energies.context import FOLDED, AngleFeatures, Block, zero
from ..energies.networks import NARROWEST, READOUT_SIZE, input_scale


class LatentUNet(nn.Module):
    """A network from the noise of all layers (N, D), and its noise level, to as many numbers.

    Args:
        shapes: shapes of the latents without batch, top to bottom.
        width: channels at the coarsest scale; half as many at each finer one.
        vector_width: features of what reads the coarsest maps and the vectors together.
        blocks: residual blocks of these.

    Attributes:
        activity: factor on inputs and outputs (D,). Ones at first.
    """

    activity: Tensor

    def __init__(self, shapes: Shapes, width: int, vector_width: int, blocks: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        self.register_buffer("activity", torch.ones(sum(self.sizes)))
        sizes = [map_size(shape) for shape in shapes]
        self.scales = sorted({size for size in sizes if size}, reverse=True)
        while self.scales and max(self.scales[-1]) > READOUT_SIZE:
            rows, columns = self.scales[-1]
            self.scales.append((math.ceil(rows / 2), math.ceil(columns / 2)))
        # Layers by scale, and those that are read as vectors.
        self.maps = [[i for i, size in enumerate(sizes) if size == scale] for scale in self.scales]
        self.vectors = [i for i, size in enumerate(sizes) if size is None]
        widths = [max(width >> finer, min(width, NARROWEST)) for finer in reversed(range(len(self.scales)))]
        # Channels of the layers that enter at a scale; none enter at some.
        entering = {
            str(k): (sum(math.prod(shapes[i]) for i in layers) // math.prod(scale), widths[k])
            for k, (layers, scale) in enumerate(zip(self.maps, self.scales, strict=True))
            if layers
        }
        self.angles = AngleFeatures()
        self.stems = nn.ModuleDict({k: nn.Conv2d(a, b, 3, padding=1) for k, (a, b) in entering.items()})
        self.heads = nn.ModuleDict({k: zero(nn.Conv2d(b, a, 3, padding=1)) for k, (a, b) in entering.items()})
        self.down = nn.ModuleList(Block(each, nn.Conv2d) for each in widths)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.widen = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(Block(each, nn.Conv2d) for each in widths)
        coarsest = widths[-1] * math.prod(self.scales[-1]) if self.scales else 0
        self.split = [*(math.prod(shapes[i]) for i in self.vectors), coarsest]
        self.pool = nn.Linear(sum(self.split), vector_width)
        self.blocks = nn.ModuleList(Block(vector_width, nn.Linear) for _ in range(blocks))
        self.spread = zero(nn.Linear(vector_width, sum(self.split)))

    def forward(self, x: Tensor, log_ratio: Tensor) -> Tensor:
        """The network's output.

        Args:
            x: noise of all layers (N, D), of unit variance.
            log_ratio: log of the noise's scale over the signal's, () or (N,).

        Returns:
            (N, D).
        """
        condition = self.angles(log_ratio.exp().atan().expand(len(x))[:, None].expand(-1, 2))
        parts = self.read(x)
        h = x.new_zeros(len(x), 0)
        kept: list[Tensor] = []
        for k, (scale, layers) in enumerate(zip(self.scales, self.maps, strict=True)):
            h = self.narrow[k - 1](F.adaptive_avg_pool2d(h, scale)) if k else h
            if layers:
                entering = self.stems[str(k)](torch.cat([fold(parts[i]) for i in layers], dim=1))
                h = h + entering if k else entering
            h = self.down[k](h, condition)
            kept.append(h)

        vector = self.pool(F.silu(torch.cat([*(parts[i].flatten(1) for i in self.vectors), h.flatten(1)], dim=1)))
        for block in self.blocks:
            vector = block(vector, condition)
        *vectors, coarsest = self.spread(F.silu(vector)).split(self.split, dim=1)
        found = dict(zip(self.vectors, vectors, strict=True))

        h = coarsest.reshape(h.shape)
        for k in reversed(range(len(self.scales))):
            if k < len(self.scales) - 1:
                h = self.widen[k](F.interpolate(h, self.scales[k]))
            h = self.up[k](kept[k] + h, condition)
            if layers := self.maps[k]:
                channels = [math.prod(self.shapes[i]) // math.prod(self.scales[k]) for i in layers]
                velocities = self.heads[str(k)](F.silu(h)).split(channels, dim=1)
                found |= {i: unfold(part, self.shapes[i]) for i, part in zip(layers, velocities, strict=True)}
        return self.activity * torch.cat([found[i].flatten(1) for i in range(len(self.shapes))], dim=1)

    def read(self, x: Tensor) -> list[Tensor]:
        """Every layer's noise (N, *shape) of that of all (N, D), times its activity and the scale that goes with it."""
        scales = [input_scale(part) for part in self.activity.split(self.sizes)]
        parts = (self.activity * x).split(self.sizes, dim=1)
        return [
            (scale * part).unflatten(1, shape) for scale, part, shape in zip(scales, parts, self.shapes, strict=True)
        ]


def map_size(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width of the maps that a latent is read as: half its own where it is large and they are even; None for
    what is read as a vector.
    """
    if len(shape) != 3 or max(shape[1:]) <= READOUT_SIZE:
        return None
    height, width = shape[1:]
    halved = max(height, width) > FOLDED and height % 2 == width % 2 == 0
    return (height // 2, width // 2) if halved else (height, width)


def fold(part: Tensor) -> Tensor:
    """A layer's noise (N, C, H, W) as maps of its `map_size`."""
    return F.pixel_unshuffle(part, 1 if map_size(tuple(part.shape[1:])) == part.shape[2:] else 2)


def unfold(maps: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `fold`, for a layer of this shape."""
    return F.pixel_shuffle(maps, shape[-1] // maps.shape[-1])
