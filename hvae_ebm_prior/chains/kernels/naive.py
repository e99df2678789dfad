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

    Returns:
        The new states (N, D).
    """
    n, dim = u.shape
    noise = philox_normal(key, step, stream, n, dim)
    if previous:
        noise = noise + philox_normal(key, step - 1, stream, n, dim)
    a, b, c, d = coefficients.unsqueeze(2).unbind(1)
    # Not addcmul, which may round once where this rounds twice.
    new = a * u + b * u_next.float() + c * gradient.float() + d * noise
    return new if held is None else torch.where(held, u, new)
