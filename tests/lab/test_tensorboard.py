"""Tests of bn_research.lab.tensorboard: event files read back against the ledger."""

import dataclasses
import math
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bn_research.claims.claim import Claim
from bn_research.claims.finding import REPRODUCED, Finding
from bn_research.lab import launch, tensorboard
from bn_research.lab import run as run_module
from bn_research.lab.experiment import Experiment
from bn_research.lab.tensorboard import curves, event_files
from bn_research.lab.workdir import Ledger

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")

ROOT = Path(__file__).parents[2]


def read(folder):
    """Points of every run as {run: {tag: [(step, value), ...]}}, in the order of the files."""
    runs = {}
    for path in sorted(folder.rglob("events.*")):
        tags = runs.setdefault(str(path.relative_to(folder).parent), {})
        content = path.read_bytes()
        while content:  # a length of 8 bytes and its checksum, the event and its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append((event.step, value.simple_value))
    return runs


def write(path, *records):
    """The runs of a ledger with these records."""
    ledger = Ledger(path / "metrics.jsonl")
    with event_files(path / "metrics.jsonl"):
        for name, record in records:
            ledger.get(name, lambda record=record: record)
    return read(path / "tensorboard")


def single(value):
    return float(np.float32(value))


def test_every_number_of_a_training_has_its_point(tmp_path):
    rng = np.random.default_rng(0)
    loss, angles, cosine = rng.normal(size=50), rng.normal(size=(4, 2)), rng.normal(size=(4, 2, 2))
    record = {
        "rate": 0.1,
        "seed": 3,
        "is_watched": True,
        "network": "f10",
        "loss": loss,
        "surface_steps": [0, 20, 40, 60],
        "angles": angles,
        "surface": {"cosine": cosine},
        "curvature_steps": [5, 7, 9],
        "largest": [1.0, 2.0, 3.0],
        "accuracy": 0.5,
        "diverged": 0,
        "rows": [{"path": "w", "degree": 1.5}, {"path": "b", "degree": None}],
    }
    runs = write(tmp_path, ("train/plain rate=0.1 seed=3", record))
    steps = [0, 20, 40, 60]
    assert runs == {
        "train/plain rate=0.1 seed=3": {
            "loss": [(step, single(value)) for step, value in enumerate(loss)],
            **{
                f"angles/{layer}": [
                    (step, single(row[layer])) for step, row in zip(steps, angles, strict=True)
                ]
                for layer in (0, 1)
            },
            **{
                f"surface/cosine/{i}/{j}": [
                    (step, single(row[i, j])) for step, row in zip(steps, cosine, strict=True)
                ]
                for i in (0, 1)
                for j in (0, 1)
            },
            "largest": [(5, 1.0), (7, 2.0), (9, 3.0)],
            "accuracy": [(0, 0.5)],
            "diverged": [(0, 0.0)],
            "rows/degree": [(0, 1.5)],
        }
    }


def test_points_that_are_not_finite_are_left_out(tmp_path):
    runs = write(tmp_path, ("a", {"loss": [1.0, math.nan, 3.0], "x": math.inf, "wide": 1e39}))
    assert runs == {"a": {"loss": [(0, 1.0), (2, 3.0)]}}


def evaluation(step):
    record = {"step": step, "accuracy": step / 64, "parts": {"mean": [step, 2 * step]}}
    return f"evaluation/seed=0 step={step}", record


@pytest.mark.parametrize("order", [(8, 16, 24), (24, 8, 16), (24, 16, 8)])
def test_records_of_one_training_are_one_curve_with_rising_steps(tmp_path, order):
    """At a step that goes down TensorBoard forgets what came after it."""
    runs = write(tmp_path, *map(evaluation, order))
    assert runs == {
        "evaluation/seed=0": {
            "accuracy": [(8, 0.125), (16, 0.25), (24, 0.375)],
            "parts/mean/0": [(8, 8.0), (16, 16.0), (24, 24.0)],
            "parts/mean/1": [(8, 16.0), (16, 32.0), (24, 48.0)],
        }
    }


def test_a_setting_that_the_name_says_is_no_curve():
    name, points = curves({"name": "tune/batch=8 rate=0.1 seed=5", "rate": 0.1, "seed": 5, "a": 2})
    assert name == "tune/batch=8 rate=0.1 seed=5"
    assert points == [("a", 0, 2)]


def test_names_too_long_for_a_file_stay_apart(tmp_path):
    long = "β" * 200
    runs = write(tmp_path, (f"{long} seed=0", {"x": 0}), (f"{long} seed=1", {"x": 1}))
    assert sorted(tags["x"] for tags in runs.values()) == [[(0, 0.0)], [(0, 1.0)]]
    assert all(name.startswith("β" * 100) for name in runs)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "nothing was written while the run went on"
        time.sleep(0.05)


def last_step(folder):
    points = read(folder).get("evaluation/seed=0", {}).get("accuracy", [(None, None)])
    return points[-1][0]


def test_points_are_there_while_the_run_goes_on(tmp_path):
    ledger = Ledger(tmp_path / "metrics.jsonl")
    with event_files(tmp_path / "metrics.jsonl"):
        for step in (8, 16):
            name, record = evaluation(step)
            ledger.get(name, lambda record=record: record)
            wait_for(lambda step=step: last_step(tmp_path / "tensorboard") == step)


KILLED = """
import sys, time
from pathlib import Path
from bn_research.lab.tensorboard import event_files
from bn_research.lab.workdir import Ledger
path = Path(sys.argv[1]) / "metrics.jsonl"
ledger = Ledger(path)
with event_files(path):
    ledger.get("a", lambda: {"loss": [1.0, 2.0]})
    ledger.get("b step=1", lambda: {"step": 1, "x": 1.0})
    path.open("a").write('{"name": "b step=2", "step": 2, "x"')
    while not list(path.parent.glob("tensorboard/b/*")):
        time.sleep(0.05)
    print("written", flush=True)
    time.sleep(120)
"""


def test_a_run_killed_and_started_again_has_whole_curves_once(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert "written\n" in iter(first.stdout.readline, "")
    finally:
        first.kill()
        first.communicate(timeout=30)
    assert first.returncode == -signal.SIGKILL
    (tmp_path / "tensorboard" / "a" / "events.out.tfevents.1.of.a.kill").write_bytes(b"\1")
    runs = write(
        tmp_path,
        ("a", {}),
        ("b step=1", {}),
        ("b step=2", {"step": 2, "x": 2.0}),
        ("c", {"y": 3.0}),
    )
    assert runs == {
        "a": {"loss": [(0, 1.0), (1, 2.0)]},
        "b": {"x": [(1, 1.0), (2, 2.0)]},
        "c": {"y": [(0, 3.0)]},
    }


@pytest.mark.parametrize("tail", ['{"name": "b", "x"', '{"name": "b", "x": 1}', "\x00\x00"])
def test_a_line_cut_short_waits_for_the_ledger_to_measure_it_anew(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"name": "a", "x": 0}\n' + tail)
    with event_files(path):
        wait_for(lambda: read(tmp_path / "tensorboard").get("a"))
        Ledger(path).get("b", lambda: {"x": 2})
    assert read(tmp_path / "tensorboard") == {"a": {"x": [(0, 0.0)]}, "b": {"x": [(0, 2.0)]}}


CLAIM = Claim("one-is-one", "One is one", "Peano", "1 = 1; else not", "1")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 1
    dataset: str = "digits"


def prepare(config):
    return None


def measure(config, data, path):
    return Ledger(path / "metrics.jsonl").get("one", lambda: {"value": 1.0})


def judge(config, record):
    return [Finding(CLAIM, {"value": record["value"]}, None, REPRODUCED)]


def draw(config, record, folder):
    return []


CLAIMS = (CLAIM,)
EXPERIMENT = Experiment(__name__, {"quick": Config()})


def start(path, *flags):
    return launch.main(EXPERIMENT, ["one", f"--workdir={path}", *flags])


def test_the_flag_of_an_experiment(tmp_path, capsys):
    assert start(tmp_path / "w") == 0
    assert not (tmp_path / "w" / "tensorboard").exists()
    capsys.readouterr()
    assert start(tmp_path / "w", "--tensorboard") == 0  # finished before: written from its ledger
    assert read(tmp_path / "w" / "tensorboard") == {"one": {"value": [(0, 1.0)]}}
    assert f"tensorboard --logdir={tmp_path / 'w' / 'tensorboard'}\n" in capsys.readouterr().out
    assert start(tmp_path / "w", "--help") == 0
    assert "--tensorboard" in capsys.readouterr().out


def test_only_process_0_of_a_job_writes(tmp_path, monkeypatch):
    assert start(tmp_path / "w") == 0
    monkeypatch.setattr(run_module, "_writes", lambda job: False)
    assert start(tmp_path / "w", "--tensorboard") == 0
    assert not (tmp_path / "w" / "tensorboard").exists()


def test_without_the_library_the_flag_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    assert start(tmp_path / "w", "--tensorboard") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'bn_research[tensorboard]'" in said
    assert not (tmp_path / "w").exists()


def test_the_library_is_loaded_for_the_flag_alone():
    program = "import sys, bn_research.lab.run; print([m for m in sys.modules if 'tensorb' in m])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['bn_research.lab.tensorboard']"


def test_a_file_in_the_folders_place_is_refused(tmp_path, capsys):
    assert start(tmp_path / "w") == 0
    (tmp_path / "w" / "tensorboard").write_text("mine")
    capsys.readouterr()
    assert start(tmp_path / "w", "--tensorboard") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be replaced" in said
    assert (tmp_path / "w" / "tensorboard").read_text() == "mine"


def test_an_error_of_the_disk_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(tensorboard, "_write", full)
    assert start(tmp_path / "w", "--tensorboard") == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device; the run goes on" in said
