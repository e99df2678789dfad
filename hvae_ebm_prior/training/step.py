"""One training step: batch -> noise -> loss -> gradient -> optimiser -> record.

Two copies of the energies exist: a trainee that the optimiser moves, and the prior's own, which follow it as an
exponential moving average. Weights enter the average only after a batch showed them healthy.

    gradient = sum over processes, sum over parts of the process's rows, of grad sum_n loss_n / N

A batch may be divided among processes, and each process's rows into parts that fit into its memory: noise belongs to
samples and not to batches, so that however a batch is divided, the gradient is that of the whole to rounding.
"""

import math
import time
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone.posterior import Posterior
from ..chains.streams import draw_key, sample_seeds
from ..energies.coupling import Labels, check_labels
from ..processes import add_gradients, collect, share, world
from .objective import BatchLoss, detach_loss, join_losses
from .optimizer import learning_rate, update_average
from .posterior_cache import PosteriorCache
from .record import TrainingRecord
from .run import Run
from .trainable import TrainablePrior, networks_by_layer

# Relative difference of batches' means at which processes read different images.
DIFFERENT = 1e-3
MEMORY_ERRORS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class Unhealthy(FloatingPointError):
    """A step whose loss or gradient must not be learned from."""


def training_step(run: Run, began: float) -> TrainingRecord:
    """Take one step of a run.

    Args:
        run: the run; its trainee, average, optimiser and guard move on. Its history does not.
        began: when the run began, by `time.monotonic`.

    Returns:
        The step's record.

    Raises:
        ChainDiverged: a chain of any process left the finite numbers; all raise it.
        Unhealthy: the guard found the step unhealthy; no weight has moved.
        ValueError: the processes read different images, or bad labels.
        torch.OutOfMemoryError: one image at a time is too much.
    """
    start = time.monotonic()
    prior, trainee, config = run.prior, run.trainee, run.config
    step = len(run.history)
    images, labels, epoch = next(run.batches)

    run.optimizer.zero_grad()
    losses = add_batch_gradient(run, images, labels)
    layer_norms = gradient_norms(parameters_by_layer(trainee))
    norm = nn.utils.clip_grad_norm_(list(trainee.parameters()), config.clip_norm).item()
    if trouble := run.guard.trouble(mean(losses.total), mean(losses.recovery), norm):
        raise Unhealthy(trouble)

    # The batch has just shown the weights before this update to be healthy, so these enter the average.
    update_average(prior, trainee, config.ema_decay, step)
    run.guard.keep(step)
    rate = run.lr_scale * learning_rate(config, step, epoch, run.warmup_from)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()

    now = time.monotonic()
    return TrainingRecord(
        iteration=step + 1,
        loss=mean(losses.recovery if losses.score is None else losses.score),
        gaps=energy_gaps(losses, prior.schedule.steps),
        gradient_norm=norm,
        learning_rate=rate,
        seconds=now - began,
        cross_entropy=label_entropy(losses),
        gradient_norms=layer_norms,
        displacement=mean(losses.displacement),
        acceptance=mean(losses.acceptance),
        score=mean(losses.score),
        calibration=mean(losses.calibration),
        gradients_per_second=len(images) * prior.gradients_per_step / max(now - start, 1e-9),
    )


def add_batch_gradient(run: Run, images: Tensor, labels: Tensor | Labels | None) -> BatchLoss:
    """Put the gradient of a batch into the trainee's parameters: every process computes its share, and all get the sum.

    Args:
        run: the run; `run.micro_batch` is halved when memory runs out.
        images: (N, C, H, W) in [0, 1], or rows (N,) of a posterior cache; the whole batch, in every process.
        labels: of the images.

    Returns:
        The loss of every sample of the batch, on the CPU, without a graph.
    """
    prior, n = run.prior, len(images)
    rows = share(n)
    own_labels = None
    if labels is not None and prior.coupling is not None:
        own_labels = pick_rows(check_labels(labels, prior.coupling, n, prior.device), rows)

    def compute_share() -> tuple[int, float, list[BatchLoss]]:
        brightness = images.float().mean().item() if world() > 1 else 0.0
        u, posterior = posterior_noise(run, images, rows)
        return n, brightness, add_gradient_of_rows(run, u, posterior, own_labels, rows, n)

    shares = collect(compute_share)
    check_batches([size for size, _, _ in shares], [brightness for _, brightness, _ in shares])
    add_gradients(list(run.trainee.parameters()))
    return join_losses([part for _, _, parts in shares for part in parts])


def posterior_noise(run: Run, images: Tensor, rows: range) -> tuple[Tensor, Posterior | None]:
    """Posterior noise (n, D) of some rows of a batch, with its Gaussians where they are known; all processes draw the
    same from the run's generator.
    """
    prior, size = run.prior, run.config.encode_batch
    try:
        if size is None or isinstance(run.batches.data, PosteriorCache):
            u, posterior = run.batches.noise_with_posterior(prior, images, run.batches.epoch, run.generator)
            return u[rows.start : rows.stop], pick_posterior(posterior, rows)
        # Blocks of `size` images have seeds of their own: only those that the rows lie in need be encoded.
        seeds = sample_seeds(draw_key(run.generator), range(math.ceil(len(images) / size)))
        first, last = rows.start // size, math.ceil(rows.stop / size)
        none = images.new_empty(0, prior.dim, device=prior.device, dtype=prior.dtype)
        parts: list[tuple[Tensor, Posterior | None]] = []
        for block in range(first, last) if rows else ():
            some = images[block * size : (block + 1) * size].to(prior.device, non_blocking=True)
            own_generator = torch.Generator().manual_seed(seeds[block])
            parts.append(prior.encode_with_posterior(some, generator=own_generator))
        own = range(rows.start - first * size, rows.start - first * size + len(rows))
        u = torch.cat([none, *(u for u, _ in parts)])[own.start : own.stop]
        known = [posterior for _, posterior in parts if posterior is not None]
        if not known:
            return u, None
        return u, pick_posterior(Posterior(*map(torch.cat, zip(*known, strict=True))), own)
    except Exception as error:
        if out_of_memory(error):
            images_at_a_time = size or len(images)
            error.add_note(
                f"This was the encoder on {images_at_a_time} images: set a smaller TrainingConfig(encode_batch=...)."
            )
        raise


def add_gradient_of_rows(
    run: Run, u: Tensor, posterior: Posterior | None, labels: Labels | None, rows: range, n: int
) -> list[BatchLoss]:
    """Add the gradients of rows of a batch of `n`, in parts of `run.micro_batch`, or of half as many until they fit.

    Args:
        run: the run.
        u: posterior noise (len(rows), D).
        posterior: its Gaussians where they are known.
        labels: of the rows.
        rows: numbers of the rows in the batch.
        n: size of the batch.

    Returns:
        The loss of every part.
    """
    trainee = run.trainee
    source = run.generator or torch.default_generator
    # Every part begins here: with the batch's key to come, and with weights under spectral normalisation as they were.
    random_state = source.get_state()
    buffers = [buffer.clone() for buffer in trainee.buffers()]
    while True:
        size = min(run.micro_batch or n, max(1, len(u)))
        parts = []
        try:
            for start in range(0, max(1, len(u)), size):
                stop = min(start + size, len(u))
                source.set_state(random_state)
                with torch.no_grad():
                    for buffer, value in zip(trainee.buffers(), buffers, strict=True):
                        buffer.copy_(value)
                part_labels = labels and pick_rows(labels, range(start, stop))
                part_posterior = pick_posterior(posterior, range(start, stop))
                parts += add_gradient_of_part(run, u[start:stop], part_posterior, part_labels, rows[start:stop], n)
            return parts
        except Exception as error:
            if not out_of_memory(error) or size == 1:
                raise
            trouble = f"{type(error).__name__}: {error}".splitlines()[0]
        # Out of the handler, so that the error and the tensors in its frames are gone before memory is asked for again.
        run.micro_batch = math.ceil(size / 2)
        trainee.zero_grad()
        if u.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with {size} images at a time, going on with micro_batch={run.micro_batch} "
            f"({trouble[:200]})",
            RuntimeWarning,
            stacklevel=9,
        )


def add_gradient_of_part(
    run: Run, u: Tensor, posterior: Posterior | None, labels: Labels | None, rows: range, n: int
) -> list[BatchLoss]:
    """Add the gradient of the given rows of a batch of `n`; their loss, or none where there are no rows."""
    if not rows:  # more processes than images; the generator moves on as in the others
        draw_key(run.generator)
        return []
    objective = run.prior.objective(run.config, len(run.history))
    own_rows = None if len(rows) == n else rows
    losses = run.trainee.batch_loss(u, labels, run.generator, own_rows, objective, posterior)
    total = losses.total
    if losses.squares is not None:
        total = total + run.config.energy_penalty / math.sqrt(run.prior.dim) * losses.squares
    # Of the weights alone: the noise asks for a gradient too, that of the energy.
    (total.sum() / n).backward(inputs=[each for each in run.trainee.parameters() if each.requires_grad])
    return [detach_loss(losses)]


def check_batches(sizes: Sequence[int], means: Sequence[float]) -> None:
    """Raise ValueError unless batches of these sizes and means, one per process, can be the same images."""
    alike = (math.isclose(value, means[0], rel_tol=DIFFERENT) for value in means)
    if len(set(sizes)) > 1 or not all(alike):
        raise ValueError(
            f"data: the processes read different batches, of {', '.join(map(str, sizes))} images; give all of them the "
            "same data in the same order (no DistributedSampler, no accelerator.prepare), as fit divides every batch "
            "itself"
        )


def pick_rows(labels: Labels, rows: range) -> dict[str, Tensor]:
    """Labels of consecutive rows, by label set."""
    return {name: values[rows.start : rows.stop] for name, values in labels.items()}


def pick_posterior(posterior: Posterior | None, rows: range) -> Posterior | None:
    """Consecutive rows of the Gaussians of posterior noise."""
    return posterior and Posterior(*(part[rows.start : rows.stop] for part in posterior))


def mean(values: Tensor | None) -> float:
    """The mean, summed in double precision; NaN of nothing."""
    return math.nan if values is None else values.double().mean().item()


def energy_gaps(losses: BatchLoss, steps: int) -> tuple[float, ...]:
    """Mean energy gap of every level; NaN where there was no chain."""
    if losses.recovery is None or losses.levels is None:
        return (math.nan,) * steps
    return tuple(-mean(losses.recovery[losses.levels == t]) for t in range(steps))


def label_entropy(losses: BatchLoss) -> float:
    """Mean cross-entropy of labels; NaN without any."""
    if losses.cross_entropy is None or losses.labelled is None:
        return math.nan
    return (losses.cross_entropy.double().sum() / losses.labelled.sum()).item()


def parameters_by_layer(prior: TrainablePrior) -> list[list[nn.Parameter]]:
    """Parameters of every layer's energy and label networks, top to bottom."""
    return [
        [parameter for network in layer for parameter in network.parameters()] for layer in networks_by_layer(prior)
    ]


def gradient_norms(layers: Sequence[Sequence[nn.Parameter]]) -> tuple[float, ...]:
    """Norm of the gradient of every layer's parameters."""
    norms = [nn.utils.get_total_norm([x.grad for x in layer if x.grad is not None]) for layer in layers]
    device = next(x.device for layer in layers for x in layer)  # that of a layer without parameters is the CPU
    return tuple(torch.stack([norm.to(device) for norm in norms]).tolist())


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_ERRORS)
