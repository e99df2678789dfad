"""Denoising score matching, layer by layer: energies with context learn the velocity of the diffusion of their layer.

    u_phi = cos(phi) u_i + sin(phi) eps,      v = cos(phi) eps - sin(phi) u_i
    loss = sum_i |grad Phi_i(u_phi, phi; c_i) - v|^2,      grad Phi_i = -tan(phi) grad f_i

Every layer is given the data's own layers above it: there are no chains, and one walk through the backbone, without its
gradient, serves all layers and noise levels. The minimum is E[v | u_phi] (Vincent 2011; in terms of v: Salimans & Ho
2022), and so it is with v's mean in its place (`score_data`).

Score matching leaves open what f_i is worth as a whole at every level and context, and sees the weights of distant
modes badly. The cross-entropy of noise levels settles both: which of two levels is this u_phi from, by f_i at either?
Its minimum is where exp f_i N(0, I) is normalised alike at all levels, and at pure noise f_i = 0. With labels, f_i +
l_i,y is learned in the place of f_i at every other noise level of an image, beside the cross-entropy of p(y | u) given
the layers so far.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.posterior import Posterior
from ..backbone.transform import LayerState
from ..density.energy_model import EnergyModel
from ..energies.coupling import Labels, check_labels, cross_entropy, evidence
from .captured import captured_loss
from .objective import BatchLoss, Objective
from .score_data import ScoreData, draw_data

# Logits (N, K) by label set.
Logits = Mapping[str, Tensor]
# One image in so many takes part in the calibration of levels; even, as images with odd numbers learn other labels.
CALIBRATED = 8


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
        The loss of every sample; its parts are means over noise levels and sums over layers. From a graph
        (`ExecutionConfig.graph`) its gradient is that of samples that weigh alike, and NaN if they do not.

    Raises:
        TypeError, ValueError: wrong labels, or labels for a prior that is not coupled.
    """
    n = len(u)
    samples = range(n) if rows is None else rows
    checked = {} if labels is None else check_labels(labels, prior.coupling, n, u.device)
    data = draw_data(prior, u, posterior, checked, samples, generator, objective)
    # Which images learn what is told by their numbers modulo CALIBRATED.
    start = samples.start % CALIBRATED

    def loss(*tensors: Tensor) -> Sequence[Tensor]:
        return layers_loss(prior, data.like(tensors), objective, start)

    factors = (objective.score, objective.calibration, prior.coupling and prior.coupling.weight)
    name = ("score", prior.execution, prior.schedule, factors, start, *data.labels)
    learn = partial(captured_loss, prior, name, loss) if prior.execution.graph else loss
    total, score, calibration, entropy = learn(*data.tensors())
    known = [(values >= 0).long() for values in checked.values()]
    labelled = torch.stack(known).sum(0) if known else torch.zeros(n, dtype=torch.long, device=u.device)
    return BatchLoss(
        total,
        score=score,
        calibration=calibration if objective.calibration else None,
        cross_entropy=entropy,
        labelled=labelled,
    )


def layers_loss(
    prior: EnergyModel, data: ScoreData, objective: Objective, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of all layers, of what was drawn.

    Args:
        prior: the prior to learn.
        data: what was drawn.
        objective: weights.
        start: number of the first image, modulo CALIBRATED.

    Returns:
        What is minimised, its score, its calibration and the cross-entropy of labels, each (N,).
    """
    above_angle, n = data.above_angle, len(data.above_angle)
    # Labels are read of the layers above as noisy as they are, and of the data's own at the first level.
    first_level = prior.schedule.on(above_angle.device, above_angle.dtype).angle[0]
    read_angle = torch.where(above_angle > 0, above_angle, first_level)
    read = torch.stack((read_angle, above_angle), dim=1).to(prior.angle_dtype)
    above = no_logits(prior, n)
    parts: list[LayerLoss] = []
    with prior.execution.loss_precision(above_angle.device):
        for i, layer in enumerate(data.layers):
            draws = len(layer.u) // n
            row = torch.arange(n * draws, device=above_angle.device)
            image = row // draws
            angles = torch.stack((layer.own, above_angle[image].to(prior.angle_dtype)), dim=1)
            rows = Rows(layer.u, layer.velocity, layer.context.mean[image], layer.context.std[image], angles)
            repeated = {name: values[image] for name, values in above.items()}
            own_labels = {name: values[image] for name, values in data.labels.items()}
            # Every other noise level of an image, and those of every other image, learn the energy under its labels.
            shown = (image + start + row % draws) % 2 == 1
            # Numbers of images that are multiples of CALIBRATED; counted, as a look would wait for a GPU.
            first = -start % CALIBRATED if objective.calibration else n
            chosen = row.reshape(n, draws)[first::CALIBRATED].flatten()
            loss = rows_loss(prior, i, rows, repeated, own_labels, shown, chosen, layer.other[chosen])
            parts.append(LayerLoss(*(part.to(above_angle).reshape(n, draws).mean(1) for part in loss)))
            with torch.no_grad():
                above = add_logits(prior, i, layer.context, read, above)
    score, calibration, entropy = (torch.stack(values).sum(0) for values in zip(*parts, strict=True))
    total = objective.score * score + objective.calibration * calibration
    if prior.coupling is not None:
        total = total + prior.coupling.weight * entropy
    return total, score, calibration, entropy


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
