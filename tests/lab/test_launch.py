"""What is one and two? Tests of bn_research.lab.launch, on an experiment that only adds."""

import contextlib
import dataclasses
import functools
import html
import json
import os
import re
import signal
import sys
import time

import pytest

from bn_research.claims.claim import Claim
from bn_research.claims.figures import Figure
from bn_research.claims.finding import NOT_REPRODUCED, REPRODUCED, Finding
from bn_research.lab import run as run_module
from bn_research.lab.experiment import Experiment
from bn_research.lab.launch import main
from bn_research.lab.workdir import Ledger
from bn_research.training.preemption import Stopped

CLAIM = Claim("sum-is-three", "One and two are three", "Peano", "sum = 3; else not", "3")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 2
    dataset: str = "digits"
    term: float = 2.0
    terms: tuple[float, ...] = (1.0, 2.0)


def prepare(config):
    if config.term > 9:
        raise ValueError(f"term={config.term} is not allowed: at most 9")
    return config.term


def measure(config, data, path):
    return 1 + data


def judge(config, total):
    verdict = REPRODUCED if total == 3 else NOT_REPRODUCED
    return [Finding(CLAIM, {"sum": total}, (total, total), verdict)]


def draw(config, total, folder):
    return []


CLAIMS = (CLAIM,)
EXPERIMENT = Experiment(__name__, {"quick": Config(), "big": Config(term=3.0, terms=(5.0,))})
NAME = EXPERIMENT.name


@pytest.fixture
def door(monkeypatch):
    """Puts another function, or other claims, behind a door of the room."""
    return functools.partial(monkeypatch.setattr, sys.modules[__name__])


def launch(*flags):
    return main(EXPERIMENT, [NAME, *flags])


def test_writes_results_report_and_prints_the_verdict(tmp_path, capsys):
    assert launch(f"--workdir={tmp_path / 'w'}") == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["preset"] == "quick" and results["seeds"] == [0, 1]
    assert results["claims"][0]["verdict"] == "reproduced"
    page = _text(tmp_path / "w" / "report.html")
    assert f"python -m {__name__} --preset=quick --workdir=" in page
    out = capsys.readouterr().out
    assert "sum-is-three" in out.replace("\n", "") and "report.html" in out


def test_the_command_says_where_only_if_that_is_no_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--workdir=w"]):
        assert launch("--config.term=1.0", *flags) == 0
    paths = [f"runs/{NAME}-quick/report.json", "w/report.json"]
    default, elsewhere = (json.loads((tmp_path / path).read_text())["command"] for path in paths)
    assert default == f"python -m {__name__} --preset=quick --config.term=1.0"
    assert elsewhere == default.replace("quick", "quick --workdir=w")


def test_presets_and_overrides(tmp_path):
    flags = ["--preset=big", "--config.term=4", "--config.terms=(7.0, 8.0)"]
    assert launch(f"--workdir={tmp_path}", *flags) == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["preset"], config["term"], config["terms"]) == ("big", 4.0, [7.0, 8.0])
    assert config["seeds"] == 2
    assert "--config.term=4.0 '--config.terms=(7.0, 8.0)'" in _text(tmp_path / "report.html")


def _text(path):
    """What a page says, without its markup."""
    return html.unescape(re.sub(r"<[^>]*>", "", path.read_text()))


def test_strict_tells_a_claim_that_failed(tmp_path):
    assert launch(f"--workdir={tmp_path / 'a'}", "--config.term=5.0") == 0
    assert launch(f"--workdir={tmp_path / 'b'}", "--config.term=5.0", "--strict") == 3
    assert launch(f"--workdir={tmp_path / 'c'}", "--strict") == 0


def test_a_finished_run_started_again_keeps_every_file(tmp_path):
    assert launch(f"--workdir={tmp_path}") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert launch(f"--workdir={tmp_path}") == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--presett=quick"], "presett"),
        (["--preset=huge"], "quick|big"),
        (["--config.tern=1"], "tern"),
        (["--config.term=two"], "two"),
        (["--config.seeds=1.5"], "1.5"),
        (["--config.seeds=0"], "--config.seeds=0 is not allowed: at least 1"),
        (["--config.seed=3"], "no field 'seed', did you mean 'seeds'?"),
        (["--config.terms=abc"], "--config.terms holds numbers, got 'abc'"),
        (["quick"], "'quick'"),
        (["--config.term=10.0"], "at most 9"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(tmp_path, capsys, flags, said):
    assert launch(f"--workdir={tmp_path / 'w'}", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_another_config_is_refused(tmp_path, capsys):
    assert launch(f"--workdir={tmp_path}") == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert launch(f"--workdir={tmp_path}", "--config.term=3.0") == 2
    assert "term (there 2.0, now 3.0)" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_the_report_asks_the_question_without_the_listings():
    asked = run_module._first_prose("Title?\n\nWhy, and\nhow.\n\n    --flag  x\n\nTheory.\n")
    assert asked == "Why, and\nhow."
    assert run_module._first_prose("What is one and two?") == "What is one and two?"


def test_help_names_every_field_preset_and_status(capsys):
    assert launch("--help", "--preset=big") == 0
    out = capsys.readouterr().out
    assert "What is one and two?" in out and "quick|big" in out and "term = 3.0" in out
    for status in (0, 2, 3, 4, 5):
        assert f"\n  {status}  " in out
    assert "--num_processes" not in out


def test_a_run_stopped_by_sigterm_has_a_status_of_its_own(tmp_path, capsys, monkeypatch, door):
    def stop(config, data, path):
        raise Stopped(20)

    door("measure", stop)
    assert launch(f"--workdir={tmp_path / 'w'}") == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    said = "stopped by SIGTERM at step 20, saved; start again with the same command to go on"
    assert captured.err == f"{NAME}: {said}\n"
    assert not (tmp_path / "w" / "results.json").exists()
    monkeypatch.undo()
    assert launch(f"--workdir={tmp_path / 'w'}") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["measure", "_xla_gc_callback"])
def test_a_signal_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch, door, number, name):
    """Where JAX would swallow the exception it comes again; what was measured is not lost."""

    def swallow():
        with contextlib.suppress(BaseException):
            signal.raise_signal(number)

    def stopped(config, data, path):
        Ledger(path / "metrics.jsonl").get("one", lambda: {"sum": 3})
        swallow.__code__ = swallow.__code__.replace(co_name=name)
        if name == "measure":
            signal.raise_signal(number)
        swallow()
        time.sleep(30)
        raise AssertionError("not stopped")

    taken = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(each, signal.SIG_IGN) for each in taken]
    door("measure", stopped)
    try:
        assert launch(f"--workdir={tmp_path / 'w'}") == 4
    finally:
        left = [signal.signal(each, old) for each, old in zip(taken, before, strict=True)]
    assert left == [signal.SIG_IGN] * 3
    said = "interrupted, what was measured is kept; start again with the same command to go on"
    assert capsys.readouterr().err == f"{NAME}: {said}\n"
    assert (tmp_path / "w" / "metrics.jsonl").exists()
    monkeypatch.undo()
    assert launch(f"--workdir={tmp_path / 'w'}") == 0


def test_what_would_show_itself_at_the_end_is_said_at_once(tmp_path, monkeypatch, door):
    @dataclasses.dataclass(frozen=True)
    class NoSeeds:
        dataset: str = "digits"

    with pytest.raises(ValueError, match="'quick' must have the fields dataset and seeds"):
        dataclasses.replace(EXPERIMENT, presets={"quick": NoSeeds()})
    door("CLAIMS", (CLAIM, CLAIM))
    door("measure", None)
    with pytest.raises(ValueError, match="more than once"):
        main(dataclasses.replace(EXPERIMENT), [NAME, f"--workdir={tmp_path / 'w'}"])
    monkeypatch.delattr(sys.modules[__name__], "judge")
    with pytest.raises(AttributeError, match=r"has no judge \(verdicts.py\)"):
        EXPERIMENT.judge(None, None)


def test_a_claim_without_finding_and_a_figure_of_another_are_refused(tmp_path, monkeypatch, door):
    door("judge", lambda config, total: [])
    with pytest.raises(ValueError, match="a finding for each of"):
        launch(f"--workdir={tmp_path / 'w'}")
    monkeypatch.undo()
    door("draw", lambda *_: [Figure(tmp_path / "a.png", "A", "A.", "A.", ("another-claim",))])
    with pytest.raises(ValueError, match=r"a.png shows \['another-claim'\]"):
        launch(f"--workdir={tmp_path / 'x'}")


def test_a_workdir_in_use_is_refused(tmp_path, capsys, door):
    said = []

    def second(config, data, path):
        said.append(launch(f"--workdir={path}"))
        said.append(capsys.readouterr().err)
        return 3

    door("measure", second)
    assert launch(f"--workdir={tmp_path / 'w'}") == 0
    assert said[0] == 2 and f"in use by process {os.getpid()} on " in said[1]
    assert said[1].count("\n") == 1


def test_only_a_distributed_experiment_takes_the_flags_for_it(tmp_path, capsys, door):
    asked = []

    def parallel_measure(config, data, path, *, parallel):
        asked.append(parallel)
        return 3

    door("measure", parallel_measure)
    distributed = dataclasses.replace(EXPERIMENT, distributed=True)
    flags = [NAME, f"--workdir={tmp_path / 'w'}"]
    assert main(distributed, flags) == 0
    assert main(distributed, [*flags, "--parallel=shard_map"]) == 0  # not a field of the config
    assert asked == ["auto", "shard_map"]
    assert main(distributed, [NAME, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--parallel=auto|jit|pmap|shard_map" in out and "--coordinator_address=HOST" in out
    for flag in ("--parallel=jit", "--multiprocess", "--num_processes=2"):
        assert launch(f"--workdir={tmp_path / 'x'}", flag) == 2
        assert flag.split("=")[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parallel=threads"], "auto|jit|pmap|shard_map"),
        (["--num_processes=two"], "num_processes"),
        (["--num_processes=2"], "coordinator_address and process_id"),
        (["--multiprocess", "--process_id=0"], "give it alone"),
        (
            ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
            "process_id=2",
        ),
    ],
)
def test_a_job_that_cannot_be_is_one_line_and_writes_nothing(tmp_path, capsys, flags, said):
    distributed = dataclasses.replace(EXPERIMENT, distributed=True)
    assert main(distributed, [NAME, f"--workdir={tmp_path / 'w'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not (tmp_path / "w").exists()
