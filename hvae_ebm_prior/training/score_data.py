"""What score matching learns from: states of the layers at noise levels, and what their velocity should be.

    u_phi = cos(phi) u_i + sin(phi) eps,      v = cos(phi) eps - sin(phi) u_i

of which v may be replaced by its mean given u_phi, the image and the layers above: where u_i was drawn from N(m_i,
s_i^2), with V = cos(phi)^2 s_i^2 + sin(phi)^2,

    E[v | u_phi, x, z_<i] = cos(phi) sin(phi) (1 - s_i^2) / V (u_phi - cos(phi) m_i) - sin(phi) m_i

has the same mean given u_phi and c_i, and little of the variance: none where an image says nothing (Rao-Blackwell). So
wherever the adapter knows m_i and s_i, as of every top-down model, v is that.

The share of noise in the variance, sin(phi)^2, is uniform. With uniform angles fewer levels would be in the middle,
where there is the most to learn (as in Esser et al., "Scaling rectified flow transformers for high-resolution image
synthesis", 2024; measured: docs/benchmarks.md, "Longer training").
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ..backbone.posterior import Posterior
from ..backbone.transform import LayerState
from ..chains.flow import LARGEST_ANGLE
from ..chains.streams import Streams, draw_key, open_streams, sample_seeds
from ..density.energy_model import EnergyModel
from ..energies.context import SMALLEST_ANGLE, VectorField
from ..energies.coupling import Labels
from .objective import Objective

# Noise levels of a vector for each of a map's: its networks cost little, and top layers, which are vectors, hold the
# most of the prior hole.
VECTOR_DRAWS = 4
# The fraction of the golden ratio: its multiples, modulo 1, cover the unit interval evenly from the first one on.
GOLDEN = (math.sqrt(5) - 1) / 2


class LayerData(NamedTuple):
    """What a layer learns from, M rows of it, the noise levels of an image one after the other.

    Attributes:
        u: its noise at the levels (M, *shape).
        velocity: what v should be on average (M, *shape).
        own: angles of the rows (M,).
        other: angles to tell theirs from (M,).
        context: of the images, each part (N, *shape).
    """

    u: Tensor
    velocity: Tensor
    own: Tensor
    other: Tensor
    context: LayerState


class ScoreData(NamedTuple):
    """All that a loss learns from.

    Attributes:
        labels: of the images (N,) by label set, -1 where unknown.
        above_angle: of the noise in the contexts (N,), 0 for none.
        layers: top to bottom.
    """

    labels: Mapping[str, Tensor]
    above_angle: Tensor
    layers: list[LayerData]

    def tensors(self) -> list[Tensor]:
        """All of it as one list."""
        layers = (part for *rows, context in self.layers for part in (*rows, *context))
        return [*self.labels.values(), self.above_angle, *layers]

    def like(self, tensors: Sequence[Tensor]) -> "ScoreData":
        """The same with other tensors, in the order of `tensors()`."""
        rest = iter(tensors)
        labels, above_angle = {name: next(rest) for name in self.labels}, next(rest)
        layers: list[LayerData] = []
        for _ in self.layers:
            u, velocity, own, other, *state = islice(rest, 8)
            layers.append(LayerData(u, velocity, own, other, LayerState(*state)))
        return ScoreData(labels, above_angle, layers)


def draw_data(
    prior: EnergyModel,
    u: Tensor,
    posterior: Posterior | None,
    labels: Labels,
    samples: range,
    generator: torch.Generator | None,
    objective: Objective,
) -> ScoreData:
    """Draw noise levels and noise.

    Args:
        prior: the prior.
        u: posterior noise of the data (N, D).
        posterior: the Gaussians that it was drawn from, where they are known.
        labels: of the images.
        samples: numbers of the images.
        generator: source of all noise.
        objective: the number of noise levels, and the share of images with noise in their contexts.

    Returns:
        The data.
    """
    key = draw_key(generator)
    streams = open_streams(key, samples, u.device, u.dtype, prior.execution.backend)
    gaussians = [] if posterior is None else list(zip(*map(prior.split, posterior), strict=True))
    with prior.execution.loss_precision(u.device):
        contexts, above_angle = noisy_contexts(prior, u, key, samples, streams, objective)
    draws = [draws_of(prior, i, objective) for i in range(len(contexts))]
    drawn = [spread_angles(key, samples, draws[k // 2], k).flatten() for k in range(2 * len(contexts))]
    # One copy to the device, as each waits for it.
    angles = torch.cat(drawn).to(u.device, prior.angle_dtype).split([len(part) for part in drawn])
    layers: list[LayerData] = []
    for i, (part, context) in enumerate(zip(prior.split(u), contexts, strict=True)):
        own, other = angles[2 * i : 2 * i + 2]
        noisy, velocity = noisy_states(part.to(prior.dtype).repeat_interleave(draws[i], 0), own, streams)
        if gaussians:
            mean, std = (x.to(prior.dtype).repeat_interleave(draws[i], 0) for x in gaussians[i])
            velocity = mean_velocity(noisy, own, mean, std)
        layers.append(LayerData(noisy, velocity, own, other, context))
    return ScoreData(labels, above_angle, layers)


@torch.no_grad()
def noisy_contexts(
    prior: EnergyModel, u: Tensor, key: int, samples: range, streams: Streams, objective: Objective
) -> tuple[list[LayerState], Tensor]:
    """The layers' contexts: the data's own, and those of data with noise for a share of the images, as joint chains
    meet them.

    Args:
        prior: the prior.
        u: posterior noise of the data (N, D).
        key: of the angles.
        samples: numbers of the images.
        streams: the samples' noise.
        objective: the share of images.

    Returns:
        States of all layers, and the angle of the noise in them (N,), 0 for none.
    """
    chosen, angle = spread(key, samples, 2, 2 * len(prior.latent_shapes)).unbind(1)
    angle = torch.where(chosen < objective.noisy_context, noise_angle(angle), 0.0).to(u)
    noisy = angle.cos()[:, None] * u + angle.sin()[:, None] * streams.normal(prior.dim)
    return [state.to(prior.dtype) for state in prior.transform.states(noisy)], angle


def noisy_states(data: Tensor, phi: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
    """A layer's noise at noise levels.

    Args:
        data: posterior noise of the layer, (M, *shape), one row for every image and level.
        phi: angles of the rows (M,).
        streams: the images' noise.

    Returns:
        u_phi and v (M, *shape).
    """
    eps = streams.normal(data.numel() // len(streams)).reshape(data.shape).to(data)
    cos, sin = (wave.to(data).reshape(-1, *[1] * (data.ndim - 1)) for wave in (phi.cos(), phi.sin()))
    return cos * data + sin * eps, cos * eps - sin * data


def mean_velocity(u: Tensor, phi: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """E[cos(phi) eps - sin(phi) u_0 | u = cos(phi) u_0 + sin(phi) eps] of u_0 ~ N(mean, std^2) and eps ~ N(0, I).

    Args:
        u: noisy states (M, *shape).
        phi: their angles (M,).
        mean: of the states without noise (M, *shape).
        std: of the states without noise (M, *shape).

    Returns:
        Velocities (M, *shape).
    """
    cos, sin = (wave.to(u).reshape(-1, *[1] * (u.ndim - 1)) for wave in (phi.cos(), phi.sin()))
    variance = std.square()
    slope = cos * sin * (1 - variance) / (cos.square() * variance + sin.square())
    return slope * (u - cos * mean) - sin * mean


def draws_of(prior: EnergyModel, i: int, objective: Objective) -> int:
    """Noise levels of every image in layer `i`."""
    is_vector = isinstance(getattr(prior.energies[i], "network", None), VectorField)
    return objective.noise_draws * (VECTOR_DRAWS if is_vector else 1)


def spread_angles(key: int, samples: range, draws: int, sequence: int) -> Tensor:
    """Angles (N, draws) of noise levels; arguments as of `spread`."""
    return noise_angle(spread(key, samples, draws, sequence))


def noise_angle(share: Tensor) -> Tensor:
    """Angles at which noise has such shares of the variance, from 0, at the smallest angle, to 1, at the largest."""
    least, most = math.sin(SMALLEST_ANGLE) ** 2, math.sin(LARGEST_ANGLE) ** 2
    return (least + (most - least) * share).sqrt().asin()


def spread(key: int, samples: range, draws: int, sequence: int) -> Tensor:
    """Numbers (N, draws) uniform over [0, 1), spread evenly over samples and independent of one another over draws and
    sequences; a sample's do not depend on which others there are.
    """
    generator = torch.Generator().manual_seed(sample_seeds(key, range(sequence, sequence + 1))[0])
    start = torch.rand(draws, generator=generator, device="cpu", dtype=torch.float64)
    numbers = torch.arange(samples.start, samples.stop, device="cpu", dtype=torch.float64)[:, None]
    return (start + GOLDEN * numbers).remainder(1)
