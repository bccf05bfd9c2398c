r"""Numbers in prose, written from the results instead of by hand.

A number stands between two comments, the first of which says where it comes from:

    <!--=CLAIM; WHAT; FORMAT-->0.48<!--/-->

CLAIM is the id of a claim, WHAT one of

    NAME            the number of this name in `measured`
    ±NAME           likewise with its interval: 0.48 [0.34, 0.62]
    []NAME          the interval alone; [] is that of the claim
    low, high       an end of the claim's interval
    note TEXT       the first number behind TEXT in the claim's note; ±note TEXT, []note TEXT
    verdict

and FORMAT a format specification as `.2f`, by default four significant digits; `.1f*100` scales
first. In the place of CLAIM the name of an experiment gives `seeds`, `wall_seconds` or
`config.FIELD` of its run, and `all` the number of claims (`claims`) or of a verdict
(`not reproduced`). In a table | is written \|.

A figure that a paper has published, or that is no measurement, stands between <!--"--> and
<!--/-->, so that a test can tell it from one that was typed by hand.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bn_research.claims.formatting import MINUS, format_duration, format_number

Results = Mapping[str, dict[str, Any]]

_QUOTE = re.compile(r"(<!--=(.*?)-->)(.*?)(<!--/-->)", re.DOTALL)
_NUMBER = r"[−-]?\d+(?:\.\d+)?(?:e[−-]?\d+)?"
_RESULTS = Path(__file__).parents[2] / "docs" / "results"


class QuoteError(ValueError):
    """A page asks for a number that no run has measured; one line for people."""


def fill(text: str, results: Results) -> str:
    """The text with every quoted number written anew.

    Raises:
      QuoteError: there is no such claim, number or format.
    """

    def quote(match: re.Match[str]) -> str:
        start, asked, _, end = match.groups()
        return f"{start}{quoted(asked, results)}{end}"

    return _QUOTE.sub(quote, text)


def quoted(asked: str, results: Results) -> str:
    """What `CLAIM; WHAT; FORMAT` stands for.

    Raises:
      QuoteError: there is no such claim, number or format.
    """
    parts = [part.strip() for part in " ".join(asked.replace("\\|", "|").split()).split(";")]
    if len(parts) not in (2, 3):
        raise QuoteError(f"{asked!r} must be CLAIM; WHAT or CLAIM; WHAT; FORMAT")
    of, what = parts[:2]
    spec = parts[2] if len(parts) == 3 else ""
    if of == "all":
        verdicts = [claim["verdict"] for run in results.values() for claim in run["claims"]]
        return str(len(verdicts) if what == "claims" else verdicts.count(what))
    if of in results:
        return _of_run(of, results[of], what, spec)
    for run in results.values():
        for claim in run["claims"]:
            if claim["id"] == of:
                return _of_claim(claim, what, spec)
    raise QuoteError(f"{asked!r}: no claim, experiment or 'all' is called {of!r}")


def _of_run(name: str, run: Mapping[str, Any], what: str, spec: str) -> str:
    if what == "seeds":
        return str(len(run["seeds"]))
    if what == "wall_seconds":
        return format_duration(run["wall_seconds"])
    kind, _, field = what.partition(".")
    if kind == "config":
        config = json.loads((_RESULTS / name / "config.json").read_text())
        if field in config:
            value = config[field]
            return _format(value, spec) if isinstance(value, (int, float)) else str(value)
    raise QuoteError(f"{name}: {what!r} is none of seeds, wall_seconds, config.FIELD")


def _of_claim(claim: Mapping[str, Any], what: str, spec: str) -> str:
    if what == "verdict":
        return claim["verdict"]
    if what in ("low", "high"):
        return _format(claim["interval"][what == "high"], spec)
    kind = next((kind for kind in ("±", "[]") if what.startswith(kind)), "")
    name = what.removeprefix(kind).strip()
    if kind == "[]" and not name:
        return _interval(claim["interval"], spec)
    value, interval = _look_up(claim, name)
    if kind and interval is None:
        raise QuoteError(
            f"{claim['id']}: {name!r} has no interval: give '{name}, low' and '{name}, high' in "
            "measured, or quote the claim's own by []"
        )
    if kind == "[]":
        return _interval(interval, spec)
    number = _format(value, spec)
    return f"{number} {_interval(interval, spec)}" if kind else number


def _look_up(claim: Mapping[str, Any], name: str) -> tuple[float | None, list | None]:
    """A number of a claim with its interval, or None for that."""
    measured = claim["measured"]
    if name in measured:
        ends = [f"{name}, low", f"{name}, high"]
        interval = [measured[end] for end in ends] if set(ends) <= measured.keys() else None
        return measured[name], interval
    if name.startswith("note "):
        text = re.escape(name.removeprefix("note "))
        found = re.search(
            rf"{text}\D*?({_NUMBER})(?: \[({_NUMBER}), ({_NUMBER})\])?", claim["note"]
        )
        if found:
            numbers = [float(text.replace(MINUS, "-")) for text in found.groups() if text]
            return numbers[0], numbers[1:] or None
    raise QuoteError(f"{claim['id']}: {name!r} is not measured; there are {', '.join(measured)}")


def _interval(ends: Any, spec: str) -> str:
    if ends is None:
        raise QuoteError("a claim without interval is asked for it")
    low, high = (
        math.inf * sign if end is None else end for sign, end in zip((-1, 1), ends, strict=True)
    )
    shown = (_format(low, spec), _format(high, spec))
    if spec.partition("*")[2].startswith("-"):
        shown = shown[::-1]
    return f"[{', '.join(shown)}]"


def _format(value: float | None, spec: str) -> str:
    digits, _, factor = spec.partition("*")
    try:
        if value is not None and factor:
            value = value * float(factor)
        if value is None or not digits:
            return format_number(value)
        text = format(float(value), digits)
    except ValueError as error:
        raise QuoteError(f"{spec!r} is no format: give one as .2f or .1f*100") from error
    if re.fullmatch(r"-0(\.0*)?%?", text):
        text = text[1:]
    return text.replace("-", MINUS) if "e" not in text else MINUS * (value < 0) + text.lstrip("-")
