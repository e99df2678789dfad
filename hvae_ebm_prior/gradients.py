"""The gradient of one step of training: of a batch that several processes share, each in parts that fit into its memory.

    gradient = sum over processes, sum over parts of the process's rows, of grad sum_n loss_n / N

Noise belongs to samples and not to batches, so that however a batch is divided, the gradient is that of the whole to rounding.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import Run
from .coupling import Labels, check_labels
from .posterior_cache import PosteriorCache
from .processes import add_gradients, collect, share, world
from .recovery import RecoveryLoss
from .streams import draw_key, sample_seeds

# Sums of a part's figures, beside those by level.
SUMS = 5
# Relative difference of batches' means at which processes read different images.
DIFFERENT = 1e-3
MEMORY_ERRORS = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class Learned(NamedTuple):
    """What a step saw, over all processes.

    Attributes:
        loss: mean loss in nats.
        gaps: mean energy gap by level; NaN where there was no sample.
        cross_entropy: mean of -log p(y | u_t) over known labels; NaN where none was.
        labelled: how many labels were known.
        displacement: mean displacement of the chains; NaN without chains.
        acceptance: mean acceptance probability of Metropolis steps; NaN without any.
    """

    loss: float
    gaps: tuple[float, ...]
    cross_entropy: float
    labelled: int
    displacement: float
    acceptance: float


def learn(run: Run, images: Tensor, labels: Tensor | Labels | None) -> Learned:
    """Put the gradient of a batch into the trainee's parameters, the same in all processes, which all have the whole batch.

    Args:
        run: the run; `run.micro_batch` is halved when memory runs out.
        images: (N, C, H, W) in [0, 1], or rows (N,) of a posterior cache.
        labels: of the images.

    Returns:
        The batch's figures.

    Raises:
        ChainDiverged: a chain of any process left the finite numbers; all raise it.
        ValueError: the processes read different images, or bad labels.
        torch.OutOfMemoryError: one image at a time is too much.
    """
    prior, n, rows = run.prior, len(images), share(len(images))
    known = None if labels is None or prior.coupling is None else check_labels(labels, prior.coupling, n, prior.device)
    mine = known and {name: values[rows.start : rows.stop] for name, values in known.items()}
    work = collect(lambda: (n, images.float().mean().item() if world() > 1 else 0.0, accumulate(run, encode_rows(run, images, rows), mine, rows, n)))
    if world() > 1 and any(size != n or not math.isclose(mean, work[0][1], rel_tol=DIFFERENT) for size, mean, _ in work):
        raise ValueError(
            f"data: the processes read different batches, of {', '.join(str(size) for size, _, _ in work)} images; give all of them the same data in "
            "the same order (no DistributedSampler, no accelerator.prepare), as fit divides every batch itself"
        )
    add_gradients(list(run.trainee.parameters()))
    loss, entropy, labelled, moved, accepted, *levels = torch.stack([sums for _, _, sums in work]).sum(0).tolist()
    steps = prior.schedule.steps
    gaps = tuple(-gap / count if count else math.nan for gap, count in zip(levels[:steps], levels[steps:], strict=True))
    return Learned(loss / n, gaps, entropy / labelled if labelled else math.nan, int(labelled), moved / n, accepted / n)


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
            error.add_note(f"This was the encoder on {size or len(images)} images: set a smaller TrainingConfig(encode_batch=...).")
        raise


def accumulate(run: Run, u: Tensor, labels: Labels | None, rows: range, n: int) -> Tensor:
    """Add the gradients of rows of a batch of `n`, of posterior noise `u`, in parts of `run.micro_batch`, or of half as many until they fit.

    Returns sums: losses, cross-entropies, labels, displacements, acceptances; losses by level, samples by level.
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
                part = range(len(u))[start : start + size]
                sums += part_gradient(run, u, labels, part, rows, n)
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
            f"out of memory with {size} images at a time, going on with micro_batch={run.micro_batch} ({trouble[:200]})", RuntimeWarning, stacklevel=8
        )


def part_gradient(run: Run, u: Tensor, labels: Labels | None, part: range, rows: range, n: int) -> Tensor:
    """Add the gradient of a part of a process's rows, and return its sums; see `accumulate`."""
    prior, config = run.prior, run.config
    here = slice(part.start, part.stop)
    mine = labels and {name: values[here] for name, values in labels.items()}
    if len(part) == n:
        losses = run.trainee.batch_loss(u, mine, run.generator)
    elif part:
        losses = run.trainee.batch_loss(u[here], mine, run.generator, rows=rows[here])
    else:  # more processes than images; the key is drawn as elsewhere
        draw_key(run.generator)
        return torch.zeros(SUMS + 2 * prior.schedule.steps, dtype=torch.float64)
    ((losses.total + config.energy_penalty / math.sqrt(prior.dim) * losses.squares).sum() / n).backward()
    return summed(losses, prior.schedule.steps)


@torch.no_grad()
def summed(losses: RecoveryLoss, steps: int) -> Tensor:
    """Sums of a part's losses; see `accumulate`."""
    recovery = losses.recovery.double().cpu()
    by_level = torch.nn.functional.one_hot(losses.levels.cpu(), steps).double()
    # 0 times infinity would be NaN at every level.
    gaps = torch.where(by_level > 0, recovery[:, None], 0.0).sum(0)
    measured = [torch.full((1,), math.nan) if each is None else each for each in (losses.displacement, losses.acceptance)]
    plain = (recovery, losses.cross_entropy, torch.tensor([float(losses.labelled)]), *measured)
    return torch.cat((torch.stack([each.double().sum().cpu() for each in plain]), gaps, by_level.sum(0)))


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_ERRORS)
