"""Every command that README.md prints is executed; those of the other pages are understood.

Experiments run at the size `smoke`, whatever the page says, in a folder that a newcomer would have:
a copy of experiments/ with the README's own example saved into it.
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bn_research.lab.launch import main
from bn_research.lab.pages import ROOT, pages
from bn_research.lab.rooms import experiment_names

README = (ROOT / "README.md").read_text()
# What this file does not run, with the test that does.
ELSEWHERE = {
    "make test": None,  # the run that this test is part of
    "make lint": None,  # its first half
    ".venv/bin/python -m pytest": None,  # likewise
    "make pages": "test_readme.py::test_results_are_those_committed",
    "make docs": "test_api_pages.py::",
    "mpirun -n 2 python -m experiments.imagenet": (
        "experiments/test_imagenet.py::test_the_same_under_mpirun"
    ),
}


def commands(text):
    """Lines of the bash blocks, without comments, and commands in the running text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(
        r"`((?:python -m|make|mpirun) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    found = (re.sub(r"\s+#.*", "", line).strip() for line in [*lines, *inline])
    return list(dict.fromkeys(" ".join(line.split()) for line in found if line))


def example():
    """The experiment that the README shows."""
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "\nEXPERIMENT = " in block
    )
    return block


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Gives a clone with some of the experiments and the README's example; one for each choice."""
    clones = {}

    def with_experiments(*names):
        if names not in clones:
            clones[names] = make_clone(tmp_path_factory.mktemp("clone"), names)
        return clones[names]

    return with_experiments


def make_clone(folder, names):
    others = shutil.ignore_patterns("__pycache__", *({*experiment_names()} - {*names}))
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=others)
    (folder / "experiments" / "cancelled_bias.py").write_text(example())
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")
    return folder


def experiment_commands(text):
    """Of the commands those of `python -m experiments`, as `make` would give them too."""
    found = []
    for command in commands(text):
        if command.startswith("make "):
            target = command.split()[1]
            printed = subprocess.run(
                ["make", "-n", target, "VENV=venv"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            found += re.findall(r"python (-m experiments\..*)", printed)
        elif command.startswith("python -m experiments."):
            found.append(command.removeprefix("python "))
    return list(dict.fromkeys(found))


def at_smoke(command):
    words = shlex.split(command)
    if {"--help", "--list", "--report_only", "--preset=paper"} & set(words):
        return words
    return [*(word for word in words if not word.startswith("--preset=")), "--preset=smoke"]


@pytest.mark.parametrize("command", experiment_commands(README))
def test_a_command_of_the_readme_runs(clone, command):
    name = command.split(".")[1].split()[0]
    folder = clone(*(["transform", "whitening"] if name == "reproduce" else [name]))
    words = [sys.executable, *at_smoke(command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240)
    if "data_dir=DATA" in command:  # nobody has ImageNet here: one line says what is missing
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "imagenet2012" in done.stderr and "DATA" in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    reports = re.findall(r"^report: (.*)", done.stdout, re.MULTILINE)
    assert bool(reports) == (not {"--help", "--list"} & set(shlex.split(command)))
    assert all("<!DOCTYPE html>" in (folder / report).read_text() for report in reports)


def test_the_readme_prints_no_command_that_nobody_runs():
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    ran = ("python -m experiments.", "make demo", "make reproduce")
    for command in commands(text):
        if command.startswith(ran):
            continue
        if command.startswith("python -m benchmarks."):
            assert (ROOT / "benchmarks" / f"{command.split('.')[1].split()[0]}.py").exists()
            continue
        (test,) = (test for start, test in ELSEWHERE.items() if command.startswith(start))
        if test is not None:
            file, name = test.split("::")
            assert f"def {name}" in (ROOT / "tests" / file).read_text(), command


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_the_flags_that_a_page_prints_exist(page, capsys):
    for command in experiment_commands(page.read_text()):
        name = command.split(".")[1].split()[0]
        if name in ("reproduce", "readme", "cancelled_bias"):
            continue
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
        assert main(experiment, [*shlex.split(command)[1:], "--help"]) == 0, command
        capsys.readouterr()


def test_the_example_has_fifty_lines():
    assert len([line for line in example().splitlines() if line.strip()]) <= 50


def test_the_example_is_as_clean_as_the_project(tmp_path):
    path = tmp_path / "cancelled_bias.py"
    path.write_text(example())
    config = [
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    ruff = Path(sys.executable).parent / "ruff"
    subprocess.run([ruff, "check", *config, path], check=True)
