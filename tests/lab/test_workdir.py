"""Tests of bn_research.lab.workdir."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bn_research.lab.workdir import Ledger, Workdir, WorkdirError

ROOT = Path(__file__).parents[2]


def fail():
    raise AssertionError("measured twice")


def open_once(path, config):
    """Opens a workdir and closes it, as a run does that ends at once."""
    with Workdir(path, config).opened():
        pass


def test_opening_writes_config_and_environment_once(tmp_path):
    workdir = Workdir(tmp_path / "run", {"seeds": 3, "rates": (0.1, 1.0)})
    open_once(workdir.path, workdir.config)
    config = (workdir.path / "config.json").read_bytes()
    assert json.loads(config) == {"seeds": 3, "rates": [0.1, 1.0]}
    environment = workdir.path / "environment.json"
    assert {"python", "devices", "commit", "versions"} <= set(json.loads(environment.read_text()))
    environment.write_text('{"python": "as it was"}')
    open_once(workdir.path, workdir.config)
    assert (workdir.path / "config.json").read_bytes() == config
    assert environment.read_text() == '{"python": "as it was"}'


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    open_once(tmp_path / "run", {"seeds": 3, "a": 0.1})
    with pytest.raises(WorkdirError, match=r"seeds \(there 3, now 5\)") as error:
        open_once(tmp_path / "run", {"seeds": 5, "a": 0.1})
    assert "a (there" not in str(error.value)


def test_somebody_elses_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(WorkdirError, match="not empty"):
        open_once(tmp_path, {})
    with pytest.raises(WorkdirError, match="is a file"):
        open_once(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seeds": ')
    with pytest.raises(WorkdirError, match="config.json cannot be read"):
        Workdir(tmp_path, {"seeds": 1}).check()


HOLDER = """
import sys, time
from pathlib import Path
from bn_research.lab.workdir import Workdir
with Workdir(Path(sys.argv[1]), {"seeds": 1}).opened():
    print("opened", flush=True)
    time.sleep(120)
"""


def test_a_second_run_is_refused_until_the_first_has_ended_however(tmp_path):
    """Another process holds the folder, and dies by SIGKILL."""
    config = {"seeds": 1}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert first.stdout.readline() == b"opened\n"
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        said = f"in use by process {first.pid} on {socket.gethostname()}: wait"
        with pytest.raises(WorkdirError, match=said):
            Workdir(tmp_path / "run", config).check()
        with pytest.raises(WorkdirError, match=said):
            open_once(tmp_path / "run", config)
        assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    finally:
        first.kill()
        first.communicate(timeout=30)
    assert str(first.pid) in (tmp_path / "run" / ".lock").read_text()  # stale, and no obstacle
    Workdir(tmp_path / "run", config).check()
    open_once(tmp_path / "run", config)
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_two_runs_of_one_process_are_refused_too(tmp_path):
    with Workdir(tmp_path / "run", {"seeds": 1}).opened():
        with pytest.raises(WorkdirError, match="in use by process"):
            Workdir(tmp_path / "run", {"seeds": 1}).check()
    Workdir(tmp_path / "run", {"seeds": 1}).check()


def test_a_run_that_fails_frees_the_folder(tmp_path):
    with pytest.raises(KeyError), Workdir(tmp_path / "run", {"seeds": 1}).opened():
        raise KeyError
    open_once(tmp_path / "run", {"seeds": 1})


def test_a_run_killed_before_it_wrote_its_config_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on moon\n")
    (tmp_path / "figures").mkdir()
    open_once(tmp_path, {"seeds": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"seeds": 1}


def test_another_process_of_the_job_must_see_the_folder(tmp_path):
    with pytest.raises(WorkdirError, match="all processes see"):
        Workdir(tmp_path / "run", {"seeds": 1}).check_shared()
    with Workdir(tmp_path / "run", {"seeds": 1}).opened():
        Workdir(tmp_path / "run", {"seeds": 1}).check_shared()
        with pytest.raises(WorkdirError, match=r"seeds \(there 1, now 2\)"):
            Workdir(tmp_path / "run", {"seeds": 2}).check_shared()


def test_ledger_measures_each_name_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = Ledger(path).get("a", lambda: {"loss": [0.1, math.nan], "x": math.inf})
    assert first == {"name": "a", "loss": [0.1, None], "x": None}
    again = Ledger(path)
    assert "a" in again and "b" not in again
    assert again.get("a", fail) == first


@pytest.mark.parametrize("tail", ['{"name": "b", "x"', '{"name": "b", "x": 1}', "\x00\x00"])
def test_a_line_cut_short_is_measured_anew(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    Ledger(path).get("a", lambda: {"x": 0})
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write(tail)
    ledger = Ledger(path)
    assert "a" in ledger and "b" not in ledger
    assert path.read_bytes() == whole
    assert ledger.get("b", lambda: {"x": 2})["x"] == 2
    assert len(path.read_bytes().splitlines()) == 2


def test_damage_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"name": "a"}\n{"na\n{"name": "c"}\n')
    before = path.read_bytes()
    with pytest.raises(WorkdirError, match="damaged in the middle"):
        Ledger(path)
    assert path.read_bytes() == before
