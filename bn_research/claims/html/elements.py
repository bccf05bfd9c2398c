"""Parts that the pages share: pure functions from results to HTML.

Everything that comes from outside passes through `escape`. The same input gives the same bytes: no
clock and no random identifier is consulted.
"""

import base64
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from bn_research.claims.figures import Figure
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from bn_research.claims.formatting import format_duration
from bn_research.claims.html.images import embed

FAILED = "failed"  # of an experiment that came to no verdict

# Class and sign of each badge: the colour never carries the verdict alone.
_BADGES = {
    REPRODUCED: ("yes", "✓"),
    NOT_REPRODUCED: ("no", "✗"),
    INCONCLUSIVE: ("open", "~"),
    FAILED: ("failed", "!"),
}

# The policy makes the browser itself refuse whatever would reach out of the file, and any script
# but the one that was written into it.
_DOCUMENT = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'$allowed">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
$style</style>
</head>
$body</html>
""")

_READING = Template("""\
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
$more</dl>
<p>An interval is the 95&#8239;% Student-t interval over seeds, of paired differences where the
compared arms share their seeds, unless a note says otherwise. A claim of several parts is
reproduced only if all of its parts are. “Not finite” is a measurement that overflowed or was not a
number; the note says which.</p>
</section>""")


def resource(name: str) -> str:
    """A style sheet or a script of this package."""
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def document(*, title: str, style: str, body: str, script: str = "") -> str:
    """A page that needs no other file; `body` is whole, with its script if it has one."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    return _DOCUMENT.substitute(title=escape(title), style=style, body=body, allowed=allowed)


def badge(verdict: str) -> str:
    """A verdict with its colour and sign."""
    sign = verdict_sign(verdict)
    mark = f'<span aria-hidden="true">{sign}</span> ' if sign else ""
    return f'<span class="badge {verdict_class(verdict)}">{mark}{escape(verdict)}</span>'


def verdict_class(verdict: str) -> str:
    """The class by which the style sheet colours a verdict."""
    return _BADGES.get(verdict, ("other", ""))[0]


def verdict_sign(verdict: str) -> str:
    """The sign that says the same as the colour."""
    return _BADGES.get(verdict, ("other", ""))[1]


def facts(results: Mapping[str, Any]) -> str:
    """Experiment, preset, data, seeds and time in one line."""
    seeds = results["seeds"]
    parts = [
        f"Experiment <strong>{escape(str(results['experiment']))}</strong>",
        f"preset <strong>{escape(str(results['preset']))}</strong>",
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}",
        escape(format_duration(results["wall_seconds"])),
    ]
    if results["dataset"]:
        parts.insert(2, f"data <strong>{escape(str(results['dataset']))}</strong>")
    return " · ".join(parts)


def numbers(entries: Sequence[tuple[str, str]], *, shown: int) -> str:
    """Names and numbers as a list, folded after the first `shown` ones."""
    if not entries:
        return "<p>none</p>"
    rest = entries[shown:]
    text = _numbers(entries[:shown])
    if rest:
        text += f"<details><summary>{len(rest)} more</summary>{_numbers(rest)}</details>"
    return text


def _numbers(entries: Sequence[tuple[str, str]]) -> str:
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in entries)
    return f"<dl>{''.join(rows)}</dl>"


def figure(shown: Figure, *, anchor: str = "", label: str = "", more: str = "") -> str:
    """A figure with its heading, alternative text and caption.

    Args:
      shown: the figure; its file is read.
      anchor: its id on the page, if links lead to it.
      label: what stands before the title, such as its number.
      more: HTML below the caption.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a PNG.
    """
    uri, width, height = embed(shown.path)
    name = f' id="{escape(anchor)}"' if anchor else ""
    kind = ' class="wide"' if width > 2 * height else ""
    return (
        f"<figure{name}{kind}>\n<h3>{escape(f'{label}{shown.title}')}</h3>\n"
        f'<img src="{uri}" width="{width}" height="{height}" loading="lazy" decoding="async" '
        f'alt="{escape(shown.alt)}">\n'
        f"<figcaption>{escape(shown.caption)}{more}</figcaption>\n</figure>"
    )


def command(line: str) -> str:
    """A command as a block."""
    return f"<pre>{code(line)}</pre>"


def code(line: str) -> str:
    """A command, each word a box: a narrow screen would break `--preset` after `--`."""
    words = re.sub(r"\S+", lambda word: f"<span>{escape(word[0])}</span>", line)
    return f'<code class="command">{words}</code>'


def pairs(mapping: Mapping[str, Any]) -> str:
    """Names and values as a table; nested mappings become dotted names."""
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


def reading(*, with_failures: bool = False) -> str:
    """The section that says what the verdicts mean."""
    more = (
        f"<div><dt>{badge(FAILED)}</dt><dd>The experiment came to no end; its log is in its "
        "section.</dd></div>\n"
    )
    return _READING.substitute(
        reproduced=badge(REPRODUCED),
        not_reproduced=badge(NOT_REPRODUCED),
        inconclusive=badge(INCONCLUSIVE),
        more=more if with_failures else "",
    )
