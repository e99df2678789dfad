"""Functions of tensors, captured once and replayed: what is many small launches becomes one.

A CUDA graph reads and writes where its tensors were in memory when it was captured. So all that differs from call to
call is an argument, which is copied to a place of its own; all else, such as weights, must stay in place, changed or
not. What depends on a number on the host, such as a step's size, is captured as that number, and belongs to the graph's
name.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Tensor | None]
Function = Callable[..., Sequence[Tensor]]
# Runs a function of tensors; `Graphs.run` with the name given.
Keep = Callable[[Function, Inputs], list[Tensor]]
Captured = tuple[Callable[[], object], Sequence[Tensor]]
# Largest relative difference between the first replay and the function at which a graph is trusted.
CAPTURED_ERROR = 1e-3
# Graphs that are kept; the one that was not used for the longest time goes first.
KEPT = 16


class CudaRecorder:
    """Captures functions as CUDA graphs that share their memory: one runs at a time, and its results are copied."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Sequence[Tensor]]) -> Captured:
        """Capture what `function` launches, without running it.

        Args:
            function: has been run before, so that nothing is made ready in it any more.

        Returns:
            The function that replays it, and the results, which every replay overwrites.

        Raises:
            ValueError: there is no CUDA.
        """
        if not torch.cuda.is_available():
            raise ValueError("graph: captured on CUDA alone; leave ExecutionConfig(graph=False) here")
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            results = function()
        return graph.replay, results


class Graphs:
    """Graphs by name and by the shapes of their inputs.

    Args:
        record: captures a function; None for a `CudaRecorder`.
    """

    def __init__(self, record: Callable[[Callable[[], Sequence[Tensor]]], Captured] | None = None) -> None:
        self._record = record or CudaRecorder()
        # Inputs and results have one place each, whichever thread they are of.
        self._lock = threading.RLock()
        self._kept: OrderedDict[Hashable, tuple[list[Tensor | None], Captured | None]] = OrderedDict()

    def run(self, name: Hashable, function: Function, inputs: Inputs) -> list[Tensor]:
        """The results of `function`: the first time as it is, then from the graph that is captured after that, if its
        first replay gives the same.

        Args:
            name: names everything that the function depends on beside its inputs, and what stays in place.
            function: of tensors or None, at fixed places for all calls of a name; it may use no other tensors than
                these and those that stay in place, and not wait for the device.
            inputs: its arguments.

        Returns:
            Its results, in memory of their own.

        Raises:
            ValueError: a function on a device without graphs.
        """
        with self._lock:
            key = (name, *((x.shape, x.dtype, x.device) if x is not None else None for x in inputs))
            if key not in self._kept:
                places = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in inputs]
                results = copy(function(*places))
                captured = self._record(lambda: function(*places))
                trusted = alike(replay(places, captured, inputs), results, name)
                self._kept[key] = places, captured if trusted else None
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
                return results
            self._kept.move_to_end(key)
            places, kept = self._kept[key]
            return copy(function(*inputs)) if kept is None else replay(places, kept, inputs)


def replay(places: Inputs, captured: Captured, inputs: Inputs) -> list[Tensor]:
    """The results of what was captured, of inputs that are copied to their places, in memory of their own."""
    pairs = [(place, x) for place, x in zip(places, inputs, strict=True) if place is not None and x is not None]
    torch._foreach_copy_([place for place, _ in pairs], [x for _, x in pairs])
    captured[0]()
    return copy(captured[1])


def alike(results: Sequence[Tensor], expected: Sequence[Tensor], name: Hashable) -> bool:
    """Whether a graph's first results are those of the function that it was captured from; a warning if not."""
    pairs = [(x, y) for x, y in zip(results, expected, strict=True) if x.is_floating_point() and x.numel()]
    errors = [((x - y).norm() / y.norm().clamp(min=1e-12)).float() for x, y in pairs]
    error = torch.stack(errors).max().item() if errors else 0.0
    if error <= CAPTURED_ERROR:
        return True
    warnings.warn(
        f"a CUDA graph ({name[0] if isinstance(name, tuple) else name}) gives other numbers than what was captured, by "
        f"{error:.1%}, so this is computed without a graph; ExecutionConfig(graph=False) does so from the start",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in memory of their own."""
    copies = [torch.empty_like(x) for x in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
