"""One page of many experiments: a table of all claims, then a section for each experiment.

The page is whole without its script, which adds search, filters and sorting; it needs no other
file and no network.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple

from bn_research.claims import atomic
from bn_research.claims.figures import Figure
from bn_research.claims.finding import VERDICTS
from bn_research.claims.formatting import format_measured, headline
from bn_research.claims.html import elements
from bn_research.claims.results import Failure, Run

COLUMNS = ("Claim", "Source", "Expected", "Measured", "Verdict", "Figure")
_UNFOLDED = 3  # numbers of a claim; the rest opens on demand

_BODY = Template("""\
<body class="overview">
<header>
<h1>$title</h1>
<p class="question">$introduction</p>
$summary
$command
<p class="jump">Further down: <a href="#experiments">experiments and figures</a>
<a href="#reading">how to read the verdicts</a></p>
</header>
<main>
<section aria-labelledby="claims">
<h2 id="claims">All claims</h2>
$tools
$table
</section>
<nav aria-labelledby="experiments">
<h2 id="experiments">Experiments</h2>
$contents
</nav>
$sections
$reading
</main>
<script>$script</script>
</body>
""")


class _Row(NamedTuple):
    """A claim, or an experiment that failed."""

    kind: str  # "claim" or "failure"
    verdict: str
    experiment: str
    cells: Sequence[tuple[str, str]]  # HTML, and what to sort by, for each column


class _Place(NamedTuple):
    """A run and where it stands on the page."""

    run: Run
    first_figure: int  # figures are counted through the page, from 1

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return str(self.run.results["experiment"])

    @property
    def anchor(self) -> str:
        """Id of the section."""
        return _section_anchor(self.experiment)

    def claim_anchor(self, claim: str) -> str:
        """Id of a claim within the section."""
        return f"{self.anchor}-claim-{_slug(claim)}"

    def figure_anchor(self, index: int) -> str:
        """Id of the figure of this index."""
        return f"{self.anchor}-figure-{index + 1}"


def write_overview(
    path: str | os.PathLike[str],
    *,
    title: str,
    introduction: str,
    command: str,
    runs: Sequence[Run],
    failures: Sequence[Failure],
) -> None:
    """The page of all experiments as one HTML file, runs in their order.

    The introduction says what was tested, the command line gives this page.

    Raises:
      OSError: a figure cannot be read, or the page cannot be written.
      ValueError: an experiment is given twice, or a figure is not a PNG.
    """
    text = render(
        title=title, introduction=introduction, command=command, runs=runs, failures=failures
    )
    atomic.write_bytes(path, text.encode())


def render(
    *,
    title: str,
    introduction: str,
    command: str,
    runs: Sequence[Run],
    failures: Sequence[Failure],
) -> str:
    """The whole page; the arguments are those of `write_overview`."""
    placed = _places(runs)
    _check_different([*(p.experiment for p in placed), *(f.experiment for f in failures)])
    rows = [*_claim_rows(placed), *_failure_rows(failures)]
    sections = [*map(_run_section, placed), *map(_failure_section, failures)]
    script = elements.resource("overview.js")
    body = _BODY.substitute(
        title=escape(title),
        introduction=escape(introduction),
        summary=_summary(rows),
        command=elements.command(command),
        tools=_tools(rows) if rows else "",
        table=_table(rows, heading="claims"),
        contents=_contents(placed, failures),
        sections="\n".join(sections),
        reading=elements.reading(with_failures=bool(failures)),
        script=script,
    )
    style = elements.resource("report.css") + elements.resource("overview.css")
    return elements.document(title=title, style=style, body=body, script=script)


def _counts(rows: Sequence[_Row]) -> dict[str, int]:
    """Rows of each verdict; failures are named only where there are some."""
    found = [row.verdict for row in rows]
    names = (*VERDICTS, elements.FAILED) if elements.FAILED in found else VERDICTS
    return {name: found.count(name) for name in names}


def _summary(rows: Sequence[_Row]) -> str:
    """The counts of the verdicts, as a bar and in words."""
    parts, words = "", ""
    for name, count in _counts(rows).items():
        kind = elements.verdict_class(name)
        parts += f'<span class="{kind}" style="flex-grow:{count}"></span>' if count else ""
        words += f"<li><strong>{count}</strong> {elements.badge(name)}</li>"
    return (
        f'<div class="bar" aria-hidden="true">{parts}</div>\n'
        f'<ul class="counts" aria-label="Verdicts">{words}</ul>'
    )


def _tools(rows: Sequence[_Row]) -> str:
    """Search, filters and order, hidden until the script that they need runs."""
    buttons = "\n".join(
        f'<button type="button" class="{elements.verdict_class(name)}" data-verdict="{name}" '
        f'aria-pressed="false"><span aria-hidden="true">{elements.verdict_sign(name)}</span> '
        f"{name} <b>{count}</b></button>"
        for name, count in _counts(rows).items()
    )
    names = map(escape, dict.fromkeys(row.experiment for row in rows))
    experiments = "".join(f'<option value="{name}">{name}</option>' for name in names)
    orders = "".join(
        f'<option value="{index} {order}">{column} {arrow}</option>'
        for index, column in enumerate(COLUMNS)
        for order, arrow in (("ascending", "↑"), ("descending", "↓"))
    )
    return f"""\
<form class="tools" role="search" aria-label="Claims" hidden>
<label class="words">Search
<input type="search" name="words" autocomplete="off" spellcheck="false"></label>
<label>Experiment
<select name="experiment"><option value="">all</option>{experiments}</select></label>
<label class="order">Order
<select name="order"><option value="">as on the page</option>{orders}</select></label>
<div class="filters" role="group" aria-label="Verdict">
{buttons}
</div>
<p class="shown"><span role="status"></span>
<button type="reset" hidden>Clear filters</button></p>
</form>"""


def _section_anchor(experiment: str) -> str:
    """The id of an experiment's section."""
    return f"experiment-{_slug(experiment)}"


def _places(runs: Sequence[Run]) -> list[_Place]:
    """Runs with their figures counted through the page."""
    found, number = [], 1
    for run in runs:
        found.append(_Place(run, number))
        number += len(run.figures)
    return found


def _check_different(experiments: Sequence[str]) -> None:
    """ValueError if two are the same: one would take the other's links."""
    anchors = list(map(_section_anchor, experiments))
    for index, (name, anchor) in enumerate(zip(experiments, anchors, strict=True)):
        if anchor in anchors[:index]:
            raise ValueError(f"each run must be of another experiment, got {name!r} more than once")


def _claim_rows(places: Sequence[_Place]) -> Iterator[_Row]:
    """A row for each claim, in the order of the page."""
    for place in places:
        for claim in place.run.results["claims"]:
            verdict = claim["verdict"]
            cells = (
                (_claim_cell(place, claim), claim["statement"]),
                (escape(claim["source"]), claim["source"]),
                (escape(claim["expected"]), claim["expected"]),
                (_measured(claim), _headline_number(claim)),
                (elements.badge(verdict), _rank(verdict)),
                _figure_links(place, claim["id"]),
            )
            yield _Row("claim", verdict, place.experiment, cells)


def _failure_rows(failures: Sequence[Failure]) -> Iterator[_Row]:
    """A row for each experiment that failed, which leads to its log."""
    for failure in failures:
        statement = f"The experiment {failure.experiment} came to no end"
        cells = (
            (escape(statement), statement),
            ("", ""),
            ("", ""),
            (f'<p class="reason">{escape(failure.reason)}</p>', ""),
            (elements.badge(elements.FAILED), _rank(elements.FAILED)),
            (f'<a href="#{_section_anchor(failure.experiment)}">Log</a>', ""),
        )
        yield _Row("failure", elements.FAILED, failure.experiment, cells)


def _table(rows: Sequence[_Row], *, heading: str) -> str:
    """The whole table; `heading` is the id of the heading that names it."""
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


def _row(row: _Row) -> str:
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


def _claim_cell(place: _Place, claim: Mapping[str, Any]) -> str:
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


def _figure_links(place: _Place, claim: str) -> tuple[str, str]:
    """A link to the first figure that shows the claim, and one to its section."""
    section = f'<a class="from" href="#{place.anchor}">{escape(place.experiment)}</a>'
    for index, figure in enumerate(place.run.figures):
        if claim in figure.claims:
            number = place.first_figure + index
            link = f'<a href="#{place.figure_anchor(index)}">Figure {number}</a>'
            return f"{link} {section}", str(number)
    return section, str(place.first_figure)


def _contents(placed: Sequence[_Place], failures: Sequence[Failure]) -> str:
    """Links to the sections, each with its verdicts."""
    entries = [
        (place.anchor, place.run.title, place.experiment, _signs(place.run)) for place in placed
    ]
    entries += [
        (_section_anchor(f.experiment), f.reason, f.experiment, elements.badge(elements.FAILED))
        for f in failures
    ]
    items = "\n".join(
        f'<li><a href="#{anchor}"><span class="name">{escape(title)}</span> '
        f'<code>{escape(experiment)}</code> <span class="signs">{signs}</span></a></li>'
        for anchor, title, experiment, signs in entries
    )
    return f'<ol class="contents">\n{items}\n</ol>'


def _run_section(place: _Place) -> str:
    """The section of one run: question, claims, figures, configuration."""
    run, anchor = place.run, place.anchor
    claims = "\n".join(_claim_entry(place, claim) for claim in run.results["claims"])
    figures = "\n".join(_figure(place, index, f) for index, f in enumerate(run.figures))
    return f"""\
<section class="experiment" id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">{escape(run.title)}</h2>
<p class="question">{escape(run.question)}</p>
<p class="facts">{elements.facts(run.results)}</p>
{elements.command(run.command)}
<ul class="claims">
{claims}
</ul>
<div class="figures">
{figures}
</div>
<details><summary>Configuration</summary>
{elements.pairs(run.config)}
</details>
<details><summary>Environment</summary>
{elements.pairs(run.environment)}
</details>
{_BACK}
</section>"""


def _failure_section(failure: Failure) -> str:
    """The section of an experiment that failed: command, reason and log."""
    anchor = _section_anchor(failure.experiment)
    return f"""\
<section class="experiment" id="{anchor}" aria-labelledby="{anchor}-title">
<h2 id="{anchor}-title">Failed: {escape(failure.experiment)}</h2>
<p class="question">{escape(failure.reason)}</p>
<p class="facts">{elements.badge(elements.FAILED)} Exit status {failure.status}</p>
{elements.command(failure.command)}
<h3>End of its log</h3>
<pre class="log" tabindex="0">{escape(failure.log) or "The log is empty."}</pre>
{_BACK}
</section>"""


_BACK = '<p class="back"><a href="#claims">Back to all claims</a></p>'


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)


def _signs(run: Run) -> str:
    """How many claims came to each verdict, in signs that are read out as words."""
    found = [claim["verdict"] for claim in run.results["claims"]]
    return " ".join(
        f'<span class="sign {elements.verdict_class(verdict)}">{found.count(verdict)} '
        f'<span aria-hidden="true">{elements.verdict_sign(verdict)}</span>'
        f'<span class="unseen">{verdict}</span></span>'
        for verdict in VERDICTS
        if verdict in found
    )


def _claim_entry(place: _Place, claim: Mapping[str, Any]) -> str:
    note = f'<p class="note">{escape(claim["note"])}</p>' if claim["note"] else ""
    return (
        f'<li id="{place.claim_anchor(claim["id"])}">\n'
        f'<p class="statement">{elements.badge(claim["verdict"])} '
        f"<strong>{escape(claim['statement'])}</strong> <code>{escape(claim['id'])}</code></p>\n"
        f"<p><b>Criterion.</b> {escape(claim['criterion'])}</p>{note}</li>"
    )


def _figure(place: _Place, index: int, figure: Figure) -> str:
    known = [claim["id"] for claim in place.run.results["claims"]]
    links = ", ".join(
        f'<a href="#{place.claim_anchor(claim)}">{escape(claim)}</a>'
        for claim in figure.claims
        if claim in known
    )
    shows = f'<p class="shows">Shows {links}</p>' if links else ""
    return elements.figure(
        figure,
        anchor=place.figure_anchor(index),
        label=f"Figure {place.first_figure + index}. ",
        more=f'{shows}<p class="made">{elements.code(place.run.command)}</p>',
    )
