"""The activity of latent dimensions: what part of each one's variance images determine.

    activity_d = corr(u_d, u_d')  over images, for posterior draws u, u' of each

In a deep VAE most dimensions are inactive: their posterior is the prior for every image, and energies need not look at
them. Others say little each and much together, and are told from noise by many draws of an image, all pairs of which
count (Fisher's intraclass correlation).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..density.latent_prior import LatentPrior
from ..energies.context import ContextEnergy
from ..energies.networks import LayerEnergy
from ..processes import progress_bar
from .batches import Batches
from .posterior_cache import DRAWS, PosteriorCache
from .trainable import TrainablePrior, networks_by_layer

# Weights of activities: steps of their fit, and dimensions without activity that are counted beside those there are.
EM_STEPS = 300
NULL_COUNT = 9


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
        count: how many images to take, with eight posterior draws each, or those of a posterior cache if it has fewer.
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
    layers, moments, pairs = measure(prior, batches, count, generator, progress=progress)
    estimated = estimate_layers(layers, pairs)
    for i, network in fresh:
        if isinstance(network, LayerEnergy):
            network.set_activity(layers[i].clamp(min=0))
        else:
            network.set_statistics(estimated[i], *moments[i])


def estimate_layers(layers: Sequence[Tensor], pairs: int) -> list[Tensor]:
    """`estimate` of the correlations of every layer; ones where no layer has activity."""
    estimated = [estimate(correlation, pairs) for correlation in layers]
    # Too few images to tell anything, or an encoder that says nothing of them: no dimension is better than another.
    if not any(bool(part.any()) for part in estimated):
        return [torch.ones_like(part) for part in estimated]
    return estimated


def estimate(correlation: Tensor, pairs: int) -> Tensor:
    """Activity of a layer's dimensions from measured correlations: 0 where it is as likely as not that there is none,
    and elsewhere its mean given them.

    Activities of a channel of a map, or of another latent, are taken for a mixture of 0 and half-normals of several
    scales, with those weights under which its correlations, each with the std pairs^-1/2, are likeliest; weight goes to
    0 before all (Stephens, "False discovery rates: a new deal", 2017). So where few dimensions say much, these alone
    stay; where many say little, of which none could be told from noise by itself, all stay, shrunk to what noise leaves
    of them; and of a layer without activity nothing stays, however large it is.

    Args:
        correlation: of a layer's dimensions, in [-1, 1].
        pairs: pairs of posterior draws of one image that they were measured on.

    Returns:
        Activity of the same shape, in [0, 1].
    """
    shape = correlation.shape
    groups = shape[0] if len(shape) == 3 and math.prod(shape[1:]) > 1 else 1
    z = correlation.double().reshape(groups, -1, 1) * math.sqrt(pairs)
    # Scales of the half-normals in stds of a correlation, up to an activity of 1.
    scale = 2.0 ** torch.arange(-1, math.log2(pairs) / 2, device=z.device, dtype=z.dtype)
    # Given its half-normal, an activity is normal, cut off at 0.
    shrunk = scale**2 / (1 + scale**2)
    mean, std = z * shrunk, shrunk.sqrt()
    square, log_positive = 0.5 * (mean / std) ** 2, torch.special.log_ndtr(mean / std)
    # Log-likelihoods of the correlations, less that of no activity.
    log_ratio = math.log(2) - 0.5 * (1 + scale**2).log() + square + log_positive
    log_ratio = torch.cat((torch.zeros_like(z), log_ratio), dim=2)
    largest = log_ratio.amax(2, keepdim=True)
    likelihood = (log_ratio - largest).exp()
    shares = torch.ones_like(likelihood)
    for _ in range(EM_STEPS):
        weights = shares.sum(1, keepdim=True)
        weights[..., 0] += NULL_COUNT
        weighted = likelihood * weights / weights.sum(2, keepdim=True)
        shares = weighted / weighted.sum(2, keepdim=True)
    # Means of these normals.
    expected = mean + std * (-square - log_positive).exp() / math.sqrt(2 * math.pi)
    activity = (shares[..., 1:] * expected).sum(2) / math.sqrt(pairs)
    # What a channel's weights add must outweigh that they were looked for in all channels.
    gain = (weighted.sum(2, keepdim=True).log() + largest).sum(1)
    active = (shares[..., 0] < 0.5) & (gain > math.log(z.numel()))
    return torch.where(active, activity.clamp(0, 1), 0.0).to(correlation.dtype).reshape(shape)


def measure(
    prior: LatentPrior,
    batches: Batches,
    count: int,
    generator: torch.Generator | None,
    *,
    progress: bool | None = None,
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], int]:
    """Statistics of `count` images or more.

    Args:
        prior: the prior.
        batches: the images.
        count: how many to take.
        generator: source of the posterior draws.
        progress: show a progress bar; None shows one on a terminal only.

    Returns:
        For every layer the correlation of two posterior draws of an image, latent_shapes[i], in [-1, 1], 0 for
        constants; the mean and the std of the backbone's means and log stds, (2, *latent_shapes[i]), those of a map
        over its positions too; and the number of pairs of draws.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    held = batches.data.index.draws if isinstance(batches.data, PosteriorCache) else 0
    draws = min(DRAWS, held or DRAWS)
    if draws == 1:
        raise ValueError(
            "activity_images: activity is the correlation of posterior draws of an image, and this cache has one of "
            "each; build it with draws=2 or more, call measure_activity on images before, or set "
            "TrainingConfig(activity_images=0)"
        )
    # Running sums over images of the means of draws, of pairs' products and of squares.
    sums = torch.zeros(3, prior.dim, device="cpu", dtype=torch.float64)
    # Likewise of a layer's contexts and their squares.
    contexts: list[Tensor] = [torch.zeros((), device="cpu", dtype=torch.float32)] * len(prior.latent_shapes)
    n = 0
    with progress_bar(count, "activity", shown=progress) as bar:
        while n < count:
            images = next(batches)[0]
            u = torch.zeros((), device="cpu", dtype=torch.float64)
            total, squares = u, u
            for draw in range(draws):
                u = batches.noise(prior, images, draw, generator).cpu().double()
                total, squares = total + u, squares + u.square()
            products = (total.square() - squares) / (draws - 1)
            sums += torch.stack((total, products, squares)).sum(1) / draws
            n += len(images)
            bar.update(len(images))
            with torch.no_grad():
                states = prior.transform.states(u.to(prior.device, prior.dtype))
            for i, state in enumerate(states):
                context = torch.stack((state.mean, state.std.log())).cpu().double()
                contexts[i] = contexts[i] + torch.stack((context, context.square())).sum(2)
    mean, product, square = sums / n
    variance = square - mean**2
    # What is left of a constant is rounding.
    correlation = torch.where(variance > 1e-9 * square, (product - mean**2) / variance, 0.0)
    layers = [part[0] for part in prior.split(correlation.clamp(-1, 1)[None])]
    return layers, [context_moments(*each / n) for each in contexts], n * draws * (draws - 1) // 2


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
