"""What a run leaves behind in its workdir: written by an experiment, read by whatever shows it.

`results.json`, `config.json` and `environment.json` hold the numbers; `report.json` holds what a
page says beside them: the question, the command, and the words of each figure.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bn_research.claims import atomic
from bn_research.claims.claim import check_unique
from bn_research.claims.figures import Figure
from bn_research.claims.finding import VERDICTS, Finding
from bn_research.claims.formatting import format_interval, format_number

SCHEMA = 1

_NUMBER = (int, float)
_RESULTS = {
    "schema": int,
    "experiment": str,
    "preset": str,
    "dataset": str,
    "seeds": list,
    "wall_seconds": _NUMBER,
    "claims": list,
}
_CLAIM = {
    "id": str,
    "statement": str,
    "source": str,
    "criterion": str,
    "expected": str,
    "measured": dict,
    "interval": (list, type(None)),
    "verdict": str,
    "note": str,
}
_REPORT = {"schema": int, "title": str, "question": str, "command": str, "figures": list}
_FIGURE = {"file": str, "title": str, "alt": str, "caption": str, "claims": list}


class Run(NamedTuple):
    """What a page shows of one run of one experiment."""

    title: str
    question: str  # what the experiment asks, in a sentence or two
    command: str  # the exact command line that gives these results
    results: Mapping[str, Any]  # results.json
    figures: Sequence[Figure]  # in the order of the page
    config: Mapping[str, Any]  # resolved; nested mappings become dotted names
    environment: Mapping[str, Any]  # versions, devices, commit


class Failure(NamedTuple):
    """What a page shows of an experiment that came to no end."""

    experiment: str
    command: str
    status: int  # of its process; negative for a signal, as in `subprocess`
    reason: str  # in one line
    log: str  # the end of what it printed


def results_document(
    *,
    experiment: str,
    preset: str,
    dataset: str,
    seeds: Iterable[int],
    wall_seconds: float,
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """The content of `results.json`.

    JSON has no infinity and no NaN: such a number becomes None, and the claim's note says which and
    what it was. An interval that is open on one side, as a censored number's is, has None there,
    and so have the numbers `name, low` and `name, high`; one that is open on both is None.

    It is of plain dicts, lists, strings and numbers, in the order of schema 1. The dataset is `""`
    where none is used.

    Raises:
      ValueError: two findings share a claim id, or `wall_seconds` is negative or not finite.
    """
    if not 0 <= wall_seconds < math.inf:
        raise ValueError(f"wall_seconds must be finite and not negative, got {wall_seconds}")
    check_unique(finding.claim for finding in findings)
    return {
        "schema": SCHEMA,
        "experiment": experiment,
        "preset": preset,
        "dataset": dataset,
        "seeds": [int(seed) for seed in seeds],
        "wall_seconds": float(wall_seconds),
        "claims": [_claim_entry(finding) for finding in findings],
    }


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Strict JSON in a file, written atomically: equal documents in one order give equal bytes.

    Keys keep the order of the document, which is the order a reader expects.

    Raises:
      ValueError: the document holds a number that is not finite; nothing is written.
      TypeError: it holds something JSON does not know; nothing is written.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write_bytes(path, f"{text}\n".encode())


def write_run(
    path: str | os.PathLike[str],
    *,
    title: str,
    question: str,
    command: str,
    figures: Sequence[Figure],
) -> None:
    """`report.json` in a workdir, beside the files that a run leaves there anyway.

    Raises:
      ValueError: a figure lies outside the workdir, which could then not be moved.
      OSError: the file could not be written.
    """
    root = Path(path).resolve()
    entries = []
    for figure in figures:
        file = Path(figure.path).resolve()
        if not file.is_relative_to(root):
            raise ValueError(f"figure must lie in the workdir {path}, got {figure.path}")
        entries.append(
            {
                "file": file.relative_to(root).as_posix(),
                "title": figure.title,
                "alt": figure.alt,
                "caption": figure.caption,
                "claims": list(figure.claims),
            }
        )
    document = {"schema": SCHEMA, "title": title, "question": question, "command": command}
    write_json(Path(path) / "report.json", document | {"figures": entries})


def read_run(path: str | os.PathLike[str]) -> Run:
    """A finished run, read back from its workdir.

    Raises:
      ValueError: a file is missing, damaged, or of another schema; in one line.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give the workdir of a run")
    results = _read(path / "results.json", _RESULTS)
    for index, claim in enumerate(results["claims"]):
        _check_claim(claim, f"{path / 'results.json'}: claims[{index}]")
    report = _read(path / "report.json", _REPORT)
    figures = [
        _figure(path, entry, f"{path / 'report.json'}: figures[{index}]")
        for index, entry in enumerate(report["figures"])
    ]
    return Run(
        title=report["title"],
        question=report["question"],
        command=report["command"],
        results=results,
        figures=figures,
        config=_read(path / "config.json", {}),
        environment=_read(path / "environment.json", {}),
    )


def _claim_entry(finding: Finding) -> dict[str, Any]:
    claim = finding.claim
    measured = {name: float(value) for name, value in finding.measured.items()}
    lost = [
        f"{name} ({format_number(value)})"
        for name, value in measured.items()
        if not math.isfinite(value) and not _is_open_end(name, measured)
    ]
    interval = None
    if finding.interval is not None:
        interval = [float(end) if math.isfinite(end) else None for end in finding.interval]
        if interval == [None, None]:
            lost.append(f"interval {format_interval(finding.interval)}")
            interval = None
    note = finding.note
    if lost:
        if note and not note.rstrip().endswith((".", "!", "?")):
            note = f"{note.rstrip()}."
        note = f"{note} Not finite, stored as null: {', '.join(lost)}.".lstrip()
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "criterion": claim.criterion,
        "expected": claim.expected,
        "measured": {n: v if math.isfinite(v) else None for n, v in measured.items()},
        "interval": interval,
        "verdict": finding.verdict,
        "note": note,
    }


def _is_open_end(name: str, measured: Mapping[str, float]) -> bool:
    """Whether this is the end of an interval that the number itself stands beside."""
    number, _, end = name.rpartition(", ")
    return end in ("low", "high") and number in measured


def _read(path: Path, shape: Mapping[str, Any]) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: run the experiment again to its end") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({_one_line(error)}): run it again") from error
    _check(document, shape, str(path))
    if document.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"{path} must be of schema {SCHEMA}, got {document['schema']}")
    return document


def _check(value: Any, shape: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(value).__name__}")
    for name, kind in shape.items():
        if name not in value:
            raise ValueError(f"{where} has no {name!r}: run the experiment again")
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            got = type(value[name]).__name__
            raise ValueError(f"{where} holds a damaged {name!r} ({got}): run the experiment again")


def _check_claim(claim: Any, where: str) -> None:
    _check(claim, _CLAIM, where)
    ends = claim["interval"]
    whole = ends is None or len(ends) == 2
    numbers = [*claim["measured"].values(), *(ends or ())]
    if not whole or not all(n is None or isinstance(n, _NUMBER) for n in numbers):
        raise ValueError(f"{where} holds numbers that are none: run the experiment again")
    if claim["verdict"] not in VERDICTS:
        raise ValueError(f"{where}: verdict must be one of {VERDICTS}, got {claim['verdict']!r}")


def _figure(folder: Path, entry: Any, where: str) -> Figure:
    _check(entry, _FIGURE, where)
    path = folder / entry["file"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where} lies outside the workdir: {entry['file']!r}")
    if not all(isinstance(claim, str) for claim in entry["claims"]):
        raise ValueError(f"{where} holds damaged 'claims': run the experiment again")
    _check_image(path)
    return Figure(path, entry["title"], entry["alt"], entry["caption"], tuple(entry["claims"]))


def _check_image(path: Path) -> None:
    from PIL import Image  # not needed by whoever asks an experiment for help

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: run the experiment again") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a whole PNG ({_one_line(error)}): run it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
