"""What a recipe costs on this machine: a few learning steps are measured, and the rest is multiplied.

One iteration is K Langevin steps and what is done once: encoding and the loss. Both come from learning steps with one
and with three Langevin steps,

    seconds(K) = seconds(1) + (K - 1) (seconds(3) - seconds(1)) / 2,

and a sample is T K Langevin steps and the decoder. Times are of the largest batch measured, and proportional to the
batch beyond it; memory is a straight line through the two batches.
"""

import ctypes
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvae_ebm_prior import DiffusionEBMPrior
from hvae_ebm_prior.backbone.lock import backbone_modules

# What takes longer than so many seconds is not run again.
SLOW = 20.0


@dataclass(frozen=True)
class BatchCost:
    """Time and memory of one batch.

    Attributes:
        batch: images.
        langevin_seconds: one Langevin step, which is one gradient of the whole prior.
        once_seconds: the rest of an iteration.
        decode_seconds: the decoder, in sampling.
        memory: bytes at the peak beyond what the models hold; NaN where the system does not report it.
    """

    batch: int
    langevin_seconds: float
    once_seconds: float
    decode_seconds: float
    memory: float


def measure(prior: DiffusionEBMPrior, image_size: int, batch: int) -> BatchCost:
    """Time and memory of learning steps with `batch` random images; of short steps the faster one of two."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, image_size, image_size, generator=generator).to(prior.device)
    prior.train()

    def learn(steps: int) -> None:
        prior.langevin = dataclasses.replace(langevin, steps=steps)
        prior.loss(images, generator=generator).mean().backward()
        prior.zero_grad()

    def decode() -> None:
        with torch.no_grad():
            prior.decode(torch.randn(batch, prior.dim, generator=generator).to(prior.device))

    langevin = prior.langevin
    before = memory_in_use(prior.device)
    try:
        one = seconds(lambda: learn(1), prior.device)
        rounds = 1 if one > SLOW else 2
        if rounds == 2:
            one = min(one, seconds(lambda: learn(1), prior.device))
        three = min(seconds(lambda: learn(3), prior.device) for _ in range(rounds))
        decoding = min(seconds(decode, prior.device) for _ in range(rounds))
    finally:
        prior.langevin = langevin
        prior.eval()
    step = max((three - one) / 2, 0.0)
    return BatchCost(batch, step, max(one - step, 0.0), decoding, peak_memory(prior.device) - before)


def extrapolate(prior: DiffusionEBMPrior, costs: Sequence[BatchCost], batch: int) -> dict[str, float]:
    """Time and memory with batches of `batch` images, from those of growing batches: seconds and GiB by name."""
    first, last = costs[0], costs[-1]
    steps, levels = prior.langevin.steps, prior.schedule.steps
    slope = (last.memory - first.memory) / (last.batch - first.batch) if len(costs) > 1 else last.memory / last.batch
    # Energies are held seven times: the prior's, the trainee's, gradients, two moments of Adam, and two snapshots of
    # the guard.
    held = sum(
        tensor.nbytes
        for module in backbone_modules(prior.backbone)
        for tensor in (*module.parameters(), *module.buffers())
    )
    held += 7 * sum(parameter.nbytes for parameter in prior.parameters())
    return {
        "seconds per gradient and image": last.langevin_seconds / last.batch,
        "seconds per iteration": (steps * last.langevin_seconds + last.once_seconds) * batch / last.batch,
        "seconds per sample": (levels * steps * last.langevin_seconds + last.decode_seconds) / last.batch,
        "GiB of weights": held / 2**30,
        "GiB per image": slope / 2**30,
        "GiB": (held + last.memory + slope * (batch - last.batch)) / 2**30,
    }


def report_costs(
    prior: DiffusionEBMPrior, image_size: int, sizes: Sequence[int], batch: int, epoch: int, iterations: int
) -> dict[str, object]:
    """Measure, and print what a run takes.

    Args:
        prior: an untrained prior.
        image_size: height and width of its images.
        sizes: batches to measure, growing.
        batch: images per iteration of the run.
        epoch: iterations per epoch of the run.
        iterations: all of them.

    Returns:
        What was measured and extrapolated, for estimate.json.
    """
    on_gpu = prior.device.type == "cuda"
    name = torch.cuda.get_device_name(prior.device) if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    print(f"D = {prior.dim:,} in {len(prior.latent_shapes)} layers; on {name}, torch {torch.__version__}", flush=True)
    measured = []
    for size in sizes:
        cost = measure(prior, image_size, size)
        measured.append(cost)
        print(
            f"measured, batch {size}: {cost.langevin_seconds:.3f} s per Langevin step, {cost.once_seconds:.3f} s once "
            f"per iteration, {cost.decode_seconds:.3f} s to decode, {cost.memory / 2**30:.2f} GiB",
            flush=True,
        )
    costs = extrapolate(prior, measured, batch)
    print(
        f"extrapolated, batch {batch}, T = {prior.schedule.steps}, K = {prior.langevin.steps}:\n"
        f"  one iteration    {duration(costs['seconds per iteration'])}\n"
        f"  one epoch        {duration(epoch * costs['seconds per iteration'])} for {epoch:,} iterations\n"
        f"  training         {duration(iterations * costs['seconds per iteration'])} for {iterations:,} iterations\n"
        f"  50,000 samples   {duration(50_000 * costs['seconds per sample'])}\n"
        f"  memory           {costs['GiB']:.2f} GiB, {costs['GiB of weights']:.2f} of it weights; "
        f"{costs['GiB per image']:.3f} per image"
    )
    return {
        "on": name,
        "torch": torch.__version__,
        "measured": [dataclasses.asdict(cost) for cost in measured],
        "extrapolated": costs,
        "epoch": epoch,
        "iterations": iterations,
    }


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """How long a call takes: on one thread the processor's time, which other programs do not lengthen."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def duration(seconds: float) -> str:
    """A time in words."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def memory_in_use(device: torch.device) -> float:
    """Bytes in use; the peak is counted anew from here. NaN where the system does not report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back to the system, or it would hide the peak to come
    Path("/proc/self/clear_refs").write_text("5")
    return process_status("VmRSS")


def peak_memory(device: torch.device) -> float:
    """Peak of the bytes in use since `memory_in_use` was called."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_status("VmHWM")


def process_status(field: str) -> float:
    """A size of this process as Linux gives it, in bytes; NaN elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])
