"""Figures in one clean style: readable on paper and on a phone, for colour-blind readers too.

pyplot and its global state, which leaks figures in a long run, are not used. Matplotlib and scipy
take half a second to import, so this is done by the first figure, not by whoever asks an experiment
for help.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from bn_research.claims import atomic, palette_png
from bn_research.claims.claim import SLUG

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

DPI = 150
GREY = "#777777"  # of what others are compared with
_INK = "#262626"
_GRID = "#e3e3e3"
_LABEL_GAP = 12.0  # points between two direct labels


class Palette(NamedTuple):
    """Okabe & Ito's colours, by name or by index; those that also carry text on white come first.

    Their yellow is left out: as a line on white paper it cannot be seen.
    """

    blue: str = "#0072B2"
    vermillion: str = "#D55E00"
    green: str = "#009E73"
    purple: str = "#CC79A7"
    orange: str = "#E69F00"
    sky: str = "#56B4E9"
    black: str = "#000000"


PALETTE = Palette()


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure on disk, with the words that a page needs to show it.

    Attributes:
      path: the PNG file.
      title: short heading.
      alt: what the picture shows, for those who do not see it.
      caption: what to conclude from it, and what bands and marks mean.
      claims: ids of the claims whose verdicts rest on what it shows.
    """

    path: Path
    title: str
    alt: str
    caption: str
    claims: tuple[str, ...] = ()


def new_figure(
    *, columns: int = 1, rows: int = 1, width: float | None = None, height: float | None = None
) -> tuple[matplotlib.figure.Figure, Any]:
    """A styled figure with its axes.

    Prefer rows to columns where readers use phones: side by side, panels shrink together with
    their text.

    Args:
      columns: panels side by side.
      rows: panels one above the other.
      width: of the whole figure, in inches; by default 4.6, or 3.4 for each of several columns.
      height: likewise; by default 3.1 for each row.

    Returns:
      The figure, and its axes as `plt.subplots` would give them: one object for one panel, a
      vector for one row or column, else an array `[rows, columns]`.

    Raises:
      ValueError: `columns` or `rows` is below 1.
    """
    for name, value in (("columns", columns), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    width = width or (4.6 if columns == 1 else 3.4 * columns)
    fig = MatplotlibFigure(
        figsize=(width, height or 3.1 * rows), facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns)
    for axis in np.ravel(axes):
        _style(axis)
    return fig, axes


def save_figure(
    fig: matplotlib.figure.Figure,
    path: str | os.PathLike[str],
    *,
    title: str,
    alt: str,
    caption: str,
    claims: Sequence[str] = (),
) -> Figure:
    """The figure as a PNG file, whose bytes depend on its content alone; written atomically.

    Raises:
      ValueError: `path` does not end in `.png`, a text is empty, or `claims` are not ids
        of claims, each once.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    for name, text in (("title", title), ("alt", alt), ("caption", caption)):
        if not text.strip():
            raise ValueError(f"{name} must not be empty, got {text!r} for {path.name}")
    if isinstance(claims, str) or not all(map(SLUG.fullmatch, claims)):
        raise ValueError(f"claims must be a sequence of ids of claims, got {claims!r}")
    if len(set(claims)) < len(claims):
        raise ValueError(f"claims must name each claim once, got {claims!r}")
    data = palette_png.encode(fig, dpi=DPI)
    return Figure(atomic.write_bytes(path, data), title, alt, caption, tuple(claims))


def save_all(
    draws: Iterable[Callable[..., Any]], folder: str | os.PathLike[str], *given: Any
) -> list[Figure]:
    """Figures drawn and saved, in the order of the page.

    Args:
      draws: functions of what is given, or partial ones. The first line of a docstring, without
        its full stop, is the title; the file is named after the function. Each returns the
        Matplotlib figure and a dict of what else `save_figure` takes: `alt`, `caption` and, if any,
        `claims`; a `title`, or the name of a `file`, may stand there too. None draws nothing.
      folder: of the PNG files.
      *given: for each of the functions.
    """
    saved = []
    for draw in draws:
        if drawn := draw(*given):
            fig, words = drawn
            while isinstance(draw, functools.partial):
                draw = draw.func
            words = {"title": (draw.__doc__ or "").partition("\n")[0].removesuffix("."), **words}
            name = words.pop("file", draw.__name__.strip("_"))
            saved.append(save_figure(fig, Path(folder) / f"{name}.png", **words))
    return saved


def band(
    axis: Axes,
    x: ArrayLike,
    curves: ArrayLike,
    *,
    label: str,
    color: str,
    spread: str = "range",
    linestyle: str = "-",
    mark_lost: bool = True,
    **look: Any,
) -> Line2D:
    """The mean over seeds as a line, and their spread as a band around it.

    Values that are not finite are left out of the mean, step by step. A seed that has none from
    some step on (it diverged, or it stopped) gets a cross at its last value: from there on the
    line is the mean of the others.

    Args:
      axis: of one panel.
      x: one number per step.
      curves: values `[seeds, steps]`, or `[steps]` for one seed.
      label: in the legend.
      color: of line and band.
      spread: `"range"`, from the smallest to the largest seed, or `"interval"`, the 95 %
        Student-t interval of the mean, which is very wide below 5 seeds.
      linestyle: of the line, as Matplotlib takes it.
      mark_lost: whether there are crosses.
      **look: of the line likewise, such as a marker.

    Returns:
      The line.

    Raises:
      ValueError: shapes do not match, or `spread` is unknown.
    """
    x = np.asarray(x, dtype=np.float64)
    curves = np.atleast_2d(np.asarray(curves, dtype=np.float64))
    if x.ndim != 1 or curves.ndim != 2 or curves.shape[1] != len(x):
        raise ValueError(f"curves must be [seeds, {len(x)}] for {len(x)} x, got {curves.shape}")
    if spread not in _SPREADS:
        raise ValueError(f"spread must be one of {tuple(_SPREADS)}, got {spread!r}")
    valid = np.isfinite(curves)
    mean = _divide(np.sum(curves, axis=0, where=valid), valid.sum(axis=0))
    low, high = _SPREADS[spread](curves, valid, mean)
    axis.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    (line,) = axis.plot(x, mean, color=color, linestyle=linestyle, label=label, **look)
    if mark_lost:
        for curve, kept in zip(curves, valid, strict=True):
            if kept.any() and not kept[-1]:
                last = np.flatnonzero(kept)[-1]
                axis.plot(x[last], curve[last], marker="x", markersize=6, color=color)
    return line


def shared_legend(fig: matplotlib.figure.Figure, *, columns: int | None = None) -> None:
    """One legend for all panels, above them, where it covers no data; each label appears once.

    By default as many entries stand side by side as fit.
    """
    entries: dict[str, Any] = {}
    for axis in fig.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    if columns is None:
        # 0.085 inch for a character of 10 points, 0.6 for the line before it and the gap.
        needed = 0.085 * max(map(len, entries)) + 0.6
        columns = max(1, min(len(entries), int(fig.get_figwidth() / needed)))
    fig.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        labelcolor=_INK,
    )


def end_labels(axis: Axes) -> None:
    """Each line's label at its right end, in its colour, moved apart where they collide.

    Better than a legend for up to about five lines. Call it last, when the limits are final.
    """
    lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    ends = []
    for line in lines:
        points = np.asarray(line.get_xydata())
        points = points[np.all(np.isfinite(points), axis=1)]
        if len(points):
            ends.append((line, points[-1]))
    if not ends:
        return
    axis.get_ylim()  # settles a pending autoscale, which transforms do not
    to_fraction = (axis.transScale + axis.transLimits).transform
    height = axis.get_window_extent().height * 72 / axis.figure.dpi  # type: ignore[union-attr]
    wanted = [float(to_fraction(end)[1]) * height for _, end in ends]
    for (line, end), at, old in zip(ends, _spread_apart(wanted), wanted, strict=True):
        axis.annotate(
            str(line.get_label()),
            (end[0], end[1]),
            xytext=(5, at - old),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )


def _style(axis: Axes) -> None:
    # By methods, not rcParams: ticks are made lazily, when a context of rcParams is long over.
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_INK)
    axis.tick_params(labelsize=9.5, color=_INK, labelcolor=_INK)
    axis.xaxis.label.set(size=10.5, color=_INK)
    axis.yaxis.label.set(size=10.5, color=_INK)
    axis.grid(visible=True, color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_prop_cycle(color=list(PALETTE), linewidth=[1.8] * len(PALETTE))


def _spread_apart(positions: list[float]) -> list[float]:
    """Positions moved as little as it takes to lie `_LABEL_GAP` apart, in their old order."""
    moved = list(positions)
    order = sorted(range(len(moved)), key=lambda i: (moved[i], i))
    for _ in range(100):
        for below, above in zip(order, order[1:], strict=False):
            overlap = _LABEL_GAP - (moved[above] - moved[below])
            if overlap > 0:
                moved[below] -= overlap / 2
                moved[above] += overlap / 2
    return moved


def _range(
    curves: np.ndarray, valid: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    low = np.where(valid, curves, np.inf).min(axis=0)
    high = np.where(valid, curves, -np.inf).max(axis=0)
    missing = np.isnan(mean)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def _interval(
    curves: np.ndarray, valid: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    from scipy import special

    count = valid.sum(axis=0)
    squares = np.where(valid, curves - mean, 0.0) ** 2
    error = np.sqrt(_divide(squares.sum(axis=0), (count - 1) * count))  # NaN, no band, for one seed
    half = special.stdtrit(np.maximum(count - 1, 1), 0.975) * error
    return mean - half, mean + half


_SPREADS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "range": _range,
    "interval": _interval,
}


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`total / count`, NaN and no warning where the count is zero or less."""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
