"""The activity of latent dimensions: what part of each one's variance images determine.

    activity_d = corr(u_d, u_d')  over images, for two posterior draws u, u' of each

In a deep VAE most dimensions are inactive: their posterior is the prior for every image, and energies need not look at
them.
"""

import torch

from ..energies.networks import LayerEnergy
from .batches import Batches
from .posterior_cache import PosteriorCache
from .trainable import TrainablePrior, networks_by_layer


def measure_activity(prior: TrainablePrior, batches: Batches, count: int, generator: torch.Generator | None) -> None:
    """Measure the activity of every dimension, and set it in fresh default networks.

    Args:
        prior: the prior; networks whose activity was set before, and the user's own, are left alone.
        batches: the images.
        count: how many images to take.
        generator: source of the posterior draws.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    fresh = [
        (i, network)
        for i, networks in enumerate(networks_by_layer(prior))
        for network in networks
        if isinstance(network, LayerEnergy) and bool((network.activity == 1).all())
    ]
    if not fresh or count == 0:
        return
    if isinstance(batches.data, PosteriorCache) and batches.data.index.draws == 1:
        raise ValueError(
            "activity_images: activity is the correlation of two posterior draws of an image, and this cache has one "
            "of each; build it with draws=2 or more, call measure_activity on images before, or set "
            "TrainingConfig(activity_images=0)"
        )
    activity = posterior_correlation(prior, batches, count, generator)
    layers = prior.split(activity[None])
    for i, network in fresh:
        network.set_activity(layers[i][0])


def posterior_correlation(
    prior: TrainablePrior, batches: Batches, count: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Correlation (D,) of two posterior draws of an image, over `count` images or more, in [0, 1]; 0 for constants."""
    # Running sums over images of a, b, a b, a^2 and b^2, a and b being the two draws.
    sums = torch.zeros(5, prior.dim, dtype=torch.float64)
    n = 0
    while n < count:
        images = next(batches)[0]
        a, b = (batches.noise(prior, images, draw, generator).cpu().double() for draw in range(2))
        sums += torch.stack((a, b, a * b, a * a, b * b)).sum(1)
        n += len(images)
    mean_a, mean_b, product, square_a, square_b = sums / n
    correlation = (product - mean_a * mean_b) / ((square_a - mean_a**2) * (square_b - mean_b**2)).sqrt()
    return correlation.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
