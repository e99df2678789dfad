"""Denoising score matching, layer by layer: energies with context learn the velocity of the diffusion of their layer.

    u_phi = cos(phi) u_i + sin(phi) eps,      v = cos(phi) eps - sin(phi) u_i
    loss = sum_i |grad Phi_i(u_phi, phi; c_i) - v|^2,      grad Phi_i = -tan(phi) grad f_i

with phi uniform over a quarter turn, and every layer given the data's own layers above it: there are no chains, and one
walk through the backbone, without its gradient, serves all layers and noise levels. The minimum is E[v | u_phi]
(Vincent 2011; in terms of v: Salimans & Ho 2022).

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
# The fraction of the golden ratio: its multiples, modulo 1, cover the unit interval evenly from the first one on.
GOLDEN = (math.sqrt(5) - 1) / 2


def score_loss(
    prior: EnergyModel,
    u: Tensor,
    labels: Tensor | Labels | None,
    generator: torch.Generator | None,
    rows: range | None,
    objective: Objective,
) -> BatchLoss:
    """The loss of posterior noise of images; see the module's text.

    Args:
        prior: the prior to learn; its energies have context.
        u: posterior noise of the data (N, D).
        labels: of the images, see `check_labels`.
        generator: source of all noise.
        rows: numbers of these samples in a batch of which they are a part; None for a whole batch.
        objective: weights, and the number of noise levels.

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
    first = torch.stack((prior.schedule.angle[:1], torch.zeros(1)), dim=1).to(u).expand(n, 2)
    parts: list[LayerLoss] = []
    with prior.execution.loss_precision(u.device):
        with torch.no_grad():
            data = [state.to(prior.dtype) for state in prior.transform.states(u)]
            noisy = noisy_rows(prior, u, key, samples, streams, objective)
        above, above_noisy = no_logits(prior, n), no_logits(prior, len(noisy.image))
        for i, state in enumerate(data):
            draws = draws_of(prior, i, objective)
            clean = clean_rows(state, spread_angles(key, samples, draws, i).to(u), streams)
            both = join_rows(clean, noisy.layers[i])
            image = torch.cat((torch.arange(n, device=u.device).repeat_interleave(draws), noisy.image))
            logits_above = {
                name: torch.cat((above[name].repeat_interleave(draws, 0), above_noisy[name])) for name in above
            }
            own_labels = {name: values[image] for name, values in checked.items()}
            loss, logits = rows_loss(prior, i, both, logits_above, own_labels, n * draws, objective)
            parts.append(
                LayerLoss(*(torch.zeros_like(u[:, 0]).index_add(0, image, part.to(u)) / draws for part in loss))
            )
            with torch.no_grad():
                above = add_logits(prior, i, state, first, above)
                above_noisy = {name: values[n * draws :].detach() for name, values in logits.items()}
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


class NoisyRows(NamedTuple):
    """Images whose layers are all at one noise level: their numbers in the batch (M,), and rows of every layer."""

    image: Tensor
    layers: list[Rows]


class LayerLoss(NamedTuple):
    """Squared error of a layer's velocity, less that of zero, and cross-entropies of levels and of labels, each
    (M,).
    """

    score: Tensor
    calibration: Tensor
    cross_entropy: Tensor


def clean_rows(state: LayerState, angles: Tensor, streams: Streams) -> Rows:
    """A layer at several noise levels of every image, given the data's own layers above.

    Args:
        state: of the data (N, *shape).
        angles: noise levels (N, R).
        streams: the samples' noise.

    Returns:
        N R rows.
    """
    n, draws = angles.shape
    shape = state.u.shape[1:]
    eps = streams.normal(draws * math.prod(shape)).reshape(n * draws, *shape).to(state.u)
    data, mean, std = (part.repeat_interleave(draws, 0) for part in (state.u, state.mean, state.std))
    phi = angles.flatten().to(state.u)
    cos, sin = (wave.reshape(-1, *[1] * len(shape)) for wave in (phi.cos(), phi.sin()))
    levels = torch.stack((phi, torch.zeros_like(phi)), dim=1)
    return Rows(cos * data + sin * eps, cos * eps - sin * data, mean, std, levels)


def noisy_rows(
    prior: EnergyModel, u: Tensor, key: int, samples: range, streams: Streams, objective: Objective
) -> NoisyRows:
    """Some images with all layers at one noise level, as joint chains meet them.

    Args:
        prior: the prior.
        u: posterior noise of the data (N, D).
        key: of the angles.
        samples: numbers of the images.
        streams: the samples' noise.
        objective: the share of images.

    Returns:
        The rows of the images chosen.
    """
    chosen = spread_angles(key, samples, 2, len(prior.latent_shapes)).to(u)
    image = (chosen[:, 0] < objective.noisy_context * math.pi / 2).nonzero()[:, 0]
    eps = streams.normal(prior.dim)[image]
    phi = chosen[image, 1]
    cos, sin = phi.cos()[:, None], phi.sin()[:, None]
    velocity = prior.split(cos * eps - sin * u[image])
    states = prior.transform.states(cos * u[image] + sin * eps) if len(image) else prior.transform.states(u[:1])
    angles = torch.stack((phi, phi), dim=1).to(prior.dtype)
    layers = []
    for state, v in zip(states, velocity, strict=True):
        kept = state.to(prior.dtype) if len(image) else LayerState(*(part[:0].to(prior.dtype) for part in state))
        layers.append(Rows(kept.u, v.to(kept.u), kept.mean, kept.std, angles))
    return NoisyRows(image, layers)


def join_rows(clean: Rows, noisy: Rows) -> Rows:
    """The rows of both."""
    return Rows(*(torch.cat(parts) for parts in zip(clean, noisy, strict=True)))


def rows_loss(
    prior: EnergyModel, i: int, rows: Rows, above: Logits, labels: Labels, clean: int, objective: Objective
) -> tuple[LayerLoss, Logits]:
    """The loss of one layer.

    Args:
        prior: the prior to learn.
        i: the layer.
        rows: M of them, those of clean contexts first, whose levels come in pairs.
        above: logits (M, K) of the layers above by label set.
        labels: of the rows (M,) by label set, -1 where unknown.
        clean: number of rows of clean contexts.
        objective: whether levels are calibrated.

    Returns:
        The loss of every row, and the logits of the layers so far.
    """
    u = rows.u.detach().requires_grad_()
    state = LayerState(u, rows.mean + rows.std * u, rows.mean, rows.std)
    number = torch.arange(len(u), device=u.device)
    # Every other noise level learns the energy under the label, the rest that without.
    shown = (number < clean) & (number % 2 == 1)
    value, logits = layer_value(prior, i, state, rows.angles, above, labels, shown)
    score = velocity_error(value, u, rows.velocity, rows.angles[:, 0])
    calibration = torch.zeros_like(score)
    if objective.calibration:
        # Two levels of a pair take each other's place, so that neither is more probable before u is seen.
        still = LayerState(*(part[:clean].detach() for part in state))
        own = rows.angles[:clean]
        other = torch.stack((own[:, 0].unflatten(0, (-1, 2)).flip(1).flatten(), own[:, 1]), dim=1)
        own_above = {name: values[:clean] for name, values in above.items()}
        at_own, at_other = (
            layer_value(prior, i, still, angles, own_above, {}, shown[:clean])[0] for angles in (own, other)
        )
        calibration = torch.cat((F.softplus(at_other - at_own), score.new_zeros(len(u) - clean)))
    entropy = torch.zeros_like(score)
    for name, values in labels.items():
        if str(i) in prior.heads[name]:  # type: ignore[operator]
            entropy = entropy + cross_entropy(logits[name].to(entropy), values)
    return LayerLoss(score, calibration, entropy), logits


def layer_value(
    prior: EnergyModel,
    i: int,
    state: LayerState,
    angles: Tensor,
    above: Logits,
    labels: Labels,
    shown: Tensor,
) -> tuple[Tensor, Logits]:
    """What a layer adds to F, with the evidence of labels or under them.

    Args:
        prior: the prior.
        i: the layer.
        state: of the layer.
        angles: noise levels (N, 2).
        above: logits (N, K) of the layers above by label set.
        labels: of the samples (N,) by label set, -1 where unknown.
        shown: samples (N,) whose known labels are to be conditioned on.

    Returns:
        f_i and, of every label set, log sum_y exp l_y or l_y less what that was above, (N,); and the logits of the
        layers so far.
    """
    f = prior.energies[i](state, angles)
    logits = add_logits(prior, i, state, angles, above)
    for name, values in logits.items():
        gained = evidence(values) - evidence(above[name])
        if name in labels:
            category = labels[name].clamp(min=0)[:, None]
            under_label = (values - above[name]).gather(1, category).squeeze(1)
            gained = torch.where(shown & (labels[name] >= 0), under_label, gained)
        f = f + gained
    return f, logits


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


def spread_angles(key: int, samples: range, draws: int, layer: int) -> Tensor:
    """Angles (N, draws), uniform over a quarter turn but for its ends, spread evenly over samples and independent of
    one another over draws; a sample's do not depend on which others there are.
    """
    generator = torch.Generator().manual_seed(sample_seeds(key, range(layer, layer + 1))[0])
    start = torch.rand(draws, generator=generator, dtype=torch.float64)
    numbers = torch.arange(samples.start, samples.stop, dtype=torch.float64)[:, None]
    fraction = (start + GOLDEN * numbers).remainder(1)
    return SMALLEST_ANGLE + (LARGEST_ANGLE - SMALLEST_ANGLE) * fraction
