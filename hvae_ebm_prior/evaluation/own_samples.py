"""Are the samples of an adapter's layers those that the model itself draws? The one question about an adapter that it
cannot answer from itself: with the std of a layer squared, say, T and its inverse still undo each other.

Two sets of n images each are compared by differences of means over the sets, of

    x_p,    (x_p - m_p)^2,    mean over c of y_c^2,    mean over p of (band_k(x) - band_k(m))_p^2

for every pixel p of images made small, with m the mean image of both sets; for their principal components c, of unit
variance over both sets, in groups of ever smaller ones; and for every band k of a Laplacian pyramid. The small
components and the fine bands show layers that draw details. Under equal densities any division of the 2n images in two
halves is as likely as the one that was given; a statistic that none of many random divisions reaches is a difference.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.transform import NoiseTransform
from ..backbone.validation import check_images, takes_tensors
from ..chains.streams import seeded

# Fewest samples that say something, most that are compared, and random divisions of them: what is right is called
# wrong once in as many.
FEWEST = 64
MOST = 1000
DIVISIONS = 1999
# Differences of means up to here are those of rounding to 8 bits, down or to the nearest.
RESOLUTION = 1 / 255
# Side that images are made small to for the statistics of pixels.
SIDE = 16


def check_samples(samples: Tensor, adapter: object) -> None:
    """Raise TypeError or ValueError unless `samples` are what an adapter decodes to, and enough of them."""
    try:
        check_images(samples, adapter)
    except (TypeError, ValueError) as error:
        raise type(error)(f"samples, as {error}") from error
    if len(samples) < FEWEST:
        raise ValueError(f"samples: expected at least {FEWEST} of the model's own, got {len(samples)}")


@torch.no_grad()
def compare_samples(transform: NoiseTransform, samples: Tensor, seed: int) -> Iterator[str]:
    """What tells images of the Gaussian layers from the model's own samples, in words.

    Args:
        transform: the adapter's layers.
        samples: the model's own samples (M, C, H, W) in [0, 1].
        seed: of all noise.

    Yields:
        One sentence where they differ.
    """
    if tuple(samples.shape[1:]) != transform.image_shape:
        yield f"samples: the adapter decodes to images {transform.image_shape}, got {tuple(samples.shape[1:])}"
        return
    own = samples[:MOST].to(transform.device, torch.float32)
    with seeded(seed, transform.device):
        noise = torch.randn(len(own), transform.dim, device=transform.device, dtype=transform.dtype)
        drawn = torch.cat([transform.decode(part).float() for part in noise.split(16)])
        if takes_tensors(transform.adapter):
            alike = equal_or_more(own, drawn, moments)
        else:
            alike = equal_or_more(eight_bits(own), eight_bits(drawn), differences)
    if alike == 1:
        spreads = [(x - torch.cat((own, drawn)).mean(0)).square().mean().sqrt() for x in (drawn, own)]
        yield (
            f"samples: {len(own)} images of the layers differ from the model's own (mean {drawn.mean():.3f} and "
            f"{own.mean():.3f}, spread {spreads[0]:.4f} and {spreads[1]:.4f}, p < {1 / DIVISIONS:.1g}): does a layer "
            "yield a variance or a log-std for its std, does top_down take its layers in another order than the model, "
            "or are the samples of another temperature, or draws of p(x|z) where decode gives means?"
        )


def eight_bits(images: Tensor) -> Tensor:
    """Images rounded as files are."""
    return (images.clamp(0, 1) * 255).round() / 255


def equal_or_more(own: Tensor, drawn: Tensor, differ: Callable[[Tensor, Tensor], Iterator[Tensor]]) -> int:
    """How many divisions in two differ by as much as two sets of n images each, (n, ...): the given one among them, and
    so one at least.
    """
    n = len(own)
    images = torch.cat((own, drawn))
    halves = torch.cat((images.new_ones(1, n), -images.new_ones(1, n)), dim=1) / n
    order = torch.stack([torch.randperm(2 * n, device=images.device) for _ in range(DIVISIONS)])
    divisions = torch.cat((halves, halves[0][order]))
    statistics = torch.stack(list(differ(images, divisions)), dim=1)
    # By how much a division stands out, in its most outstanding statistic.
    outstanding = ((statistics - statistics.mean(0)) / statistics.std(0).clamp(min=1e-12)).amax(1)
    return int((outstanding >= outstanding[0]).sum())


def squared(values: Tensor, divisions: Tensor, resolution: float = 0.0) -> Tensor:
    """Mean over values (2n, p) of their squared differences in units of the standard error, (divisions,)."""
    difference = (divisions @ (values - values.mean(0))).abs() - resolution
    error = values.std(0) * math.sqrt(4 / len(values))
    return (difference.clamp(min=0) / error.clamp(min=1e-6)).square().mean(1)


def moments(data: Tensor, divisions: Tensor, resolution: float = 0.0) -> Iterator[Tensor]:
    """Squared differences as of `differences` of data (2n, ...): means, squares, and groups of components; all that
    there are of plain tensors.
    """
    values = data.flatten(1)
    yield squared(values, divisions, resolution)
    centred = values - values.mean(0)
    yield squared(centred.square(), divisions)
    components, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    smallest = max(resolution * math.sqrt(len(values)), 1e-5 * sizes[0].item())
    count = int((sizes > smallest).sum())
    for first in (2**k - 1 for k in range(count.bit_length())):
        group = components[:, first : min(2 * first + 1, count)]
        yield squared(group.square().mean(1)[:, None] * len(values), divisions)


def differences(images: Tensor, divisions: Tensor) -> Iterator[Tensor]:
    """Every statistic of every division, (divisions,).

    Args:
        images: of both sets, (2n, C, H, W).
        divisions: weights (divisions, 2n) of the images, 1/n of one half and -1/n of the other.

    Yields:
        Squared differences in units of their standard error: means over pixels, of groups of components, of bands.
    """
    height, width = images.shape[2:]
    pixels = F.adaptive_avg_pool2d(images, (min(SIDE, height), min(SIDE, width)))
    yield from moments(pixels, divisions, RESOLUTION)
    residual = images - images.mean(0)
    while True:
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        coarse = F.adaptive_avg_pool2d(residual, (height, width))
        if coarse.shape == residual.shape:
            return
        band = residual - F.interpolate(coarse, residual.shape[2:])
        yield squared(band.square().mean((1, 2, 3))[:, None], divisions)
        residual = coarse
