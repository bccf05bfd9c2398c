"""Tests of experiments.workdir."""

import json
import math

import pytest

from experiments.workdir import Ledger, Workdir, WorkdirError


def fail():
    raise AssertionError("measured twice")


def test_create_writes_config_and_environment_once(tmp_path):
    workdir = Workdir(tmp_path / "run", {"seeds": 3, "rates": (0.1, 1.0)})
    workdir.create()
    config = (workdir.path / "config.json").read_bytes()
    assert json.loads(config) == {"seeds": 3, "rates": [0.1, 1.0]}
    assert {"python", "devices", "commit", "versions"} <= set(workdir.environment)
    (workdir.path / "environment.json").write_text('{"python": "as it was"}')
    workdir.create()
    assert (workdir.path / "config.json").read_bytes() == config
    assert workdir.environment == {"python": "as it was"}


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    Workdir(tmp_path / "run", {"seeds": 3, "a": 0.1}).create()
    with pytest.raises(WorkdirError, match=r"seeds \(there 3, now 5\)") as error:
        Workdir(tmp_path / "run", {"seeds": 5, "a": 0.1}).create()
    assert "a (there" not in str(error.value)


def test_somebody_elses_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(WorkdirError, match="not empty"):
        Workdir(tmp_path, {}).create()
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(tmp_path / "thesis.txt", {}).create()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seeds": ')
    with pytest.raises(WorkdirError, match="config.json cannot be read"):
        Workdir(tmp_path, {"seeds": 1}).check()


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
