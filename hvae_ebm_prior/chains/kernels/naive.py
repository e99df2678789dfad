"""The Langevin update in plain torch: what the fused kernel computes, operation by operation.

Sums over a row of D elements have one order, which the kernel keeps with any number of programs: the row is cut into
sections of 8,192 elements and these into chunks of 1,024; chunks of a section are added lane by lane, then lanes two by
two, neighbours first, and the sections' sums likewise. Zeros past the end change nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import philox_normal

LANES = 1024
SECTION = 8 * LANES


def naive_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    renewed: Tensor | None,
    replaced: Tensor | None,
    coefficients: Tensor,
    key: Tensor,
    step: Tensor,
    ahead: int,
    stream: int,
    previous: bool,
    held: Tensor | None,
    reach: float,
    out: Tensor,
) -> None:
    """See `langevin_update`; arguments are checked there.

    Args:
        u: states (N, D), float32.
        u_next: states of the noisier level (N, D).
        gradient: grad F (N, D).
        renewed: a part of the gradient (N, D), to stand in the place of `replaced`; both or neither.
        replaced: what that part is in `gradient` (N, D).
        coefficients: A, B, C, D of every sample (N, 4), float32.
        key: int64 (2,).
        step: int64 (1,).
        ahead: added to the step.
        stream: which of a step's noises.
        previous: add the noise of the step before.
        held: mask (D,) of elements to leave as they are.
        reach: largest length of the drift C grad F in units of D; may be infinite.
        out: where the new states go (N, D); may be `u`.
    """
    n, dim = u.shape
    number = step + ahead
    noise = philox_normal(key, number, stream, n, dim)
    if previous:
        noise = noise + philox_normal(key, number - 1, stream, n, dim)
    a, b, c, d = coefficients.unsqueeze(2).unbind(1)
    g = gradient.float()
    if renewed is not None and replaced is not None:
        g = g + (renewed.float() - replaced.float())
    if reach < math.inf:
        # Of the square root double precision is used, as in noise.py.
        length = sum_of_squares(c * g).double().sqrt().float()[:, None]
        longest = reach * d
        c = torch.where(length > longest, c * (longest / length), c)
    # Not addcmul, which may round once where this rounds twice.
    new = a * u + b * u_next.float() + c * g + d * noise
    out.copy_(new if held is None else torch.where(held, u, new))


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum over the elements of every row of `x` (N, D), in the module's order, (N,)."""
    squares, whole = x * x, x.shape[1] - x.shape[1] % SECTION
    sections = squares[:, :whole].unflatten(1, (-1, SECTION // LANES, LANES))
    # Of the last section, with no more zeros than needed.
    rest = squares[:, whole:]
    if rest.shape[1] > LANES:
        rest = F.pad(rest, (0, -rest.shape[1] % LANES)).unflatten(1, (1, -1, LANES))
    else:
        rest = rest[:, None, None]
    parts = [sum_of_section(part) for part in (sections, rest) if part.shape[1] and part.shape[-1]]
    return sum_of_neighbours(torch.cat(parts, dim=1))


def sum_of_section(chunks: Tensor) -> Tensor:
    """Sums (N, S) of sections, given as chunks (N, S, C, lanes)."""
    lanes = chunks[:, :, 0]
    for k in range(1, chunks.shape[2]):
        lanes = lanes + chunks[:, :, k]
    return sum_of_neighbours(lanes)


def sum_of_neighbours(x: Tensor) -> Tensor:
    """Sum over the last dimension of `x` (..., M), two by two."""
    x = F.pad(x, (0, (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]
