"""Counter-based normal noise in plain torch: the twin of what the fused kernel draws, bit for bit.

Philox4x32-10 (Salmon et al. 2011) maps a 64-bit key and four 32-bit counters to four 32-bit words; here the counters
are

    (element // 4, sample, step, stream),

so that noise is a pure function of (key, sample, step, stream, element): nothing is stored, and no batch, block or
device order matters. Two words make two normals by Box-Muller, sqrt(-2 log a) (cos 2 pi b, sin 2 pi b), with a and b of
24 bits and a > 0, so |noise| < 5.9. Logarithm, sine and cosine are polynomials (absolute errors of some 1e-7) in
multiplications and additions alone, which every IEEE device rounds alike.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# (log(1 + x) - x) / x^2 on sqrt(1/2) <= 1 + x <= sqrt(2); sin(2 pi x) / x and cos(2 pi x) in x^2 on |x| <= 1/8. Lowest
# power first.
LOG = (-0.49999997, 0.33333322, -0.25000772, 0.20001969, -0.166276, 0.141890004, -0.13101634, 0.12821749, -0.07866668)
SIN = (6.2831855, -41.341663, 81.592545, -75.40184)
COS = (1.0, -19.739208, 64.939316, -85.44285, 59.220287)
LN2 = 0.6931472
SQRT_HALF_BITS = 0x3F3504F3


def philox(key: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        key: 64-bit key, int64.
        counters: four 32-bit counters as int64 in 0..2^32 - 1, of shapes that broadcast.

    Returns:
        Four 32-bit words as int64.
    """
    c0, c1, c2, c3 = counters
    k0, k1 = key & WORD, (key >> 32) & WORD
    for _ in range(ROUNDS):
        high, low = multiply(MULTIPLIERS[0], c0)
        other_high, other_low = multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = other_high ^ c1 ^ k0, other_low, high ^ c3 ^ k1, low
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 64-bit product; int64 wraps where uint64 would not, with the same bits."""
    product = x * factor
    return (product >> 32) & WORD, product & WORD


def philox_words(key: Tensor, step: Tensor, stream: int, n: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Words of `groups` groups of four elements for samples key[1]..key[1] + n - 1, each (n, groups) int64."""
    group = torch.arange(groups, device=key.device)
    sample = (key[1] + torch.arange(n, device=key.device)) & WORD
    return philox(key[0], (group.expand(n, -1), sample[:, None], step & WORD, torch.full_like(step, stream & WORD)))


def philox_normal(key: Tensor, step: Tensor, stream: int, n: int, dim: int) -> Tensor:
    """Standard normal noise.

    Args:
        key: int64 (2,): the Philox key, and the number of the first sample.
        step: int64 (1,): the step.
        stream: which of a step's independent noises.
        n: number of samples.
        dim: elements per sample.

    Returns:
        Noise (n, dim), float32.
    """
    a, b, c, d = philox_words(key, step, stream, n, -(-dim // 4))
    return torch.stack((*box_muller(a, b), *box_muller(c, d)), dim=2).flatten(1)[:, :dim]


def philox_levels(key: Tensor, step: Tensor, stream: int, n: int, levels: int) -> Tensor:
    """One integer uniform over 0..levels - 1 per sample, (n,) int64."""
    return (philox_words(key, step, stream, n, 1)[0][:, 0] * levels) >> 32


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two 32-bit words."""
    # Of the square root alone double precision is used: rounded to single it is the correctly rounded one, which
    # torch's own is not everywhere.
    radius = (-2.0 * log((a >> 8).float() * 2.0**-24 + 2.0**-25)).double().sqrt().float()
    cosine, sine = cos_sin((b >> 8).float() * 2.0**-24)
    return radius * cosine, radius * sine


def log(x: Tensor) -> Tensor:
    """log x of positive normal float32."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return exponent.float() * LN2 + (f + f * f * polynomial(LOG, f))


def cos_sin(x: Tensor) -> tuple[Tensor, Tensor]:
    """cos 2 pi x and sin 2 pi x for x in [0, 1)."""
    quadrant = torch.floor(x * 4.0 + 0.5)
    r = x - quadrant * 0.25
    q = quadrant.int()
    square = r * r
    sine, cosine = r * polynomial(SIN, square), polynomial(COS, square)
    odd = (q & 1) == 1
    first, second = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(((q + 1) & 2) == 2, -first, first), torch.where((q & 2) == 2, -second, second)


def polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, each product and sum rounded."""
    y = torch.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        y = y * x + coefficient
    return y
