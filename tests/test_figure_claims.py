"""Every claim of the committed results is shown by a figure, and figures name claims that exist."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "docs" / "results").glob("*/results.json"))
NAMES = [path.parent.name for path in RESULTS]

_OTHER_RUNS = "the published number of a setting that this run does not train"
SHOWN_BY_NONE = {
    "imagenet-inception": _OTHER_RUNS,
    "imagenet-bn-baseline": _OTHER_RUNS,
    "imagenet-bn-x30": _OTHER_RUNS,
    "imagenet-bn-x5-sigmoid": _OTHER_RUNS,
    "imagenet-ensemble-of-six": "a published number that no run here can decide",
}


def read(name):
    folder = ROOT / "docs" / "results" / name
    claims = [c["id"] for c in json.loads((folder / "results.json").read_text())["claims"]]
    report = json.loads((folder / "report.json").read_text())
    return folder, claims, report


def test_there_are_results():
    assert len(RESULTS) >= 14


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_has_a_figure(name):
    _, claims, report = read(name)
    named = {claim for figure in report["figures"] for claim in figure["claims"]}
    assert named <= set(claims)
    assert set(claims) - named == set(claims) & set(SHOWN_BY_NONE)


@pytest.mark.parametrize("name", NAMES)
def test_the_report_lists_the_figures_that_are_there(name):
    folder, _, report = read(name)
    assert {f["file"] for f in report["figures"]} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
    }
    assert report["figures"][0]["claims"], "the first figure of a report shows a claim"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_runs_anywhere(name):
    preset = json.loads((ROOT / "docs" / "results" / name / "results.json").read_text())["preset"]
    command = read(name)[2]["command"]
    assert command == f"python -m experiments.{name} --preset={preset}"


def test_figures_name_claims_of_their_experiment():
    """In the sources, so that a slip is found before a run."""
    ids = {
        found
        for path in (ROOT / "experiments").rglob("*.py")
        for found in re.findall(r'\bid="([a-z0-9-]+)"', path.read_text())
    }
    named = [
        (path.name, claim.value)
        for path in (ROOT / "experiments").rglob("*figures.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "claims"
        if isinstance(node.value, ast.Tuple)
        for claim in node.value.elts
        if isinstance(claim, ast.Constant)
    ]
    assert len(named) > 50
    assert [(path, claim) for path, claim in named if claim not in ids] == []
