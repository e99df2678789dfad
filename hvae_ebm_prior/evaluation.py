"""Fréchet distance and closure: how much of the prior hole is gone.

    FD = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2}),      closure = (FD_gauss - FD) / (FD_gauss - FD_recon)

over the features of any fixed extractor (with Inception's pool features FD is the FID of Heusel et al., 2017). Closure is 0 for the backbone's
Gaussian prior and 1 for samples as good as its reconstructions. All rows use one number of images and one decoder.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .prior import DiffusionEBMPrior
from .streams import draw_key, open_streams

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EvaluationRow:
    """One prior's figures.

    Attributes:
        name: what was sampled.
        distance: Fréchet distance to the reference images.
        closure: share of the prior hole that is closed.
        seconds: time to make the images.
    """

    name: str
    distance: float
    closure: float
    seconds: float


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    Args:
        features: (N, K).
        reference: (M, K).

    Returns:
        The distance, in squared units of the features; at least 0.

    Raises:
        ValueError: a set is no matrix, has fewer than two rows or is not finite, or the two differ in K.
    """
    moments = []
    for x in (features, reference):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != reference.shape[1] or not bool(torch.isfinite(x).all()):
            raise ValueError(f"features: expected two finite matrices (N, K) and (M, K), got {tuple(features.shape)} and {tuple(reference.shape)}")
        x = x.detach().to("cpu", torch.float64)
        moments.append((x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])))
    (mean_1, cov_1), (mean_2, cov_2) = moments
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def closure(distance: float, gaussian: float, reconstruction: float) -> float:
    """Share of the prior hole that is closed, (gaussian - distance) / (gaussian - reconstruction).

    Args:
        distance: Fréchet distance of the prior's samples.
        gaussian: of samples of the backbone's own Gaussian prior.
        reconstruction: of reconstructions.

    Returns:
        The closure: 0 for the Gaussian prior, 1 for the reconstructions.

    Raises:
        ValueError: reconstructions are no better than Gaussian samples, so there is no prior hole to close.
    """
    if not reconstruction < gaussian:
        raise ValueError(
            f"reconstructions ({reconstruction:.4g}) are no better than Gaussian samples ({gaussian:.4g}): there is no prior hole to close"
        )
    return (gaussian - distance) / (gaussian - reconstruction)


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, chunk_size: int = 250) -> Tensor:
    """`function` of `inputs` (N, ...), a chunk of rows at a time."""
    return torch.cat([function(chunk) for chunk in inputs.split(chunk_size)])


def evaluate(
    prior: DiffusionEBMPrior,
    images: Tensor,
    reference: Tensor,
    features: Features,
    *,
    temperatures: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5),
    generator: torch.Generator | None = None,
) -> list[EvaluationRow]:
    """Compare the prior with the Gaussian prior, the Gaussian prior at its best temperature, and reconstructions.

    Args:
        prior: the trained prior.
        images: held-out images (N, C, H, W) in [0, 1]; they are reconstructed, and N samples of each prior are drawn.
        reference: real images (M, C, H, W), other than `images`, whose features are the target.
        features: maps images (n, C, H, W) to features (n, K).
        temperatures: temperatures of the Gaussian prior to choose from.
        generator: source of all randomness.

    Returns:
        Rows "real" (the held-out images: the floor for N images), "reconstruction", "Gaussian", "Gaussian, temperature ..." and "ours".

    Raises:
        ValueError: fewer than two images, or reconstructions no better than Gaussian samples.
    """
    images = images.to(prior.device)
    target = in_chunks(lambda x: features(x.to(prior.device)), reference)
    noise = open_streams(draw_key(generator), range(len(images)), prior.device, prior.dtype).normal(prior.dim)

    def measure(make: Callable[[], Tensor]) -> tuple[float, float]:
        start = time.monotonic()
        made = make()
        seconds = time.monotonic() - start
        return frechet_distance(in_chunks(features, made), target), seconds

    measured = {
        "real": measure(lambda: images),
        "reconstruction": measure(lambda: in_chunks(lambda x: prior.decode(prior.encode(x, generator=generator)), images)),
        "Gaussian": measure(lambda: in_chunks(prior.decode, noise)),
    }
    gaussian, reconstruction = measured["Gaussian"][0], measured["reconstruction"][0]
    closure(gaussian, gaussian, reconstruction)  # raises before the long part where there is no hole
    tempered = {f"Gaussian, temperature {t:g}": measure(partial(in_chunks, prior.decode, t * noise)) for t in temperatures}
    if tempered:
        best = min(tempered, key=lambda name: tempered[name][0])
        measured[best] = tempered[best]
    measured["ours"] = measure(lambda: prior.sample(len(images), generator=generator))
    return [EvaluationRow(name, distance, closure(distance, gaussian, reconstruction), seconds) for name, (distance, seconds) in measured.items()]
