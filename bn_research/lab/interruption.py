"""Ctrl-C and SIGTERM as KeyboardInterrupt, also where JAX would swallow an exception.

Nothing needs to be saved then: what a run has measured stands in its ledger.
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
    """Context in which both signals raise KeyboardInterrupt.

    A `Preemption` inside it takes SIGTERM for itself. Outside the main thread it does nothing.
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
