"""Marks and axes that figures share: bands over seeds, points, rows, references, ticks.

Each draws on an axis of `new_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims.estimate import Estimate
from bn_research.claims.figures import GREY, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Look = str | tuple[str, str]  # a colour, or a colour and a line style


def over_seeds(seeds: int) -> str:
    """Words of a caption for `band`, without the full stop."""
    return f"Line: mean of {seeds} seeds; band: lowest to highest"


def bands(
    axis: Axes,
    x: ArrayLike,
    curves: Mapping[str, Any],
    looks: Mapping[str, Look],
    *,
    names: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """A `band` of the curves `[seeds, steps]` of each key, in their order.

    The legend has the keys unless there are names for them. Options are those of `band`, for all.
    """
    for key, rows in curves.items():
        look = looks[key]
        color, style = (look, "-") if isinstance(look, str) else look
        label = names[key] if names else key
        band(axis, x, rows, label=label, color=color, **{"linestyle": style} | options)


def points(axis: Axes, x: ArrayLike, values: ArrayLike, **look: Any) -> None:
    """Means over seeds of values `[seeds, points]`, with bars from the lowest to the highest.

    The look is as Matplotlib's `errorbar` takes it, without a line unless it has one.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = values.mean(axis=0)
    spans = [mean - values.min(axis=0), values.max(axis=0) - mean]
    axis.errorbar(x, mean, yerr=spans, **{"linestyle": "none"} | look)


def interval_row(
    axis: Axes, y: float, found: Estimate, *, color: str, marker: str = "o", width: float = 2.0
) -> None:
    """An estimate at a height, with a bar along its interval where it has one."""
    if math.isfinite(found.low):
        axis.plot(found.interval, (y, y), color=color, linewidth=width)
    axis.plot(found.mean, y, marker, color=color, markersize=7)


def name_rows(axis: Axes, names: Sequence[str]) -> None:
    """Names of rows at heights 0, 1, ... along the y axis, the first on top."""
    axis.set_yticks(range(len(names)), list(names))
    axis.set_ylim(len(names) - 0.5, -0.5)


def reference(axis: Axes, *, x: float | None = None, y: float | None = None, **look: Any) -> None:
    """A thin line across at y, or upright at x, to compare with: chance, a criterion, no change.

    It is grey and dashed unless its look, as Matplotlib takes it, says otherwise.
    """
    options: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2} | look
    if x is not None:
        axis.axvline(x, **options)
    if y is not None:
        axis.axhline(y, **options)


def log_ticks(axis: Axes, values: Sequence[float], *, base: float = 2, side: str = "x") -> None:
    """A logarithmic axis with ticks at these values as plain numbers, and no others."""
    getattr(axis, f"set_{side}scale")("log", base=base)
    ruler = getattr(axis, f"{side}axis")
    ruler.set_ticks(values, [f"{value:g}" for value in values])
    ruler.minorticks_off()


def padded(rows: Sequence[Any], length: int = 0) -> np.ndarray:
    """Curves `[seeds, steps]` of unequal runs: NaN after a run's end, and in place of None.

    They are as long as the longest run, or longer if so asked.
    """
    curves = np.full((len(rows), max([length, *map(len, rows)])), math.nan)
    for curve, values in zip(curves, rows, strict=True):
        curve[: len(values)] = np.array(values, dtype=np.float64)
    return curves


def running_mean(curves: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each step, of fewer at the first ones."""
    return np.array(
        [[row[max(0, i + 1 - window) : i + 1].mean() for i in range(len(row))] for row in curves]
    )
