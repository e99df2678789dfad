"""Functions of tensors, captured once and replayed: what is many small launches becomes one.

A CUDA graph reads and writes where its tensors were in memory when it was captured. So all that differs from call to
call is an argument, which is copied to a place of its own; all else, such as weights, must stay in place, changed or
not. What depends on a number on the host, such as a step's size, is captured as that number, and belongs to the graph's
name. The first replay is compared with what the function gave; a graph that gives something else is not used.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = Sequence[Tensor | None]
Function = Callable[..., Sequence[Tensor]]
# Runs a function of tensors; `Graphs.run` with the name given.
Keep = Callable[[Function, Inputs], list[Tensor]]
# Largest relative difference between the first replay and the function at which a graph is trusted: in half precision
# sums in another order are .003 off.
CAPTURED_ERROR = 0.02
# Graphs that are kept; the one that was not used for the longest time goes first.
KEPT = 16


class Captured(NamedTuple):
    """A captured function: what replays it, and its results, which every replay overwrites."""

    replay: Callable[[], object]
    results: Sequence[Tensor]


class Kept(NamedTuple):
    """A graph that is kept: the places of its inputs, what was captured, and whether that is used."""

    places: list[Tensor | None]
    captured: Captured
    trusted: bool


class CudaRecorder:
    """Captures functions as CUDA graphs that share their memory: one runs at a time, and its results are copied."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}

    def __call__(self, function: Callable[[], Sequence[Tensor]]) -> Captured:
        """Capture what `function` launches, without running it, on the current device.

        Args:
            function: has been run before, so that nothing is made ready in it any more.

        Returns:
            What was captured.

        Raises:
            ValueError: there is no CUDA.
            RuntimeError: the function does what cannot be captured, such as wait for the device.
        """
        if not torch.cuda.is_available():
            raise ValueError("graph: captured on CUDA alone; leave ExecutionConfig(graph=False) here")
        stream = self._streams.setdefault(torch.cuda.current_device(), torch.cuda.Stream())
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails leaves its own stream the current one. Other threads may pin memory meanwhile.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
            ):
                results = function()
        except Exception as error:
            self._pool = None
            error.add_note("This was the capture of a CUDA graph: ExecutionConfig(graph=False) does without.")
            raise
        return Captured(graph.replay, results)


class Graphs:
    """Graphs by name and by the shapes of their inputs.

    Args:
        record: captures a function; None for a `CudaRecorder`.
    """

    def __init__(self, record: Callable[[Callable[[], Sequence[Tensor]]], Captured] | None = None) -> None:
        self._record = record or CudaRecorder()
        # Inputs and results have one place each, whichever thread they are of.
        self._lock = threading.RLock()
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def run(self, name: Hashable, function: Function, inputs: Inputs) -> list[Tensor]:
        """The results of `function`: the first time as it is, then from the graph that is captured after that, if its
        first replay gives the same.

        Args:
            name: names everything that the function depends on beside its inputs, and what stays in place.
            function: of tensors or None; it may use no other tensors than these and those that stay in place, and not
                wait for the device.
            inputs: its arguments, of which no gradient is asked for.

        Returns:
            Its results, in memory of their own.

        Raises:
            ValueError: a function on a device without graphs.
        """
        inputs = [None if x is None else x.detach() for x in inputs]
        key = (name, *((x.shape, x.dtype, x.device) if x is not None else None for x in inputs))
        with self._lock, torch.cuda.device_of(next((x for x in inputs if x is not None), None)):
            if key in self._kept:
                self._kept.move_to_end(key)
                kept = self._kept[key]
                return replay(kept, inputs) if kept.trusted else own_copies(function(*inputs))
            places = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
            results = own_copies(function(*places))
            if not all(bool(x.isfinite().all()) for x in results):
                return results  # with which no replay could be compared
            kept = Kept(places, self._record(lambda: function(*places)), True)
            # A graph that is not used is kept too, as the last one of a pool takes the pool with it.
            self._kept[key] = kept._replace(trusted=alike(replay(kept, inputs), results, name))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return results


def replay(kept: Kept, inputs: Inputs) -> list[Tensor]:
    """The results of a graph, of inputs that are copied to their places, in memory of their own."""
    for place, x in zip(kept.places, inputs, strict=True):
        if place is not None and x is not None:
            place.copy_(x)
    kept.captured.replay()
    return own_copies(kept.captured.results)


def alike(results: Sequence[Tensor], expected: Sequence[Tensor], name: Hashable) -> bool:
    """Whether a graph's first results are those of the function that it was captured from; a warning if not."""
    squares = [
        ((x - y).double().square().sum(), y.double().square().sum()) for x, y in zip(results, expected, strict=True)
    ]
    difference, size = (torch.stack(sums).sum().item() for sums in zip(*squares, strict=True))
    if difference <= CAPTURED_ERROR**2 * size:
        return True
    warnings.warn(
        f"a CUDA graph ({name[0] if isinstance(name, tuple) else name}) gives other numbers than what was captured, so "
        "this is computed without a graph; ExecutionConfig(graph=False) does so from the start",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def own_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in memory of their own."""
    copies = [torch.empty_like(x) for x in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
