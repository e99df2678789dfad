"""Callbacks of training: TensorBoard, Trackio, or a function of yours.

`fit(callback=...)` takes a callback or a sequence of them, each called as callback(prior, record) after every step. One
may have a method `close`, which is called when training ends, however it ends. One that raises ends training: the prior
holds its moving average, and the last checkpoint stands.

`TensorBoard` and `Trackio` log the numbers of `TrainingRecord` and, every so many steps, samples of the moving average,
always of the same noise. They draw from random states of their own, so that training does not change by a bit.
"""

import contextlib
import io
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbone.validation import check_count, takes_tensors
from ..chains.langevin import ChainDiverged
from ..chains.streams import seeded
from ..density.latent_prior import LatentPrior
from ..saving.extras import missing
from ..saving.grid import tile
from .record import Callback, TrainingRecord

LOGS = "tensorboard:FOLDER or trackio:PROJECT"


def scalars(record: TrainingRecord) -> dict[str, float]:
    """The numbers of a record by name, without those that were not measured."""
    named = {
        "loss": record.loss,
        **{f"gap/t{t}": gap for t, gap in enumerate(record.gaps)},
        "gradient_norm": record.gradient_norm,
        **{f"gradient_norm/layer{i}": norm for i, norm in enumerate(record.gradient_norms)},
        "chain/displacement": record.displacement,
        "chain/acceptance": record.acceptance,
        "cross_entropy": record.cross_entropy,
        "score": record.score,
        "calibration": record.calibration,
        "learning_rate": record.learning_rate,
        "gradients_per_second": record.gradients_per_second,
    }
    return {name: value for name, value in named.items() if not math.isnan(value)}


def sample_grid(prior: LatentPrior, count: int, seed: int) -> Tensor | None:
    """Samples as one picture; all random states and the prior stay as they were.

    Args:
        prior: the prior.
        count: number of samples.
        seed: of their noise.

    Returns:
        Pixels (C, H, W) in [0, 1] on the CPU, with 1 or 3 channels (of other images the first is shown); None of a
        model of plain tensors, and, with a warning, where chains diverged.
    """
    if takes_tensors(prior.backbone):
        return None
    was_training = prior.training
    try:
        prior.eval()
        with seeded(seed, prior.device):
            images = prior.sample(count, generator=torch.Generator().manual_seed(seed))
    except ChainDiverged as error:
        warnings.warn(f"no samples are shown: {error}", RuntimeWarning, stacklevel=4)
        return None
    finally:
        prior.train(was_training)
    images = images.float().cpu().clamp(0, 1)
    images = images if images.shape[1] == 3 else images[:, :1]
    return tile(images, math.ceil(math.sqrt(count)))


class Logger:
    """What `TensorBoard` and `Trackio` have in common.

    Args:
        every: steps between two records that are shown.
        samples_every: steps between two pictures of samples; 0 for none.
        samples: samples in a picture.
        seed: of the samples' noise.
    """

    def __init__(self, every: int, samples_every: int, samples: int, seed: int) -> None:
        every = check_count(every, "every")
        samples = check_count(samples, "samples")
        if samples_every:
            samples_every = check_count(samples_every, "samples_every")
        self.every = every
        self.samples_every = samples_every
        self.samples = samples
        self.seed = seed

    def __call__(self, prior: LatentPrior, record: TrainingRecord) -> None:
        """Log a record and a picture of samples, if they are due."""
        numbers = scalars(record) if record.iteration % self.every == 0 else {}
        due = self.samples_every and record.iteration % self.samples_every == 0
        picture = sample_grid(prior, self.samples, self.seed) if due else None
        if numbers or picture is not None:
            self.show(record.iteration, numbers, picture)

    def show(self, step: int, numbers: dict[str, float], picture: Tensor | None) -> None:
        """Write numbers by name and a picture (C, H, W) of a step."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left; a later record begins anew."""
        raise NotImplementedError


class TensorBoard(Logger):
    """Event files for TensorBoard: tensorboard --logdir log_dir.

    A run that goes on from a checkpoint hides what an interrupted one wrote of later steps.

    Args:
        log_dir: folder of the files.
        every: steps between two records that are written.
        samples_every: steps between two pictures of samples; 0 for none.
        samples: samples in a picture.
        seed: of the samples' noise.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError, ValueError: a wrong count.
    """

    def __init__(
        self, log_dir: str | Path, *, every: int = 1, samples_every: int = 500, samples: int = 16, seed: int = 0
    ) -> None:
        super().__init__(every, samples_every, samples, seed)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing("the callback TensorBoard needs tensorboard", "tensorboard") from error
        self.log_dir = Path(log_dir).expanduser()
        self._open = SummaryWriter
        self._writer: Any = None

    def show(self, step: int, numbers: dict[str, float], picture: Tensor | None) -> None:
        """Write numbers by name and a picture (C, H, W) of a step."""
        if self._writer is None:
            self._writer = self._open(str(self.log_dir), purge_step=step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if picture is not None:
            self._writer.add_image("samples", picture, step)

    def close(self) -> None:
        """Write what is left; a later record begins another event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Trackio(Logger):
    """A run of Trackio, on this machine or in a Space of the Hugging Face Hub: trackio show --project project.

    What Trackio prints is left out where nobody is at a terminal.

    Args:
        project: name of the project.
        name: name of the run, which is gone on with if there is one; None for a new run.
        space_id: Space to send to, as owner/name; None for this machine.
        every: steps between two records that are sent.
        samples_every: steps between two pictures of samples; 0 for none.
        samples: samples in a picture.
        seed: of the samples' noise.

    Raises:
        ImportError: Trackio is not installed.
        TypeError, ValueError: a wrong count.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        space_id: str | None = None,
        every: int = 1,
        samples_every: int = 500,
        samples: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__(every, samples_every, samples, seed)
        try:
            import trackio  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise missing("the callback Trackio needs trackio", "trackio") from error
        self.project = project
        self.name = name
        self.space_id = space_id
        self._trackio: Any = trackio
        self._run: Any = None

    def show(self, step: int, numbers: dict[str, float], picture: Tensor | None) -> None:
        """Send numbers by name and a picture (C, H, W) of a step."""
        with quiet():
            if self._run is None:
                resume = "never" if self.name is None else "allow"
                self._run = self._trackio.init(
                    project=self.project, name=self.name, space_id=self.space_id, resume=resume
                )
            values: dict[str, Any] = dict(numbers)
            if picture is not None:
                pixels = (picture * 255).round().byte().permute(1, 2, 0).expand(-1, -1, 3)
                values["samples"] = self._trackio.Image(pixels.contiguous().numpy(), caption=f"step {step}")
            self._run.log(values, step=step)

    def close(self) -> None:
        """Send what is left; a later record begins anew."""
        if self._run is not None:
            run, self._run = self._run, None
            with quiet():
                run.finish()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which nothing is printed unless to a terminal."""
    if sys.stdout.isatty():
        yield
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            yield


def open_log(place: str, samples_every: int, name: str) -> Callback:
    """The callback that `hvae-ebm-prior train --log` names.

    Args:
        place: tensorboard:FOLDER or trackio:PROJECT.
        samples_every: steps between two pictures of samples; 0 for none.
        name: of a run of Trackio.

    Returns:
        The callback.

    Raises:
        ImportError: its package is not installed.
        ValueError: another place.
    """
    kind, _, where = place.partition(":")
    if kind not in ("tensorboard", "trackio") or not where:
        raise ValueError(f"log: expected {LOGS}, got {place!r}")
    if kind == "tensorboard":
        return TensorBoard(where, samples_every=samples_every)
    return Trackio(where, name=name, samples_every=samples_every)
