"""Tests of what is installed, and of what is said beside it: CITATION.cff and CHANGELOG.md."""

import datetime
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

from bn_research import __version__

ROOT = Path(__file__).parents[1]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_names_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["license"] == project["license"]
    assert citation["message"] and citation["title"].startswith(f"{project['name']}:")
    assert isinstance(citation["date-released"], datetime.date)
    assert citation["authors"] == [{"name": "The bn_research authors"}]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    assert "arXiv:1502.03167" in str(citation["references"])


def test_the_newest_entry_of_the_changelog_is_this_version_on_the_day_of_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    version, date = re.findall(r"^## (\S+) - (\S+)$", CHANGELOG, re.MULTILINE)[0]
    assert version == __version__
    assert date == str(citation["date-released"])


def test_the_changelog_has_the_headings_of_its_form():
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= allowed
    assert "### Added" in CHANGELOG


def test_the_wheel_installs_the_library_alone(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "docs", "runs", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_wheel(WHEELS)"
    done = subprocess.run(
        [sys.executable, "-c", build.replace("WHEELS", repr(str(wheels)))],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [Path(name) for name in archive.namelist()]
    assert {name.parts[0] for name in names} == {
        "bn_research",
        f"bn_research-{__version__}.dist-info",
    }
    library = ROOT / "bn_research"
    wanted = [p for p in library.rglob("*") if p.suffix in (".py", ".css", ".js", ".typed")]
    assert {p.relative_to(ROOT) for p in wanted} <= set(names)
