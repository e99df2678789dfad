"""Ctrl-C and SIGTERM wait for the step that runs, so that a checkpoint of whole steps can be made first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_wait() -> Iterator[list[int]]:
    """A context whose end Ctrl-C (SIGINT) and SIGTERM wait for, to do there what they would have done at once; a second
    one of a kind does not wait. Only the main thread is sent signals, so elsewhere nothing waits.

    Yields:
        The numbers of the signals that wait, which grow while the context lasts.
    """
    waiting: list[int] = []
    # Those that are ignored stay so, and handlers that are not Python's (None) could not be put back.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def wait(number: int, frame: FrameType | None) -> None:
        signal.signal(number, handlers[signal.Signals(number)])
        waiting.append(number)

    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    try:
        for number in handlers:
            signal.signal(number, wait)
        yield waiting
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in waiting:
            signal.raise_signal(each)
