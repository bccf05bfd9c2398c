"""The table of all claims, with a row for each experiment that failed."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from bn_research.claims import elements
from bn_research.claims.formatting import format_measured, headline
from bn_research.claims.overview_sections import Place, section_anchor
from bn_research.claims.run import Failure
from bn_research.claims.verdict import VERDICTS

COLUMNS = ("Claim", "Source", "Expected", "Measured", "Verdict", "Figure")
_UNFOLDED = 3  # numbers of a claim; the rest opens on demand


class Row(NamedTuple):
    """A claim, or an experiment that failed."""

    kind: str  # "claim" or "failure"
    verdict: str
    experiment: str
    cells: Sequence[tuple[str, str]]  # HTML, and what to sort by, for each column


def claim_rows(places: Sequence[Place]) -> Iterator[Row]:
    """Give each claim its row, in the order of the page."""
    for place in places:
        for claim in place.run.results["claims"]:
            verdict = claim["verdict"]
            cells = (
                (_claim(place, claim), claim["statement"]),
                (escape(claim["source"]), claim["source"]),
                (escape(claim["expected"]), claim["expected"]),
                (_measured(claim), _headline_number(claim)),
                (elements.badge(verdict), _rank(verdict)),
                _figure(place, claim["id"]),
            )
            yield Row("claim", verdict, place.experiment, cells)


def failure_rows(failures: Sequence[Failure]) -> Iterator[Row]:
    """Give each experiment that failed its row, which leads to its log."""
    for failure in failures:
        statement = f"The experiment {failure.experiment} came to no end"
        cells = (
            (escape(statement), statement),
            ("", ""),
            ("", ""),
            (f'<p class="reason">{escape(failure.reason)}</p>', ""),
            (elements.badge(elements.FAILED), _rank(elements.FAILED)),
            (f'<a href="#{section_anchor(failure.experiment)}">Log</a>', ""),
        )
        yield Row("failure", elements.FAILED, failure.experiment, cells)


def table(rows: Sequence[Row], *, heading: str) -> str:
    """Return the whole table; `heading` is the id of the heading that names it."""
    if not rows:
        return "<p>No claim was tested.</p>"
    # Roles are spelled out, since the cards of narrow screens are `display: block`, which takes a
    # table's meaning from it in some browsers.
    head = "".join(f'<th scope="col" role="columnheader">{column}</th>' for column in COLUMNS)
    body = "\n".join(map(_row, rows))
    return (
        f'<table class="verdicts" role="table" aria-labelledby="{heading}">\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{body}\n</tbody>\n</table>'
    )


def _row(row: Row) -> str:
    (claim, key), *others = row.cells
    cells = "".join(map(_cell, COLUMNS[1:], others))
    return (
        f'<tr role="row" data-kind="{row.kind}" data-verdict="{escape(row.verdict)}" '
        f'data-experiment="{escape(row.experiment)}">\n'
        f'<th scope="row" role="rowheader" data-key="{escape(key)}">{claim}</th>\n{cells}</tr>'
    )


def _cell(column: str, content: tuple[str, str]) -> str:
    text, key = content
    kind = column.lower() if text else f"{column.lower()} empty"
    return (
        f'<td role="cell" class="{kind}" data-label="{column}" data-key="{escape(key)}">'
        f'<div class="cell">{text}</div></td>\n'
    )


def _claim(place: Place, claim: Mapping[str, Any]) -> str:
    name, anchor = escape(claim["id"]), escape(place.claim_anchor(claim["id"]))
    return (
        f'{escape(claim["statement"])} <a class="id" href="#{anchor}"><code>{name}</code></a>'
        f"<details><summary>Criterion</summary><p>{escape(claim['criterion'])}</p></details>"
    )


def _measured(claim: Mapping[str, Any]) -> str:
    """The number that the criterion is about, then the others."""
    if not claim["measured"]:
        return elements.numbers([], shown=_UNFOLDED)
    name, text = headline(claim)
    others = [entry for entry in format_measured(claim["measured"]) if entry[0] != name]
    return elements.numbers([(name, text), *others], shown=_UNFOLDED)


def _headline_number(claim: Mapping[str, Any]) -> str:
    if not claim["measured"]:
        return ""
    value = claim["measured"][headline(claim)[0]]
    return "" if value is None else repr(float(value))


def _rank(verdict: str) -> str:
    return str((elements.FAILED, *VERDICTS).index(verdict))


def _figure(place: Place, claim: str) -> tuple[str, str]:
    """Return a link to the first figure that shows the claim, and one to its section."""
    section = f'<a class="from" href="#{place.anchor}">{escape(place.experiment)}</a>'
    for index, figure in enumerate(place.run.figures):
        if claim in figure.claims:
            number = place.first_figure + index
            link = f'<a href="#{place.figure_anchor(index)}">Figure {number}</a>'
            return f"{link} {section}", str(number)
    return section, str(place.first_figure)
