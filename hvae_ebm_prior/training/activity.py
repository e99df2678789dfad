"""The activity of latent dimensions: what part of each one's variance images determine.

activity_d = corr(u_d, u_d')  over images, for two posterior draws u, u' of each
"""

import torch

from ..energies.networks import LayerEnergy
from .batches import Batches
from .posterior_cache import PosteriorCache
from .trainable import TrainablePrior


def measure_activity(prior: TrainablePrior, batches: Batches, count: int, generator: torch.Generator | None) -> None:
    """Tell fresh default energies what part of each dimension's variance images determine: the correlation of two
    posterior draws of one image.

    In a deep VAE most dimensions are inactive: their posterior is the prior whatever the image. Energies need not look
    at them.

    Args:
        prior: the prior; energies and label networks that know their activity already, and the user's own, are left
            alone.
        batches: the images.
        count: how many images to take.
        generator: source of the posterior draws.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    layers = [
        *enumerate(prior.energies),
        *((int(i), network) for networks in prior.heads.values() for i, network in networks.items()),
    ]  # type: ignore[operator]
    fresh = [
        (i, network)
        for i, network in layers
        if isinstance(network, LayerEnergy) and bool((network.activity == 1).all())
    ]
    if not fresh or count == 0:
        return
    if isinstance(batches.data, PosteriorCache) and batches.data.index.draws == 1:
        raise ValueError(
            "activity_images: activity is the correlation of two posterior draws of an image, and this cache has one of each; build it with "
            "draws=2 or more, call measure_activity on images before, or set TrainingConfig(activity_images=0)"
        )
    pairs, seen = torch.zeros(5, prior.dim, dtype=torch.float64), 0
    while seen < count:
        images = next(batches)[0]
        a, b = (batches.noise(prior, images, number, generator).cpu().double() for number in range(2))
        pairs += torch.stack((a, b, a * b, a * a, b * b)).sum(1)
        seen += len(images)
    mean_a, mean_b, product, square_a, square_b = pairs / seen
    correlation = (product - mean_a * mean_b) / ((square_a - mean_a**2) * (square_b - mean_b**2)).sqrt()
    activity = correlation.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    parts = prior.split(activity[None])
    for i, network in fresh:
        network.set_activity(parts[i][0])
