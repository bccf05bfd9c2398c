"""Ctrl-C and SIGTERM as an exception that is not lost, where a run does not take them itself.

What a run has measured stands in its ledger, so that nothing needs to be saved when it ends.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 0.05
_SWALLOWS = (
    "_xla_gc_callback"  # of JAX; an exception in a callback of the garbage collector is lost
)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside it both signals raise KeyboardInterrupt; outside the main thread it does nothing.

    `Preemption`, within it, takes SIGTERM for itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, _raise) for number in numbers}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name == _SWALLOWS:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
            return
        frame = frame.f_back
    raise KeyboardInterrupt
