"""Diffusion recovery likelihood (Alg. 1): from posterior noise to the loss whose gradient is the learning gradient.

    loss = F(T(u_t^-), t) - F(T(u_t), t)        (Eq. 11, 12)

with u_t from the forward process and u_t^- by Langevin steps on p(. | u_{t+1}). The chain is drawn from and not
differentiated. Labels add the cross-entropy of p(y | u_t).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chains.langevin import LangevinConfig
from ..chains.streams import draw_key, open_streams
from ..density.conditional import draw_conditional
from ..density.energy_model import EnergyModel
from ..energies.coupling import Labels, check_labels, cross_entropy


class RecoveryLoss(NamedTuple):
    """The loss of every sample of a batch, and the figures of it that a training record averages; all (N,).

    Attributes:
        total: what is differentiated, F(T(u_t^-), t) - F(T(u_t), t) and the weighted cross-entropy, in nats.
        recovery: its first part.
        squares: F^2, the mean over chain and data.
        cross_entropy: -log p(y | u_t) summed over label sets; 0 where a sample has no label.
        labelled: how many labels the sample has, of sets that are coupled at its level.
        levels: the level t at which the sample was taken.
        displacement: |u_t^- - start| / sqrt(D), the start being u_{t+1} or a persistent chain's last state, or None.
        acceptance: mean acceptance probability of the Metropolis steps; None without any.
    """

    total: Tensor
    recovery: Tensor
    squares: Tensor
    cross_entropy: Tensor
    labelled: Tensor
    levels: Tensor
    displacement: Tensor | None = None
    acceptance: Tensor | None = None


def recovery_loss(
    prior: EnergyModel,
    u: Tensor,
    labels: Tensor | Labels | None = None,
    generator: torch.Generator | None = None,
    rows: range | None = None,
) -> RecoveryLoss:
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
    schedule = prior.schedule
    t = streams.levels(schedule.steps)
    alpha, sigma, alpha_bar, sigma_bar = (
        level.to(u)[:, None] for level in (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
    )
    u_t = alpha_bar[t] * u + sigma_bar[t] * streams.normal(prior.dim)
    u_next = alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(prior.dim)
    acceptance: list[Tensor] = []
    negative = draw_conditional(prior, u_next, t, streams, report=acceptance.append)
    return add_chain_figures(contrast(prior, negative, u_t, t, labels), u_next, negative, acceptance)


def gradients_of_recovery(langevin: LangevinConfig) -> int:
    """Gradients of the networks for a batch in one step of learning: one per step of the chain, one to learn from."""
    corrector_steps = langevin.corrector_steps
    # Metropolis steps compare the gradients at both ends, so they need one more than there are steps.
    return langevin.steps + 1 + (corrector_steps + 1 if corrector_steps else 0)


def contrast(
    prior: EnergyModel, negative: Tensor, u_t: Tensor, t: Tensor, labels: Tensor | Labels | None = None
) -> RecoveryLoss:
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
            z = prior.transform.to_latents(torch.cat((negative, u_t)))
        f, logits = prior.learned_corrections(z, t.repeat(2))
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
    return RecoveryLoss(total, recovery, squares, entropy, labelled, t)


def add_chain_figures(loss: RecoveryLoss, start: Tensor, end: Tensor, acceptance: Sequence[Tensor]) -> RecoveryLoss:
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


def detach_loss(loss: RecoveryLoss) -> RecoveryLoss:
    """The same numbers without a graph, on the CPU."""
    return RecoveryLoss(*(None if values is None else values.detach().cpu() for values in loss))  # type: ignore[arg-type]


def join_losses(parts: Sequence[RecoveryLoss]) -> RecoveryLoss:
    """The loss of all samples of a batch from those of its parts, in their order."""
    fields = zip(*parts, strict=True)
    return RecoveryLoss(*(None if values[0] is None else torch.cat(values) for values in fields))  # type: ignore[arg-type]
