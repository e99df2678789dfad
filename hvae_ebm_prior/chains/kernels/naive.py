"""The Langevin update in plain torch: what the fused kernel computes, operation by operation."""

import torch
from torch import Tensor

from .noise import philox_normal


def naive_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    key: Tensor,
    step: Tensor,
    stream: int,
    previous: bool,
    held: Tensor | None,
    guard: bool,
    statistics: Tensor | None,
) -> Tensor:
    """See `langevin_update`; arguments are checked there.

    Args:
        u: states (N, D), float32.
        u_next: states of the noisier level (N, D).
        gradient: grad F (N, D).
        coefficients: A, B, C, D of every sample (N, 4), float32.
        key: int64 (2,).
        step: int64 (1,).
        stream: which of a step's noises.
        previous: add the noise of the step before.
        held: mask (D,) of elements to leave as they are.
        guard: leave elements as they are whose new value is not finite.
        statistics: (N, 4) to write sums into.

    Returns:
        The new states (N, D).
    """
    n, dim = u.shape
    noise = philox_normal(key, step, stream, n, dim)
    if previous:
        noise = noise + philox_normal(key, step - 1, stream, n, dim)
    a, b, c, d = coefficients.unsqueeze(2).unbind(1)
    g = gradient.float()
    # Not addcmul, which may round once where this rounds twice.
    new = a * u + b * u_next.float() + c * g + d * noise
    finite = torch.isfinite(new)
    if guard:
        new = torch.where(finite, new, u)
    if held is not None:
        new = torch.where(held, u, new)
    if statistics is not None:
        sums = (g.square(), new.square(), new * u_next.float(), (~finite).float())
        statistics.copy_(torch.stack([part.sum(1) for part in sums], dim=1))
    return new
