"""Experiments side by side, each a process with its own log.

Then what one does to JAX (devices, precision, memory) does not reach the next, and one that fails
does not end the others.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

_CORES_OF_AN_EXPERIMENT = 2  # fewer cores, and its sweeps have no second device to run on
_POLL_SECONDS = 0.5
_PERCENT = re.compile(r"(\d+)%\|[^\r\n]*$")


class Stopped(Exception):
    """SIGTERM or Ctrl-C has come, and the experiments have saved what they had."""


class Finished(NamedTuple):
    """How an experiment's process ended."""

    name: str
    status: int  # its exit status; negative, the signal that ended it
    seconds: float
    log: Path


@dataclasses.dataclass(frozen=True)
class Running:
    """A process at work."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    cores: frozenset[int]
    start: float


def cores() -> frozenset[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def has_accelerator() -> bool:
    """Whether JAX has a plugin for an accelerator; a process wants that for itself."""
    names = ("libtpu", "jax_plugins", "jax_cuda12_plugin", "jax_cuda13_plugin")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in names)


def default_jobs() -> int:
    """How many experiments run at once: one for each pair of cores, or one per accelerator host."""
    return 1 if has_accelerator() else max(1, len(cores()) // _CORES_OF_AN_EXPERIMENT)


def shares(jobs: int) -> list[frozenset[int]]:
    """The cores in `jobs` parts: an experiment that measures time has its part to itself."""
    mine = sorted(cores())
    if jobs > len(mine):
        return [frozenset(mine)] * jobs
    return [frozenset(mine[part::jobs]) for part in range(jobs)]


def run_all(
    names: Sequence[str], folder: Path, *, package: str, preset: str, jobs: int
) -> Iterator[Finished]:
    """Runs experiments in workdirs `folder/NAME`, and yields each when it has ended.

    Its output goes to `folder/NAME.log`; one display shows how far they are.

    Args:
      names: in the order in which they start.
      folder: of the workdirs and logs; it exists.
      package: of the experiments.
      preset: of each.
      jobs: how many at once.

    Raises:
      Stopped: SIGTERM or Ctrl-C; the experiments were told, and have ended.
    """
    waiting, free, running = list(names), shares(jobs), list[Running]()
    with _sigterm_raises(), tqdm(total=len(names), unit="experiment", smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_start(package, waiting.pop(0), folder, preset, free.pop(0)))
                time.sleep(_POLL_SECONDS)
                bar.set_description(", ".join(f"{r.name} {_percent(r.log)}" for r in running))
                for ended in [r for r in running if r.process.poll() is not None]:
                    running.remove(ended)
                    free.append(ended.cores)
                    bar.update()
                    seconds = time.monotonic() - ended.start
                    yield Finished(ended.name, ended.process.returncode, seconds, ended.log)
        except KeyboardInterrupt:
            bar.set_description("saving")
            raise Stopped from None
        finally:
            _stop(running)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the wait as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(package: str, name: str, folder: Path, preset: str, share: frozenset[int]) -> Running:
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", f"{package}.{name}", f"--preset={preset}"]
    file: IO[bytes]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, f"--workdir={folder / name}"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us, who ask it to save
            env={"TQDM_MININTERVAL": "1", **os.environ},
        )
    if hasattr(os, "sched_setaffinity") and share < cores():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, share)  # long before it starts threads
    return Running(name, process, log, share, time.monotonic())


def _stop(running: Sequence[Running]) -> None:
    for each in running:
        each.process.terminate()
    for each in running:
        each.process.wait()


def _percent(log: Path) -> str:
    """Percent on the progress bar in the log; … where there is none yet."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        found = _PERCENT.search(file.read().decode(errors="replace"))
    return f"{found[1]}%" if found else "…"


def tail(log: Path, *, lines: int = 40) -> str:
    """Last lines of a log; of a progress bar its last state."""
    text = log.read_bytes().decode(errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])
