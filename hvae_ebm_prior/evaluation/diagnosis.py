"""Is there a prior hole, and in which layers?

Encode images and map them to noise: if the prior were right, u would be standard normal. Per layer this measures, from
several posterior draws of every image,

- the mean KL divergence of q(u_i | x) from N(0, 1), summed over dimensions, by a Gaussian fit over an image's draws:
  KL = (m^2 + v - 1 - log v) / 2, each term corrected for the number of draws. Below the top it is a lower bound, as the
  layers above vary too;
- inactive units: dimensions whose KL is not distinguishable from zero, which carry nothing of the image;
- moments of u over all images: E u^2 is 1 and E|u| is 0.798 for standard normal noise;
- the hole: the accuracy of a small classifier, trained on other images, that separates the active dimensions of u_i
  from standard normal noise; 50 % means no hole.

A layer is judged by itself: a hole in how layers depend on each other does not show.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone.lock import lock
from ..backbone.transform import BackboneAdapter, NoiseTransform
from ..backbone.validation import check_images
from ..chains.streams import draw_seeds, seeded
from ..processes import progress_bar

# A dimension is inactive if its mean KL does not exceed this, in nats, by two standard errors.
INACTIVE = 0.01
# Standard errors by which the classifier must beat chance for a hole.
SIGNIFICANT = 3.0


@dataclass(frozen=True)
class LayerReport:
    """What the posterior does in one layer.

    Attributes:
        shape: shape of the latent without batch.
        dimensions: its size.
        divergence: mean KL divergence of the posterior from the prior, in nats; below the top layer a lower bound;
            infinite for posteriors without noise.
        second_moment: mean of u^2; 1 under the prior.
        absolute_moment: mean of |u|; 0.798 under the prior.
        inactive: number of dimensions that carry nothing of the image.
        accuracy: of a classifier of posterior noise against standard normal noise, on held-out images; 0.5 without a
            hole.
        error: standard error of `accuracy`.
    """

    shape: tuple[int, ...]
    dimensions: int
    divergence: float
    second_moment: float
    absolute_moment: float
    inactive: int
    accuracy: float
    error: float

    @property
    def has_hole(self) -> bool:
        """Whether the classifier does better than chance."""
        return self.accuracy > 0.5 + SIGNIFICANT * self.error


def describe_layers(
    adapter: BackboneAdapter, images: Tensor, *, draws: int = 8, generator: torch.Generator | None = None
) -> list[LayerReport]:
    """Measure every layer's posterior noise.

    Args:
        adapter: the backbone.
        images: (N, C, H, W) in [0, 1], not those it was trained on; some hundreds give useful figures.
        draws: posterior draws per image.
        generator: source of all randomness; None takes torch's default generator.

    Returns:
        One report per layer, top to bottom.

    Raises:
        ValueError: fewer than 8 images or 4 draws, or images out of range.
    """
    check_images(images, adapter)
    if len(images) < 8 or draws < 4:
        raise ValueError(f"expected at least 8 images and 4 draws, got {len(images)} and {draws}")
    release = lock(adapter)
    try:
        transform = NoiseTransform(adapter)
        noise = posterior_noise(transform, images, draws, generator)
        return [describe_layer(part, generator) for part in zip_layers(transform, noise)]
    finally:
        release()


@torch.no_grad()
def posterior_noise(transform: NoiseTransform, images: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Posterior noise (draws, N, D) of `images`, a few at a time."""
    chunks = transform.take(images).split(16)
    noise = []
    with progress_bar(draws * len(images), "posteriors") as bar:
        for seed in draw_seeds(draws, generator):
            parts = []
            with seeded(seed, transform.device):
                for chunk in chunks:
                    parts.append(transform.to_noise(transform.infer(chunk)))
                    bar.update(len(chunk))
            noise.append(torch.cat(parts).float())
    return torch.stack(noise)


def zip_layers(transform: NoiseTransform, noise: Tensor) -> list[Tensor]:
    """Per-layer noise (draws, N, *shape) of `noise` (draws, N, D)."""
    parts = transform.split(noise.flatten(0, 1))
    return [part.unflatten(0, noise.shape[:2]) for part in parts]


def describe_layer(noise: Tensor, generator: torch.Generator | None) -> LayerReport:
    """The report of one layer from its posterior noise (draws, N, *shape)."""
    u = noise.flatten(2)
    divergence = posterior_divergence(u)
    inactive = divergence.mean(0) <= INACTIVE + 2 * divergence.std(0) / math.sqrt(len(divergence))
    active = ~inactive  # also where the divergence is infinite
    return LayerReport(
        shape=tuple(noise.shape[2:]),
        dimensions=u.shape[2],
        divergence=divergence.mean(0).sum().item(),
        second_moment=u.square().mean().item(),
        absolute_moment=u.abs().mean().item(),
        inactive=int(inactive.sum()),
        # Inactive dimensions follow the prior; among many of them the classifier would miss the others.
        accuracy=classifier_accuracy(u[..., active], generator) if bool(active.any()) else 0.5,
        error=math.sqrt(0.25 / (2 * u.shape[1])),
    )


def posterior_divergence(u: Tensor) -> Tensor:
    """KL divergence of q(u | x) from N(0, 1), in nats, from k draws of every image; unbiased where q is Gaussian, and
    infinite where all draws are equal.

    Args:
        u: (k, N, d).

    Returns:
        (N, d).
    """
    # Over k draws the squared mean is too large by v / k, and log v too small by log((k-1)/2) - digamma((k-1)/2).
    k = len(u)
    mean, variance = u.mean(0), u.var(0)
    half = torch.tensor((k - 1) / 2, device=u.device, dtype=u.dtype)
    log_variance = variance.log() + half.log() - torch.digamma(half)
    log_variance = torch.where((u == u[0]).all(0), -torch.inf, log_variance)
    return (mean.square() - variance / k + variance - 1 - log_variance) / 2


def classifier_accuracy(u: Tensor, generator: torch.Generator | None) -> float:
    """Held-out accuracy of a small network that classifies posterior noise against standard normal noise.

    Args:
        u: posterior noise (draws, N, d); networks are trained on each half of the images and tested on one draw of the
            other half.
        generator: source of the networks' weights and of all noise.

    Returns:
        The share of N posterior and N normal draws that are classified correctly.
    """
    seed = draw_seeds(1, generator)[0]
    half = u.shape[1] // 2
    correct = 0
    with seeded(seed, u.device), torch.enable_grad(), torch.inference_mode(False):
        for train, test in ((u[:, :half], u[0, half:]), (u[:, half:], u[0, :half])):
            logits = train_classifier(train.flatten(0, 1).clone())
            with torch.no_grad():
                correct += int((logits(test) > 0).sum() + (logits(torch.randn_like(test)) <= 0).sum())
    return correct / (2 * u.shape[1])


def two_sample_accuracy(real: Tensor, drawn: Tensor, generator: torch.Generator | None) -> float:
    """Held-out accuracy of the same network between two sets of noise.

    Args:
        real: noise (N, d).
        drawn: noise (N, d); networks are trained on each half of both and tested on the other.
        generator: source of the networks' weights and of all noise.

    Returns:
        The share of both that is classified correctly.
    """
    half, correct = len(real) // 2, 0
    first, last = slice(None, half), slice(half, None)
    with seeded(draw_seeds(1, generator)[0], real.device), torch.enable_grad(), torch.inference_mode(False):
        for train, test in ((first, last), (last, first)):
            logits = train_classifier(real[train].clone(), drawn[train].clone())
            with torch.no_grad():
                correct += int((logits(real[test]) > 0).sum() + (logits(drawn[test]) <= 0).sum())
    return correct / (len(real) + len(drawn))


def train_classifier(
    real: Tensor, drawn: Tensor | None = None, steps: int = 200, width: int = 64
) -> Callable[[Tensor], Tensor]:
    """Logits (n,) of a network trained to separate rows of `real` (n, d), positive, from those of `drawn` (m, d), or
    from standard normal ones.
    """
    scale = math.sqrt(width / (2 * real.shape[1]))
    kind: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    network = nn.Sequential(nn.Linear(2 * real.shape[1], width, **kind), nn.SiLU(), nn.Linear(width, 1, **kind))
    network = network.to(real.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)

    def logits(x: Tensor) -> Tensor:
        # With x^2 as an input too, a wrong variance is as easy to find as a wrong mean.
        return network(scale * torch.cat((x, (x.square() - 1) / math.sqrt(2)), dim=1)).squeeze(1)

    for _ in range(steps):
        batch = real[torch.randint(len(real), (128,), device=real.device)]
        other = (
            torch.randn_like(batch) if drawn is None else drawn[torch.randint(len(drawn), (128,), device=real.device)]
        )
        loss = F.softplus(-logits(batch)) + F.softplus(logits(other))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return logits


def layer_table(reports: Sequence[LayerReport]) -> str:
    """The reports as text, one line per layer, with the verdict below."""
    lines = ["layer  shape             dims    KL, nats   E u^2   E|u|   inactive   classifier accuracy"]
    for i, report in enumerate(reports):
        shape = "x".join(map(str, report.shape))
        accuracy = f"{report.accuracy:.0%} +- {report.error:.0%}{'  hole' if report.has_hole else ''}"
        lines.append(
            f"{i:5}  {shape:14} {report.dimensions:7} {report.divergence:11.2f} {report.second_moment:7.3f} "
            f"{report.absolute_moment:6.3f} {report.inactive:10}   {accuracy}"
        )
    holes = [str(i) for i, report in enumerate(reports) if report.has_hole]
    if holes:
        verdict = f"Prior hole in {'layer' if len(holes) == 1 else 'layers'} {', '.join(holes)}"
    else:
        verdict = "No prior hole found in any layer by itself"
    lines.append(f"{verdict}. (Under the prior: E u^2 = 1, E|u| = 0.798, classifier accuracy 50 %.)")
    return "\n".join(lines)
