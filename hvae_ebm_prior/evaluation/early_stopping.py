"""Early stopping: training ends when a classifier no longer finds samples harder to tell from held-out noise."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..backbone.validation import check_count, check_images
from ..chains.streams import seeded
from ..density.latent_prior import LatentPrior
from ..training.record import StopTraining, TrainingRecord
from .diagnosis import two_sample_accuracy


class EarlyStopping:
    """A callback of `fit` that keeps the best state and ends training when nothing better comes.

    Every so many steps a small classifier, that of `hvae-ebm-prior diagnose`, learns to tell the prior's noise from the
    posterior noise of images that are not trained on; the share that it gets right on draws which it has not seen is
    the figure, .5 where there is nothing to tell. When training ends, however it ends, the prior is at its best state.
    It draws from random states of its own, so that training does not change by a bit.

    Args:
        images: held-out images (N, C, H, W) in [0, 1], some hundreds or more.
        every: steps between two tests, each the time of N samples.
        patience: tests without a better figure after which training ends.
        seed: of all randomness.

    Attributes:
        history: iteration and accuracy of every test.
        best: iteration and accuracy of the best one; None before the first.

    Raises:
        TypeError, ValueError: counts that are not positive; when it is first called, images of a wrong type, shape or
            range.
    """

    def __init__(self, images: Tensor, *, every: int = 250, patience: int = 4, seed: int = 0) -> None:
        every = check_count(every, "every")
        patience = check_count(patience, "patience")
        self.images, self.every, self.patience, self.seed = images, every, patience, seed
        self.history: list[tuple[int, float]] = []
        self.best: tuple[int, float] | None = None
        self._prior: Any = None
        self._checked = False
        self._state: dict[str, Tensor] = {}

    def __call__(self, prior: Any, record: TrainingRecord) -> None:
        """Test every `every` steps; StopTraining after `patience` tests without a better figure."""
        if not self._checked:
            check_images(self.images, prior.backbone)
            self._checked = True
        if record.iteration % self.every:
            return
        accuracy = held_out_accuracy(prior, self.images, self.seed)
        self.history.append((record.iteration, accuracy))
        if self.best is None or accuracy < self.best[1]:
            self.best = (record.iteration, accuracy)
            self._prior, self._state = prior, copy.deepcopy(prior.state_dict())
        tests_since = sum(iteration > self.best[0] for iteration, _ in self.history)
        if tests_since >= self.patience:
            raise StopTraining(f"accuracy {accuracy:.3f}, best {self.best[1]:.3f} at step {self.best[0]}")

    def close(self) -> None:
        """Put the prior into its best state."""
        if self._prior is not None:
            self._prior.load_state_dict(self._state)


@torch.no_grad()
def held_out_accuracy(prior: LatentPrior, images: Tensor, seed: int = 0) -> float:
    """Accuracy of a classifier between a prior's noise and the posterior noise of images.

    Args:
        prior: the prior.
        images: held-out images (N, C, H, W) in [0, 1].
        seed: of all randomness.

    Returns:
        The share of held-out draws that are classified correctly; .5 for a perfect prior, within its standard error of
        1 / sqrt(8 N).
    """
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, prior.device):
        chunks = images.split(prior.samples_per_chunk)
        data = torch.cat([prior.encode(chunk, generator=generator) for chunk in chunks])
        drawn = prior.sample_noise(len(images), generator=generator)
        return two_sample_accuracy(data.float(), drawn.float(), generator)
