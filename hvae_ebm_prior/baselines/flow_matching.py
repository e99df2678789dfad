"""Flow matching over the noise of all layers at once (Lipman et al., "Flow Matching for Generative Modeling", ICLR
2023): what many would take instead of energies.

    u_t = (1 - t) u + t eps,      loss = E |v(u_t, t) - (eps - u)|^2,      du_t / dt = v(u_t, t) from t = 1 to 0

One network gives the velocities of all layers: a U-Net whose scales are the latents' own, made of the blocks of our
energies. The noise of a layer enters on the way down and its velocity leaves on the way up, at the layer's own
resolution; vectors and the smallest maps meet the others where these are coarsest. Dimensions are weighted by their
activity, so that those which images do not determine stay Gaussian and are no noise to the others.

Path, preconditioning and solver are azula's. An output of zero, as before training, is exact for N(0, I).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone.transform import BackboneAdapter
from ..backbone.validation import check_count, check_images
from ..chains.autograd import with_autograd
from ..chains.streams import draw_key, open_streams
from ..density.energy_model import Shapes
from ..density.latent_prior import LatentPrior
from ..energies.build import usual_defaults
from ..energies.context import FOLDED, AngleFeatures, Block, zero
from ..energies.networks import NARROWEST, READOUT_SIZE
from ..processes import progress_bar
from ..training.activity import measure, tell_apart
from ..training.batches import Batches
from ..training.config import TrainingConfig
from ..training.optimizer import learning_rate, make_optimizer, update_average
from ..training.record import StopTraining, TrainingRecord

# What `fit` takes without settings.
FLOW_TRAINING = TrainingConfig(noise_draws=4, clip_norm=1000.0)


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
        """Every layer's noise (N, *shape) of that of all (N, D), times its activity, and then as if all of a layer's
        were active alike.
        """
        scales = [part.square().mean().clamp(min=1e-4).rsqrt() for part in self.activity.split(self.sizes)]
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


class FlowMatchingPrior(LatentPrior):
    """A flow over the noise of all layers, learned by flow matching; before `fit`, the Gaussian prior. Needs azula.

    Args:
        backbone: as of `LatentPrior`.
        width: as of `LatentUNet`.
        vector_width: as of `LatentUNet`.
        blocks: as of `LatentUNet`.
        steps: of the Adams-Bashforth method of second order, an evaluation of the network each.

    Raises:
        TypeError, ValueError: as of `LatentPrior`, or a number that is not positive.
    """

    gradients_per_step = 1

    def __init__(
        self,
        backbone: BackboneAdapter | nn.Module,
        *,
        width: int = 64,
        vector_width: int = 256,
        blocks: int = 2,
        steps: int = 32,
    ) -> None:
        sizes = {"width": width, "vector_width": vector_width, "blocks": blocks, "steps": steps}
        width, vector_width, blocks, steps = (check_count(size, name) for name, size in sizes.items())
        super().__init__(backbone)
        with usual_defaults(self.transform.device):
            network = LatentUNet(self.latent_shapes, width, vector_width, blocks)
        self.network = network.to(self.transform.device).eval()
        self.steps = steps

    @with_autograd
    @torch.enable_grad()
    def fit(
        self,
        data: Tensor | Dataset[Any] | Iterable[Any],
        *,
        training: TrainingConfig = FLOW_TRAINING,
        callback: Callable[[Any, TrainingRecord], object] | None = None,
        progress: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> list[TrainingRecord]:
        """Learn the flow; the prior holds the weights' moving average at every moment.

        Args:
            data: images (N, C, H, W) in [0, 1], a dataset of them, a posterior cache, or a loader of batches.
            training: number and size of batches, draws of noise and level for every image (`noise_draws`), images on
                which a fresh prior measures activity, and all of Adam, its learning rate, clipping and averaging; other
                settings are of energies.
            callback: called as callback(prior, record) after every step; the loss is that of
                `flow_matching_loss`.
            progress: show a progress bar; None shows one on a terminal only.
            generator: source of all randomness; None takes torch's global generators.

        Returns:
            One record per step.

        Raises:
            TypeError, ValueError: data of the wrong type, empty or out of range, or a posterior cache of one draw of
                each image, which does not tell activity.
            ImportError: azula is not installed.
        """
        trainee = deepcopy(self.network).train()
        optimizer = make_optimizer(trainee, training)
        denoiser = make_denoiser(trainee)
        batches = Batches(data, training.batch_size, generator, check=partial(check_images, adapter=self.backbone))
        if training.activity_images and bool((self.network.activity == 1).all()):
            activity, _, n = measure(self, batches, training.activity_images, generator, progress=progress)
            for network in (self.network, trainee):
                network.activity.copy_(tell_apart(activity, n))
        history: list[TrainingRecord] = []
        began = time.monotonic()
        with progress_bar(training.iterations, "flow", shown=progress, leave=True) as bar:
            for step in range(training.iterations):
                images, _, epoch = next(batches)
                u = batches.noise(self, images, epoch, generator).repeat_interleave(training.noise_draws, 0)
                loss = flow_matching_loss(denoiser, u, generator).mean()
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(trainee.parameters(), training.clip_norm)
                rate = learning_rate(training, step, epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                update_average(self.network, trainee, min(training.ema_decay, (1 + step) / (10 + step)))
                seconds = time.monotonic() - began
                history.append(TrainingRecord(step + 1, loss.item(), (), norm.item(), rate, seconds))
                bar.update()
                try:
                    if callback is not None:
                        callback(self, history[-1])
                except StopTraining:
                    break
        return history

    @torch.no_grad()
    def _draw(self, key: int, samples: range) -> Tensor:
        noise = open_streams(key, samples, self.device, self.dtype).normal(self.dim)
        solver = import_azula().sample.vABSampler(
            make_denoiser(self.network), steps=self.steps, silent=True, dtype=self.dtype, device=self.device
        )
        return solver(noise)


def make_denoiser(network: nn.Module) -> Any:
    """E[u | u_t] by a network, preconditioned as by Karras et al. (2022), on the straight path from data to noise."""
    azula = import_azula()
    return azula.denoise.KarrasDenoiser(network, azula.noise.RectifiedSchedule())


def import_azula() -> Any:
    """azula, with the modules that are used of it."""
    try:
        import azula.denoise  # type: ignore[import-untyped]
        import azula.noise  # type: ignore[import-untyped]
        import azula.sample  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"flow matching needs azula and tqdm: pip install --no-deps azula tqdm ({error}); see docs/install.md"
        ) from error
    return azula


def flow_matching_loss(denoiser: Any, u: Tensor, generator: torch.Generator | None) -> Tensor:
    """|v(u_t, t) - (eps - u)|^2 (N,), less that of an untrained prior, at levels t uniform in [0, 1].

    Args:
        denoiser: see `make_denoiser`.
        u: posterior noise (N, D).
        generator: source of the levels and of eps.

    Returns:
        The loss of every sample, summed over dimensions, which is below 0 where something was learned.
    """
    source = torch.Generator(u.device).manual_seed(draw_key(generator))
    t = torch.rand(len(u), device=u.device, dtype=u.dtype, generator=source)
    noise = torch.randn(u.shape, device=u.device, dtype=u.dtype, generator=source)
    alpha, sigma = (scale[:, None] for scale in denoiser.schedule(t))
    u_t = alpha * u + sigma * noise
    # With eps = (u_t - alpha u) / sigma, an error of the velocity is one of u times this.
    factor = (alpha + sigma) / sigma
    untrained = alpha / (alpha**2 + sigma**2) * u_t
    errors = (factor * (mean - u) for mean in (denoiser(u_t, t).mean, untrained))
    learned, unlearned = (error.square().sum(1) for error in errors)
    return learned - unlearned
