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

from ..chains.streams import draw_key, sample_seeds
from ..energies.coupling import Labels, check_labels
from ..processes import add_gradients, collect, share, world
from .optimizer import learning_rate, update_average
from .posterior_cache import PosteriorCache
from .record import TrainingRecord
from .recovery import RecoveryLoss
from .run import Run
from .trainable import TrainablePrior

# Sums of a part's figures, beside those by level.
SUMS = 5
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
    prior, trainee, config, step = run.prior, run.trainee, run.config, len(run.history)
    start = time.monotonic()
    images, labels, epoch = next(run.batches)

    run.optimizer.zero_grad()
    sums = add_batch_gradient(run, images, labels)
    layer_norms = gradient_norms(parameters_by_layer(trainee))
    norm = nn.utils.clip_grad_norm_(list(trainee.parameters()), config.clip_norm).item()

    loss, entropy, labelled, moved, accepted, *levels = sums.tolist()
    if trouble := run.guard.trouble(loss / len(images), norm):
        raise Unhealthy(trouble)
    update_average(prior, trainee, min(config.ema_decay, (1 + step) / (10 + step)))
    run.guard.keep(step)
    rate = run.lr_scale * learning_rate(config, step, epoch, run.first)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()

    now, n, steps = time.monotonic(), len(images), prior.schedule.steps
    gaps = (-gap / count if count else math.nan for gap, count in zip(levels[:steps], levels[steps:], strict=True))
    return TrainingRecord(
        iteration=step + 1,
        loss=loss / n,
        gaps=tuple(gaps),
        gradient_norm=norm,
        learning_rate=rate,
        seconds=now - began,
        cross_entropy=entropy / labelled if labelled else math.nan,
        gradient_norms=layer_norms,
        displacement=moved / n,
        acceptance=accepted / n,
        gradients_per_second=n * prior.gradients_per_step / max(now - start, 1e-9),
    )


def add_batch_gradient(run: Run, images: Tensor, labels: Tensor | Labels | None) -> Tensor:
    """Put the gradient of a batch into the trainee's parameters, the same in all processes, which all have the whole
    batch.

    Args:
        run: the run; `run.micro_batch` is halved when memory runs out.
        images: (N, C, H, W) in [0, 1], or rows (N,) of a posterior cache.
        labels: of the images.

    Returns:
        Sums over the batch, (SUMS + 2 T,): losses, cross-entropies, labels that were there, displacements and
        acceptances; losses by level, and samples by level.
    """
    prior, n, rows = run.prior, len(images), share(len(images))
    checked = (
        None if labels is None or prior.coupling is None else check_labels(labels, prior.coupling, n, prior.device)
    )
    mine = checked and {name: values[rows.start : rows.stop] for name, values in checked.items()}

    def work() -> tuple[int, float, Tensor]:
        mean = images.float().mean().item() if world() > 1 else 0.0
        return n, mean, add_gradient_of_rows(run, encode_rows(run, images, rows), mine, rows, n)

    found = collect(work)
    if world() > 1 and any(
        size != n or not math.isclose(mean, found[0][1], rel_tol=DIFFERENT) for size, mean, _ in found
    ):
        sizes = ", ".join(str(size) for size, _, _ in found)
        raise ValueError(
            f"data: the processes read different batches, of {sizes} images; give all of them the same data in the same order "
            "(no DistributedSampler, no accelerator.prepare), as fit divides every batch itself"
        )
    add_gradients(list(run.trainee.parameters()))
    return torch.stack([sums for _, _, sums in found]).sum(0)


def encode_rows(run: Run, images: Tensor, rows: range) -> Tensor:
    """Posterior noise (n, D) of some rows of a batch; all processes draw the same from the run's generator."""
    prior, size = run.prior, run.config.encode_batch
    try:
        if size is None or isinstance(run.batches.data, PosteriorCache):
            return run.batches.noise(prior, images, run.batches.epoch, run.generator)[rows.start : rows.stop]
        first, last = rows.start // size, math.ceil(rows.stop / size)
        seeds = sample_seeds(draw_key(run.generator), range(math.ceil(len(images) / size)))
        parts = [images.new_empty(0, prior.dim, device=prior.device, dtype=prior.dtype)]
        for block in range(first, last) if rows else ():
            some = images[block * size : (block + 1) * size].to(prior.device, non_blocking=True)
            parts.append(prior.encode(some, generator=torch.Generator().manual_seed(seeds[block])))
        return torch.cat(parts)[rows.start - first * size :][: len(rows)]
    except Exception as error:
        if out_of_memory(error):
            error.add_note(
                f"This was the encoder on {size or len(images)} images: set a smaller TrainingConfig(encode_batch=...)."
            )
        raise


def add_gradient_of_rows(run: Run, u: Tensor, labels: Labels | None, rows: range, n: int) -> Tensor:
    """Add the gradients of rows of a batch of `n`, in parts of `run.micro_batch`, or of half as many until they fit.

    Args:
        run: the run.
        u: posterior noise (len(rows), D).
        labels: of the rows.
        rows: numbers of the rows in the batch.
        n: size of the batch.

    Returns:
        The rows' sums, as of `add_batch_gradient`.
    """
    trainee, source = run.trainee, run.generator or torch.default_generator
    # Every part begins here: with the batch's key to come, and with weights under spectral normalisation as they were.
    begin, buffers = source.get_state(), [buffer.clone() for buffer in trainee.buffers()]
    while True:
        size = min(run.micro_batch or n, max(1, len(u)))
        try:
            sums = torch.zeros(SUMS + 2 * run.prior.schedule.steps, dtype=torch.float64)
            for start in range(0, max(1, len(u)), size):
                source.set_state(begin)
                with torch.no_grad():
                    for buffer, value in zip(trainee.buffers(), buffers, strict=True):
                        buffer.copy_(value)
                sums += add_gradient_of_part(run, u, labels, range(len(u))[start : start + size], rows, n)
            return sums
        except Exception as error:
            if not out_of_memory(error) or size == 1:
                raise
            trouble = f"{type(error).__name__}: {error}".splitlines()[0]
        run.micro_batch = math.ceil(size / 2)
        trainee.zero_grad()
        if u.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with {size} images at a time, going on with micro_batch={run.micro_batch} ({trouble[:200]})",
            RuntimeWarning,
            stacklevel=8,
        )


def add_gradient_of_part(run: Run, u: Tensor, labels: Labels | None, part: range, rows: range, n: int) -> Tensor:
    """Add the gradient of a part of a process's rows, and return its sums."""
    prior, config, here = run.prior, run.config, slice(part.start, part.stop)
    mine = labels and {name: values[here] for name, values in labels.items()}
    if len(part) == n:
        losses = run.trainee.batch_loss(u, mine, run.generator)
    elif part:
        losses = run.trainee.batch_loss(u[here], mine, run.generator, rows=rows[here])
    else:  # more processes than images; the key is drawn as elsewhere
        draw_key(run.generator)
        return torch.zeros(SUMS + 2 * prior.schedule.steps, dtype=torch.float64)
    penalty = config.energy_penalty / math.sqrt(prior.dim)
    ((losses.total + penalty * losses.squares).sum() / n).backward()
    return sum_figures(losses, prior.schedule.steps)


@torch.no_grad()
def sum_figures(losses: RecoveryLoss, steps: int) -> Tensor:
    """Sums of a part's losses, as of `add_batch_gradient`."""
    recovery = losses.recovery.double().cpu()
    by_level = torch.nn.functional.one_hot(losses.levels.cpu(), steps).double()
    # 0 times infinity would be NaN at every level.
    gaps = torch.where(by_level > 0, recovery[:, None], 0.0).sum(0)
    of_chains = [torch.full((1,), math.nan) if x is None else x for x in (losses.displacement, losses.acceptance)]
    plain = (recovery, losses.cross_entropy, torch.tensor([float(losses.labelled)]), *of_chains)
    return torch.cat((torch.stack([x.double().sum().cpu() for x in plain]), gaps, by_level.sum(0)))


def parameters_by_layer(prior: TrainablePrior) -> list[list[nn.Parameter]]:
    """Parameters of every layer's energy and label networks, top to bottom."""
    heads = [networks for networks in prior.heads.values() if isinstance(networks, nn.ModuleDict)]
    layers = []
    for i, energy in enumerate(prior.energies):
        own = (networks[str(i)].parameters() for networks in heads if str(i) in networks)
        layers.append([*energy.parameters(), *(parameter for each in own for parameter in each)])
    return layers


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
