"""What a training step minimises, and the loss of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Weights of the parts of a loss.

    Attributes:
        score: of denoising score matching, for energies with context; see `score_loss`.
        recovery: of recovery likelihood; see `recovery_loss` and `teacher_forced_loss`.
        joint: whether the chains of recovery run through all layers together, as in the paper, or in each layer given
            the data's own layers above.
        calibration: of the cross-entropy of noise levels beside the score; see `score_loss`.
        noise_draws: noise levels of every image in `score`.
        noisy_context: share of the images for which the layers above are noisy, as joint chains meet them; for the
            others they are the data's own, as in ancestral drawing.
    """

    score: float = 0.0
    recovery: float = 0.0
    joint: bool = False
    calibration: float = 0.0
    noise_draws: int = 2
    noisy_context: float = 0.125


JOINT_RECOVERY = Objective(recovery=1.0, joint=True)
# The offsets of energies learn from the calibration alone, at full speed under Adam whatever its weight; beside the
# score, from which the rest learns, a larger one is noise.
SCORE = Objective(score=1.0, calibration=0.02)


class BatchLoss(NamedTuple):
    """The loss of every sample of a batch, and the figures of it that a training record averages; all (N,), None for
    what is no part of it.

    Attributes:
        total: what is differentiated: score, recovery, calibration and the cross-entropy of labels, weighted.
        levels: the level t at which the sample's chain was taken.
        recovery: F(T(u_t^-), t) - F(T(u_t), t) in nats.
        squares: F^2, the mean over chain and data.
        score: squared error of the velocity, summed over dimensions, less that of an untrained prior.
        calibration: cross-entropy of noise levels in nats.
        cross_entropy: -log p(y | u_t) summed over label sets; 0 where a sample has no label.
        labelled: how many labels the sample has, of sets that are coupled at its level.
        displacement: |u_t^- - start| / sqrt(D), the start being u_{t+1} or a persistent chain's last state.
        acceptance: mean acceptance probability of the Metropolis steps.
    """

    total: Tensor
    levels: Tensor | None = None
    recovery: Tensor | None = None
    squares: Tensor | None = None
    score: Tensor | None = None
    calibration: Tensor | None = None
    cross_entropy: Tensor | None = None
    labelled: Tensor | None = None
    displacement: Tensor | None = None
    acceptance: Tensor | None = None


def detach_loss(loss: BatchLoss) -> BatchLoss:
    """The same numbers without a graph, on the CPU."""
    return BatchLoss(*(None if values is None else values.detach().cpu() for values in loss))  # type: ignore[arg-type]


def join_losses(parts: Sequence[BatchLoss]) -> BatchLoss:
    """The loss of all samples of a batch from those of its parts, in their order."""
    fields = zip(*parts, strict=True)
    return BatchLoss(*(None if values[0] is None else torch.cat(values) for values in fields))  # type: ignore[arg-type]
