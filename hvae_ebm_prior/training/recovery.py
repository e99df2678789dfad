"""Diffusion recovery likelihood (Alg. 1): from images to the loss whose gradient is the learning gradient.

    loss = F(T(u_t^-), t) - F(T(u_t), t),      u_t from the forward process, u_t^- by Langevin steps on p(. | u_{t+1})      (Eq. 11, 12)

The chain is drawn from and not differentiated. Labels add the cross-entropy of p(y | u_t).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..chains.streams import draw_key, open_streams
from ..density.conditional import draw_conditional
from ..density.energy_model import EnergyModel
from ..energies.coupling import Labels, check_labels, cross_entropy


class RecoveryLoss(NamedTuple):
    """The loss of every sample of a batch.

    Attributes:
        total: what is learned from, F(T(u_t^-), t) - F(T(u_t), t) and the weighted cross-entropy, (N,) in nats.
        recovery: its first part.
        squares: F^2, the mean over chain and data.
        cross_entropy: -log p(y | u_t) summed over label sets; 0 where no label is known.
        labelled: how many labels were known and at a coupled level.
        levels: the level t at which each sample was taken.
        displacement: |u_t^- - start| / sqrt(D) of every sample, its start being u_{t+1} or a persistent chain's last
            state; None without chains.
        acceptance: every sample's mean acceptance probability of Metropolis steps; None without any.
    """

    total: Tensor
    recovery: Tensor
    squares: Tensor
    cross_entropy: Tensor
    labelled: int
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
    samples, schedule = range(len(u)) if rows is None else rows, prior.schedule
    streams = open_streams(draw_key(generator), samples, u.device, u.dtype, prior.execution.backend)
    t = streams.levels(schedule.steps)
    alpha, sigma, alpha_bar, sigma_bar = (
        level.to(u)[:, None] for level in (schedule.alpha, schedule.sigma, schedule.alpha_bar, schedule.sigma_bar)
    )
    u_t = alpha_bar[t] * u + sigma_bar[t] * streams.normal(prior.dim)
    u_next = alpha[t + 1] * u_t + sigma[t + 1] * streams.normal(prior.dim)
    acceptance: list[Tensor] = []
    negative = draw_conditional(prior, u_next, t, streams, report=acceptance.append)
    return observed(contrast(prior, negative, u_t, t, labels), negative, u_next, acceptance)


def observed(loss: RecoveryLoss, negative: Tensor, start: Tensor, acceptance: list[Tensor]) -> RecoveryLoss:
    """The loss, with what its chains did from `start` to `negative`, both (N, D), and their `acceptance`, if it was
    reported.
    """
    moved = torch.linalg.vector_norm(negative - start, dim=1) / math.sqrt(start.shape[1])
    return loss._replace(displacement=moved, acceptance=acceptance[0] if acceptance else None)


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
    with prior.execution.loss_precision(u_t.device):
        with torch.no_grad():
            z = prior.transform.to_latents(torch.cat((negative, u_t)))
        f, logits = prior.learned_corrections(z, t.repeat(2))
    f, logits = f.to(u_t), {name: values.to(u_t) for name, values in logits.items()}
    from_chain, from_data = f.sum(1).chunk(2)
    recovery, squares, entropy, labelled = (
        from_chain - from_data,
        (from_chain**2 + from_data**2) / 2,
        torch.zeros_like(from_data),
        0,
    )
    known_labels = {} if labels is None else check_labels(labels, prior.coupling, len(u_t), u_t.device)
    total = recovery
    if prior.coupling is not None:
        coupled = prior.coupling.coupled(t)
        for name, values in known_labels.items():
            known = values.where(coupled, -1)
            entropy = entropy + cross_entropy(logits[name][len(u_t) :], known)
            labelled += int((known >= 0).sum())
        total = recovery + prior.coupling.weight * entropy
    return RecoveryLoss(total, recovery, squares, entropy, labelled, t)
