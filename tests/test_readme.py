"""README.md says what the committed results say, and its code runs."""

import re
from pathlib import Path

from experiments import init_sensitivity
from experiments.readme import render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_results_are_those_committed():
    assert render(README, ROOT / "docs" / "results") == README, (
        "README.md differs from docs/results: run `python -m experiments.readme`"
    )


def test_a_changed_result_changes_the_readme(tmp_path):
    source = ROOT / "docs" / "results" / "init_sensitivity" / "results.json"
    target = tmp_path / "init_sensitivity" / "results.json"
    target.parent.mkdir()
    target.write_text(source.read_text().replace('"verdict": "', '"verdict": "not '))
    assert render(README, tmp_path) != README


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
