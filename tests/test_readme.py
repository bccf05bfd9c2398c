"""README.md says what the committed results say, and its code runs."""

import re
import shutil
from pathlib import Path

import pytest

from experiments import init_sensitivity
from experiments.readme import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_results_are_those_committed():
    assert render(README, ROOT / "docs") == README, (
        "README.md differs from docs/results: run `python -m experiments.readme`"
    )


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results/init_sensitivity/results.json", '"verdict": "', '"verdict": "not '),
        ("results/transform/results.json", '"verdict": "', '"verdict": "not '),
        ("benchmarks/accuracy.md", "NaN", "0"),
        ("benchmarks/speed.md", " ms", " s"),
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


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_files_and_presets_that_it_names_exist():
    for target in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / target).exists(), target
    named = re.findall(r"^\| `(\w+)` \| (?:every|a first|the evidence)", README, re.MULTILINE)
    assert sorted(named) == sorted(init_sensitivity.PRESETS)
