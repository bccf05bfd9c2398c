"""A run written into its workdir comes back the same; what is missing or damaged is named."""

import dataclasses
import json
import shutil

import pytest

from bn_research.claims.claim import Claim
from bn_research.claims.figures import new_figure, save_figure
from bn_research.claims.finding import REPRODUCED, Finding
from bn_research.claims.results import read_run, results_document, write_json, write_run

CONFIG = {"experiment": "demo", "seeds": 2, "train": {"rate": 0.1}}
ENVIRONMENT = {"python": "3.11", "versions": {"jax": "0.10"}}


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    figure = _figure(folder / "figures" / "a.png")
    claim = Claim("a-claim", "A holds.", "Notes", "x ≥ 1", "2")
    results = results_document(
        experiment="demo",
        preset="smoke",
        dataset="",
        seeds=range(2),
        wall_seconds=3,
        findings=[Finding(claim, {"x": 2.0, "y": float("nan")}, (1.0, float("inf")), REPRODUCED)],
    )
    for name, document in (
        ("results", results),
        ("config", CONFIG),
        ("environment", ENVIRONMENT),
    ):
        write_json(folder / f"{name}.json", document)
    write_run(folder, title="T", question="Is σ 1?", command="python -m x", figures=[figure])
    return folder


def _figure(path):
    fig, axis = new_figure()
    axis.plot([0, 1])
    saved = save_figure(fig, path, title="Loss", alt="A line", caption="It rises.")
    return dataclasses.replace(saved, claims=("a-claim",))


def test_a_run_comes_back_even_from_another_place(workdir, tmp_path):
    moved = shutil.move(workdir, tmp_path / "moved")
    run = read_run(moved)
    assert (run.title, run.question, run.command) == ("T", "Is σ 1?", "python -m x")
    assert run.results == json.loads((moved / "results.json").read_text())
    assert run.config == CONFIG and run.environment == ENVIRONMENT
    (figure,) = run.figures
    assert figure.path == moved / "figures" / "a.png"
    assert (figure.title, figure.alt, figure.caption) == ("Loss", "A line", "It rises.")
    assert figure.claims == ("a-claim",)
    report = json.loads((moved / "report.json").read_text())
    assert report["figures"][0]["file"] == "figures/a.png"


def test_a_figure_elsewhere_is_refused(workdir, tmp_path):
    before = (workdir / "report.json").read_bytes()
    with pytest.raises(ValueError, match=r"figure must lie in the workdir .*, got .*b\.png"):
        figures = [_figure(tmp_path / "b.png")]
        write_run(workdir, title="T", question="Q", command="c", figures=figures)
    assert (workdir / "report.json").read_bytes() == before


@pytest.mark.parametrize("name", ["results", "config", "environment", "report"])
def test_each_missing_or_damaged_file_is_named(workdir, name):
    path = workdir / f"{name}.json"
    for content in (b'{"a": ', b"\xff", b"[1]", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.json (cannot be read|must be)") as caught:
            read_run(workdir)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name}\.json is missing"):
        read_run(workdir)


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("results", ["schema"], 2, "must be of schema 1, got 2"),
        ("results", ["seeds"], 5, "damaged 'seeds' .int"),
        ("results", ["wall_seconds"], True, "damaged 'wall_seconds'"),
        ("results", ["claims", 0], "x", r"claims\[0\] must be a JSON object, got str"),
        ("results", ["claims", 0, "note"], None, r"claims\[0\] holds a damaged 'note'"),
        ("results", ["claims", 0, "measured"], {"x": "1"}, "numbers that are none"),
        ("results", ["claims", 0, "interval"], [], "numbers that are none"),
        ("results", ["claims", 0, "interval"], [1, "2"], "numbers that are none"),
        ("results", ["claims", 0, "verdict"], "maybe", "verdict must be one of"),
        ("report", ["figures", 0, "file"], "../secret.png", "outside the workdir"),
        ("report", ["figures", 0, "file"], "figures/none.png", r"none\.png is missing"),
        ("report", ["figures", 0, "claims"], [1], "damaged 'claims'"),
    ],
)
def test_damage_within_a_file_is_named(workdir, name, keys, value, message):
    path = workdir / f"{name}.json"
    document = entry = json.loads(path.read_text())
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        read_run(workdir)
    assert "\n" not in str(caught.value)


def test_a_lost_key_is_named(workdir):
    document = json.loads((workdir / "report.json").read_text())
    del document["question"]
    (workdir / "report.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"report\.json has no 'question'"):
        read_run(workdir)


def test_a_damaged_picture_is_named(workdir):
    path = workdir / "figures" / "a.png"
    whole = path.read_bytes()
    for content in (b"GIF89a" + bytes(30), whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png is not a whole PNG") as caught:
            read_run(workdir)
        assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="none is not a folder: give the workdir of a run"):
        read_run(tmp_path / "none")
