"""Several processes that compute one result: who takes which rows, and how they agree.

Every process runs the same program with the same arguments. Rows of a batch, or samples of a call, are divided into
shares that follow each other in the order of the processes; since noise belongs to samples, the shares joined are what
one process computes. Work that only some processes do must not call what needs all of them: inside `alone` a process
counts as the only one.

The group of processes is torch.distributed's. Accelerate or a program of your own may have made it; where it is not
made yet and the environment is that of `torchrun` (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), the first call here
makes it, with gloo, and NCCL beside it where there is CUDA. This is the only module that communicates, with people by
the progress bars of the first process.
"""

import atexit
import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

T = TypeVar("T")
# A progress bar in a log: seconds between lines, and a line.
LOG_SECONDS = 30.0
LOG_LINE = "{desc}: {n_fmt}/{total_fmt} after {elapsed}, {remaining} left{postfix}\n"
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
by_itself: ContextVar[bool] = ContextVar("by_itself", default=False)


def world() -> int:
    """Number of processes; 1 where there is no group, and inside `alone`."""
    if by_itself.get() or not dist.is_available():
        return 1
    if not dist.is_initialized() and all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1:
        start()
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 inside `alone`."""
    return dist.get_rank() if world() > 1 else 0


def start() -> None:
    """Join the group that `torchrun` announces in the environment; with a GPU for each process, on its LOCAL_RANK."""
    enough_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available() and dist.is_nccl_available() and enough_gpus
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A context in which this process counts as the only one: for work that some processes do and others do not."""
    before = by_itself.set(True)
    try:
        yield
    finally:
        by_itself.reset(before)


def share(n: int) -> range:
    """This process's part of range(n); parts differ in size by 1 at most, and some are empty where n is small."""
    here, count = rank(), world()
    return range(n * here // count, n * (here + 1) // count)


def progress_bar(total: int, what: str, *, done: int = 0, shown: bool | None = None, leave: bool = False) -> tqdm:
    """A progress bar on stderr, to be entered as a context and updated. `HF_HUB_DISABLE_PROGRESS_BARS=1` hides all.

    Args:
        total: how many there are to do.
        what: their name.
        done: how many are done already.
        shown: whether it is shown, by the first process, and where stderr is no terminal (nor a notebook's) as a line
            now and then; None shows it on a terminal alone.
        leave: whether it stays when all is done.

    Returns:
        The bar.
    """
    hidden = rank() > 0 or (None if shown is None else not shown)
    log = sys.stderr is not None and not sys.stderr.isatty() and "ipykernel" not in sys.modules
    lines: dict[str, Any] = {"mininterval": LOG_SECONDS, "miniters": 1, "bar_format": LOG_LINE} if log else {}
    return tqdm(total=total, initial=done, desc=what, disable=hidden, leave=leave, **lines)


class Failure(NamedTuple):
    """What a process sends instead of a result."""

    error: BaseException


def collect(work: Callable[[], T]) -> list[T]:
    """What `work` returns in every process, in their order.

    Args:
        work: called once in every process; communicates with none. What it returns is pickled.

    Returns:
        The results, the same list in every process.

    Raises:
        BaseException: what `work` raised in the first process where it failed; every process raises it.
    """
    if world() == 1:
        return [work()]
    try:
        found: Any = work()
    except BaseException as error:
        found = Failure(portable(error))
    results: list[Any] = [None] * world()
    dist.all_gather_object(results, found)
    for i, result in enumerate(results):
        if isinstance(result, Failure):
            raised = found.error if i == rank() else result.error
            raised.add_note(f"(in process {i} of {world()})")
            raise raised
    return results


def portable(error: BaseException) -> BaseException:
    """`error`, or a RuntimeError with its type and message where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # our own bytes
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def agree(value: T) -> T:
    """The first process's `value`, in all of them."""
    return collect(lambda: value)[0]


def agree_on_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Give all processes a generator in the same state.

    Args:
        generator: of this process; takes the state of the first process's. None stays None in a single process; in
            several it becomes a new generator, as networks may draw from torch's global one, in each process as often
            as it needs.

    Returns:
        The generator.
    """
    if world() == 1:
        return generator
    if generator is None:
        return torch.Generator().manual_seed(agree(int(torch.randint(2**62, (), device="cpu"))))
    return generator.set_state(agree(generator.get_state()))


def sendable(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous, on a device that the group can send from."""
    # A group of NCCL alone, as Accelerate makes it, sends nothing from a CPU.
    able = tensor.is_cuda or "cpu:" in dist.get_backend_config()
    return tensor.contiguous() if able else tensor.contiguous().cuda()


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of all processes the values of the first one's."""
    if world() > 1:
        for tensor in tensors:
            values = sendable(tensor)
            dist.broadcast(values, 0)
            tensor.copy_(values)


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace gradients by their sums over processes, the same bits in all; those that no process has stay None."""
    if world() == 1:
        return
    in_processes = collect(lambda: [parameter.grad is not None for parameter in parameters])
    used = [parameter for parameter, *has in zip(parameters, *in_processes, strict=True) if any(has)]
    if not used:
        return
    flat = sendable(
        torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in used])
    )
    dist.all_reduce(flat)
    for parameter, part in zip(used, flat.split([each.numel() for each in used]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.device, copy=True)


def join_rows(rows: Tensor | None) -> Tensor | None:
    """The rows of all processes in their order, in every process.

    Args:
        rows: this process's, (n, ...); None for none.

    Returns:
        All rows (N, ...), on this process's device of the kind that they are on; None where no process has any.
    """
    if world() == 1:
        return rows
    layouts = collect(lambda: None if rows is None else (tuple(rows.shape), rows.dtype, rows.device.type))
    parts = []
    for i, layout in enumerate(layouts):
        if layout is not None:
            shape, dtype, kind = layout
            part = sendable(rows if i == rank() and rows is not None else torch.empty(shape, dtype=dtype, device=kind))
            dist.broadcast(part, i)
            parts.append(part.to(kind if rows is None else rows.device))
    return torch.cat(parts) if parts else None
