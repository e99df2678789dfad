"""The Langevin update as one Triton kernel: noise is drawn where it is used, and every element is read and written
once.

Importing this module imports Triton. Fusion of multiplications and additions is off, as it would round differently from
the twin in naive.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import noise

L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(value) for value in noise.LOG)
S0, S1, S2, S3 = (tl.constexpr(value) for value in noise.SIN)
C0, C1, C2, C3, C4 = (tl.constexpr(value) for value in noise.COS)
LN2 = tl.constexpr(noise.LN2)
SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
LARGEST_BLOCK = 1024


def launch_options(previous: bool, warp_size: int) -> dict[str, int | bool]:
    """Options of a launch: without fusion, and with so many threads that each needs no more than 64 registers, of which
    two noises take more.
    """
    return {"num_warps": 8 if previous and warp_size == 32 else 4, "enable_fp_fusion": False}


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((((((((L8 * f + L7) * f + L6) * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f) + L0
    return exponent.to(tl.float32) * LN2 + (f + f * f * p)


@triton.jit
def _cos_sin(x):
    quadrant = tl.floor(x * 4.0 + 0.5)
    r = x - quadrant * 0.25
    q = quadrant.to(tl.int32)
    square = r * r
    sine = r * (((S3 * square + S2) * square + S1) * square + S0)
    cosine = (((C4 * square + C3) * square + C2) * square + C1) * square + C0
    odd = (q & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    return tl.where(((q + 1) & 2) == 2, -first, first), tl.where((q & 2) == 2, -second, second)


@triton.jit
def _box_muller(a, b):
    radius = tl.sqrt_rn(-2.0 * _log((a >> 8).to(tl.float32) * 5.9604644775390625e-08 + 2.98023223876953125e-08))
    cosine, sine = _cos_sin((b >> 8).to(tl.float32) * 5.9604644775390625e-08)
    return radius * cosine, radius * sine


@triton.jit
def _normal(key, group, sample, step, stream, BLOCK: tl.constexpr):
    """Noise of BLOCK elements, BLOCK / 4 groups of four."""
    zero = group * 0
    a, b, c, d = tl.philox(key, group, zero + sample, zero + step, zero + stream)
    n0, n1 = _box_muller(a, b)
    n2, n3 = _box_muller(c, d)
    # Four numbers side by side in memory: join puts its operands along a new last axis.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit(do_not_specialize=["stream"])
def update_kernel(
    u_ptr,
    next_ptr,
    gradient_ptr,
    coefficients_ptr,
    key_ptr,
    step_ptr,
    held_ptr,
    out_ptr,
    dim,
    chunks,
    u_stride,
    next_stride,
    gradient_stride,
    stream,
    BLOCK: tl.constexpr,
    PREVIOUS: tl.constexpr,
    HELD: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    chunk = program % chunks
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < dim
    long_row = row.to(tl.int64)
    u = tl.load(u_ptr + long_row * u_stride + offsets, mask=inside, other=0.0)
    u_next = tl.load(next_ptr + long_row * next_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gradient_ptr + long_row * gradient_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(coefficients_ptr + row * 4)
    b = tl.load(coefficients_ptr + row * 4 + 1)
    c = tl.load(coefficients_ptr + row * 4 + 2)
    d = tl.load(coefficients_ptr + row * 4 + 3)

    key = tl.load(key_ptr)
    sample = (tl.load(key_ptr + 1) + row).to(tl.int32)
    step = tl.load(step_ptr).to(tl.int32)
    group = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    xi = _normal(key, group, sample, step, stream, BLOCK)
    if PREVIOUS:
        xi = xi + _normal(key, group, sample, step - 1, stream, BLOCK)

    new = a * u + b * u_next + c * g + d * xi
    if HELD:
        new = tl.where(tl.load(held_ptr + offsets, mask=inside, other=0) != 0, u, new)
    tl.store(out_ptr + long_row * dim + offsets, new, mask=inside)


def fused_update(
    u: Tensor,
    u_next: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    key: Tensor,
    step: Tensor,
    stream: int,
    previous: bool,
    held: Tensor | None,
    block: int | None = None,
) -> Tensor:
    """One launch of the kernel; see `naive_update` for the arguments, which are checked in `langevin_update`.

    Args:
        u: states (N, D), float32, rows contiguous like those of the next two.
        u_next: float32, bfloat16 or float16 (N, D).
        gradient: float32, bfloat16 or float16 (N, D).
        coefficients: (N, 4), float32, contiguous.
        key: int64 (2,), in device memory like `step`: a captured graph reads them anew at every replay.
        step: int64 (1,).
        stream: which of a step's noises.
        previous: add the noise of the step before.
        held: mask (D,), bool.
        block: elements per program, a power of two; None chooses. Results do not depend on it.

    Returns:
        The new states (N, D), float32.
    """
    n, dim = u.shape
    block = block or max(16, min(LARGEST_BLOCK, triton.next_power_of_2(dim)))
    chunks = triton.cdiv(dim, block)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    update_kernel[(n * chunks,)](
        u,
        u_next,
        gradient,
        coefficients,
        key,
        step,
        out if held is None else held.view(torch.uint8),
        out,
        dim,
        chunks,
        u.stride(0),
        u_next.stride(0),
        gradient.stride(0),
        stream,
        BLOCK=block,
        PREVIOUS=previous,
        HELD=held is not None,
        **launch_options(previous, 64 if torch.version.hip else 32),
    )
    return out
