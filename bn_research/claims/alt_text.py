"""What a figure's lines do, in words, for those who do not see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bn_research.claims.formatting import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DIGITS = 3  # significant; more than a reader sees in the picture
_NO_MARKUP = str.maketrans("", "", "${}")  # of Matplotlib's formulas


def line_ends(axis: Axes) -> str:
    """Where each labelled line begins and ends: `plain: 0.1 to 0.9; chance: 0.1`.

    Left to right, one number where both are the same; points with error bars are a line too.
    Values that are not finite, lines that have no other, and vertical lines are left out.
    """
    from matplotlib.container import ErrorbarContainer
    from matplotlib.lines import Line2D

    shown = []
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        if not isinstance(line, Line2D):
            continue
        x, y = (np.asarray(data, dtype=np.float64) for data in line.get_data())
        y = y[np.isfinite(y)]
        if not len(y) or (len(x) > 1 and np.ptp(x) == 0):
            continue
        ends = [format_number(float(f"{value:.{_DIGITS}g}")) for value in (y[0], y[-1])]
        label = label.translate(_NO_MARKUP)
        shown.append(f"{label}: {' to '.join(dict.fromkeys(ends))}")
    return "; ".join(shown)


def panel_ends(panels: Mapping[str, Axes]) -> str:
    """`line_ends` of each panel after its name, a sentence each: `Low rate: plain: 0.1 to 0.9.`.

    A name begins with a capital here, however it is written.
    """
    return " ".join(
        f"{name[:1].upper()}{name[1:]}: {line_ends(axis)}." for name, axis in panels.items()
    )
