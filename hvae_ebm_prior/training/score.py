"""Denoising score matching, layer by layer: energies with context learn the velocity of the diffusion of their layer.

    u_phi = cos(phi) u_i + sin(phi) eps,      v = cos(phi) eps - sin(phi) u_i
    loss = sum_i |grad Phi_i(u_phi, phi; c_i) - v|^2,      grad Phi_i = -tan(phi) grad f_i

of which v may be replaced by its mean given u_phi, the image and the layers above: where u_i was drawn from N(m_i,
s_i^2), with V = cos(phi)^2 s_i^2 + sin(phi)^2,

    E[v | u_phi, x, z_<i] = cos(phi) sin(phi) (1 - s_i^2) / V (u_phi - cos(phi) m_i) - sin(phi) m_i

has the same mean given u_phi and c_i, and little of the variance: none where an image says nothing (Rao-Blackwell). So
wherever the adapter knows m_i and s_i, as of every top-down model, v is that.

The share of noise in the variance, sin(phi)^2, is uniform. With uniform angles fewer levels would be in the middle,
where there is the most to learn (as in Esser et al., "Scaling rectified flow transformers for high-resolution image
synthesis", 2024; measured: docs/benchmarks.md, "Longer training"). Every layer is given the data's own layers above it:
there are no chains, and one walk through the backbone, without its gradient, serves all layers and noise levels. The
minimum is E[v | u_phi] (Vincent 2011; in terms of v: Salimans & Ho 2022).

Score matching leaves open what f_i is worth as a whole at every level and context, and sees the weights of distant
modes badly. The cross-entropy of noise levels settles both: which of two levels is this u_phi from, by f_i at either?
Its minimum is where exp f_i N(0, I) is normalised alike at all levels, and at pure noise f_i = 0. With labels, f_i +
l_i,y is learned in the place of f_i at every other noise level of an image, beside the cross-entropy of p(y | u) given
the layers so far.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.posterior import Posterior
from ..backbone.transform import LayerState
from ..chains.flow import LARGEST_ANGLE
from ..chains.streams import Streams, draw_key, open_streams, sample_seeds
from ..density.energy_model import EnergyModel
from ..energies.context import SMALLEST_ANGLE, VectorField
from ..energies.coupling import Labels, check_labels, cross_entropy, evidence
from .objective import BatchLoss, Objective

# Logits (N, K) by label set.
Logits = Mapping[str, Tensor]
# Noise levels of a vector for each of a map's: its networks cost little, and top layers, which are vectors, hold the
# most of the prior hole.
VECTOR_DRAWS = 4
# One image in so many takes part in the calibration of levels.
CALIBRATED = 8
# The fraction of the golden ratio: its multiples, modulo 1, cover the unit interval evenly from the first one on.
GOLDEN = (math.sqrt(5) - 1) / 2


def score_loss(
    prior: EnergyModel,
    u: Tensor,
    labels: Tensor | Labels | None,
    generator: torch.Generator | None,
    rows: range | None,
    objective: Objective,
    posterior: Posterior | None = None,
) -> BatchLoss:
    """The loss of posterior noise of images; see the module's text.

    Args:
        prior: the prior to learn; its energies have context.
        u: posterior noise of the data (N, D).
        labels: of the images, see `check_labels`.
        generator: source of all noise.
        rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
        objective: weights, and the number of noise levels.
        posterior: the Gaussians that `u` was drawn from, where they are known.

    Returns:
        The loss of every sample; its parts are means over noise levels and sums over layers.

    Raises:
        TypeError, ValueError: wrong labels, or labels for a prior that is not coupled.
    """
    n = len(u)
    samples = range(n) if rows is None else rows
    key = draw_key(generator)
    streams = open_streams(key, samples, u.device, u.dtype, prior.execution.backend)
    checked = {} if labels is None else check_labels(labels, prior.coupling, n, u.device)
    data = prior.split(u)
    gaussians = [] if posterior is None else list(zip(*map(prior.split, posterior), strict=True))
    parts: list[LayerLoss] = []
    with prior.execution.loss_precision(u.device):
        contexts, above_angle = noisy_contexts(prior, u, key, samples, streams, objective)
        # Labels are read of the layers above as noisy as they are, and of the data's own at the first level.
        read_angle = torch.where(above_angle > 0, above_angle, prior.schedule.angle[0].to(u))
        above = no_logits(prior, n)
        for i, context in enumerate(contexts):
            draws = draws_of(prior, i, objective)
            own, other = (
                spread_angles(key, samples, draws, sequence).to(u).flatten() for sequence in (2 * i, 2 * i + 1)
            )
            image = torch.arange(n, device=u.device).repeat_interleave(draws)
            angles = torch.stack((own, above_angle[image]), dim=1).to(prior.angle_dtype)
            layer = noisy_rows(data[i].to(prior.dtype)[image], context, image, angles, streams)
            if gaussians:
                mean, std = (part.to(prior.dtype)[image] for part in gaussians[i])
                layer = layer._replace(velocity=mean_velocity(layer.u, angles[:, 0], mean, std))
            repeated = {name: values[image] for name, values in above.items()}
            own_labels = {name: values[image] for name, values in checked.items()}
            row = torch.arange(n * draws, device=u.device)
            # Every other noise level of an image, and those of every other image, learn the energy under its labels.
            shown = (image + samples.start + row % draws) % 2 == 1
            # Numbers of images that are multiples of CALIBRATED; counted, as a look would wait for a GPU.
            first = -samples.start % CALIBRATED if objective.calibration else n
            chosen = row.reshape(n, draws)[first::CALIBRATED].flatten()
            loss = rows_loss(prior, i, layer, repeated, own_labels, shown, chosen, other[chosen].to(prior.angle_dtype))
            parts.append(LayerLoss(*(part.to(u).reshape(n, draws).mean(1) for part in loss)))
            with torch.no_grad():
                read = torch.stack((read_angle, above_angle), dim=1).to(prior.angle_dtype)
                above = add_logits(prior, i, context, read, above)
    score, calibration, entropy = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
    total = objective.score * score + objective.calibration * calibration
    if prior.coupling is not None:
        total = total + prior.coupling.weight * entropy
    known = [(values >= 0).long() for values in checked.values()]
    labelled = torch.stack(known).sum(0) if known else torch.zeros(n, dtype=torch.long, device=u.device)
    return BatchLoss(
        total,
        score=score,
        calibration=calibration if objective.calibration else None,
        cross_entropy=entropy,
        labelled=labelled,
    )


class Rows(NamedTuple):
    """States of one layer at noise levels: its noise u and v, mean and std (M, *shape), and angles (M, 2)."""

    u: Tensor
    velocity: Tensor
    mean: Tensor
    std: Tensor
    angles: Tensor


class LayerLoss(NamedTuple):
    """Squared error of a layer's velocity, less that of zero, and cross-entropies of levels and of labels, each
    (M,).
    """

    score: Tensor
    calibration: Tensor
    cross_entropy: Tensor


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


def noisy_rows(data: Tensor, context: LayerState, image: Tensor, angles: Tensor, streams: Streams) -> Rows:
    """A layer's noise at noise levels.

    Args:
        data: posterior noise of the layer, (M, *shape), one row for every image and level.
        context: of the images (N, *shape).
        image: the rows' images (M,).
        angles: of the rows (M, 2).
        streams: the images' noise.

    Returns:
        The rows.
    """
    eps = streams.normal(data.numel() // len(streams)).reshape(data.shape).to(data)
    cos, sin = (wave.to(data).reshape(-1, *[1] * (data.ndim - 1)) for wave in (angles[:, 0].cos(), angles[:, 0].sin()))
    return Rows(cos * data + sin * eps, cos * eps - sin * data, context.mean[image], context.std[image], angles)


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


def rows_loss(
    prior: EnergyModel,
    i: int,
    rows: Rows,
    above: Logits,
    labels: Labels,
    shown: Tensor,
    chosen: Tensor,
    other: Tensor,
) -> LayerLoss:
    """The loss of one layer.

    Args:
        prior: the prior to learn.
        i: the layer.
        rows: M of them.
        above: logits (M, K) of the layers above by label set.
        labels: of the rows (M,) by label set, -1 where unknown.
        shown: rows (M,) that learn the energy under their labels.
        chosen: indices (m,) of the rows whose levels are calibrated.
        other: angles (m,) to tell theirs from.

    Returns:
        The loss of every row.
    """
    u = rows.u.detach().requires_grad_()
    value, marginal, logits = layer_value(prior, i, rows._replace(u=u), above, labels, shown)
    score = velocity_error(value, u, rows.velocity, rows.angles[:, 0])
    calibration, entropy = torch.zeros_like(score), torch.zeros_like(score)
    if len(chosen):
        # The same states once more, as if of another level, that is as probable as their own before u is seen.
        again = Rows(*(part[chosen] for part in rows))
        again = again._replace(angles=torch.stack((other, again.angles[:, 1]), dim=1))
        as_other = layer_value(prior, i, again, {name: values[chosen] for name, values in above.items()})[1]
        calibration = calibration.index_add(0, chosen, CALIBRATED * F.softplus(as_other - marginal[chosen]))
    for name, values in labels.items():
        if str(i) in prior.heads[name]:  # type: ignore[operator]
            entropy = entropy + cross_entropy(logits[name].to(entropy), values)
    return LayerLoss(score, calibration, entropy)


def layer_value(
    prior: EnergyModel,
    i: int,
    rows: Rows,
    above: Logits,
    labels: Labels = {},  # noqa: B006
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor, Logits]:
    """What a layer adds to F, with the evidence of labels and under them.

    Args:
        prior: the prior.
        i: the layer.
        rows: N states of it.
        above: logits (N, K) of the layers above by label set.
        labels: of the rows (N,) by label set, -1 where unknown.
        shown: rows (N,) whose known labels are to be conditioned on.

    Returns:
        f_i under the labels that are shown, (N,), f_i with the evidence of all labels, (N,), and the logits of the
        layers so far.
    """
    state = LayerState(rows.u, rows.mean + rows.std * rows.u, rows.mean, rows.std)
    f = marginal = prior.energies[i](state, rows.angles)
    logits = add_logits(prior, i, state, rows.angles, above)
    for name, values in logits.items():
        gained = evidence(values) - evidence(above[name])
        marginal = marginal + gained
        if shown is not None and name in labels:
            category = labels[name].clamp(min=0)[:, None]
            under_label = (values - above[name]).gather(1, category).squeeze(1)
            gained = torch.where(shown & (labels[name] >= 0), under_label, gained)
        f = f + gained
    return f, marginal, logits


def velocity_error(value: Tensor, u: Tensor, velocity: Tensor, phi: Tensor) -> Tensor:
    """|v - velocity|^2 - |velocity|^2 (N,) of v = -tan(phi) grad value.

    Args:
        value: what a layer adds to F (N,).
        u: its noise (N, *shape), from which `value` was computed.
        velocity: what v should be on average (N, *shape).
        phi: angles (N,).

    Returns:
        The error, 0 for an untrained prior.
    """
    gradient = torch.autograd.grad(value.sum(), u, create_graph=True)[0]
    v = -phi.tan().reshape(-1, *[1] * (u.ndim - 1)) * gradient
    return (v * (v - 2 * velocity)).flatten(1).sum(1)


def add_logits(prior: EnergyModel, i: int, state: LayerState, angles: Tensor, above: Logits) -> Logits:
    """Logits (N, K) by label set of the layers so far, with those of layer `i`."""
    logits = dict(above)
    for name, heads in prior.heads.items():
        if str(i) in heads:  # type: ignore[operator]
            logits[name] = logits[name] + heads[str(i)](state, angles)  # type: ignore[index]
    return logits


def no_logits(prior: EnergyModel, n: int) -> Logits:
    """Logits of no layers, zeros (n, K) by label set."""
    sets = {} if prior.coupling is None else prior.coupling.sets
    return {name: torch.zeros(n, labels.size, device=prior.device, dtype=prior.dtype) for name, labels in sets.items()}


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
