"""One page of many experiments: a table of all claims, then a section for each experiment.

The page is whole without its script, which adds search, filters and sorting; it needs no other
file and no network.
"""

import os
from collections.abc import Sequence
from html import escape
from string import Template

from bn_research.claims import atomic, elements
from bn_research.claims.overview_sections import (
    check_different,
    contents,
    failure_section,
    places,
    run_section,
)
from bn_research.claims.overview_table import COLUMNS, Row, claim_rows, failure_rows, table
from bn_research.claims.run import Failure, Run
from bn_research.claims.verdict import VERDICTS

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


def write_overview(
    path: str | os.PathLike[str],
    *,
    title: str,
    introduction: str,
    command: str,
    runs: Sequence[Run],
    failures: Sequence[Failure],
) -> None:
    """Write the page of all experiments as one HTML file.

    Args:
        path: Where to write.
        title: Of the page.
        introduction: What was tested, in a sentence or two.
        command: The command line that gives this page.
        runs: In the order of the page, each of another experiment.
        failures: Experiments that came to no end.

    Raises:
        OSError: A figure cannot be read, or the page cannot be written.
        ValueError: An experiment is given twice, or a figure is not a PNG.
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
    """Return the whole page; the arguments are those of :func:`write_overview`."""
    placed = places(runs)
    check_different([*(p.experiment for p in placed), *(f.experiment for f in failures)])
    rows = [*claim_rows(placed), *failure_rows(failures)]
    sections = [*map(run_section, placed), *map(failure_section, failures)]
    script = elements.resource("overview.js")
    body = _BODY.substitute(
        title=escape(title),
        introduction=escape(introduction),
        summary=_summary(rows),
        command=elements.command(command),
        tools=_tools(rows) if rows else "",
        table=table(rows, heading="claims"),
        contents=contents(placed, failures),
        sections="\n".join(sections),
        reading=elements.reading(with_failures=bool(failures)),
        script=script,
    )
    style = elements.resource("report.css") + elements.resource("overview.css")
    return elements.document(title=title, style=style, body=body, script=script)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    """Rows of each verdict; failures are named only where there are some."""
    found = [row.verdict for row in rows]
    names = (*VERDICTS, elements.FAILED) if elements.FAILED in found else VERDICTS
    return {name: found.count(name) for name in names}


def _summary(rows: Sequence[Row]) -> str:
    """Return the counts of the verdicts, as a bar and in words."""
    parts, words = "", ""
    for name, count in _counts(rows).items():
        kind = elements.verdict_class(name)
        parts += f'<span class="{kind}" style="flex-grow:{count}"></span>' if count else ""
        words += f"<li><strong>{count}</strong> {elements.badge(name)}</li>"
    return (
        f'<div class="bar" aria-hidden="true">{parts}</div>\n'
        f'<ul class="counts" aria-label="Verdicts">{words}</ul>'
    )


def _tools(rows: Sequence[Row]) -> str:
    """Return search, filters and order, hidden until the script that they need runs."""
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
