"""Smoke runs of the experiments: how to start, watch and stop one from outside."""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bn_research.lab.launch import main
from bn_research.lab.rooms import load
from bn_research.lab.workdir import Ledger
from bn_research.training.checkpoint import Checkpointer
from bn_research.training.lanes import Lanes
from bn_research.training.preemption import Preemption

# What can be seen of a run: a sweep fills its lanes and dispatches them; whoever trains asks after
# each dispatch whether to stop; the ledger begins to measure a record, has written it, and gives
# it or another; a checkpoint is restored; a clock is read.
LOAD, DISPATCH, ASK, MEASURE, RECORD, GET, RESTORE, CLOCK = (
    "load dispatch ask measure record get restore clock".split()
)
_PLACES = {
    LOAD: (Lanes, "load"),
    DISPATCH: (Lanes, "advance"),
    ASK: (Preemption, "requested"),
    RESTORE: (Checkpointer, "restore"),
}
_OURS = ("bn_research.", "experiments.")  # whose clocks matter
_NOT_REPEATED = ("checkpoints/", "environment.json", "report.html", ".lock")


class Event(NamedTuple):
    """Something that a run does."""

    kind: str
    name: str = ""  # of a record


class Ended(NamedTuple):
    """How a start ended."""

    status: int
    out: str
    err: str

    def said(self, name: str) -> list[str]:
        """The lines on stderr that are not the progress bar's."""
        assert "Traceback" not in self.err
        return [line for line in self.err.splitlines() if line.startswith(f"{name}: ")]


class SmokeRun(NamedTuple):
    """A run from its beginning to its end."""

    name: str
    path: Path
    ended: Ended
    events: tuple[Event, ...]

    @property
    def clocks(self) -> dict[str, dict[str, Any]]:
        """The records that no second run repeats: one of our modules read a clock for them."""
        names, read = [], False
        for event in self.events:
            if event.kind == GET and read and event.name not in names:
                names.append(event.name)
            read = event.kind == CLOCK or (read and event.kind != GET)
        return {record["name"]: record for record in ledger(self.path) if record["name"] in names}

    @property
    def repeated(self) -> list[Event]:
        """The events that a second run repeats: those for which no clock was read."""
        clocks, found, inside = self.clocks, [], False
        for event in self.events:
            inside = inside and event.kind != RECORD
            if not inside:
                found.append(event)
            inside = inside or (event.kind == MEASURE and event.name in clocks)
        return found


def launch(name: str, workdir: Path, *flags: str) -> Ended:
    """Starts an experiment as its command line does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(load(name), [name, "--preset=smoke", f"--workdir={workdir}", *flags])
    return Ended(status, out.getvalue(), err.getvalue())


def run_smoke(name: str, workdir: Path) -> SmokeRun:
    """Starts one and lets it come to its end."""
    with watched() as events:
        ended = launch(name, workdir)
    assert ended.status == 0, ended.err
    return SmokeRun(name, workdir, ended, tuple(events))


def ledger(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run so far."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def files(workdir: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {
        str(path.relative_to(workdir)): path.read_bytes()
        for path in sorted(workdir.rglob("*"))
        if path.is_file()
    }


def bits(workdir: Path) -> dict[str, Any]:
    """What a run must give again, interrupted or not, in whatever folder."""
    found: dict[str, Any] = {
        name: content
        for name, content in files(workdir).items()
        if not name.startswith(_NOT_REPEATED)
    }
    found["metrics.jsonl"] = found["metrics.jsonl"].splitlines()
    found["results.json"] = {**json.loads(found["results.json"]), "wall_seconds": None}
    found["report.json"] = found["report.json"].replace(os.fsencode(workdir), b"DIR")
    return found


@contextlib.contextmanager
def watched(act: Callable[[list[Event]], object] = lambda events: None) -> Iterator[list[Event]]:
    """Gives the list that events are appended to; `act` sees it just before each happens."""
    events: list[Event] = []

    def note(kind, name=""):
        events.append(Event(kind, name))
        act(events)

    def noting(kind, original):
        def wrapped(*args, **kwargs):
            note(kind)
            return original(*args, **kwargs)

        return wrapped

    get, clock = Ledger.get, time.perf_counter

    def noting_get(self, name, measure, *given):
        def measured():
            note(MEASURE, name)
            return measure(*given)

        is_new = name not in self
        record = get(self, name, measured)
        if is_new:
            note(RECORD, name)
        note(GET, name)
        return record

    def noting_clock():
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_OURS):
            note(CLOCK)
        return clock()

    with pytest.MonkeyPatch.context() as patch:
        for kind, (owner, method) in _PLACES.items():
            patch.setattr(owner, method, noting(kind, getattr(owner, method)))
        patch.setattr(Ledger, "get", noting_get)
        patch.setattr(time, "perf_counter", noting_clock)
        yield events


@contextlib.contextmanager
def given(records: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Lets runs take these records for what they would measure themselves."""
    get = Ledger.get

    def knowing(self, name, measure, *given):
        known = {key: value for key, value in records.get(name, {}).items() if key != "name"}
        return get(self, name, lambda: known or measure(*given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "get", knowing)
        yield
