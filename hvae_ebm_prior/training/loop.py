"""Training (Alg. 1): one step after the other, with checkpoints, callbacks and a guard against divergence.

    fit           makes the run, or goes on with an interrupted one
    take_steps    training_step, then record, callbacks and checkpoint, until the run has all its steps

Whatever ends the loop leaves the prior in a good state: it holds the moving average of weights that were healthy.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backbone.validation import check_count, check_images
from ..chains.autograd import with_autograd
from ..chains.langevin import ChainDiverged
from ..energies.coupling import Labels, check_labels
from ..processes import agree, agree_on_generator, alone, broadcast, collect, progress_bar, rank
from ..saving.config import TrainingSummary
from ..saving.typed_json import to_json
from .activity import measure_activity
from .batches import Batches
from .checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .guard import Guard
from .interruption import signals_wait
from .optimizer import make_optimizer, peak_learning_rate, warmup_steps
from .posterior_cache import PosteriorCache
from .record import Callback, StopTraining, TrainingRecord
from .run import Run
from .step import Unhealthy, training_step
from .trainable import TrainablePrior

Data = Tensor | Dataset[Any] | Iterable[Any]


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go.

    Attributes:
        folder: the folder; None for none.
        every: steps between two checkpoints.
        resume: go on from the newest one there.
    """

    folder: str | Path | None = None
    every: int = 100
    resume: bool = False

    def open(self) -> Path | None:
        """Make the folder if need be.

        Returns:
            The folder; None for none.

        Raises:
            TypeError, ValueError: bad settings.
            FileExistsError: it holds checkpoints of a run that is not to be resumed.
        """
        check_count(self.every, "checkpoint_every")
        if self.folder is None:
            if self.resume:
                raise ValueError("resume: there is nothing to go on from without checkpoint_dir")
            return None
        folder = Path(self.folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not self.resume and find_checkpoints(folder):
            raise FileExistsError(
                f"{folder} holds checkpoints of a run: resume=True goes on with it; "
                "to begin anew, give another checkpoint_dir"
            )
        return folder


def warn_of_signs(labels: Labels) -> None:
    """Warn where the labels of a set are 1 and -1 alone, as those of attributes often are, and -1 is none here."""
    for name, values in labels.items():
        if values.unique().tolist() == [-1, 1]:
            warnings.warn(
                f"labels {name!r}: all are 1 or -1, and -1 says that a label is unknown; if it means no, give "
                "(labels + 1) // 2",
                RuntimeWarning,
                stacklevel=5,
            )


@with_autograd
@torch.enable_grad()
def train(
    prior: TrainablePrior,
    data: Data,
    config: TrainingConfig,
    *,
    labels: Tensor | Labels | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: Checkpoints = Checkpoints(),
    progress: bool | None = None,
    generator: torch.Generator | None = None,
) -> list[TrainingRecord]:
    """Learn the energies of a prior.

    Args:
        prior: the prior.
        data: as of `LearnedPrior.fit`.
        config: all settings.
        labels: of the images of a tensor.
        callbacks: called after every step.
        checkpoints: where they go, and whether to go on from there.
        progress: show a progress bar; None shows one on a terminal only.
        generator: source of all randomness; None takes torch's global generators.

    Returns:
        One record per step.

    Raises:
        TypeError, ValueError, OSError: as of `LearnedPrior.fit`.
        TrainingDiverged: training blew up again and again.
    """
    if labels is None and prior.coupling is not None and isinstance(data, Tensor):
        warnings.warn(
            f"this prior is coupled to {', '.join(prior.coupling.sets)}, of which it will learn nothing, as no labels "
            "are given: fit(images, labels=...)",
            UserWarning,
            stacklevel=3,
        )
    if labels is not None:
        labels = check_labels(labels, prior.coupling, len(data), prior.device)  # type: ignore[arg-type]
        warn_of_signs(labels)
    # Checkpoints and the model card say what was taken.
    config = replace(config, learning_rate=peak_learning_rate(config), warmup=warmup_steps(config))
    if not list(prior.parameters()):
        raise ValueError("the energy networks have no parameters, so there is nothing to learn")
    if isinstance(data, PosteriorCache):
        data.check(prior)
    check = partial(check_images, adapter=prior.backbone)
    generator = agree_on_generator(generator)
    folder = collect(checkpoints.open)[rank()]
    resumed = agree(folder is not None and bool(find_checkpoints(folder)))
    if not resumed:
        batches = Batches(data, config.batch_size, generator, check=check)
        measure_activity(prior, batches, config.activity_images, generator, progress=progress)
    broadcast(prior.state_dict().values())
    with contextlib.ExitStack() as at_the_end:
        trainee = copy.deepcopy(prior).train()
        at_the_end.callback(trainee.release)
        run = Run(
            prior=prior,
            trainee=trainee,
            config=config,
            batches=Batches(
                data,
                config.batch_size,
                generator,
                labels,
                config.workers,
                pin=prior.device.type == "cuda",
                check=check,
            ),
            guard=Guard(prior, trainee, config),
            optimizer=make_optimizer(trainee, config),
            generator=generator,
            micro_batch=config.micro_batch,
        )
        if folder is not None and resumed:
            load_checkpoint(folder, run)
            check_same_step(folder, collect(lambda: len(run.history)))
        at_the_end.callback(summarize, run)
        for callback in callbacks:
            if close := getattr(callback, "close", None):
                at_the_end.callback(close)
        take_steps(run, callbacks, progress, folder, checkpoints.every)
    return run.history


def take_steps(run: Run, callbacks: Sequence[Callback], progress: bool | None, folder: Path | None, every: int) -> None:
    """Steps until the run has all of them; a checkpoint goes to `folder` every so many steps and at the end, also where
    that is Ctrl-C or SIGTERM, which wait for it.
    """
    config, history = run.config, run.history
    began = time.monotonic() - (history[-1].seconds if history else 0.0)
    ended = len(history) >= config.iterations
    wait: AbstractContextManager[list[int]] = contextlib.nullcontext([]) if folder is None else signals_wait()
    with (
        wait as signals,
        progress_bar(config.iterations, "prior", done=len(history), shown=progress, leave=True) as bar,
    ):
        while not ended:
            try:
                record = training_step(run, began)
            except (ChainDiverged, Unhealthy) as error:
                go_back(run, str(error))
                continue
            history.append(record)
            bar.set_postfix_str(progress_text(record), refresh=False)
            bar.update()
            # All processes end after the same step.
            ended = len(history) == config.iterations or (folder is not None and any(collect(lambda: bool(signals))))
            due = folder is not None and (ended or len(history) % every == 0)
            if callbacks or due:
                try:
                    collect(partial(finish_step, run, callbacks, folder if due else None))
                except StopTraining:
                    return


def go_back(run: Run, trouble: str) -> None:
    """Return to the last good state, at half the learning rate; TrainingDiverged if that happened too often."""
    run.lr_scale /= 2
    run.warmup_from = len(run.history)
    run.guard.restore(trouble, run.history, run.lr_scale * peak_learning_rate(run.config))
    run.optimizer = make_optimizer(run.trainee, run.config)


def finish_step(run: Run, callbacks: Sequence[Callback], folder: Path | None) -> None:
    """The first process, by itself, calls the callbacks, and writes a checkpoint to a folder if there is one."""
    if rank() == 0:
        with alone():
            for callback in callbacks:
                callback(run.prior, run.history[-1])
            if folder is not None:
                save_checkpoint(folder, run)


def progress_text(record: TrainingRecord) -> str:
    """A record as the progress bar shows it."""
    chains = not all(math.isnan(gap) for gap in record.gaps)
    gaps = f", gap {max((gap for gap in record.gaps if not math.isnan(gap)), key=abs):.1f}" if chains else ""
    labels = "" if math.isnan(record.cross_entropy) else f", labels {record.cross_entropy:.2f}"
    return f"loss {record.loss:.2f}{gaps}{labels}"


def check_same_step(folder: Path, steps: Sequence[int]) -> None:
    """Raise ValueError unless all processes go on from the same step."""
    if len(set(steps)) > 1:
        raise ValueError(
            f"{folder}: the processes read checkpoints of different steps, {steps}; "
            "they need one folder that all of them see"
        )


def summarize(run: Run) -> None:
    """Note in the prior how it was trained."""
    if run.history:
        # Settings of None are those that were not set.
        settings = {name: value for name, value in to_json(run.config).items() if value is not None}
        run.prior.trained = TrainingSummary(len(run.history), run.history[-1].seconds, settings)
