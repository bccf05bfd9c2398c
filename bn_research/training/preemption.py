"""SIGTERM as a request to stop at the next step at which every process can save."""

import signal
from types import FrameType, TracebackType
from typing import Self

from bn_research.training import processes


class Stopped(Exception):
    """A run that was stopped by SIGTERM and has saved what it had.

    Attributes:
      step: at which it was saved.
    """

    def __init__(self, step: int):
        """Keeps the step."""
        super().__init__(f"stopped by SIGTERM at step {step}, saved")
        self.step = step


class Preemption:
    """Inside it SIGTERM is noted instead of ending the process; one of several may be enough.

        with Preemption() as preemption:
            while step < num_steps:
                state, step = advance(state)
                if preemption.requested(step):
                    saver.save(step, state, note, wait=True)
                    raise Stopped(step)

    A second SIGTERM is noted as well, so it does not break the save. SIGTERM is given back at the
    end, but not where that is Stopped: other processes may still be saving, and this one is about
    to end anyway. SIGINT stays KeyboardInterrupt. Enter it in the main thread, as Python's signal
    handlers demand.
    """

    def __init__(self) -> None:
        """Nothing is requested."""
        self._signalled = False  # no Event: a handler interrupted by itself would lock itself out

    def __enter__(self) -> Self:
        """Takes SIGTERM."""
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives SIGTERM back, unless the run was stopped by it."""
        if kind is None or not issubclass(kind, Stopped):
            signal.signal(signal.SIGTERM, self._before)

    def requested(self, step: int) -> bool:
        """Whether to save and stop at this step: the same answer in every process of the job.

        All processes must ask at the same steps. Each waits for the others, about 0.1 ms where
        they run on one machine. (JAX's own preemption service would answer for the step after the
        furthest, which nobody asks about where a dispatch takes many steps, and keeps SIGTERM from
        ending the process ever after.)
        """
        signalled, job = self._signalled, processes.current()
        if job is None:
            return signalled
        return bool(job.agree(f"step {step}", int(signalled)))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
