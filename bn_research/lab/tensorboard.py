"""TensorBoard event files of a run, as a function of its ledger.

What `metrics.jsonl` holds is written into the folder `tensorboard` beside it: all of it when a run
starts, then each record within a second of its line. So the curves of a run that was killed and
started again are whole, and no point stands twice.

A record is a run of TensorBoard, by its name, so that curves of one quantity lie in one chart. Its
numbers become points:

- the entries of a list stand at their places in it, from 0; or at the steps that a list of the same
  length gives, whose name is `step`, `steps` or ends in `_steps`;
- a record with one number `step` gives one point to each of its curves, and records that differ in
  nothing else are one run: `evaluation/seed=0 step=60` is a point of `evaluation/seed=0`;
- other numbers stand at step 0, but for those that the record's name says, as `seed=0`;
- the names and places that lead to a number make its tag: `surface/cosine/3`.

Event files hold float32. What is not finite in it has no point.
"""

import contextlib
import hashlib
import json
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bn_research.lab.workdir import WorkdirError

_SECONDS_BETWEEN_LOOKS = 1.0
_LARGEST = float(np.finfo(np.float32).max)
_LONGEST = 255  # bytes of a file's name


class Point(NamedTuple):
    """A point of a curve."""

    tag: str
    step: int
    value: float


def obstacle() -> str:
    """Why event files cannot be written, and what to install; empty where they can."""
    try:
        import tensorboardX.event_file_writer  # noqa: F401
    except ImportError as error:
        install = "pip install 'bn_research[tensorboard]'"
        return f"--tensorboard cannot be had ({error}): {install}, or leave the flag out"
    return ""


@contextlib.contextmanager
def event_files(ledger: Path) -> Iterator[None]:
    """Keeps the folder `tensorboard` beside a ledger equal to it, from a thread, while it is open.

    Says where it is. What is there before is replaced. An error of the disk while the run goes on
    ends the event files, with one line on stderr, and not the run.

    Args:
      ledger: `metrics.jsonl`; it need not exist yet.

    Raises:
      WorkdirError: the folder cannot be replaced.
    """
    folder = ledger.parent / "tensorboard"
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    except OSError as error:
        raise WorkdirError(
            f"folder {folder} cannot be replaced ({error}): remove it, or leave --tensorboard out"
        ) from error
    print(f"curves: {shlex.join(['tensorboard', f'--logdir={folder}'])}", flush=True)
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(ledger, folder, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _follow(ledger: Path, folder: Path, ended: threading.Event) -> None:
    """Writes the ledger's records, and those it gets until the run has ended."""
    position = count = 0
    runs: dict[str, list[Point]] = {}
    is_last = False
    try:
        while not is_last:
            is_last = ended.is_set()  # asked before the look, which then misses nothing
            for line in _lines(ledger, position):
                try:
                    record = json.loads(line)
                except ValueError:
                    break  # cut short by a kill: the ledger drops it
                _write(folder, record, count, runs)
                position += len(line)
                count += 1
            if not is_last:
                ended.wait(_SECONDS_BETWEEN_LOOKS)
    except OSError as error:
        print(f"--tensorboard: no more event files: {error}; the run goes on", file=sys.stderr)


def _lines(ledger: Path, position: int) -> list[bytes]:
    """The whole lines after a position, in bytes."""
    if not ledger.exists():
        return []
    with ledger.open("rb") as file:
        file.seek(position)
        return [line for line in file if line.endswith(b"\n")]


def _write(
    folder: Path, record: Mapping[str, Any], number: int, runs: dict[str, list[Point]]
) -> None:
    """Writes the event file of a record.

    Args:
      folder: of all runs.
      record: of the ledger.
      number: its place in the ledger; TensorBoard reads a run's files in the order of their names.
      runs: points so far of the runs that several records give.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    name, points = curves(record)
    path = folder.joinpath(*map(_file_name, name.split("/")))
    path.mkdir(parents=True, exist_ok=True)
    replaced: list[Path] = []
    if _is_number(record.get("step")):
        before = runs.get(name, [])
        runs[name] = sorted(before + points, key=lambda point: point.step)
        if runs[name][: len(before)] != before:
            # At an earlier step than the last TensorBoard forgets what came after it.
            replaced, points = list(path.glob("events.*")), runs[name]
    writer = EventsWriter(str(path / "events"), f".{number:06}")
    for tag, step, value in points:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
    for old in replaced:
        old.unlink()


def _file_name(text: str) -> str:
    """A name for a file: the text, or where that is too long its beginning and a digest."""
    encoded = text.encode()
    if len(encoded) <= _LONGEST:
        return text
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return encoded[: _LONGEST - 17].decode(errors="ignore") + " " + digest


def curves(record: Mapping[str, Any]) -> tuple[str, list[Point]]:
    """The name of a record's run, and its points."""
    words = record["name"].split(" ")
    said = {"name", *(word.rpartition("/")[2].partition("=")[0] for word in words if "=" in word)}
    step = record.get("step")
    if _is_number(step):
        numbers = {key: value for key, value in record.items() if key not in {"step", *said}}
        name = " ".join(word for word in words if word != f"step={step}")
        return name, list(_points(numbers, "", step, {}))
    steps = {key: value for key, value in record.items() if _are_steps(key, value)}
    numbers = {key: value for key, value in record.items() if key not in {*steps, *said}}
    by_length = {len(value): value for value in steps.values()}
    return record["name"], list(_points(numbers, "", None, by_length))


def _are_steps(key: str, value: Any) -> bool:
    return (
        (key in ("step", "steps") or key.endswith("_steps"))
        and isinstance(value, list)
        and all(map(_is_number, value))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _points(
    value: Any, tag: str, step: int | None, steps: Mapping[int, Sequence[int]]
) -> Iterator[Point]:
    """Points of a value; with a step, all are at it, and the places in lists go into the tag."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _points(item, f"{tag}/{key}" if tag else key, step, steps)
    elif isinstance(value, list) and step is None:
        for place, item in zip(steps.get(len(value), range(len(value))), value, strict=True):
            yield from _points(item, tag, place, steps)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _points(item, f"{tag}/{place}", step, steps)
    elif _is_number(value) and abs(value) <= _LARGEST:
        yield Point(tag, step or 0, value)
