"""README.md and the pages of docs say what the committed results say, and the code runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments import imagenet, init_sensitivity
from experiments.readme import PAGES, render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_results_are_those_committed(page):
    text = (ROOT / page).read_text()
    assert render(text, ROOT / "docs") == text, (
        f"{page} differs from docs/results: run `python -m experiments.readme`"
    )


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results/init_sensitivity/results.json", '"verdict": "', '"verdict": "not '),
        ("results/scale_invariance/results.json", '"verdict": "', '"verdict": "not '),
        ("results/signal_propagation/results.json", '"verdict": "', '"verdict": "not '),
        ("results/transform/results.json", '"verdict": "', '"verdict": "not '),
        ("benchmarks/accuracy.md", "NaN", "0"),
        ("benchmarks/sweep.md", " ms", " s"),
        ("benchmarks/train_step.md", " ms", " s"),
    ],
)
def test_a_changed_result_changes_the_readme(tmp_path, name, old, new):
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    assert render(README, docs) == README
    text = (docs / name).read_text()
    assert old in text
    (docs / name).write_text(text.replace(old, new))
    assert render(README, docs) != README


_INTERVAL = r"\[(-?\d+(?:\.\d+)?), (-?\d+(?:\.\d+)?)\]"


def test_intervals_in_the_text_are_those_of_the_results():
    """Every [low, high] outside tables and code is a rounding of one that a run has written."""
    text = re.sub(r"<!-- (\w+:\w+) -->.*?<!-- /\1 -->|```.*?```", "", README, flags=re.DOTALL)
    text = text.replace("−", "-")
    said = re.findall(_INTERVAL, text)
    assert len(said) >= 40
    known = []
    for path in (ROOT / "docs" / "results").glob("*/results.json"):
        for claim in json.loads(path.read_text())["claims"]:
            known += [claim["interval"]] if claim["interval"] else []
            known += re.findall(_INTERVAL, claim["note"].replace("−", "-"))
            measured = claim["measured"]
            known += [
                (measured[name], measured[name[:-3] + "high"])
                for name in measured
                if name.endswith(", low")
            ]
    known = [pair for pair in known if None not in pair]  # an end that is open
    for low, high in said:
        digits = len(low.partition(".")[2])
        rounded = {tuple(f"{float(end):.{digits}f}" for end in pair) for pair in known}
        assert (low, high) in rounded, f"[{low}, {high}] stands in no results.json"


def test_verdicts_of_the_table_of_effects_are_those_of_the_results():
    rows = re.findall(r"\| ([a-z ]+?)(?: \([^|]*\))? \| `(\w+)`: `([a-z0-9-]+)` \|", README)
    assert len(rows) == 23
    for verdict, experiment, claim_id in rows:
        path = ROOT / "docs" / "results" / experiment / "results.json"
        claims = {c["id"]: c["verdict"] for c in json.loads(path.read_text())["claims"]}
        assert claims[claim_id] == verdict


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        if "print(audit" not in block and "print(probe" not in block:  # they have tests below
            exec(compile(block, "README.md", "exec"), {})


def test_the_audit_prints_what_it_shows(capsys):
    """Of each parameter the verdict; the digits are the machine's."""
    block, shown = re.search(
        r"```python\n(import jax[^`]*audit[^`]*)```\n\n```\n(.*?)```", README, re.S
    ).groups()
    assert len([line for line in block.splitlines() if line]) < 10
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for text in (shown, printed):
        assert re.search(r"\['w1'\] +invariant", text) and "together: ['b'], ['w2']" in text
    verdicts = [re.findall(r"^(\[\S+|\w[^-+–\d]*)", text, re.M) for text in (shown, printed)]
    assert verdicts[0] == verdicts[1]


def test_the_probe_prints_what_it_shows(capsys):
    """The same layers and findings; the digits are the machine's."""
    block, shown = re.search(
        r"```python\n(import jax[^`]*probe_linen[^`]*)```\n\n```\n(.*?)```", README, re.S
    ).groups()
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shapes = [re.findall(r"^(\S+ +\d+×[\d×]+)", text, re.M) for text in (shown, printed)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 7
    for text in (shown, printed):
        assert re.search(r"^signal lost from layer 2 \(conv2\) on.*weights by \d+× per", text, re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_flags_of_the_imagenet_job_exist(page, capsys):
    """Every flag that a launch of it gives stands in its --help."""
    assert imagenet.main(imagenet.EXPERIMENT, ["imagenet", "--help"]) == 0
    known = capsys.readouterr().out
    text = (ROOT / page).read_text().replace("\\\n", " ")
    launches = re.findall(r"python -m experiments\.imagenet(.*)", text)
    assert len(launches) >= 3
    for flag in {flag for launch in launches for flag in re.findall(r"--([\w.]+)", launch)}:
        assert (f"  {flag[7:]} = " if flag.startswith("config.") else f"--{flag}") in known, flag


def test_files_and_presets_that_it_names_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([\w./]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), target
    named = re.findall(r"^\| `(\w+)` \| (?:every|a first|the evidence)", README, re.MULTILINE)
    assert sorted(named) == sorted(init_sensitivity.PRESETS)
