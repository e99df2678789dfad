"""The activity of latent dimensions: what part of each one's variance images determine.

    activity_d = corr(u_d, u_d')  over images, for two posterior draws u, u' of each

In a deep VAE most dimensions are inactive: their posterior is the prior for every image, and energies need not look at
them.
"""

import math

import torch
from torch import Tensor

from ..density.latent_prior import LatentPrior
from ..energies.context import ContextEnergy
from ..energies.networks import LayerEnergy
from ..processes import progress_bar
from .batches import Batches
from .posterior_cache import PosteriorCache
from .trainable import TrainablePrior, networks_by_layer

# Share of the dimensions that count as active which may be there by chance.
FALSE_SHARE = 0.05


def measure_activity(
    prior: TrainablePrior,
    batches: Batches,
    count: int,
    generator: torch.Generator | None,
    *,
    progress: bool | None = None,
) -> None:
    """Measure the activity of every dimension, and set it in fresh default networks.

    Args:
        prior: the prior; networks whose activity was set before, and the user's own, are left alone.
        batches: the images.
        count: how many images to take.
        generator: source of the posterior draws.
        progress: show a progress bar; None shows one on a terminal only.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    fresh = [
        (i, network)
        for i, networks in enumerate(networks_by_layer(prior))
        for network in networks
        if isinstance(network, LayerEnergy | ContextEnergy) and bool((network.activity == 1).all())
    ]
    if not fresh or count == 0:
        return
    activity, moments, n = measure(prior, batches, count, generator, progress=progress)
    layers = [part[0] for part in prior.split(activity[None])]
    told = [tell_apart(part, n) for part in layers]
    # Too few images to tell anything, or an encoder that says nothing of them: no dimension is better than another.
    if not any(bool(part.any()) for part in told):
        told = [torch.ones_like(part) for part in told]
    for i, network in fresh:
        if isinstance(network, LayerEnergy):
            network.set_activity(layers[i])
        else:
            network.set_statistics(told[i], *moments[i])


def tell_apart(activity: Tensor, n: int) -> Tensor:
    """Activity, 0 where n images cannot tell it from none: these dimensions stay Gaussian.

    Of a layer's dimensions those stay of which at most FALSE_SHARE are there by chance (Benjamini & Hochberg,
    "Controlling the false discovery rate", 1995); of a layer without activity that is none, however large it is.

    Args:
        activity: correlations of a layer's dimensions.
        n: images they were measured on, so that the std of a correlation is n^-1/2 where there is none.

    Returns:
        Activity of the same shape.
    """
    chance = torch.erfc(activity.double() * math.sqrt(n / 2)) / 2
    ordered = chance.flatten().sort().values
    rank = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=ordered.dtype)
    allowed = FALSE_SHARE * rank / len(ordered)
    found = (ordered <= allowed).nonzero()
    limit = ordered[found[-1]] if len(found) else chance.new_zeros(1)
    return torch.where(chance <= limit, activity, 0.0)


def measure(
    prior: LatentPrior,
    batches: Batches,
    count: int,
    generator: torch.Generator | None,
    *,
    progress: bool | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], int]:
    """Statistics of `count` images or more.

    Args:
        prior: the prior.
        batches: the images.
        count: how many to take.
        generator: source of the posterior draws.
        progress: show a progress bar; None shows one on a terminal only.

    Returns:
        Correlation (D,) of two posterior draws of an image, in [0, 1], 0 for constants; for every layer the mean and
        the std of the backbone's means and log stds, (2, *latent_shapes[i]), those of a map over its positions too; and
        the number of images.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    if isinstance(batches.data, PosteriorCache) and batches.data.index.draws == 1:
        raise ValueError(
            "activity_images: activity is the correlation of two posterior draws of an image, and this cache has one "
            "of each; build it with draws=2 or more, call measure_activity on images before, or set "
            "TrainingConfig(activity_images=0)"
        )
    # Running sums over images of a, b, a b, a^2 and b^2, a and b being the two draws.
    sums = torch.zeros(5, prior.dim, device="cpu", dtype=torch.float64)
    # Likewise of a layer's contexts and their squares.
    contexts: list[Tensor] = [torch.zeros((), device="cpu", dtype=torch.float32)] * len(prior.latent_shapes)
    n = 0
    with progress_bar(count, "activity", shown=progress) as bar:
        while n < count:
            images = next(batches)[0]
            a, b = (batches.noise(prior, images, draw, generator).cpu().double() for draw in range(2))
            sums += torch.stack((a, b, a * b, a * a, b * b)).sum(1)
            n += len(images)
            bar.update(len(images))
            with torch.no_grad():
                states = prior.transform.states(a.to(prior.device, prior.dtype))
            for i, state in enumerate(states):
                context = torch.stack((state.mean, state.std.log())).cpu().double()
                contexts[i] = contexts[i] + torch.stack((context, context.square())).sum(2)
    mean_a, mean_b, product, square_a, square_b = sums / n
    correlation = (product - mean_a * mean_b) / ((square_a - mean_a**2) * (square_b - mean_b**2)).sqrt()
    moments = [context_moments(*each / n) for each in contexts]
    return correlation.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1), moments, n


def context_moments(mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and a std for each channel, (2, *shape), from means (2, *shape) of contexts and of their squares; where
    nothing varies the std is 1, so that contexts less their mean are 0.
    """
    variance = square - mean**2
    constant = variance <= 1e-6 * square.clamp(min=1e-6)
    variance = torch.where(constant, 0.0, variance)
    by_channel = variance.reshape(*variance.shape[:2], -1).mean(2)
    by_channel = by_channel.reshape(*by_channel.shape, *[1] * (variance.ndim - 2))
    scale = torch.where(by_channel > 0, by_channel, 1.0).sqrt()
    return mean, scale.expand_as(mean)
