"""Scores of images in chunks, averaged over posterior draws; noise belongs to an image's place in the call."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.validation import check_count, check_images
from ..chains.streams import Streams, draw_key, open_streams, sample_seeds
from ..density.energy_model import EnergyModel
from ..processes import progress_bar


class Chunk(NamedTuple):
    """Some images (n, C, H, W) of a call, their places in it, and the randomness that belongs to these: a seed each for
    the posterior draws, and streams for all other noise.
    """

    images: Tensor
    rows: range
    seeds: list[int]
    streams: Streams


def averaged(
    prior: EnergyModel,
    images: Tensor,
    draws: int,
    generator: torch.Generator | None,
    score: Callable[[Chunk], Tensor],
    copies: int = 1,
) -> Tensor:
    """Mean over draws of the scores of chunks of images.

    Args:
        prior: the prior.
        images: (N, C, H, W).
        draws: how often all are scored.
        generator: source of the noise.
        score: the scores (n, ...) of a chunk of n images.
        copies: how many times `score` holds each image in memory.

    Returns:
        Scores (N, ...).
    """
    check_images(images, prior.backbone)
    draws = check_count(draws, "draws")
    copies = check_count(copies, "draws")
    images = prior.transform.take(images)
    chunk_size = max(1, prior.samples_per_chunk // copies)
    scores = []
    with progress_bar(draws * len(images), "scores") as bar:
        for _ in range(draws):
            seeds_key, streams_key = draw_key(generator), draw_key(generator)
            parts = []
            for first in range(0, len(images), chunk_size):
                rows = range(first, min(first + chunk_size, len(images)))
                seeds = sample_seeds(seeds_key, rows)
                streams = open_streams(streams_key, rows, prior.device, prior.dtype, prior.execution.backend)
                parts.append(score(Chunk(images[rows.start : rows.stop], rows, seeds, streams)))
                bar.update(len(rows))
            scores.append(torch.cat(parts))
    return torch.stack(scores).mean(0)


def posterior_means(
    prior: EnergyModel,
    images: Tensor,
    draws: int,
    generator: torch.Generator | None,
    statistics: Callable[[Tensor], Tensor],
) -> Tensor:
    """Means (N, ...) over posterior draws of `statistics`, (n, ...) of noise (n, D)."""

    def score(chunk: Chunk) -> Tensor:
        u = encode_each(prior, chunk, draws)
        return statistics(u.flatten(0, 1)).unflatten(0, u.shape[:2]).mean(0)

    return averaged(prior, images, 1, generator, score, copies=draws)


def gaussian_energies(prior: EnergyModel, u: Tensor) -> Tensor:
    """|u_i|^2 / 2 of every layer, (N, L)."""
    return torch.stack([0.5 * part.flatten(1).square().sum(1) for part in prior.split(u)], dim=1)


def encode_each(prior: EnergyModel, chunk: Chunk, draws: int = 1) -> Tensor:
    """Posterior noise (draws, N, D) of images one by one, so that it does not depend on the others."""
    noise = []
    for image, seed in zip(chunk.images.split(1), chunk.seeds, strict=True):
        copies = image.expand(draws, *image.shape[1:])
        noise.append(prior.encode(copies, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(noise, dim=1)


def above_cuts(layers: Tensor) -> Tensor:
    """Sums over the layers above each cut, entry k without the k lowest, of values per layer (N, L)."""
    return layers.cumsum(1).flip(1)
