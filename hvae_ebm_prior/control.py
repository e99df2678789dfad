"""Editing: hold some layers, draw the others anew.

    resample          of noise u_0, hold some layers and draw the rest from the prior, under labels if asked
    edit              the same of real images: encode, resample, decode
    sample_in_turn    sequential editing: top layers under one label, then, with these held, those below under another
    interpolate       on the great circle between two noises

High-level attributes belong to high layers and low-level ones to low layers, so holding layers keeps an edit local.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backbone.validation import check_count, check_noise
from .density.composition import Expression
from .density.sampling import supported_options
from .training.learned_prior import LearnedPrior

Labels = Mapping[str, Any] | Expression | None


def resample(
    prior: LearnedPrior,
    u: Tensor,
    hold: Sequence[int],
    *,
    labels: Labels = None,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hold some layers of noise and draw the others.

    Args:
        prior: the trained prior.
        u: noise u_0 (N, D), of samples or encoded images.
        hold: indices of the layers to hold, 0 the top.
        labels: as in `DiffusionEBMPrior.sample_noise`, for the layers that are drawn.
        guidance: strength of the labels.
        generator: source of the noise.

    Returns:
        Noise (N, D); held layers are exact.

    Raises:
        TypeError, ValueError: a layer that does not exist, a wrong label or shape, noise that is not finite, or a prior
            without labels.
        ChainDiverged: a chain left the finite numbers.
    """
    check_noise(u, prior.dim, prior.device)
    parts = prior.split(u.detach())
    for i in hold:
        if i not in range(len(parts)):
            raise ValueError(f"hold: expected layer indices 0 (top) to {len(parts) - 1} (bottom), got {i!r}")
    given = supported_options(prior, labels=labels, guidance=guidance)
    return prior.sample_noise(len(u), fixed={i: parts[i] for i in hold}, generator=generator, **given)


def edit(
    prior: LearnedPrior,
    images: Tensor,
    hold: Sequence[int],
    *,
    labels: Labels = None,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw real images anew, but for some layers.

    Args:
        prior: the trained prior.
        images: (N, C, H, W) in [0, 1].
        hold: indices of the layers that keep their posterior draw, 0 the top.
        labels: as in `DiffusionEBMPrior.sample_noise`, for the layers that are drawn.
        guidance: strength of the labels.
        generator: source of all noise.

    Returns:
        Images (N, C, H, W) in [0, 1].

    Raises:
        TypeError, ValueError: as in `resample`, or wrong images.
        ChainDiverged: a chain left the finite numbers, or the backbone's images are not finite.
    """
    with torch.no_grad():
        u = prior.encode(images, generator=generator)
        return prior.decode(resample(prior, u, hold, labels=labels, guidance=guidance, generator=generator))


def sample_in_turn(
    prior: LearnedPrior,
    n: int,
    stages: Sequence[tuple[Labels, Sequence[int]]],
    *,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Sequential editing: each stage draws all layers that are not held yet under its labels, then holds its own.

    Args:
        prior: the trained prior.
        n: number of samples N.
        stages: labels, and the layers to hold from then on; usually from the top down.
        guidance: strength of the labels.
        generator: source of the noise.

    Returns:
        Noise (N, D) after every stage.

    Raises:
        TypeError, ValueError: no stages, a layer that does not exist or is held already, or a wrong label.
    """
    if not stages:
        raise ValueError("stages: expected at least one pair of labels and layers")
    held: list[int] = []
    states: list[Tensor] = []
    for labels, layers in stages:
        if again := set(layers) & set(held):
            raise ValueError(f"stages: layers {sorted(again)} are held by an earlier stage")
        if not states:
            given = supported_options(prior, labels=labels, guidance=guidance)
            states.append(prior.sample_noise(n, generator=generator, **given))
        else:
            states.append(resample(prior, states[-1], held, labels=labels, guidance=guidance, generator=generator))
        held += layers
    return states


def interpolate(
    prior: LearnedPrior, start: Tensor, end: Tensor, steps: int, *, layers: Sequence[int] | None = None
) -> Tensor:
    """Noises between two, on the great circle through them: they keep the length that noise has.

    Args:
        prior: the prior, for its layers.
        start: noise (N, D).
        end: noise (N, D).
        steps: number of noises, ends included.
        layers: indices of the layers to interpolate, the others stay at `start`; None for all.

    Returns:
        Noise (steps, N, D).

    Raises:
        TypeError, ValueError: wrong shapes, noise that is not finite, or fewer than two steps.
    """
    check_noise(start, prior.dim)
    check_noise(end, prior.dim)
    steps = check_count(steps, "steps")
    if start.shape != end.shape or steps < 2:
        raise ValueError(
            f"expected two noises of one shape and at least 2 steps, "
            f"got {tuple(start.shape)}, {tuple(end.shape)} and {steps}"
        )
    chosen = range(len(prior.latent_shapes)) if layers is None else layers
    moves = prior.join([torch.full_like(part, i in chosen) for i, part in enumerate(prior.split(start[:1]))]) > 0
    weight = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype)[:, None, None]
    angle = torch.nn.functional.cosine_similarity(moves * start, moves * end, dim=1)[:, None].clamp(-1, 1).acos()
    on_circle = torch.sin((1 - weight) * angle) / angle.sin() * start + torch.sin(weight * angle) / angle.sin() * end
    # At small angles the sines are 0 / 0, and the circle is the straight line.
    return torch.where(moves, torch.where(angle < 1e-3, torch.lerp(start, end, weight), on_circle), start)
