"""Sampling (Alg. 2): from u_T ~ N(0, I) through the conditional priors to u_0, all layers together or some held.

At a temperature the backbone's stds are multiplied by it. Then the chains run in v = u / temperature, in which the backbone's prior is N(0, I) again.
A held layer takes part at level t as its own diffusion to that level, so that every conditional prior meets noise of the level it was trained on.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .backbone import NoiseTransform
from .processes import collect, join, share
from .schedule import DiffusionSchedule
from .streams import Streams
from .validation import check_count

if TYPE_CHECKING:
    from .latent_prior import LatentPrior

# Mask (D,) of held dimensions, and the states (N, D) that they are held at.
Held = tuple[Tensor, Tensor]


class Chain(Protocol):
    """Draws v_t given v_{t+1} at levels t (N,), some dimensions held."""

    def __call__(self, v_next: Tensor, t: Tensor, /, *, hold: Held | None) -> Tensor: ...


def sample_levels(chain: Chain, steps: int, v: Tensor, *, held: tuple[Tensor, list[Tensor]] | None = None, temperature: float = 1.0) -> list[Tensor]:
    """States of all levels.

    Args:
        chain: the Langevin chain of one level.
        steps: number of levels T.
        v: standard normal noise (N, D), where the pass starts.
        held: mask and states from `held_states`.
        temperature: factor on the backbone's stds.

    Returns:
        u_0..u_T, each (N, D); held dimensions are exact.
    """

    def hold(u: Tensor, t: int) -> Tensor:
        return u if held is None else torch.where(held[0], held[1][t], u)

    states = [hold(temperature * v, steps)]
    for t in reversed(range(steps)):
        levels = torch.full((len(v),), t, dtype=torch.long, device=v.device)
        v = chain(states[0] / temperature, levels, hold=None if held is None else (held[0], held[1][t] / temperature))
        states.insert(0, hold(temperature * v, t))
    return states


def held_rows(fixed: Mapping[int, Tensor], rows: slice) -> dict[int, Tensor]:
    """Noise of held layers for some rows of a call; one noise for all rows stays."""
    return {i: part if len(part) == 1 else part[rows] for i, part in fixed.items()}


def held_states(
    fixed: Mapping[int, Tensor], transform: NoiseTransform, schedule: DiffusionSchedule, streams: Streams, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """The diffusion of held layers.

    Args:
        fixed: layer index -> noise u_i, (N, *latent_shapes[i]) or (1, ...).
        transform: the backbone's layers.
        schedule: noise levels.
        streams: the samples' noise.
        temperature: factor on the backbone's stds, so the std of pure noise.

    Returns:
        Mask (D,) of the held dimensions, and T + 1 states (N, D), the first noise-free.
    """
    zeros = [torch.zeros(len(streams), *shape, device=streams.device, dtype=streams.dtype) for shape in transform.latent_shapes]
    mask = transform.join([torch.full_like(zero[:1], i in fixed, dtype=torch.bool) for i, zero in enumerate(zeros)])[0]
    states = [transform.join([fixed[i].to(zero).expand_as(zero) if i in fixed else zero for i, zero in enumerate(zeros)])]
    for alpha, sigma in zip(schedule.alpha[1:].tolist(), schedule.sigma[1:].tolist(), strict=True):
        states.append(alpha * states[-1] + sigma * temperature * streams.normal(transform.dim))
    return mask, states


def images_in_chunks(prior: "LatentPrior", n: int, draw: Callable[[slice], Tensor], chunk_size: int | None) -> Tensor:
    """Images (n, C, H, W) of the noise that `draw` returns for each chunk of the samples; every process computes its share and gets all."""
    size, mine, images = prior.samples_per_chunk if chunk_size is None else chunk_size, share(n), list[Tensor]()
    check_count(size, "chunk_size")
    collect(lambda: images.extend(prior._decode_finite(draw(slice(i, min(i + size, mine.stop)))) for i in mine[::size]))
    return join(torch.cat(images) if images else None)  # type: ignore[return-value]  # n is positive
