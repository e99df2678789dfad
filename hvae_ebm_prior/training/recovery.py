"""Diffusion recovery likelihood (Alg. 1): from posterior noise to the loss whose gradient is the learning gradient.

    loss = F(T(u_t^-), t) - F(T(u_t), t)        (Eq. 11, 12)

with u_t from the forward process and u_t^- by Langevin steps on p(. | u_{t+1}). The chain is drawn from and not
differentiated. Labels add the cross-entropy of p(y | u_t).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..backbone.transform import LayerState
from ..chains.execution import chain_gradient, one_by_one
from ..chains.langevin import LangevinConfig, langevin_chain
from ..chains.streams import Streams, draw_key, open_streams
from ..density.conditional import draw_conditional
from ..density.energy_model import EnergyModel
from ..energies.coupling import Labels, check_labels, cross_entropy
from .objective import BatchLoss


def recovery_loss(
    prior: EnergyModel,
    u: Tensor,
    labels: Tensor | Labels | None = None,
    generator: torch.Generator | None = None,
    rows: range | None = None,
) -> BatchLoss:
    """The loss of posterior noise of images (Alg. 1, Eq. 11-12).

    Args:
        prior: the prior to learn.
        u: posterior noise of the data (N, D).
        labels: of the images, see `check_labels`.
        generator: source of the levels and of all other noise.
        rows: numbers of these samples in a batch of which they are a part; their noise is what they have in the whole.
            None for a whole batch.

    Returns:
        The loss, whose gradient in the parameters is the learning gradient.

    Raises:
        TypeError, ValueError: wrong labels, or labels for a prior that is not coupled.
        ChainDiverged: a chain left the finite numbers.
    """
    samples = range(len(u)) if rows is None else rows
    streams = open_streams(draw_key(generator), samples, u.device, u.dtype, prior.execution.backend)
    t, u_t, u_next = diffuse(prior, u, streams)
    acceptance: list[Tensor] = []
    negative = draw_conditional(prior, u_next, t, streams, report=acceptance.append)
    return add_chain_figures(contrast(prior, negative, u_t, t, labels), u_next, negative, acceptance)


def gradients_of_recovery(langevin: LangevinConfig) -> int:
    """Gradients of the networks for a batch in one step of learning: one per step of the chain, one to learn from."""
    corrector_steps = langevin.corrector_steps
    # Metropolis steps compare the gradients at both ends, so they need one more than there are steps.
    return langevin.steps + 1 + (corrector_steps + 1 if corrector_steps else 0)


def diffuse(prior: EnergyModel, u: Tensor, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """Levels t (N,), drawn uniformly, and states u_t and u_{t+1} (N, D) of one diffusion of noise `u` (N, D)."""
    schedule = prior.schedule
    t = streams.levels(schedule.steps)
    alpha, sigma, alpha_bar, sigma_bar, _ = (level[:, None] for level in schedule.on(u.device, u.dtype))
    u_t = alpha_bar[t] * u + sigma_bar[t] * streams.normal(prior.dim)
    return t, u_t, alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(prior.dim)


def teacher_forced_loss(
    prior: EnergyModel, u: Tensor, generator: torch.Generator | None = None, rows: range | None = None
) -> BatchLoss:
    """Recovery likelihood of every layer given the data's own layers above it.

    Given those, p(u_{t,i} | u_{t+1,i}, z_<i) of different layers are independent: their chains run at once, as one
    packed state whose gradient is that of the networks alone.

    Args:
        prior: the prior to learn; its energies have context.
        u: posterior noise of the data (N, D).
        generator: source of the levels and of all other noise.
        rows: as of `recovery_loss`.

    Returns:
        The loss, summed over layers.

    Raises:
        ChainDiverged: a chain left the finite numbers.
    """
    n = len(u)
    samples = range(n) if rows is None else rows
    streams = open_streams(draw_key(generator), samples, u.device, u.dtype, prior.execution.backend)
    with torch.no_grad(), prior.execution.precision(u.device):
        contexts = [part for state in prior.transform.states(u) for part in (state.mean, state.std)]
    t, u_t, u_next = diffuse(prior, u, streams)
    angle = prior.schedule.on(u.device, prior.angle_dtype).angle[t]
    angles = torch.stack((angle, torch.zeros_like(angle)), dim=1)

    def states(u: Tensor, contexts: Sequence[Tensor]) -> list[LayerState]:
        layers = zip(prior.split(u), contexts[::2], contexts[1::2], strict=True)
        return [LayerState(part, mean + std * part, mean, std).to(prior.dtype) for part, mean, std in layers]

    energies = prior.chain_energies(n)
    config = replace(prior.langevin, top_steps=1)

    def total(u: Tensor, angles: Tensor, *contexts: Tensor) -> Tensor:
        return energies(states(u, contexts), angles).sum()

    name = ("teacher-forced", energies, config, prior.schedule, prior.execution)
    negative = langevin_chain(
        chain_gradient(total, 1.0, prior.execution),
        u_next,
        t,
        schedule=prior.schedule,
        config=config,
        streams=streams,
        inputs=(angles, *contexts),
        keep=partial(prior.graphs.run, name) if prior.execution.graph else None,
    )
    with prior.execution.loss_precision(u.device):
        both = states(torch.cat((negative, u_t)), [x.repeat(2, *[1] * (x.ndim - 1)) for x in contexts])
        f = one_by_one(list(prior.energies), both, angles.repeat(2, 1)).to(u).sum(1)
    from_chain, from_data = f.chunk(2)
    loss = from_chain - from_data
    squares = (from_chain**2 + from_data**2) / 2
    return add_chain_figures(BatchLoss(loss, levels=t, recovery=loss, squares=squares), u_next, negative, [])


def contrast(
    prior: EnergyModel, negative: Tensor, u_t: Tensor, t: Tensor, labels: Tensor | Labels | None = None
) -> BatchLoss:
    """The loss of states from chains against states of the data; see `recovery_loss`.

    Args:
        prior: the prior to learn.
        negative: states from chains (N, D).
        u_t: states of the data (N, D).
        t: their levels (N,).
        labels: of the images, see `check_labels`.

    Returns:
        The loss.

    Raises:
        TypeError, ValueError: wrong labels, or labels for a prior that is not coupled.
    """
    n = len(u_t)
    with prior.execution.loss_precision(u_t.device):
        # Nothing of the backbone is learned, so its walk needs no graph.
        with torch.no_grad():
            states = prior.transform.states(torch.cat((negative, u_t)))
        f, logits = prior.learned_corrections(states, t.repeat(2))
    from_chain, from_data = f.to(u_t).sum(1).chunk(2)
    recovery = from_chain - from_data
    squares = (from_chain**2 + from_data**2) / 2
    checked = {} if labels is None else check_labels(labels, prior.coupling, n, u_t.device)
    total = recovery
    entropy = torch.zeros_like(recovery)
    labelled = torch.zeros_like(t)
    if prior.coupling is not None:
        coupled = prior.coupling.coupled(t)
        for name, values in checked.items():
            values = values.where(coupled, -1)
            entropy = entropy + cross_entropy(logits[name][n:].to(u_t), values)
            labelled = labelled + (values >= 0)
        total = recovery + prior.coupling.weight * entropy
    return BatchLoss(total, levels=t, recovery=recovery, squares=squares, cross_entropy=entropy, labelled=labelled)


def add_chain_figures(loss: BatchLoss, start: Tensor, end: Tensor, acceptance: Sequence[Tensor]) -> BatchLoss:
    """The loss with figures of its chains.

    Args:
        loss: of N samples.
        start: where the chains started (N, D).
        end: where they ended (N, D).
        acceptance: one tensor (N,) of mean acceptance probabilities, or none without Metropolis steps.

    Returns:
        The loss with `displacement` and `acceptance`.
    """
    displacement = torch.linalg.vector_norm(end - start, dim=1) / math.sqrt(start.shape[1])
    return loss._replace(displacement=displacement, acceptance=acceptance[0] if acceptance else None)
