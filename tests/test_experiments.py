"""Contract of the experiments: what every room keeps, whatever it measures."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import typing
from typing import Annotated, Literal

import pydantic
import pytest
import smoke
from smoke import ASK, CLOCK, DISPATCH, GET, LOAD, MEASURE, RECORD, RESTORE

from bn_research.claims.finding import VERDICTS
from bn_research.lab import runner
from bn_research.lab.experiment import Experiment
from bn_research.lab.launch import main
from bn_research.lab.rooms import experiment_names, load
from bn_research.lab.workdir import Ledger
from bn_research.training.lanes import Lanes

NAMES = experiment_names()


def never(*_, **__):
    raise AssertionError("something is measured, trained or read")


# --- a whole run ---


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in NAMES for p in load(n).presets])
def test_help_shows_a_preset_and_runs_nothing(name, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Experiment, "prepare", property(never))
    assert main(load(name), [name, f"--preset={preset}", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(config := load(name).presets[preset]):
        assert f"  {field.name} = {getattr(config, field.name)!r}" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_smoke_writes_everything(name, smoke_run_of):
    experiment, run = load(name), smoke_run_of(name)
    config, ids = experiment.presets["smoke"], [claim.id for claim in experiment.claims]

    def read(file):
        return json.loads((run.path / file).read_text())

    results = read("results.json")
    assert [claim["id"] for claim in results["claims"]] == ids
    assert (results["schema"], results["preset"]) == (1, "smoke")
    assert (results["dataset"], results["seeds"]) == (config.dataset, [*range(config.seeds)])
    assert results["wall_seconds"] > 0
    given = {"experiment": name, "preset": "smoke", **dataclasses.asdict(config)}
    assert read("config.json") == json.loads(json.dumps(given))
    assert {"python", "devices", "commit", "versions"} <= read("environment.json").keys()
    names = [record["name"] for record in smoke.ledger(run.path)]
    assert names and len(set(names)) == len(names)

    figures = read("report.json")["figures"]
    drawn = sorted(f"figures/{path.name}" for path in (run.path / "figures").iterdir())
    assert sorted(figure["file"] for figure in figures) == drawn
    assert all(file.endswith(".png") for file in drawn)
    assert all(figure["title"] and figure["alt"] for figure in figures)
    shown = {id for figure in figures for id in figure["claims"]}
    assert {claim["id"] for claim in results["claims"] if claim["measured"]} <= shown <= {*ids}
    page = (run.path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<script" not in page
    assert page.count("data:image/webp;base64,") == len(figures)
    assert all(id in page for id in ids)

    *table, counts, last = run.ended.out.splitlines()
    assert last == f"report: {run.path / 'report.html'}"
    verdicts = [claim["verdict"] for claim in results["claims"]]
    assert counts == ", ".join(f"{verdicts.count(each)} {each}" for each in VERDICTS)
    assert any(line.split() == "claim expected measured interval verdict".split() for line in table)
    assert run.ended.said(name) == []


@pytest.mark.parametrize("name", NAMES)
def test_started_again_it_only_prints(name, smoke_run_of, monkeypatch):
    run = smoke_run_of(name)
    before, get = smoke.files(run.path), Ledger.get
    monkeypatch.setattr(Ledger, "get", lambda self, name, *_: get(self, name, never))
    monkeypatch.setattr(Lanes, "advance", never)
    ended = smoke.launch(name, run.path)
    assert (ended.status, ended.out) == (0, run.ended.out)
    assert smoke.files(run.path) == before


@pytest.mark.parametrize("name", NAMES)
def test_another_config_is_refused(name, smoke_run_of, monkeypatch):
    run = smoke_run_of(name)
    before, seeds = smoke.files(run.path), load(name).presets["smoke"].seeds
    monkeypatch.setattr(Experiment, "prepare", property(never))
    ended = smoke.launch(name, run.path, f"--config.seeds={seeds + 1}")
    assert (ended.status, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith(f"{name}: ") and f"seeds (there {seeds}, now {seeds + 1})" in line
    assert smoke.files(run.path) == before


# --- interrupted ---


@pytest.mark.parametrize("name", NAMES)
def test_cut_between_two_measurements_it_ends_with_the_same_bits(name, smoke_run_of, tmp_path):
    """Its last line is cut in the middle, and no checkpoint is left."""
    whole, run = smoke_run_of(name), tmp_path / "run"
    lost = shutil.ignore_patterns("results.json", "report.*", "figures", "checkpoints")
    shutil.copytree(whole.path, run, ignore=lost)
    lines = (whole.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = lines[: math.ceil(len(lines) / 2)]
    (run / "metrics.jsonl").write_bytes(b"".join(kept)[:-20])
    with smoke.given(whole.clocks):
        ended = smoke.launch(name, run)
    assert ended.status == 0, ended.err
    assert smoke.bits(run) == smoke.bits(whole.path)


class PowerCut(BaseException):
    """Ends a run as nothing that it could answer to."""


def cut_power():
    raise PowerCut


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def happened(events, kind):
    """The indices at which a run trained, or measured; of ASK those after a dispatch alone."""
    found = [index for index, event in enumerate(events) if event.kind == kind]
    if kind == ASK:
        before = [[e.kind for e in events[:index] if e.kind != CLOCK] for index in found]
        found = [index for index, kinds in zip(found, before, strict=True) if kinds[-1:] != [GET]]
    return found


def at(kind, number, action):
    """Acts just before what is of this kind happens for the time of this number, from 1."""

    def act(events):
        if events[-1].kind == kind and len(happened(events, kind)) == number:
            if happened(events, kind)[-1] == len(events) - 1:
                action()

    return act


def stops(events):
    """At what a run is stopped, and at which times of it: a training goes on after each."""
    for kind in (DISPATCH, ASK, MEASURE):
        if found := happened(events, kind):
            break
    numbers = [*range(1, len(found) + 1)]
    if kind == DISPATCH:
        following = [
            next((e.kind for e in events[i + 1 :] if e.kind in (LOAD, DISPATCH, RECORD)), None)
            for i in found
        ]
        numbers = [n for n in numbers if following[n - 1] == DISPATCH]
    return kind, numbers


def done(events):
    """What was trained and written down, in order."""
    return [event for event in events if event.kind in (DISPATCH, RECORD)]


def checkpoints(workdir):
    """Folders of the checkpoints, the newest first."""
    folders = (path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
    return sorted(folders, key=lambda path: -int(path.name))


def check_damaged_checkpoints(name, run, copy):
    """All of them cut: one line says so, and nothing is written."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    before = smoke.files(copy)
    ended = smoke.launch(name, copy)
    assert ended.status == 2, ended.err
    (line,) = ended.said(name)
    assert "damaged or cut" in line and "remove that" in line
    assert smoke.files(copy) == before


def flip_a_bit(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_stopped_while_it_trains_it_ends_with_the_same_bits(
    name, smoke_run_of, tmp_path, monkeypatch
):
    """By SIGTERM, then by a power cut after which the newest checkpoint is damaged.

    Both in the middle of a training, or of the measurements of a room without any.
    """
    whole, run = smoke_run_of(name), tmp_path / "run"
    kind, numbers = stops(whole.repeated)
    first, last = numbers[(len(numbers) - 1) // 3], numbers[-1]

    with smoke.watched(at(kind, first, send_sigterm)) as events, smoke.given(whole.clocks):
        ended = smoke.launch(name, run)
    assert (ended.status, ended.out) == (4, ""), ended.err
    (line,) = ended.said(name)
    assert line.endswith("tart again with the same command to go on")
    asks = any(event.kind == ASK for event in events)
    assert ("stopped by SIGTERM at step" if asks else "what was measured is kept") in line
    measured = smoke.ledger(run)
    assert measured == smoke.ledger(whole.path)[: len(measured)]
    assert not [*(run / "figures").iterdir(), *run.glob("re*.*")]  # neither results nor a report
    first_done, all_done = done(events), done(whole.repeated)
    assert first_done == all_done[: len(first_done)]

    is_saved = bool(checkpoints(run))
    if is_saved:
        check_damaged_checkpoints(name, run, tmp_path / "damaged")
    monkeypatch.setattr(runner, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    if first < last:
        number = last - first + (kind == DISPATCH or not asks)
        with smoke.watched(at(kind, number, cut_power)) as events, smoke.given(whole.clocks):
            with pytest.raises(PowerCut):
                smoke.launch(name, run)
        assert sum(event.kind == RESTORE for event in events) == is_saved
        assert done(events) == all_done[len(first_done) :][: len(done(events))]
    damaged = checkpoints(run)[:-1][:1]  # where another is left to go on from
    for folder in damaged:
        flip_a_bit(folder)
    with smoke.given(whole.clocks):
        ended = smoke.launch(name, run)
    assert ended.status == 0, ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("checkpoint ")]
    assert len(said) == len(damaged)
    assert all(str(folder) in said[0] and "is damaged" in said[0] for folder in damaged)
    assert smoke.bits(run) == smoke.bits(whole.path)


# --- refused ---

NO_NAME = "no such name"


def unpacked(kind):
    """A type and its constraints: a dict of numbers, and whether a function checks it too."""
    rules, calls = {}, False
    while typing.get_origin(kind) is Annotated:
        kind, *given = typing.get_args(kind)
        for rule in (rule for each in given for rule in getattr(each, "metadata", [each])):
            calls = calls or isinstance(rule, pydantic.AfterValidator)
            names = ("ge", "gt", "le", "lt", "min_length", "allow_inf_nan")
            rules |= {name: getattr(rule, name) for name in names if hasattr(rule, name)}
    return kind, rules, calls


def forbidden(kind, example):
    """Values that the type of a field, or of its entries, does not allow; it allows the example."""
    kind, rules, calls = unpacked(kind)
    if kind in (int, float):
        step = 1 if kind is int else 0.5
        for name, off in (("ge", -step), ("gt", 0), ("le", step), ("lt", 0)):
            if name in rules:
                yield rules[name] + off
        finite = not rules.get("allow_inf_nan", True)
        if kind is float and (finite or "lt" in rules or "le" in rules):
            yield from (math.nan, math.inf, -math.inf)
    if kind in (int, float, bool):
        yield NO_NAME
    if kind is int:
        yield 1.5
    if calls and kind is str or typing.get_origin(kind) is Literal:
        yield NO_NAME
    if typing.get_origin(kind) is tuple:
        entries = typing.get_args(kind)[0]
        if "min_length" in rules:
            yield ()
        if calls and example:
            yield (*example, example[0])
        yield from ((value,) for value in forbidden(entries, example[0] if example else None))
        if unpacked(entries)[0] is str:
            yield (1.5,)


def written(value, *, within=False):
    """A value as a flag takes it; in a tuple, as Python writes it."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{written(item, within=True)}," for item in value) + ")"
    if within and isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "1e999", -math.inf: "-1e999"}.get(value, "float('nan')")
    return repr(value) if within else str(value)


def bad_flags(name):
    """A field of the config and a value that its type forbids, for each that there is."""
    config = load(name).presets["smoke"]
    kinds = typing.get_type_hints(type(config), include_extras=True)
    assert pydantic.dataclasses.is_pydantic_dataclass(type(config)), "else no type is checked"
    for field in dataclasses.fields(config):
        example = getattr(config, field.name)
        values = [0] if field.name == "seeds" else []
        values += forbidden(kinds[field.name], example)
        for text in dict.fromkeys(map(written, values)):
            yield field.name, text
    yield "no_such_field", "1"


@pytest.mark.parametrize(
    ("name", "field", "value"), [(name, *bad) for name in NAMES for bad in bad_flags(name)]
)
def test_a_value_that_its_type_forbids_is_refused(name, field, value, tmp_path, monkeypatch):
    """At once: no data are read for it."""
    monkeypatch.setattr(Experiment, "prepare", property(never))
    ended = smoke.launch(name, tmp_path / "run", f"--config.{field}={value}")
    check_refused(name, ended, tmp_path / "run", field)


def check_refused(name, ended, workdir, *said):
    """Exit status 2, one line that says this, and nothing written."""
    assert (ended.status, ended.out) == (2, ""), ended
    (line,) = ended.err.splitlines()
    assert line.startswith(f"{name}: ")
    assert all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line) for word in said), line
    assert not workdir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_data_that_are_not_there_are_refused(name, tmp_path):
    ended = smoke.launch(name, tmp_path / "run", "--config.dataset=imagenette")
    check_refused(name, ended, tmp_path / "run", "imagenette", "fashion_mnist")
    source, absent = tmp_path / "source", tmp_path / "absent"
    source.mkdir()
    (source / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b cut")
    for folder, said in ((absent, str(absent)), (source, "idx")):
        flags = ["--config.dataset=fashion_mnist", f"--config.manual_dir={folder}"]
        check_refused(name, smoke.launch(name, tmp_path / "run", *flags), tmp_path / "run", said)
