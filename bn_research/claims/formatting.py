"""Numbers and text for people: on a page, and on a terminal that may know ASCII only."""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"

# What NFKD does not take apart, in the words a reader of formulas would use.
_ASCII = str.maketrans(
    {
        MINUS: "-",
        "–": "-",
        "—": "-",
        "×": "x",
        "·": "*",
        "±": "+-",
        "≤": "<=",
        "≥": ">=",
        "≈": "~",
        "→": "->",
        "√": "sqrt ",
        "∞": "inf",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "α": "alpha",
        "β": "beta",
        "γ": "gamma",
        "ε": "epsilon",
        "η": "eta",
        "κ": "kappa",
        "λ": "lambda",
        "μ": "mu",
        "π": "pi",
        "σ": "sigma",
    }
)


def format_number(value: float | None) -> str:
    """Four significant digits: `0.5`, `−12.35`, `50000`, `3.2e-12`.

    Whole numbers below a million keep all their digits, for steps and counts. None stands for a
    number that was not finite when it was stored.
    """
    if value is None:
        return "not finite"
    value = float(value)
    if math.isnan(value):
        return "nan"
    size = abs(value)
    if math.isinf(value):
        text = "inf"
    elif 1e3 <= size < 1e6:
        text = f"{size:.0f}"  # %.4g would turn 12345 steps into 1.234e+04
    elif size < 1e-3 or size >= 1e6:
        mantissa, _, exponent = f"{size:.3e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if size else "0"
    else:
        text = f"{size:.4g}"
    return f"{MINUS}{text}" if value < 0 and text != "0" else text


def format_interval(interval: Sequence[float | None] | None) -> str:
    """`[0.45, 0.53]`, `[2.5, inf]` where an end is open (infinite or None), or `none`."""
    if interval is None:
        return "none"
    low, high = interval
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return f"[{format_number(low)}, {format_number(high)}]"


def format_measured(measured: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Names with their numbers, and with the interval where `name, low` and `name, high` stand.

    Those two are not listed again: `{"x": 1, "x, low": 0.5, "x, high": 2}` is one entry,
    `("x", "1 [0.5, 2]")`.
    """

    def ends(name: str) -> tuple[str, str]:
        return f"{name}, low", f"{name}, high"

    with_interval = {name for name in measured if set(ends(name)) <= measured.keys()}
    listed = [name for name in measured if not any(name in ends(n) for n in with_interval)]
    return [
        (
            name,
            format_number(measured[name])
            + (
                f" {format_interval([measured[end] for end in ends(name)])}"
                if name in with_interval
                else ""
            ),
        )
        for name in listed
    ]


def headline(claim: Mapping[str, Any]) -> tuple[str, str]:
    """Name and text of the measured number that a claim's interval is about: `32 [23.6, 43.4]`.

    That is the number with this very interval, else the one in its middle, else the first inside
    it. Where none is, or there is no interval, it is the first number, as it is.
    The claim is an entry of `results.json` with a number at least in `measured`.
    """
    measured, interval = claim["measured"], claim["interval"]
    entries = format_measured(measured)
    if interval is None:
        return entries[0]
    low, high = (-math.inf if interval[0] is None else interval[0]), interval[1]
    high = math.inf if high is None else high

    def distance(name: str) -> int:
        value = measured[name]
        if [measured.get(f"{name}, low", ...), measured.get(f"{name}, high", ...)] == [*interval]:
            return 0
        if value is None or not low <= value <= high:
            return 3
        return 1 if math.isclose(value, (low + high) / 2, rel_tol=1e-6) else 2

    name, text = min(entries, key=lambda entry: distance(entry[0]))
    if distance(name) in (0, 3) or low == high:
        return name, text
    return name, f"{format_number(measured[name])} {format_interval(interval)}"


def format_duration(seconds: float) -> str:
    """`0.8 s`, `75 s`, `12 min`, `2 h 5 min`."""
    if seconds < 120:
        return f"{format_number(seconds if seconds < 10 else round(seconds))} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def display_width(text: str) -> int:
    """Terminal columns that `text` takes: 0 for a combining accent, 2 for a wide character."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def aligned(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lines of a table whose columns line up: the first `left` to the left, the rest to the right.

    Args:
      rows: cells of each line, the head first; all of one length.
      left: columns of names.
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]

    def padded(cell: str, column: int) -> str:
        space = " " * (widths[column] - display_width(cell))
        return cell + space if column < left else space + cell

    return ["  ".join(padded(cell, i) for i, cell in enumerate(row)).rstrip() for row in rows]


def printable(text: str, encoding: str) -> str:
    """One line that a terminal can show: no control characters, nothing it cannot encode.

    What the encoding lacks is spelled out where there is a usual way (`σ` becomes `sigma`) and
    becomes `?` elsewhere.
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = unicodedata.normalize("NFKD", text.translate(_ASCII)).translate(_ASCII)
        plain = "".join(c for c in plain if not unicodedata.combining(c))
        text = plain.encode(encoding, "replace").decode(encoding)
    return " ".join(text.split())


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; a word too long is broken, after a hyphen if it can be.

    Unlike `textwrap` this counts columns, not code points.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        while display_width(word) > width:
            head = _fitting(word, width)
            lines[-1], word = head, word[len(head) :]
            lines.append("")
        lines[-1] = word
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _fitting(word: str, width: int) -> str:
    """The longest head that fits, cut after a hyphen, `_` or `/` if one is there."""
    end = 1  # at least one character, or a wide one in a column of width 1 would never end
    while end < len(word) and display_width(word[: end + 1]) <= width:
        end += 1
    breaks = [i + 1 for i, c in enumerate(word[:end]) if c in "-_/"]
    return word[: breaks[-1]] if breaks else word[:end]
