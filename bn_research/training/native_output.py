"""What native code writes and how it ends, taken in hand for as long as a process is in a job."""

import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable


class NativeOutput:
    """Native code's stdout dropped, its stderr held back for a second, its abort() announced.

    Gloo tells of each connection on stdout, among our results. And JAX's runtime writes a page of
    log and aborts when another process is lost, before Python can tell of that in one line.
    Python's own streams stay as they were.

    Args:
      on_abort: called with the stderr still held where a thread of native code calls abort();
        where it returns, that text is written and the process ends as it would have.
    """

    def __init__(self, on_abort: Callable[[str], None]):
        """Takes the file descriptors 1 and 2; sys.stdout and sys.stderr get copies of them."""
        _flush_streams()
        self._file = tempfile.TemporaryFile(buffering=0)
        self._stderr = os.dup(2)
        for name, descriptor, buffering in (("stdout", 1, -1), ("stderr", 2, 1)):
            stream = getattr(sys, name)
            copy = open(
                os.dup(descriptor),
                "w",
                buffering=buffering,
                encoding=stream.encoding,
                errors=stream.errors,
            )
            setattr(sys, name, copy)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)
        os.dup2(self._file.fileno(), 2)
        self._passed_on = 0
        self._lock = threading.Lock()
        self._held = False
        self._on_abort = on_abort
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        # Python's signal module would run a handler in the main thread, after the process's end.
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        threading.Thread(target=self._pass_on, daemon=True).start()

    def write(self, text: str) -> None:
        """Writes to the real stderr at once."""
        os.write(self._stderr, text.encode())

    def flush(self) -> None:
        """Passes on what is held."""
        self._forward(os.fstat(self._file.fileno()).st_size)

    def _forward(self, end: int) -> None:
        with self._lock:
            if end > self._passed_on:
                content = os.pread(self._file.fileno(), end - self._passed_on, self._passed_on)
                os.write(self._stderr, content)
                self._passed_on = end

    def _pass_on(self) -> None:
        end = 0
        while not self._held:
            self._forward(end)
            end = os.fstat(self._file.fileno()).st_size
            time.sleep(1)

    def _abort(self, _signal: int) -> None:
        self._held = True
        size = os.fstat(self._file.fileno()).st_size
        held = os.pread(self._file.fileno(), size - self._passed_on, self._passed_on)
        self._on_abort(held.decode(errors="replace"))
        self.flush()


def _flush_streams() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
