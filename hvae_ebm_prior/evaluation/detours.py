"""Outlier scores after a detour: the layers above a cut are diffused to a noise level t and drawn back, beside lower
layers of the prior. What differs is where the lower layers come from, and what is scored; `outliers.py` has the list.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backbone.elbo import density_adapter
from ..backbone.validation import check_count, check_images, check_levels
from ..chains.streams import Streams, draw_key
from ..density.conditional import draw_conditional
from ..density.energy_model import EnergyModel
from ..density.sampling import SamplingRequest, held_states
from ..training.learned_prior import LearnedPrior
from .scoring import Chunk, above_cuts, averaged, encode_each


@torch.no_grad()
def diffusion_scores(
    prior: LearnedPrior,
    images: Tensor,
    *,
    level: int = 1,
    noise: float = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Energies after the detour beside lower layers of the prior's own samples, whatever the image: those of an outlier
    do not go with them (Cui & Han, 2024, Sec. 5.2).

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        level: noise level t that images are diffused to, 1..T.
        noise: factor on the std of that noise; 1 for what the conditional priors were trained on.
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k. They cost one sample of the prior, and the chains of the levels
        below `level` for each cut.

    Raises:
        TypeError, ValueError: images of a wrong type, shape or range, or no such level.
        ChainDiverged: a chain left the finite numbers.
    """
    check_detour(prior, level, noise)
    check_images(images, prior.backbone)
    draws = check_count(draws, "draws")

    def scores_of_a_draw() -> Tensor:
        samples = prior.draw_levels(draw_key(generator), range(len(images)), SamplingRequest())[level]

        def score(chunk: Chunk) -> Tensor:
            u = encode_each(prior, chunk)[0]
            return energies_above_cuts(
                prior, draw_beside(prior, u, samples[chunk.rows.start : chunk.rows.stop], level, noise, chunk.streams)
            )

        return averaged(prior, images, 1, generator, score)

    return torch.stack([scores_of_a_draw() for _ in range(draws)]).mean(0)


@torch.no_grad()
def conditional_diffusion_scores(
    prior: EnergyModel,
    images: Tensor,
    *,
    level: int = 1,
    noise: float = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Energies after the detour beside lower layers that the prior draws given those above; arguments, result and
    errors as of `diffusion_scores`. Each cut costs the chains of a sample.
    """
    check_detour(prior, level, noise)

    def score(chunk: Chunk) -> Tensor:
        u = encode_each(prior, chunk)[0]
        return energies_above_cuts(prior, restore(prior, u, level, noise, chunk.streams))

    return averaged(prior, images, draws, generator, score)


@torch.no_grad()
def restoration_scores(
    prior: EnergyModel,
    images: Tensor,
    *,
    level: int = 1,
    noise: float = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How much worse images are explained after the detour of `conditional_diffusion_scores`.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        level: noise level t that images are diffused to, 1..T.
        noise: factor on the std of that noise.
        draws: posterior draws per image, whose scores are averaged.
        generator: source of all noise.

    Returns:
        Scores (N, L) in nats, entry k for the cut k, the layers below which are the prior's own.

    Raises:
        TypeError: the adapter gives no densities, see `hvae_ebm_prior.backbone.elbo.DensityAdapter`, or images of a
            wrong type.
        ValueError: images of a wrong shape or range, or no such level.
        ChainDiverged: a chain left the finite numbers.
    """
    check_detour(prior, level, noise)
    adapter = density_adapter(prior.backbone)

    def log_likelihood(images: Tensor, u: Tensor) -> Tensor:
        _, features = prior.transform.states_and_features(u)
        return adapter.log_likelihood(features, images)

    def score(chunk: Chunk) -> Tensor:
        u = encode_each(prior, chunk)[0]
        before = log_likelihood(chunk.images, u)
        restored = restore(prior, u, level, noise, chunk.streams)
        return torch.stack([before - log_likelihood(chunk.images, u_0) for u_0 in restored], dim=1)

    return averaged(prior, images, draws, generator, score)


def check_detour(prior: EnergyModel, level: int, noise: float) -> None:
    """Raise ValueError unless the level exists and noise is non-negative."""
    if level not in range(1, prior.schedule.steps + 1):
        raise ValueError(f"level: expected a noise level 1..{prior.schedule.steps}, got {level!r}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise: expected a non-negative factor, got {noise!r}")


def energies_above_cuts(prior: EnergyModel, detours: Iterator[Tensor]) -> Tensor:
    """Energies (N, L) of the layers above every cut, of the u_0 (N, D) of its detour."""
    return torch.stack([above_cuts(prior.layer_energies(u, 0))[:, k] for k, u in enumerate(detours)], dim=1)


def diffused_above_cuts(
    prior: EnergyModel, u: Tensor, noise: float, streams: Streams
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """For every cut in turn, the mask (D,) of the layers above it and their diffusion, T + 1 states (N, D)."""
    parts = prior.split(u)
    for k in range(len(parts)):
        above = dict(enumerate(parts[: len(parts) - k]))
        yield held_states(above, prior.transform, prior.schedule, streams, noise)


def draw_beside(
    prior: EnergyModel, u: Tensor, samples: Tensor, level: int, noise: float, streams: Streams
) -> Iterator[Tensor]:
    """For every cut in turn, u_0 (N, D): the layers of `u` (N, D) above the cut diffused to `level`, the others those
    of `samples` (N, D) of the prior there, and all drawn down together.
    """
    for mask, states in diffused_above_cuts(prior, u, noise, streams):
        u_t = torch.where(mask, states[level], samples)
        for t in reversed(range(level)):
            u_t = draw_conditional(prior, u_t, check_levels(t, len(u), prior.schedule.steps, u.device), streams)
        yield u_t


def restore(prior: EnergyModel, u: Tensor, level: int, noise: float, streams: Streams) -> Iterator[Tensor]:
    """For every cut in turn, u_0 (N, D): the layers of `u` (N, D) above the cut diffused to `level`, the others drawn
    there by the prior given them, and all drawn down together.
    """
    for mask, states in diffused_above_cuts(prior, u, noise, streams):
        u_t = torch.where(mask, states[-1], streams.normal(prior.dim))
        for t in reversed(range(prior.schedule.steps)):
            # With all layers inferred nothing is drawn above the level.
            if t >= level and bool(mask.all()):
                u_t = states[t]
                continue
            levels = check_levels(t, len(u), prior.schedule.steps, u.device)
            u_t = draw_conditional(prior, u_t, levels, streams, hold=(mask, states[t]) if t >= level else None)
        yield u_t
