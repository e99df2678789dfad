"""Training: Alg. 1 as a loop, with moving-average weights and a guard against divergence.

Two copies of the energies exist while `fit` runs: a trainee that the optimiser moves, and the prior's own, which follow it as an exponential
moving average. Weights enter the average only after a batch showed them healthy, so whatever ends the loop leaves the prior in a good state.
"""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import Batches
from .checkpoint import Run, find_checkpoints, load_checkpoint, save_checkpoint
from .coupling import Labels, check_labels
from .energy import LayerEnergy
from .gradients import learn
from .langevin import ChainDiverged
from .observation import gradient_norms, list_callbacks, parameters_by_layer
from .posterior_cache import PosteriorCache
from .processes import agree, agree_on_generator, alone, broadcast, collect, rank
from .sharing import TrainingSummary
from .typed_json import to_json
from .validation import check_count

if TYPE_CHECKING:
    from .prior import DiffusionEBMPrior


class TrainingDiverged(RuntimeError):
    """Training blew up more often than allowed; the prior is at its last good state.

    Args:
        message: what happened and what to do.
        history: records of the steps that were taken, kept as an attribute.
    """

    def __init__(self, message: str, history: "Sequence[TrainingRecord]" = ()) -> None:
        super().__init__(message)
        self.history = history


@dataclass(frozen=True)
class TrainingConfig:
    """How the energies are learned.

    Attributes:
        iterations: optimiser steps.
        batch_size: images per step.
        learning_rate: largest learning rate of Adam.
        betas: Adam's decay rates.
        weight_decay: L2 penalty, added to the gradient.
        warmup: steps over which the learning rate rises linearly from 0, at the start and after each return to a good state.
        final_learning_rate: fraction of the learning rate that a cosine decay reaches at the last step; 1 for none.
        epoch_decay: factor on the learning rate after each pass over the data.
        energy_penalty: weight of mean F^2 / sqrt(D), added to the loss, which keeps energies and their curvature small (Du & Mordatch, 2019);
            a bias, to be used where training is not stable without.
        clip_norm: largest gradient norm; infinite for none.
        ema_decay: decay rate of the moving average that the prior holds; 0 for none.
        gap_limit: largest energy gap, in units of sqrt(D) nats, averaged over levels and the last steps, that is healthy; 20 nats always are.
        restarts: how often the last good state is restored, at half the learning rate, before giving up.
        activity_images: images on which a fresh prior measures the activity of every latent dimension; see `measure_activity`. 0 for none.
        micro_batch: images whose chains and gradients are computed at a time; it bounds memory, and results depend on it by rounding alone. None for
            all of a batch (in several processes, of a process's share). It is halved, with a warning, when memory runs out.
        encode_batch: images whose posterior draws come from one seed; None for a whole batch. Results depend on it, and not on how many processes
            there are. Several processes encode a whole batch each for None, and otherwise the parts of this size that they need.
        workers: processes that read a dataset ahead; 0 for none. Results do not depend on it.
    """

    iterations: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.99)
    weight_decay: float = 0.0
    warmup: int = 50
    final_learning_rate: float = 0.1
    epoch_decay: float = 1.0
    energy_penalty: float = 0.0
    clip_norm: float = 10.0
    ema_decay: float = 0.99
    gap_limit: float = 0.5
    restarts: int = 3
    activity_images: int = 1024
    micro_batch: int | None = None
    encode_batch: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("micro_batch", "encode_batch"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        for name in ("learning_rate", "clip_norm", "gap_limit", "epoch_decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate must be in [0, 1], got {self.final_learning_rate!r}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay!r}")
        for name in ("energy_penalty", "weight_decay", "warmup", "restarts", "activity_images", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TrainingRecord:
    """One training step.

    Attributes:
        iteration: number of the step, from 1.
        loss: mean loss in nats.
        gaps: mean energy gap E(chain) - E(data) in nats per level t; NaN where the batch held no sample of that level.
        gradient_norm: norm of the gradient before clipping.
        learning_rate: learning rate of the step.
        seconds: time since the start.
        cross_entropy: mean of -log p(y | u_t) in nats over the labels that were known; NaN where none was.
        gradient_norms: of every layer's networks, before clipping; the root of the sum of their squares is `gradient_norm`.
        displacement: mean over chains of |end - start| / sqrt(D), dimensionless, the start being u_{t+1}; NaN without chains.
        acceptance: mean acceptance probability of the Metropolis steps; NaN where `LangevinConfig.corrector_steps` is 0.
        gradients_per_second: gradients of single images' energies per second of this step, those of the chain included.
    """

    iteration: int
    loss: float
    gaps: tuple[float, ...]
    gradient_norm: float
    learning_rate: float
    seconds: float
    cross_entropy: float = math.nan
    gradient_norms: tuple[float, ...] = ()
    displacement: float = math.nan
    acceptance: float = math.nan
    gradients_per_second: float = math.nan


# Called after every step; `close` of those that have it, when training ends in whatever way. See `hvae_ebm_prior.callbacks`.
Callback = Callable[["DiffusionEBMPrior", TrainingRecord], object]
# Steps between two snapshots of a healthy state, and the memory of the smoothed energy gap in steps.
SNAPSHOT_EVERY = 25
GAP_MEMORY = 10


def fit(
    prior: "DiffusionEBMPrior",
    data: Tensor | Dataset[Any] | Iterable[Any],
    labels: Tensor | Labels | None,
    training: TrainingConfig | None,
    given: Mapping[str, Any],
    callback: Callback | Sequence[Callback] | None,
    progress: bool | None,
    checkpoint_dir: str | Path | None,
    checkpoint_every: int,
    resume: bool,
    generator: torch.Generator | None,
) -> list[TrainingRecord]:
    """Learn the energies of `prior`; see `DiffusionEBMPrior.fit`, whose own settings are `given`."""
    if given.get("batch_size") is not None and not isinstance(data, Tensor | Dataset):
        raise ValueError(f"batch_size: a {type(data).__name__} has batches of its own; set the size there")
    if labels is not None and not isinstance(data, Tensor):
        raise ValueError(f"labels: they go with a tensor of images; a {type(data).__name__} gives (images, labels) itself")
    config = replace(training or TrainingConfig(), **{name: value for name, value in given.items() if value is not None})
    if labels is not None:
        labels = check_labels(labels, prior.coupling, len(data), prior.device)  # type: ignore[arg-type]
    if not list(prior.parameters()):
        raise ValueError("the energy networks have no parameters, so there is nothing to learn")
    callbacks = list_callbacks(callback)
    if isinstance(data, PosteriorCache):
        data.check(prior)
    generator = agree_on_generator(generator)
    folder = collect(lambda: open_folder(checkpoint_dir, checkpoint_every, resume))[rank()]
    begun = agree(folder is not None and bool(find_checkpoints(folder)))
    if not begun:
        measure_activity(prior, Batches(data, config.batch_size, generator), config.activity_images, generator)
    broadcast(prior.state_dict().values())
    trainee = copy.deepcopy(prior).train()
    try:
        batches = Batches(data, config.batch_size, generator, labels, config.workers, pin=prior.device.type == "cuda")
        guard = Guard(prior, trainee, config)
        run = Run(prior, trainee, config, batches, guard, make_optimizer(trainee, config), generator, micro_batch=config.micro_batch)
        if folder is not None and begun:
            load_checkpoint(folder, run)
            if len(set(steps := collect(lambda: len(run.history)))) > 1:
                raise ValueError(f"{folder}: the processes read checkpoints of different steps, {steps}; they need one folder that all of them see")
        try:
            with contextlib.ExitStack() as closing:
                for close in (getattr(each, "close", None) for each in callbacks):
                    if close is not None:
                        closing.callback(close)
                train(run, callbacks, progress, folder, checkpoint_every)
        finally:
            if run.history:
                # Settings of None are those that were not set.
                prior.trained = TrainingSummary(
                    len(run.history), run.history[-1].seconds, {k: v for k, v in to_json(config).items() if v is not None}
                )
        return run.history
    finally:
        trainee.release()


def open_folder(checkpoint_dir: str | Path | None, every: int, resume: bool) -> Path | None:
    """The folder of checkpoints, made if need be; None for none."""
    check_count(every, "checkpoint_every")
    if checkpoint_dir is None:
        if resume:
            raise ValueError("resume: there is nothing to go on from without checkpoint_dir")
        return None
    folder = Path(checkpoint_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and find_checkpoints(folder):
        raise FileExistsError(f"{folder} holds checkpoints of a run: resume=True goes on with it; to begin anew, give another checkpoint_dir")
    return folder


def train(run: Run, callbacks: Sequence[Callback], progress: bool | None, folder: Path | None, every: int) -> None:
    """The loop of `fit`: the optimiser moves the trainee, and the prior follows; a checkpoint goes to `folder` every so many steps and at the end."""
    prior, trainee, config, guard, history = run.prior, run.trainee, run.config, run.guard, run.history
    parameters, layers = list(trainee.parameters()), parameters_by_layer(trainee)
    begin = time.monotonic() - (history[-1].seconds if history else 0.0)
    with tqdm(total=config.iterations, initial=len(history), desc="prior", disable=rank() > 0 or (None if progress is None else not progress)) as bar:
        while (step := len(history)) < config.iterations:
            began = time.monotonic()
            images, labels, epoch = next(run.batches)
            run.optimizer.zero_grad()
            try:
                learned = learn(run, images, labels)
                norms = gradient_norms(layers)
                norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm).item()
                trouble = guard.trouble(learned.loss, norm)
            except ChainDiverged as error:
                trouble = str(error)
            if trouble:
                run.lr_scale, run.first = run.lr_scale / 2, step
                guard.restore(trouble, history, run.lr_scale * config.learning_rate)
                run.optimizer = make_optimizer(trainee, config)
                continue
            follow(prior, trainee, min(config.ema_decay, (1 + step) / (10 + step)))
            guard.keep(step)
            rate = run.lr_scale * learning_rate(config, step, epoch, run.first)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.step()
            now = time.monotonic()
            speed = len(images) * prior.gradients_per_step / max(now - began, 1e-9)
            loss, gaps, entropy, known, moved, accepted = learned
            history.append(TrainingRecord(step + 1, loss, gaps, norm, rate, now - begin, entropy, norms, moved, accepted, speed))
            labelled = f", labels {entropy:.2f}" if known else ""
            bar.set_postfix_str(f"loss {loss:.2f}, gap per t {' '.join(f'{gap:.1f}' for gap in gaps)}{labelled}", refresh=False)
            bar.update()
            due = folder is not None and (len(history) % every == 0 or len(history) == config.iterations)
            if callbacks or due:
                collect(partial(report, run, callbacks, folder if due else None))


def report(run: Run, callbacks: Sequence[Callback], folder: Path | None) -> None:
    """After a step the first process, by itself, calls the callbacks, and writes a checkpoint to a folder if there is one."""
    if rank() == 0:
        with alone():
            for callback in callbacks:
                callback(run.prior, run.history[-1])
            if folder is not None:
                save_checkpoint(folder, run)


def measure_activity(prior: "DiffusionEBMPrior", batches: Batches, count: int, generator: torch.Generator | None) -> None:
    """Tell fresh default energies what part of each dimension's variance images determine: the correlation of two posterior draws of one image.

    In a deep VAE most dimensions are inactive: their posterior is the prior whatever the image. Energies need not look at them.

    Args:
        prior: the prior; energies and label networks that know their activity already, and the user's own, are left alone.
        batches: the images.
        count: how many images to take.
        generator: source of the posterior draws.

    Raises:
        ValueError: the images come from a posterior cache of one draw each.
    """
    layers = [*enumerate(prior.energies), *((int(i), network) for networks in prior.heads.values() for i, network in networks.items())]  # type: ignore[operator]
    fresh = [(i, network) for i, network in layers if isinstance(network, LayerEnergy) and bool((network.activity == 1).all())]
    if not fresh or count == 0:
        return
    if isinstance(batches.data, PosteriorCache) and batches.data.index.draws == 1:
        raise ValueError(
            "activity_images: activity is the correlation of two posterior draws of an image, and this cache has one of each; build it with "
            "draws=2 or more, call measure_activity on images before, or set TrainingConfig(activity_images=0)"
        )
    pairs, seen = torch.zeros(5, prior.dim, dtype=torch.float64), 0
    while seen < count:
        images = next(batches)[0]
        a, b = (batches.noise(prior, images, number, generator).cpu().double() for number in range(2))
        pairs += torch.stack((a, b, a * b, a * a, b * b)).sum(1)
        seen += len(images)
    mean_a, mean_b, product, square_a, square_b = pairs / seen
    correlation = (product - mean_a * mean_b) / ((square_a - mean_a**2) * (square_b - mean_b**2)).sqrt()
    activity = correlation.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)
    parts = prior.split(activity[None])
    for i, network in fresh:
        network.set_activity(parts[i][0])


def make_optimizer(trainee: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """A fresh Adam; its learning rate is set at every step."""
    return torch.optim.Adam(trainee.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)


def learning_rate(config: TrainingConfig, step: int, epoch: int, first: int = 0) -> float:
    """Learning rate of `step` (from 0) in the given pass over the data: warm-up since step `first`, cosine decay and decay per pass, multiplied."""
    warmup = min(1.0, (step - first + 1) / (config.warmup + 1))
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / config.iterations)
    decay = config.final_learning_rate + (1 - config.final_learning_rate) * cosine
    return config.learning_rate * warmup * decay * config.epoch_decay**epoch


@torch.no_grad()
def follow(average: nn.Module, current: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards those of `current` by 1 - decay, and copy the buffers."""
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), current.buffers(), strict=True):
        mine.copy_(theirs)


class Guard:
    """Notices divergence and goes back to an averaged state that outlived the next `SNAPSHOT_EVERY` steps.

    Args:
        prior: the prior in training, which holds the averaged energies.
        trainee: the copy that the optimiser moves.
        config: limits.
    """

    def __init__(self, prior: "DiffusionEBMPrior", trainee: "DiffusionEBMPrior", config: TrainingConfig) -> None:
        self.prior, self.trainee = prior, trainee
        self.limit = max(20.0, config.gap_limit * math.sqrt(prior.dim))
        self.restarts_left = self.restarts = config.restarts
        self.smoothed = 0.0
        self.good = self.candidate = copy.deepcopy(prior.state_dict())

    def trouble(self, loss: float, gradient_norm: float) -> str:
        """What is wrong with a step, or an empty string."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient's norm is {gradient_norm}"
        self.smoothed += (loss - self.smoothed) / GAP_MEMORY
        if abs(self.smoothed) > self.limit:
            return f"the energy gap between chains and data, averaged over {GAP_MEMORY} steps, is {-self.smoothed:.4g} nats (limit {self.limit:.4g})"
        return ""

    def keep(self, step: int) -> None:
        """Every `SNAPSHOT_EVERY` steps, the last snapshot counts as good and a new one is taken."""
        if step % SNAPSHOT_EVERY == 0:
            self.good, self.candidate = self.candidate, copy.deepcopy(self.prior.state_dict())

    def restore(self, trouble: str, history: list[TrainingRecord], learning_rate: float) -> None:
        """Put prior and trainee back to the last good state and say so.

        Args:
            trouble: what was wrong.
            history: records so far.
            learning_rate: the learning rate from now on.

        Raises:
            TrainingDiverged: this happened more often than allowed.
        """
        self.prior.load_state_dict(self.good)
        self.trainee.load_state_dict(self.good)
        self.candidate, self.smoothed = self.good, 0.0
        if self.restarts_left == 0:
            raise TrainingDiverged(
                f"training diverged {self.restarts + 1} times, last at step {len(history) + 1}: {trouble}. The prior is at its last good state. "
                "Lower learning_rate or LangevinConfig.step_size, raise the number of noise levels, or set EnergyConfig(spectral_norm=True)",
                history,
            )
        self.restarts_left -= 1
        warnings.warn(
            f"step {len(history) + 1}: {trouble}; back to the last good state, learning rate now at most {learning_rate:.3g}",
            RuntimeWarning,
            stacklevel=4,
        )
