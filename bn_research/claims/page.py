"""The HTML of ``report.html``: pure functions from results to text.

Everything that comes from outside passes through :func:`html.escape`. The same input gives the
same bytes: no clock and no random identifier is consulted.
"""

import base64
import importlib.resources
import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from bn_research.claims.figures import Figure
from bn_research.claims.formatting import format_duration, format_interval, format_measured
from bn_research.claims.verdict import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Class and sign of each badge: the colour never carries the verdict alone.
_BADGES = {REPRODUCED: ("yes", "✓"), NOT_REPRODUCED: ("no", "✗"), INCONCLUSIVE: ("open", "~")}

_UNFOLDED = 12  # numbers of a claim; the rest opens on demand
_COLUMNS = ("Claim", "Source", "Criterion", "Expected", "Measured", "Verdict")

# The policy makes the browser itself refuse whatever would reach out of this file.
_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
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
<pre><code>$command</code></pre>
</section>
<section aria-labelledby="config">
<h2 id="config">Configuration</h2>
$config
</section>
<section aria-labelledby="environment">
<h2 id="environment">Environment</h2>
$environment
</section>
<section aria-labelledby="reading">
<h2 id="reading">How to read the verdicts</h2>
<p>Each criterion was written into the code before the run. A verdict compares it with an interval,
not with a mean alone.</p>
<dl class="reading">
<div><dt>$reproduced</dt><dd>The whole interval satisfies the criterion.</dd></div>
<div><dt>$not_reproduced</dt><dd>The whole interval violates it. That is a result too: the claim
does not hold in this setting.</dd></div>
<div><dt>$inconclusive</dt><dd>The interval holds values on both sides, or there is none, as with a
single seed. More seeds, or a larger preset, may decide.</dd></div>
</dl>
<p>An interval is the 95&#8239;% Student-t interval over seeds, of paired differences where the
compared arms share their seeds, unless a note says otherwise. A claim of several parts is
reproduced only if all of its parts are. “Not finite” is a measurement that overflowed or was not a
number; the note says which.</p>
</section>
</main>
</body>
</html>
""")


def render(
    *,
    title: str,
    question: str,
    results: Mapping[str, Any],
    figures: Sequence[Figure],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
) -> str:
    """Return the whole page; the arguments are those of ``report.write_report``."""
    return _PAGE.substitute(
        title=escape(title),
        question=escape(question),
        style=importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8"),
        facts=_facts(results),
        verdicts=_verdicts(results["claims"]),
        figures=_figures(figures),
        command=_command(command),
        config=_pairs(config),
        environment=_pairs(environment),
        reproduced=_badge(REPRODUCED),
        not_reproduced=_badge(NOT_REPRODUCED),
        inconclusive=_badge(INCONCLUSIVE),
    )


def _facts(results: Mapping[str, Any]) -> str:
    seeds = results["seeds"]
    facts = [
        f"Experiment <strong>{escape(str(results['experiment']))}</strong>",
        f"preset <strong>{escape(str(results['preset']))}</strong>",
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}",
        escape(format_duration(results["wall_seconds"])),
    ]
    if results["dataset"]:
        facts.insert(2, f"data <strong>{escape(str(results['dataset']))}</strong>")
    return " · ".join(facts)


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


def _measured(entries: list[tuple[str, str]]) -> str:
    """A list of names and numbers, folded after the first ones."""
    if not entries:
        return "<p>none</p>"
    first, rest = entries[:_UNFOLDED], entries[_UNFOLDED:]
    shown = _numbers(first)
    if rest:
        shown += f"<details><summary>{len(rest)} more</summary>{_numbers(rest)}</details>"
    return shown


def _numbers(entries: list[tuple[str, str]]) -> str:
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in entries)
    return f"<dl>{''.join(rows)}</dl>"


def _claim_row(claim: Mapping[str, Any]) -> str:
    measured = _measured(format_measured(claim["measured"]))
    if claim["interval"] is not None:
        interval = escape(format_interval(claim["interval"]))
        measured += f'<p class="interval">interval {interval}</p>'
    verdict = _badge(claim["verdict"])
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


def _badge(verdict: str) -> str:
    kind, sign = _BADGES.get(verdict, ("other", ""))
    mark = f'<span aria-hidden="true">{sign}</span> ' if sign else ""
    return f'<span class="badge {kind}">{mark}{escape(verdict)}</span>'


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    shown = "\n".join(_figure(figure) for figure in figures)
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Figures</h2>\n'
        f'<div class="figures">\n{shown}\n</div>\n</section>\n'
    )


def _figure(figure: Figure) -> str:
    data = Path(figure.path).read_bytes()
    width, height = _png_size(data, figure.path)
    kind = ' class="wide"' if width > 2 * height else ""
    return (
        f"<figure{kind}>\n<h3>{escape(figure.title)}</h3>\n"
        f'<img src="data:image/png;base64,{base64.b64encode(data).decode("ascii")}" '
        f'width="{width}" height="{height}" alt="{escape(figure.alt)}">\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def _png_size(data: bytes, path: Path) -> tuple[int, int]:
    """Width and height from the header, which spares the page a jump while it loads."""
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        raise ValueError(f"figure must be a PNG, got {str(path)!r}")
    return struct.unpack(">II", data[16:24])


def _command(command: str) -> str:
    """Each word as a box of its own, or a narrow screen would break ``--preset`` after ``--``."""
    return re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", command)


def _pairs(mapping: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in _flatten(mapping)
    )
    return f'<table class="pairs">\n<tbody>\n{rows}\n</tbody>\n</table>' if rows else "<p>none</p>"


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value:
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, default=str)
