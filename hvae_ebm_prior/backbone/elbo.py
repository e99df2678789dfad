"""The backbone's own bound on the likelihood, also with its lower layers left to the prior.

L      = log p(x | z) + sum_i [log p(z_i | z_<i) - log q(z_i | z_<i, x)],     z ~ q(z | x)
L^{>k} = the same with the k lowest layers drawn from p(z_i | z_<i), where their terms vanish

(Havtorn et al., 2021, Eq. 7).
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .transform import BackboneAdapter, NoiseTransform, check_gaussian, drive


@runtime_checkable
class DensityAdapter(BackboneAdapter, Protocol):
    """An adapter that also gives densities, which likelihoods need."""

    def infer_with_density(self, images: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """As `infer`, and for every layer log q(z_i | z_<i, x) of its draw, (N,) in nats."""

    def log_likelihood(self, features: Any, images: Tensor) -> Tensor:
        """log p(x | z) in nats, (N,), of images (N, C, H, W) in [0, 1], from the features that `top_down` returned."""


def density_adapter(adapter: BackboneAdapter) -> DensityAdapter:
    """The adapter; raise TypeError unless it gives densities."""
    if not isinstance(adapter, DensityAdapter):
        methods = ("infer_with_density", "log_likelihood")
        missing = [name for name in methods if not callable(getattr(adapter, name, None))]
        raise TypeError(
            f"{type(adapter).__name__} gives no densities, as a likelihood needs: it has no method "
            f"{', '.join(missing)}; see hvae_ebm_prior.backbone.elbo.DensityAdapter for what they return"
        )
    return adapter


def backbone_bound(
    transform: NoiseTransform, images: Tensor, lower: Tensor | None = None, left_out: int = 0
) -> tuple[Tensor, Tensor]:
    """A posterior draw as noise, and the bound of it, in one teacher-forced pass.

    Args:
        transform: the backbone, whose adapter gives densities; its global generators give the posterior noise.
        images: (N, C, H, W) in [0, 1], of any type and on any device.
        lower: standard normal noise (N, D), for the layers that are left to the prior.
        left_out: how many lower layers are.

    Returns:
        Noise u (N, D), and L^{>left_out} in nats (N,).

    Raises:
        TypeError: the adapter gives no densities.
        ValueError: its densities are not finite or of a wrong shape, or the images are of a wrong size.
    """
    adapter = density_adapter(transform.adapter)
    images = transform.take(images)
    drawn = list(adapter.infer_with_density(images))
    z = [z_i for z_i, _ in drawn]
    log_densities = [log_density for _, log_density in drawn]
    return teacher_forced(transform, images, z, log_densities, lower, left_out)


def teacher_forced(
    transform: NoiseTransform,
    images: Tensor,
    z: list[Tensor],
    log_densities: list[Tensor],
    lower: Tensor | None = None,
    left_out: int = 0,
) -> tuple[Tensor, Tensor]:
    """`backbone_bound` of posterior draws z and their log-densities, one of each per layer."""
    adapter = density_adapter(transform.adapter)
    transform.check_layers(z, "latents")
    for density in log_densities:
        check_density("infer_with_density", density, len(images))
    bound = torch.zeros_like(log_densities[0])
    noise: list[Tensor] = []
    kept = len(z) - left_out
    drawn = None if lower is None else transform.split(lower)

    def draw(i: int, mean: Tensor, std: Tensor) -> Tensor:
        nonlocal bound
        check_gaussian(i, mean, std)
        if i >= kept and drawn is not None:
            noise.append(drawn[i].to(mean))
            return mean + std * noise[-1]
        noise.append((z[i] - mean) / std)
        log_prior = -(0.5 * noise[-1] ** 2 + std.log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        bound = bound + log_prior - log_densities[i]
        return z[i]

    _, features = drive(adapter, len(images), draw)
    log_likelihood = adapter.log_likelihood(features, images)
    check_density("log_likelihood", log_likelihood, len(images))
    return transform.join(noise), bound + log_likelihood


def check_density(name: str, value: Tensor, n: int) -> None:
    """Raise ValueError unless `value`, from an adapter's method `name`, is finite and of shape (n,)."""
    if tuple(value.shape) != (n,) or not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"{name}: expected finite nats of shape ({n},), one per image, got shape {tuple(value.shape)} and "
            f"{value.flatten()[:3].tolist()}"
        )
