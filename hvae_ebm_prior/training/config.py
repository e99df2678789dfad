"""Settings of training."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..backbone.validation import set_integers

ObjectiveName = Literal["score", "score-recovery", "score-joint-recovery", "recovery", "joint-recovery"]


@dataclass(frozen=True)
class TrainingConfig:
    """How the energies are learned.

    Attributes:
        iterations: optimiser steps.
        batch_size: images per step.
        learning_rate: largest learning rate of Adam. None for .002 from 2,000 iterations on, and more for fewer, as
            iterations^-1/2, up to .004; see `peak_learning_rate`.
        betas: Adam's decay rates.
        weight_decay: L2 penalty, added to the gradient.
        warmup: steps over which the learning rate rises linearly from 0, at the start and after a return to a good
            state. None for a twentieth of the iterations, and at most 100.
        final_learning_rate: fraction of the learning rate that a cosine decay reaches at the last step; 1 for none.
        epoch_decay: factor on the learning rate after each pass over the data.
        energy_penalty: weight of mean F^2 / sqrt(D), added to the loss, which keeps energies and their curvature small
            (Du & Mordatch, 2019); a bias, to be used where training is not stable without.
        clip_norm: largest gradient norm; infinite for none.
        ema_decay: decay rate of the moving average that the prior holds; 0 for none.
        gap_limit: largest energy gap, in units of sqrt(D) nats, averaged over levels and the last steps, that is
            healthy; 20 nats always are.
        restarts: how often the last good state is restored, at half the learning rate, before giving up.
        activity_images: images on which a fresh prior measures the activity of every latent dimension; see
            `measure_activity`. 0 for none.
        micro_batch: images whose chains and gradients are computed at a time; it bounds memory, and results depend on
            it by rounding alone. None for all of a batch (in several processes, of a process's share). It is halved,
            with a warning, when memory runs out.
        encode_batch: images whose posterior draws come from one seed; None for a whole batch. Results depend on it, and
            not on how many processes there are. Several processes encode a whole batch each for None, and otherwise the
            parts of this size that they need.
        workers: processes that read a dataset ahead; 0 for none. Results do not depend on it.
        objective: "score" for denoising score matching of energies with context, and the calibration of levels;
            "score-recovery" for that, with teacher-forced recovery likelihood beside it at the end, and
            "score-joint-recovery" with that of Alg. 1, whose chains run through the backbone: for priors that are
            drawn jointly; "recovery" and "joint-recovery" for either without the score. None for "score-recovery"
            where energies have context, and "joint-recovery" where not.
        recovery_share: share of the iterations, the last ones, that have recovery beside the score.
        recovery_weight: weight of recovery beside the score. More makes short chains better samplers, and the
            energies' values less those of a normalised density.
        noise_draws: noise levels of every image in a step of "score"; vectors have four times as many.
    """

    iterations: int = 2000
    batch_size: int = 32
    learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int | None = None
    final_learning_rate: float = 0.0
    epoch_decay: float = 1.0
    energy_penalty: float = 0.0
    clip_norm: float = 100.0
    ema_decay: float = 0.998
    gap_limit: float = 0.5
    restarts: int = 3
    activity_images: int = 512
    micro_batch: int | None = None
    encode_batch: int | None = None
    workers: int = 0
    objective: ObjectiveName | None = None
    recovery_share: float = 0.1
    recovery_weight: float = 0.2
    noise_draws: int = 2

    @classmethod
    def for_images(cls, images: int | None) -> "TrainingConfig":
        """The defaults, with as many iterations as so many images bear, 2,000 for 10,000, and otherwise in proportion
        to their square root, from 500 to 20,000.

        Args:
            images: number of images; None where it is not known.

        Returns:
            The settings.
        """
        if images is None:
            return cls()
        return cls(iterations=min(max(round(2000 * math.sqrt(images / 10_000)), 500), 20_000))

    def __post_init__(self) -> None:
        set_integers(self, dict.fromkeys(("iterations", "batch_size", "micro_batch", "encode_batch", "noise_draws"), 1))
        for name in ("learning_rate", "clip_norm", "gap_limit", "epoch_decay", "recovery_weight"):
            if not (self._follows(name) or getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be in [0, 1], got {self.final_learning_rate!r}")
        if self.objective not in (None, *get_args(ObjectiveName)):
            raise ValueError(
                f"objective: expected one of {', '.join(get_args(ObjectiveName))}, or None, got {self.objective!r}"
            )
        if not 0 < self.recovery_share <= 1:
            raise ValueError(f"recovery_share must be in (0, 1], got {self.recovery_share!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        for name in ("energy_penalty", "weight_decay", "warmup", "restarts", "activity_images", "workers"):
            if not (self._follows(name) or getattr(self, name) >= 0):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")

    def _follows(self, name: str) -> bool:
        """Whether a field is one that follows from the iterations, by None."""
        return name in ("learning_rate", "warmup") and getattr(self, name) is None
