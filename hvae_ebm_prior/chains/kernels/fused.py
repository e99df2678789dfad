"""The Langevin update as one Triton kernel: noise is drawn where it is used, and every element is read and written
once, but for the gradient where the drift has a limit.

A limited drift needs a sum over the row first. Rows of up to 8,192 elements have one program each, which reads its
gradient twice: one launch. For longer rows one program would take longer than a second launch, so a kernel before sums
up their sections.

Importing this module imports Triton. Fusion of multiplications and additions is off, as it would round differently from
the twin in naive.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import noise
from .naive import LANES, SECTION

L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(value) for value in noise.LOG)
S0, S1, S2, S3 = (tl.constexpr(value) for value in noise.SIN)
C0, C1, C2, C3, C4 = (tl.constexpr(value) for value in noise.COS)
LN2 = tl.constexpr(noise.LN2)
SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)
LARGEST_BLOCK = 1024


NONE, OWN, GIVEN = (tl.constexpr(value) for value in range(3))


def launch_options(previous: bool, whole_rows: bool, warp_size: int) -> dict[str, int | bool]:
    """Options of a launch: without fusion, and with so many threads that each needs no more than 64 registers, of which
    two noises take more. A program with a whole row has more of them, as there are few programs.
    """
    return {"num_warps": 8 if (previous or whole_rows) and warp_size == 32 else 4, "enable_fp_fusion": False}


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


@triton.jit
def _sum_of_neighbours(x, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Sum of WIDTH = 2^LEVELS numbers, two by two: `tl.sum` adds in an order of its own."""
    for level in tl.static_range(LEVELS):
        even, odd = tl.split(tl.reshape(x, [WIDTH >> (level + 1), 2]))
        x = even + odd
    return tl.max(tl.reshape(x, [1]), axis=0)


@triton.jit
def _load_gradient(gradient_ptr, renewed_ptr, replaced_ptr, offsets, inside, RENEWED: tl.constexpr):
    g = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if RENEWED:
        renewed = tl.load(renewed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = g + (renewed - tl.load(replaced_ptr + offsets, mask=inside, other=0.0).to(tl.float32))
    return g


@triton.jit
def _section_sum(
    gradient_ptr,
    renewed_ptr,
    replaced_ptr,
    c,
    start,
    stop,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    RENEWED: tl.constexpr,
):
    """Sum of (c g)^2 over elements `start` to `stop` of a row, as in `naive.sum_of_squares`."""
    lanes = tl.zeros([WIDTH], tl.float32)
    for first in range(start, stop, WIDTH):
        offsets = first + tl.arange(0, WIDTH)
        g = c * _load_gradient(gradient_ptr, renewed_ptr, replaced_ptr, offsets, offsets < stop, RENEWED)
        lanes = lanes + g * g
    return _sum_of_neighbours(lanes, WIDTH, LEVELS)


@triton.jit
def section_kernel(
    gradient_ptr,
    renewed_ptr,
    replaced_ptr,
    coefficients_ptr,
    sums_ptr,
    dim,
    sections,
    gradient_stride,
    renewed_stride,
    replaced_stride,
    SECTION: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    RENEWED: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // sections).to(tl.int64)
    start = program % sections * SECTION
    total = _section_sum(
        gradient_ptr + row * gradient_stride,
        renewed_ptr + row * renewed_stride,
        replaced_ptr + row * replaced_stride,
        tl.load(coefficients_ptr + row * 4 + 2),
        start,
        tl.minimum(start + SECTION, dim),
        WIDTH,
        LEVELS,
        RENEWED,
    )
    tl.store(sums_ptr + program, total)


@triton.jit(do_not_specialize=["stream", "ahead"], do_not_specialize_on_alignment=["step_ptr"])
def update_kernel(
    u_ptr,
    next_ptr,
    gradient_ptr,
    renewed_ptr,
    replaced_ptr,
    coefficients_ptr,
    key_ptr,
    step_ptr,
    held_ptr,
    sums_ptr,
    out_ptr,
    dim,
    chunks,
    u_stride,
    next_stride,
    gradient_stride,
    renewed_stride,
    replaced_stride,
    out_stride,
    stream,
    ahead,
    reach,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    LIMIT: tl.constexpr,
    PREVIOUS: tl.constexpr,
    HELD: tl.constexpr,
    RENEWED: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // chunks
    first = program % chunks
    long_row = row.to(tl.int64)
    u_ptr += long_row * u_stride
    next_ptr += long_row * next_stride
    gradient_ptr += long_row * gradient_stride
    renewed_ptr += long_row * renewed_stride
    replaced_ptr += long_row * replaced_stride
    out_ptr += long_row * out_stride
    a = tl.load(coefficients_ptr + row * 4)
    b = tl.load(coefficients_ptr + row * 4 + 1)
    c = tl.load(coefficients_ptr + row * 4 + 2)
    d = tl.load(coefficients_ptr + row * 4 + 3)
    key = tl.load(key_ptr)
    sample = (tl.load(key_ptr + 1) + row).to(tl.int32)
    step = (tl.load(step_ptr) + ahead).to(tl.int32)

    if LIMIT != NONE:
        if LIMIT == OWN:
            square = _section_sum(gradient_ptr, renewed_ptr, replaced_ptr, c, 0, dim, WIDTH, LEVELS, RENEWED)
        else:
            sums = tl.load(sums_ptr + long_row * WIDTH + tl.arange(0, WIDTH))
            square = _sum_of_neighbours(sums, WIDTH, LEVELS)
        length = tl.sqrt_rn(square)
        longest = reach * d
        c = tl.where(length > longest, c * tl.div_rn(longest, length), c)

    # A program has one chunk, or with a sum of its own all of its row's.
    count = tl.cdiv(dim, BLOCK) if LIMIT == OWN else 1
    for chunk in range(first, first + count):
        offsets = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < dim
        u = tl.load(u_ptr + offsets, mask=inside, other=0.0)
        u_next = tl.load(next_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        g = _load_gradient(gradient_ptr, renewed_ptr, replaced_ptr, offsets, inside, RENEWED)
        group = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        xi = _normal(key, group, sample, step, stream, BLOCK)
        if PREVIOUS:
            xi = xi + _normal(key, group, sample, step - 1, stream, BLOCK)
        new = a * u + b * u_next + c * g + d * xi
        if HELD:
            new = tl.where(tl.load(held_ptr + offsets, mask=inside, other=0) != 0, u, new)
        tl.store(out_ptr + offsets, new, mask=inside)


@triton.jit(do_not_specialize=["stream", "ahead"], do_not_specialize_on_alignment=["step_ptr"])
def noise_kernel(key_ptr, step_ptr, out_ptr, dim, chunks, stream, ahead, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = program // chunks
    chunk = program % chunks
    sample = (tl.load(key_ptr + 1) + row).to(tl.int32)
    step = (tl.load(step_ptr) + ahead).to(tl.int32)
    group = chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    offsets = chunk * BLOCK + tl.arange(0, BLOCK)
    xi = _normal(tl.load(key_ptr), group, sample, step, stream, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * dim + offsets, xi, mask=offsets < dim)


def block_of(dim: int) -> int:
    """Elements that a program works on at a time, a power of two."""
    return max(16, min(LARGEST_BLOCK, triton.next_power_of_2(dim)))


def warp_size() -> int:
    """Threads of a warp of the devices that this build of PyTorch is for."""
    return 64 if torch.version.hip else 32


def fused_update(
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
    block: int | None = None,
) -> None:
    """The update in one launch, or in two where the drift of long rows has a limit; see `naive_update` for the
    arguments, which are checked in `langevin_update`.

    Args:
        u: states (N, D), float32, rows contiguous like those of all the others.
        u_next: float32, bfloat16 or float16 (N, D).
        gradient: float32, bfloat16 or float16 (N, D).
        renewed: float32, bfloat16 or float16 (N, D).
        replaced: float32, bfloat16 or float16 (N, D).
        coefficients: (N, 4), float32, contiguous.
        key: int64 (2,), in device memory like `step`: a captured graph reads them anew at every replay.
        step: int64 (1,).
        ahead: added to the step.
        stream: which of a step's noises.
        previous: add the noise of the step before.
        held: mask (D,), bool.
        reach: largest length of the drift.
        out: (N, D), float32.
        block: elements per program, a power of two; None chooses. Results do not depend on it.
    """
    n, dim = u.shape
    block = block or block_of(dim)
    limit = NONE if reach == math.inf else OWN if dim <= SECTION else GIVEN
    own = limit == OWN
    chunks = 1 if own else triton.cdiv(dim, block)
    # Lanes of a chunk, or sections of a row, beyond whose end sums are 0.
    width = triton.next_power_of_2(min(LANES, dim) if own else triton.cdiv(dim, SECTION))
    sums = torch.empty(n, width, device=u.device, dtype=torch.float32) if limit == GIVEN else coefficients
    is_renewed = renewed is not None
    # What is not there is never read.
    gradients = [gradient if part is None else part for part in (gradient, renewed, replaced)]
    strides = [part.stride(0) for part in gradients]
    options = launch_options(previous, own, warp_size())
    if limit == GIVEN:
        section_kernel[(n * width,)](
            *gradients,
            coefficients,
            sums,
            dim,
            width,
            *strides,
            SECTION=SECTION,
            WIDTH=LANES,
            LEVELS=LANES.bit_length() - 1,
            RENEWED=is_renewed,
            **options,
        )
    update_kernel[(n * chunks,)](
        u,
        u_next,
        *gradients,
        coefficients,
        key,
        step,
        coefficients if held is None else held.view(torch.uint8),
        sums,
        out,
        dim,
        chunks,
        u.stride(0),
        u_next.stride(0),
        *strides,
        out.stride(0),
        stream,
        ahead,
        reach,
        BLOCK=block,
        WIDTH=width,
        LEVELS=width.bit_length() - 1,
        LIMIT=limit,
        PREVIOUS=previous,
        HELD=held is not None,
        RENEWED=is_renewed,
        **options,
    )


def fused_noise(key: Tensor, step: Tensor, ahead: int, stream: int, n: int, dim: int) -> Tensor:
    """The noise of `philox_normal` in one launch, (n, dim); arguments as of `fused_update`."""
    out = torch.empty(n, dim, device=key.device, dtype=torch.float32)
    block = block_of(dim)
    chunks = triton.cdiv(dim, block)
    options = launch_options(False, False, warp_size())
    noise_kernel[(n * chunks,)](key, step, out, dim, chunks, stream, ahead, BLOCK=block, **options)
    return out
