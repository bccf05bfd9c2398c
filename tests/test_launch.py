"""Tests of experiments.launch, on an experiment that only adds."""

import contextlib
import dataclasses
import html
import json
import os
import re
import signal
import time

import pytest

from bn_research.claims.claim import Claim
from bn_research.claims.figures import Figure
from bn_research.claims.finding import NOT_REPRODUCED, REPRODUCED, Finding
from bn_research.training.preemption import Stopped
from experiments import launch as launch_module
from experiments.launch import Experiment, main
from experiments.workdir import Ledger

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


def run(config, data, path):
    total = 1 + data
    verdict = REPRODUCED if total == 3 else NOT_REPRODUCED
    return [Finding(CLAIM, {"sum": total}, (total, total), verdict)], []


EXPERIMENT = Experiment(
    name="adding",
    title="Adding",
    question="What is one and two?",
    presets={"quick": Config(), "big": Config(term=3.0, terms=(5.0,))},
    claims=(CLAIM,),
    prepare=prepare,
    run=run,
)


def launch(*flags):
    return main(EXPERIMENT, ["adding", *flags])


def test_writes_results_report_and_prints_the_verdict(tmp_path, capsys):
    assert launch(f"--workdir={tmp_path / 'w'}") == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["preset"] == "quick" and results["seeds"] == [0, 1]
    assert results["claims"][0]["verdict"] == "reproduced"
    page = _text(tmp_path / "w" / "report.html")
    assert "python -m experiments.adding --preset=quick --workdir=" in page
    out = capsys.readouterr().out
    assert "sum-is-three" in out.replace("\n", "") and "report.html" in out


def test_the_command_says_where_only_if_that_is_no_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--workdir=w"]):
        assert launch("--config.term=1.0", *flags) == 0
    paths = ["runs/adding-quick/report.json", "w/report.json"]
    default, elsewhere = (json.loads((tmp_path / path).read_text())["command"] for path in paths)
    assert default == "python -m experiments.adding --preset=quick --config.term=1.0"
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
    asked = launch_module._first_prose("Title?\n\nWhy, and\nhow.\n\n    --flag  x\n\nTheory.\n")
    assert asked == "Why, and\nhow."
    assert launch_module._first_prose("What is one and two?") == "What is one and two?"


def test_help_names_every_field_preset_and_status(capsys):
    assert launch("--help", "--preset=big") == 0
    out = capsys.readouterr().out
    assert "What is one and two?" in out and "quick|big" in out and "term = 3.0" in out
    for status in (0, 2, 3, 4, 5):
        assert f"\n  {status}  " in out
    assert "--num_processes" not in out


def test_a_run_stopped_by_sigterm_has_a_status_of_its_own(tmp_path, capsys):
    def stop(config, data, path):
        raise Stopped(20)

    experiment = dataclasses.replace(EXPERIMENT, run=stop)
    assert main(experiment, ["adding", f"--workdir={tmp_path / 'w'}"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "adding: stopped by SIGTERM at step 20, saved; start again with the same command to go on\n"
    )
    assert not (tmp_path / "w" / "results.json").exists()
    assert launch(f"--workdir={tmp_path / 'w'}") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["measure", "_xla_gc_callback"])
def test_a_signal_ends_a_run_in_one_line(tmp_path, capsys, number, name):
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
    experiment = dataclasses.replace(EXPERIMENT, run=stopped)
    try:
        assert main(experiment, ["adding", f"--workdir={tmp_path / 'w'}"]) == 4
    finally:
        left = [signal.signal(each, old) for each, old in zip(taken, before, strict=True)]
    assert left == [signal.SIG_IGN] * 3
    said = "interrupted, what was measured is kept; start again with the same command to go on"
    assert capsys.readouterr().err == f"adding: {said}\n"
    assert (tmp_path / "w" / "metrics.jsonl").exists()
    assert launch(f"--workdir={tmp_path / 'w'}") == 0


def test_what_would_show_itself_at_the_end_is_said_at_once(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class NoSeeds:
        dataset: str = "digits"

    with pytest.raises(ValueError, match="'quick' must have the fields dataset and seeds"):
        dataclasses.replace(EXPERIMENT, presets={"quick": NoSeeds()})
    with pytest.raises(ValueError, match="more than once"):
        dataclasses.replace(EXPERIMENT, claims=(CLAIM, CLAIM))


def test_a_claim_without_finding_and_a_figure_of_another_are_refused(tmp_path):
    silent = dataclasses.replace(EXPERIMENT, run=lambda config, data, path: ([], []))
    with pytest.raises(ValueError, match="a finding for each of"):
        main(silent, ["adding", f"--workdir={tmp_path / 'w'}"])

    def other(config, data, path):
        findings, _ = run(config, data, path)
        return findings, [Figure(path / "a.png", "A", "A.", "A.", ("another-claim",))]

    with pytest.raises(ValueError, match=r"a.png shows \['another-claim'\]"):
        main(dataclasses.replace(EXPERIMENT, run=other), ["adding", f"--workdir={tmp_path / 'x'}"])


def test_a_workdir_in_use_is_refused(tmp_path, capsys):
    said = []

    def second(config, data, path):
        said.append(main(EXPERIMENT, ["adding", f"--workdir={path}"]))
        said.append(capsys.readouterr().err)
        return run(config, data, path)

    experiment = dataclasses.replace(EXPERIMENT, run=second)
    assert main(experiment, ["adding", f"--workdir={tmp_path / 'w'}"]) == 0
    assert said[0] == 2 and f"in use by process {os.getpid()} on " in said[1]
    assert said[1].count("\n") == 1


def test_only_a_distributed_experiment_takes_the_flags_for_it(tmp_path, capsys):
    asked = []

    def parallel_run(config, data, path, *, parallel):
        asked.append(parallel)
        return run(config, data, path)

    distributed = dataclasses.replace(EXPERIMENT, distributed=True, run=parallel_run)
    flags = ["adding", f"--workdir={tmp_path / 'w'}"]
    assert main(distributed, flags) == 0
    assert main(distributed, [*flags, "--parallel=shard_map"]) == 0  # not a field of the config
    assert asked == ["auto", "shard_map"]
    assert main(distributed, ["adding", "--help"]) == 0
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
    assert main(distributed, ["adding", f"--workdir={tmp_path / 'w'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err
    assert not (tmp_path / "w").exists()
