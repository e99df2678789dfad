"""A small convolutional hierarchical VAE, and its adapter.

One latent per resolution, top to bottom (4x4, 8x8, 16x16 for 28- or 32-pixel images with three layers):

    p(x, z) = p(x | z) prod_i N(z_i; mean_i, std_i^2),    q(z | x) = prod_i N(z_i; mean_i + std_i d_i, (std_i r_i)^2)

where mean_i, std_i are read from the top-down features h_i, the shift d_i and the ratio r_i from h_i and the image's
bottom-up features (the residual posterior of NVAE, Vahdat & Kautz 2020, Eq. 3). p(x | z) is Gaussian with one learned
scale (sigma-VAE, Rybkin et al. 2021). There is no normalisation layer, so images never influence each other.
"""

import dataclasses
import json
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .walk import single


@dataclasses.dataclass(frozen=True)
class HVAEConfig:
    """Shape of an `HVAE`; tuples go from the top layer to the bottom one.

    Attributes:
        image_channels: channels of the images.
        image_size: height and width of the images; padded inside to a multiple of 2 ** layers.
        latent_channels: channels of each latent.
        widths: feature channels beside each latent.
    """

    image_channels: int = 1
    image_size: int = 28
    latent_channels: tuple[int, ...] = (16, 8, 4)
    widths: tuple[int, ...] = (64, 64, 48)

    def __post_init__(self) -> None:
        if len(self.latent_channels) != len(self.widths) or not self.widths:
            raise ValueError(
                f"latent_channels and widths need one entry per layer, got {self.latent_channels} and {self.widths}"
            )


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class TopDownBlock(nn.Module):
    """One latent layer: prior and posterior from features, then the features of the layer below, twice as fine."""

    def __init__(self, latent_channels: int, width: int, width_below: int) -> None:
        super().__init__()
        self.prior_head = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        self.posterior_merge = nn.Conv2d(2 * width, width, 1)
        self.posterior_residual = ResidualBlock(width)
        self.posterior_head = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        self.latent_in = nn.Conv2d(latent_channels, width, 1)
        self.residual = ResidualBlock(width)
        self.up = nn.Conv2d(width, 4 * width_below, 1)
        for head in (self.prior_head, self.posterior_head):
            nn.init.zeros_(head.weight)

    def prior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, each (N, latent_channels, S, S), of the latent given the features `h` (N, width, S, S)."""
        mean, log_std = single(self.prior_head(F.silu(h))).chunk(2, dim=1)
        return mean, torch.exp(soft_clamp(log_std))

    def posterior(self, h: Tensor, bottom_up: Tensor) -> tuple[Tensor, Tensor]:
        """Shift d and log-ratio log r of the posterior, in units of the prior's std."""
        merged = self.posterior_residual(self.posterior_merge(torch.cat((h, bottom_up), dim=1)))
        shift, log_ratio = single(self.posterior_head(F.silu(merged))).chunk(2, dim=1)
        return shift, soft_clamp(log_ratio)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        h = self.residual(h + self.latent_in(z.to(h.dtype)))
        return F.pixel_shuffle(self.up(F.silu(h)), 2)


def soft_clamp(x: Tensor, bound: float = 5.0) -> Tensor:
    """Smoothly bound `x` to (-bound, bound), the identity near zero (NVAE)."""
    return bound * torch.tanh(x / bound)


class PosteriorLayer(NamedTuple):
    """One layer of a posterior draw.

    Attributes:
        shift: d, how far the posterior's mean is from the prior's, in units of the prior's std.
        log_ratio: log r, of the posterior's std over the prior's.
        mean: the posterior's mean.
        std: the posterior's std.
        z: the latent.
        log_density: log q(z | z above, x) in nats, (N,).
        features: the features above the layer.
    """

    shift: Tensor
    log_ratio: Tensor
    mean: Tensor
    std: Tensor
    z: Tensor
    log_density: Tensor
    features: Tensor

    def divergence(self) -> Tensor:
        """KL divergence of the posterior from the prior in nats, (N,)."""
        per_dimension = 0.5 * (self.shift**2 + torch.exp(2 * self.log_ratio) - 1) - self.log_ratio
        return per_dimension.flatten(1).sum(1)


class HVAE(nn.Module):
    """The hierarchical VAE; see the module's text for its densities.

    Args:
        config: the shape of the network.
    """

    def __init__(self, config: HVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or HVAEConfig()
        layers = len(config.widths)
        padded = math.ceil(config.image_size / 2**layers) * 2**layers
        self.before = (padded - config.image_size) // 2
        self.after = padded - config.image_size - self.before
        widths = (*config.widths, config.image_channels)
        # Encoder stages run bottom-up; stage i ends beside latent i, so they are stored top to bottom like everything
        # else.
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(below, width, 4, stride=2, padding=1), ResidualBlock(width), ResidualBlock(width))
            for width, below in zip(config.widths, widths[1:], strict=True)
        )
        self.start = nn.Parameter(torch.zeros(1, widths[0], padded // 2**layers, padded // 2**layers))
        self.blocks = nn.ModuleList(
            TopDownBlock(channels, width, below)
            for channels, width, below in zip(config.latent_channels, config.widths, widths[1:], strict=True)
        )
        self.log_scale = nn.Parameter(torch.tensor(-2.0))

    def bottom_up(self, images: Tensor) -> list[Tensor]:
        """Features of `images` (N, C, H, W) beside each latent, top to bottom."""
        h = F.pad(images.to(self.start.dtype), (self.before, self.after, self.before, self.after))
        features: list[Tensor] = []
        for stage in reversed(self.encoder):
            h = stage(h)
            features.insert(0, h)
        return features

    def image_mean(self, features: Tensor) -> Tensor:
        """Mean of p(x | z), (N, C, H, W) in [0, 1], from what the last block returns."""
        inside = slice(self.before, self.before + self.config.image_size)
        return torch.sigmoid(single(features))[..., inside, inside]

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        """log p(x | z) in nats, (N,), of `images` (N, C, H, W), from what the last block returns."""
        residual = (images - self.image_mean(features)) * torch.exp(-self.log_scale)
        return -(0.5 * residual**2 + self.log_scale + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def posterior_walk(self, images: Tensor, generator: torch.Generator | None) -> Iterator[PosteriorLayer]:
        """Draw every latent from the posterior, top to bottom."""
        h = self.start.expand(len(images), -1, -1, -1)
        for block, features in zip(self.blocks, self.bottom_up(images), strict=True):
            mean, std = block.prior(h)
            shift, log_ratio = block.posterior(h, features)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            ratio = torch.exp(log_ratio)
            z = mean + std * (shift + ratio * noise)
            log_density = -(0.5 * noise**2 + log_ratio + std.log() + 0.5 * math.log(2 * math.pi))
            log_density = log_density.flatten(1).sum(1)
            yield PosteriorLayer(shift, log_ratio, mean + std * shift, std * ratio, z, log_density, h)
            if block is not self.blocks[-1]:  # the posterior needs no features below the last latent
                h = block(h, z)

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Negative ELBO in its two parts, for training.

        Args:
            images: (N, C, H, W) in [0, 1].
            generator: source of the posterior noise.

        Returns:
            -log p(x | z) of shape (N,), and the KL divergence of every layer (N, L); both in nats.
        """
        layers = list(self.posterior_walk(images, generator))
        divergences = [layer.divergence() for layer in layers]
        features = self.blocks[-1](layers[-1].features, layers[-1].z)
        return -self.log_likelihood(features, images), torch.stack(divergences, dim=1)

    def save(self, path: str | Path) -> None:
        """Write weights and config to one safetensors file."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"config": json.dumps(dataclasses.asdict(self.config))})

    @classmethod
    def load(cls, path: str | Path) -> "HVAE":
        """Read a file written by `save`."""
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
        }
        model = cls(HVAEConfig(**settings))
        model.load_state_dict(tensors)
        return model


class HVAEAdapter:
    """Adapter of an `HVAE`: its top-down pass as a coroutine of Gaussian layers.

    Args:
        model: the trained model.
    """

    needs = ("start", "blocks", "bottom_up", "posterior_walk", "image_mean")
    output = "mean"  # `decode` gives the mean of p(x | z), as `hvae-ebm-prior evaluate` records

    def __init__(self, model: HVAE) -> None:
        self.model = model

    def top_down(self, batch_size: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
        h = self.model.start
        for block in self.model.blocks:
            # Above the first latent all samples are alike: its prior is worked out once.
            mean, std = (part.expand(batch_size, -1, -1, -1) for part in block.prior(h))
            z = yield mean, std
            h = block(h, z)
        return h

    def infer(self, images: Tensor) -> list[Tensor]:
        return [z for z, _ in self.infer_with_density(images)]

    def infer_with_density(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(layer.z, layer.log_density) for layer in self.model.posterior_walk(images, None)]

    def infer_with_posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(layer.z, layer.mean, layer.std) for layer in self.model.posterior_walk(images, None)]

    def posterior(self, images: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        # With more layers, shift and ratio of the lower ones depend on the latents drawn above.
        if len(self.model.blocks) > 1:
            return None
        features = self.model.start.expand(len(images), -1, -1, -1)
        shift, log_ratio = self.model.blocks[0].posterior(features, self.model.bottom_up(images)[0])
        return [(shift, log_ratio.exp())]

    def log_likelihood(self, features: Tensor, images: Tensor) -> Tensor:
        return self.model.log_likelihood(features, images)

    def decode(self, features: Tensor) -> Tensor:
        return self.model.image_mean(features)
