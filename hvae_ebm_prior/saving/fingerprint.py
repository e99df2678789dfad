"""The fingerprint of a backbone, by which a saved prior is matched with the model that it was learned for.

Fixed noise, the same bits on every device, is walked through the backbone. Of every layer's mean and log std a few
projections on fixed random directions are kept, in units of their size. A cast, a renamed or a folded copy of the model
has nearly the same projections; another training of the same architecture has others, and so has a model with its
channels permuted. Files of weights are not compared: they differ where the model does not. Neither are images: how they
are made of the latents, mean or sample, does not concern the prior.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone.transform import drive
from ..chains.kernels.noise import philox_normal
from ..density.latent_prior import LatentPrior

SAMPLES = 2
# Streams of the fixed noise: the one that is walked, and the directions that are projected on.
NOISE = 0
DIRECTIONS = 1
# Largest difference of two projections of one model: in single precision on different devices (TF32 included), and in
# half precision.
TOLERANCE = 0.01
TOLERANCE_HALF = 0.15
# Significant digits kept.
DIGITS = 5


class BackboneMismatch(ValueError):
    """A saved prior belongs to another backbone."""


@dataclass(frozen=True)
class Fingerprint:
    """What a backbone does to fixed noise.

    Attributes:
        latent_shapes: shapes of the latents without batch, top to bottom.
        half: whether the backbone was in half precision.
        layers: per layer, projections of its means and of its log stds, `SAMPLES` each.
    """

    latent_shapes: tuple[tuple[int, ...], ...]
    half: bool
    layers: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if [len(values) for values in self.layers] != [2 * SAMPLES] * len(self.latent_shapes):
            raise ValueError(f"expected {2 * SAMPLES} projections of each of {len(self.latent_shapes)} layers")


@torch.no_grad()
def fingerprint(prior: LatentPrior) -> Fingerprint:
    """The fingerprint of a prior's backbone.

    Args:
        prior: any prior over it.

    Returns:
        The fingerprint.
    """
    transform = prior.transform
    key, step = (torch.zeros(n, device="cpu", dtype=torch.long) for n in (2, 1))
    u = philox_normal(key, step, NOISE, SAMPLES, transform.dim)
    noise = transform.split(u.to(transform.device, transform.dtype))
    layers: list[tuple[float, ...]] = []

    def project_layer(i: int, mean: Tensor, std: Tensor) -> Tensor:
        layers.append((*project(mean, 2 * i), *project(std.log(), 2 * i + 1)))
        return mean + std * noise[i]

    drive(transform.adapter, SAMPLES, project_layer, stop_after=len(noise))
    half = transform.dtype in (torch.float16, torch.bfloat16)
    return Fingerprint(prior.latent_shapes, half, tuple(layers))


def project(values: Tensor, step: int) -> tuple[float, ...]:
    """Project values on a fixed random direction.

    Args:
        values: (N, ...).
        step: number of the direction.

    Returns:
        N projections, rounded, in units of the values' root mean square, or of 1 where that is smaller.
    """
    x = values.detach().double().cpu().flatten(1)
    zeros, number = torch.zeros(2, device="cpu", dtype=torch.long), torch.tensor([step], device="cpu", dtype=torch.long)
    direction = philox_normal(zeros, number, DIRECTIONS, 1, x.shape[1])[0].double()
    size = x.square().mean().sqrt().clamp(min=1.0) * x.shape[1] ** 0.5
    return tuple(float(f"{value:.{DIGITS}g}") for value in (x @ direction / size).tolist())


def check_backbone(saved: Fingerprint, found: Fingerprint, origin: str = "the prior was learned for") -> str:
    """Compare the fingerprint in a file with that of the backbone at hand.

    Args:
        saved: of the file.
        found: of the backbone.
        origin: how the file depends on its backbone, for messages; the words before "a backbone".

    Returns:
        What differs although all shapes agree; empty where nothing does.

    Raises:
        BackboneMismatch: the latents' shapes differ.
    """
    if saved.latent_shapes != found.latent_shapes:
        raise BackboneMismatch(f"{origin} a backbone with {shape_difference(saved.latent_shapes, found.latent_shapes)}")
    tolerance = TOLERANCE_HALF if saved.half or found.half else TOLERANCE
    for i, (before, now) in enumerate(zip(saved.layers, found.layers, strict=True)):
        difference = max(abs(a - b) for a, b in zip(before, now, strict=True))
        if not difference <= tolerance:  # also where the backbone returns NaN
            return (
                f"the Gaussian of layer {i} differs from that of the model which {origin}, by {difference:.3g} where "
                f"{tolerance:g} can be rounding. The shapes agree, so this is probably another training, or other "
                "weights, of the same architecture"
            )
    return ""


def shape_difference(saved: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]]) -> str:
    """The first difference of two lists of shapes, in words."""
    if len(saved) != len(found):
        return f"{len(saved)} latent layers, this one has {len(found)}"
    i = next(i for i, (before, now) in enumerate(zip(saved, found, strict=True)) if before != now)
    return f"a latent of shape {saved[i]} in layer {i}, this one has {found[i]}"
