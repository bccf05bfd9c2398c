"""Every experiment in one command: side by side, resumed, and with failures that are told."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bn_research.lab import reproduce, rooms, side_by_side

ROOT = Path(__file__).parents[2]

STEADY = '''
"""Is one number what it is?"""
import dataclasses, os, sys
from bn_research.claims.figures import new_figure, save_figure
from bn_research.claims.claim import Claim
from bn_research.claims.finding import Finding, decide
from bn_research.lab.experiment import Experiment
from bn_research.lab.launch import main
from bn_research.lab.workdir import Ledger

CLAIM = Claim("NAME-is-what-it-is", "NAME is what it is", "a test", "equal to 1", "1")

@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "none"
    seeds: int = 2

def prepare(config):
    BODY

def measure(config, data, path):
    cores = len(os.sched_getaffinity(0))
    return Ledger(path / "metrics.jsonl").get("one", lambda: {"number": VALUE, "cores": cores})

def judge(config, number):
    measured = {"number": number["number"], "cores": number["cores"]}
    verdict = decide((number["number"],) * 2, at_most=1)
    return [Finding(CLAIM, measured, None, verdict)]

def draw(config, number, folder):
    fig, axis = new_figure()
    axis.plot([0, 1], [0, number["number"]])
    texts = {"title": "One", "alt": "A line.", "caption": "One."}
    return [save_figure(fig, folder / "one.png", **texts)]

PRESETS = {"smoke": Config(), "quick": Config(seeds=5)}
CLAIMS = [CLAIM]
EXPERIMENT = Experiment(__name__, PRESETS, title="Is NAME steady?")

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
'''


def write_experiment(folder, name, *, body="pass", value="1.0"):
    text = STEADY.replace("NAME", name).replace("BODY", body).replace("VALUE", value)
    (folder / "experiments" / f"{name}.py").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """A copy of experiments/ without its experiments, from which `python -m` starts."""
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    for path in (ROOT / "experiments").glob("*.py"):
        shutil.copy(path, experiments)
    return tmp_path


def launch(folder, *arguments, **options):
    command = [
        sys.executable,
        "-m",
        "experiments.reproduce",
        "--preset=smoke",
        "--workdir=runs/all",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, **options
    )


def test_one_fails_the_others_go_on(folder):
    write_experiment(folder, "steady")
    write_experiment(folder, "large", value="2.0")
    write_experiment(folder, "broken", body="print('on the way'); raise RuntimeError('no <disk>')")
    done = launch(folder)
    assert done.returncode == 1, done.stderr
    assert "broken: failed, status 1: RuntimeError: no <disk>" in done.stdout
    assert "steady: 1 reproduced" in done.stdout and "large: 1 not reproduced" in done.stdout
    assert (
        "2 claims: 1 reproduced, 1 not reproduced, 0 inconclusive; 1 experiment failed"
        in done.stdout
    )
    assert done.stdout.rstrip().endswith("report: runs/all/report.html")
    runs = folder / "runs" / "all"
    assert (runs / "broken.log").read_text().startswith("on the way\n")
    page = (runs / "report.html").read_text()
    for text in ("steady-is-what-it-is", "large-is-what-it-is", "on the way", "no &lt;disk&gt;"):
        assert text in page
    assert "python -m experiments.steady --preset=smoke --workdir=runs/all/steady" in re.sub(
        r"</?span>", "", page
    )

    # Mended and started again: only the one that failed runs; --strict tells of the verdicts.
    write_experiment(folder, "broken")
    before = (runs / "steady" / "metrics.jsonl").stat().st_mtime_ns, (runs / "steady.log").stat()
    again = launch(folder, "--strict")
    assert again.returncode == 3, again.stderr
    assert "steady: 1 reproduced, finished before" in again.stdout
    assert "broken: 1 reproduced" in again.stdout and "3 claims" in again.stdout
    after = (runs / "steady" / "metrics.jsonl").stat().st_mtime_ns, (runs / "steady.log").stat()
    assert before[0] == after[0] and before[1].st_mtime_ns == after[1].st_mtime_ns

    # A damaged result is measured no second time, but written again.
    results = (runs / "steady" / "results.json").read_bytes()
    (runs / "steady" / "results.json").write_text("{")
    (runs / "steady" / "report.json").unlink()
    mended = launch(folder, "--only=steady")
    assert mended.returncode == 0, mended.stderr
    claims = json.loads((runs / "steady" / "results.json").read_text())["claims"]
    assert claims == json.loads(results)["claims"]
    assert "3 claims" in mended.stdout and "large-is" in (runs / "report.html").read_text()

    # Of what is there a report is made without running anything.
    report = launch(folder, "--report_only")
    assert report.returncode == 0 and "3 claims" in report.stdout
    assert "large-is" in (runs / "report.html").read_text()


def test_a_module_that_cannot_be_loaded_is_a_failure_too(folder):
    write_experiment(folder, "steady")
    write_experiment(folder, "spaced")
    path = folder / "experiments" / "spaced.py"
    path.write_text(path.read_text().replace('"spaced-is-what-it-is"', '"spaced out"'))
    done = launch(folder)
    assert done.returncode == 1 and "spaced: failed, status 1: ValueError: Claim.id" in done.stdout
    assert "1 claim: 1 reproduced" in done.stdout
    listed = launch(folder, "--list")
    assert listed.returncode == 0 and "spaced  cannot be loaded: Claim.id must be" in listed.stdout
    path.write_text(path.read_text().replace('"spaced out"', '"steady-is-what-it-is"'))
    twice = launch(folder, "--list")
    assert twice.returncode == 2 and "'steady-is-what-it-is' more than once" in twice.stderr


def test_stopped_it_stops_the_experiments_and_goes_on(folder):
    body = """
    import time
    from bn_research.training.preemption import Preemption, Stopped
    with Preemption() as preemption:
        open("started", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.02)
            if preemption.requested(7):
                raise Stopped(7)
    """
    write_experiment(folder, "slow", body=body.strip())
    command = [sys.executable, "-m", "experiments.reproduce", "--preset=smoke", "--workdir=r"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert stderr.rstrip().endswith("stopped; start again with the same command to go on")
    assert "start again with the same command" in (folder / "r" / "slow.log").read_text()
    (folder / "go").touch()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "slow: 1 reproduced" in done.stdout


def test_ctrl_c_between_two_looks_is_one_line_too(tmp_path, capsys, monkeypatch):
    def interrupted(*names, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(reproduce, "run_all", interrupted)
    assert reproduce.main(["reproduce", "--preset=smoke", f"--workdir={tmp_path}"]) == 4
    assert capsys.readouterr().err.endswith("start again with the same command to go on\n")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
@pytest.mark.skipif(len(side_by_side.cores()) < 2, reason="one core")
def test_experiments_side_by_side_have_cores_of_their_own(folder):
    """Both wait for the other to have started, and neither is given a core of the other."""
    body = """
    import time
    open(f"NAME.started", "w").close()
    deadline = time.monotonic() + 60
    while not all(os.path.exists(f"{other}.started") for other in ("here", "there")):
        assert time.monotonic() < deadline, "the other has not started"
        time.sleep(0.02)
    """
    for name in ("here", "there"):
        write_experiment(folder, name, body=body.strip().replace("NAME", name))
    done = launch(folder, "--jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = 0
    for name in ("here", "there"):
        claim = json.loads((folder / "runs/all" / name / "results.json").read_text())["claims"][0]
        found += claim["measured"]["cores"]
    assert found == len(side_by_side.cores())


def test_a_preset_that_one_lacks_leaves_it_out(folder):
    write_experiment(folder, "steady")
    write_experiment(folder, "hasty")
    path = folder / "experiments" / "hasty.py"
    path.write_text(path.read_text().replace('"smoke": Config(), ', ""))
    done = launch(folder)
    assert done.returncode == 0, done.stderr
    assert "hasty: left out, it has no preset smoke (quick)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only=transfrom"], "no experiment 'transfrom'; there are init_sensitivity,"),
        (["--preset=huge"], "no experiment has a preset 'huge'; there are smoke, quick"),
        (["--jobs=0"], "jobs"),
        (["transform"], "unexpected argument 'transform': flags start with --"),
        (["--report_only", "--workdir=nowhere"], "no finished run in nowhere"),
        (["--onyl=transform"], "onyl"),
    ],
)
def test_bad_flags_are_one_line(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and complaint in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_of_another_preset_is_refused(capsys, tmp_path):
    (tmp_path / "transform").mkdir()
    (tmp_path / "transform" / "config.json").write_text('{"preset": "standard"}')
    for only in ([], ["--only=audit"]):  # whichever are to run: the report would mix the presets
        flags = ["--preset=smoke", f"--workdir={tmp_path}", *only]
        assert reproduce.main(["reproduce", *flags]) == 2
        assert "holds runs of --preset=standard" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert reproduce.main(["reproduce", "--preset=smoke", f"--workdir={tmp_path / 'file'}"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_the_list_names_every_experiment_and_claim(capsys):
    assert reproduce.main(["reproduce", "--list"]) == 0
    listed = capsys.readouterr().out
    names = rooms.experiment_names()
    assert len(names) >= 14 and set(names) >= {"transform", "imagenet", "audit"}
    for name in names:
        experiment = rooms.load(name)
        assert experiment.name == name and f"\n{name}  {experiment.title}" in f"\n{listed}"
        assert all(f"- {claim.id}: " in listed for claim in experiment.claims)
    assert reproduce.main(["reproduce", "--list", "--only=whitening"]) == 0
    assert capsys.readouterr().out.startswith("whitening  ")


def test_no_two_experiments_share_a_claim():
    """A page of all of them links to a claim by its id."""
    ids = [c.id for name in rooms.experiment_names() for c in rooms.load(name).claims]
    assert len(ids) == len(set(ids)) >= 45


@pytest.mark.parametrize(
    ("cores", "jobs", "sizes"), [(2, 1, [2]), (5, 2, [3, 2]), (16, 8, [2] * 8), (2, 3, [2] * 3)]
)
def test_shares_part_the_cores(monkeypatch, cores, jobs, sizes):
    monkeypatch.setattr(side_by_side, "cores", lambda: frozenset(range(cores)))
    shares = side_by_side.shares(jobs)
    assert [len(share) for share in shares] == sizes
    assert jobs > cores or sum(sizes) == len(frozenset().union(*shares)) == cores


@pytest.mark.parametrize(
    ("accelerator", "cores", "jobs"), [(False, 1, 1), (False, 2, 1), (False, 9, 4), (True, 16, 1)]
)
def test_how_many_at_once(monkeypatch, accelerator, cores, jobs):
    monkeypatch.setattr(side_by_side, "cores", lambda: frozenset(range(cores)))
    monkeypatch.setattr(side_by_side, "has_accelerator", lambda: accelerator)
    assert side_by_side.default_jobs() == jobs


def test_the_tail_of_a_log_is_what_a_terminal_would_show(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n10%|#\r50%|##\r100%|####\n\nlast \xff\r\n")
    assert side_by_side.tail(log) == "first\n100%|####\nlast \ufffd"
    assert side_by_side.tail(log, lines=1) == "last \ufffd"
