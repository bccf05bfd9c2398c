"""Claims with what was measured as a table: for a terminal, or in Markdown."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bn_research.claims.finding import VERDICTS, Finding
from bn_research.claims.formatting import (
    display_width,
    format_interval,
    format_measured,
    printable,
    wrap,
)

_HEADINGS = ("claim", "expected", "measured", "interval", "verdict")
_MEASURED_SHOWN = 6  # a terminal is for a first look; results.json has them all
_NARROWEST = 60  # below it no column has room for a word


def verdict_table(
    findings: Sequence[Finding], *, width: int | None = None, encoding: str | None = None
) -> str:
    """Findings as a table for the terminal, with their notes below it.

    Args:
      findings: in the order of the table.
      width: columns it may take; by default the terminal's, between 80 and 120.
      encoding: what the terminal can show; by default that of standard output. `"ascii"`
        spells Greek letters and mathematical signs out.

    Raises:
      ValueError: `width` is below 60.
    """
    width = width or min(max(shutil.get_terminal_size().columns, 80), 120)
    if width < _NARROWEST:
        raise ValueError(f"width must be at least {_NARROWEST}, got {width}")
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    rows = [
        [[printable(paragraph, encoding) for paragraph in cell] for cell in row]
        for row in ([[heading] for heading in _HEADINGS], *map(_table_row, findings))
    ]
    widths = _column_widths(rows, width)
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [rule]
    for row in rows:
        lines += [*_table_lines(row, widths), rule]
    for finding in findings:
        if finding.note:
            note = printable(f"{finding.claim.id}: {finding.note}", encoding)
            lines += wrap(note, width)
    counts = [(sum(f.verdict == verdict for f in findings), verdict) for verdict in VERDICTS]
    lines.append(", ".join(f"{count} {verdict}" for count, verdict in counts))
    return "\n".join(lines)


def markdown_table(results: Mapping[str, Any]) -> str:
    """Claims of a `results.json` as a Markdown table, with their notes below it."""
    lines = ["| claim | expected | measured | 95 % interval | verdict |", "|---|---|---|---|---|"]
    notes = []
    for claim in results["claims"]:
        shown = format_measured(claim["measured"])[:_MEASURED_SHOWN]
        measured = "<br>".join(f"{name} = {text}" for name, text in shown)
        cells = (
            f"{claim['statement']} (`{claim['id']}`)",
            claim["expected"],
            measured,
            format_interval(claim["interval"]),
            f"**{claim['verdict']}**",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        if claim["note"]:
            notes.append(f"- `{claim['id']}`: {claim['note']}")
    return "\n".join([*lines, "", *notes])


def _table_row(finding: Finding) -> list[list[str]]:
    """The five cells, each a list of paragraphs."""
    measured = [f"{name} = {text}" for name, text in format_measured(finding.measured)]
    if len(measured) > _MEASURED_SHOWN:
        more = len(measured) - _MEASURED_SHOWN
        measured = [*measured[:_MEASURED_SHOWN], f"({more} more in results.json)"]
    return [
        [finding.claim.id],
        [finding.claim.expected],
        measured or ["none"],
        [format_interval(finding.interval)],
        [finding.verdict],
    ]


def _column_widths(rows: list[list[list[str]]], width: int) -> list[int]:
    """Each column as wide as its text, then the widest ones cut back until the table fits."""
    widths = [
        max(display_width(paragraph) for row in rows for paragraph in row[column])
        for column in range(len(_HEADINGS))
    ]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        # The last column, the verdict, is short and the one that must not be broken.
        widest = max(range(len(widths) - 1), key=lambda column: widths[column])
        widths[widest] -= 1
    return widths


def _table_lines(row: list[list[str]], widths: list[int]) -> list[str]:
    cells = [
        [line for paragraph in cell for line in wrap(paragraph, size)]
        for cell, size in zip(row, widths, strict=True)
    ]
    lines = []
    for index in range(max(map(len, cells))):
        parts = [cell[index] if index < len(cell) else "" for cell in cells]
        padded = (
            part + " " * (size - display_width(part))
            for part, size in zip(parts, widths, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return lines
