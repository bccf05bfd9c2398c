"""The HTML of `report.html`: what one run has found, on one page."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from bn_research.claims import atomic
from bn_research.claims.figures import Figure
from bn_research.claims.formatting import format_interval, format_measured
from bn_research.claims.html import elements
from bn_research.claims.results import Run

_UNFOLDED = 12  # numbers of a claim; the rest opens on demand
_COLUMNS = ("Claim", "Source", "Criterion", "Expected", "Measured", "Verdict")

_BODY = Template("""\
<body>
<header>
<h1>$title</h1>
<p class="question">$question</p>
<p class="facts">$facts</p>
</header>
<main>
<section aria-labelledby="verdicts">
<h2 id="verdicts">Verdicts</h2>
$verdicts
</section>
$figures<section aria-labelledby="command">
<h2 id="command">Command</h2>
$command
</section>
<section aria-labelledby="config">
<h2 id="config">Configuration</h2>
$config
</section>
<section aria-labelledby="environment">
<h2 id="environment">Environment</h2>
$environment
</section>
$reading
</main>
</body>
""")


def write_report(path: str | os.PathLike[str], run: Run) -> None:
    """The HTML file of one run, which needs no other file, no network and no script.

    Raises:
      OSError: a figure cannot be read, or the report cannot be written.
      ValueError: a figure is not a PNG.
    """
    atomic.write_bytes(path, render(run).encode())


def render(run: Run) -> str:
    """The whole page."""
    body = _BODY.substitute(
        title=escape(run.title),
        question=escape(run.question),
        facts=elements.facts(run.results),
        verdicts=_verdicts(run.results["claims"]),
        figures=_figures(run.figures),
        command=elements.command(run.command),
        config=elements.pairs(run.config),
        environment=elements.pairs(run.environment),
        reading=elements.reading(),
    )
    return elements.document(title=run.title, style=elements.resource("report.css"), body=body)


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> str:
    if not claims:
        return "<p>No claim was tested.</p>"
    # Roles are spelled out, since the cards of narrow screens are `display: block`, which takes a
    # table's meaning from it in some browsers.
    head = "".join(f'<th scope="col" role="columnheader">{column}</th>' for column in _COLUMNS)
    rows = "\n".join(_claim_row(claim) for claim in claims)
    return (
        '<table class="verdicts" role="table" aria-labelledby="verdicts">\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}\n</tbody>\n</table>'
    )


def _claim_row(claim: Mapping[str, Any]) -> str:
    measured = elements.numbers(format_measured(claim["measured"]), shown=_UNFOLDED)
    if claim["interval"] is not None:
        interval = escape(format_interval(claim["interval"]))
        measured += f'<p class="interval">interval {interval}</p>'
    verdict = elements.badge(claim["verdict"])
    if claim["note"]:
        verdict += f'<p class="note">{escape(claim["note"])}</p>'
    cells = (
        escape(claim["source"]),
        escape(claim["criterion"]),
        escape(claim["expected"]),
        measured,
        verdict,
    )
    row = "".join(
        f'<td role="cell" class="{name.lower()}" data-label="{name}">'
        f'<div class="cell">{cell}</div></td>\n'
        for name, cell in zip(_COLUMNS[1:], cells, strict=True)
    )
    name = escape(claim["id"])
    return (
        f'<tr role="row" id="claim-{name}">\n'
        f'<th scope="row" role="rowheader">{escape(claim["statement"])} <code>{name}</code></th>\n'
        f"{row}</tr>"
    )


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    shown = "\n".join(elements.figure(figure) for figure in figures)
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Figures</h2>\n'
        f'<div class="figures">\n{shown}\n</div>\n</section>\n'
    )
