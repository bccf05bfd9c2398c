"""The figures of `experiments.population_stats`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.figures import (
    PALETTE,
    Figure,
    band,
    new_figure,
    save_figure,
    shared_legend,
)
from experiments.population_stats.grid import LEVELS, Cell, Records, distance
from experiments.population_stats.measurements import (
    ALGORITHM2,
    MERGED,
    TRUTH,
    average,
    counts,
    start_removed,
)

_GREY = "#777777"
_AVERAGES = (PALETTE.orange, PALETTE.vermillion, PALETTE.purple, PALETTE.green)
_SIZES = (PALETTE.purple, PALETTE.blue, PALETTE.vermillion, PALETTE.green, PALETTE.orange)
_TITLES = {"low": "low rate: a tenth of the best", "high": "high rate: the next above the best"}


def draw(config: Any, cells: Mapping[Cell, Records], momentum: float, folder: Path) -> list[Figure]:
    """All figures, in the order of the report; none where every cell was left out.

    Args:
      config: of the run.
      cells: of the grid, see `experiments.population_stats.grid.grid`.
      momentum: of the average in the claims.
      folder: where the PNG files go.
    """
    if not cells:
        return []
    return [
        _draw_distance(config, cells, momentum, folder / "distance_against_step.png"),
        _draw_accuracy(config, cells, folder / "accuracy_against_step.png"),
        _draw_batches(config, cells, momentum, folder / "distance_against_batch.png"),
        _draw_counts(config, cells, folder / "distance_against_count.png"),
    ]


def main_batch_size(config: Any) -> int:
    """The middle one of those run, which the figures over steps show."""
    return sorted(config.batch_sizes)[len(config.batch_sizes) // 2]


def _styles(config: Any) -> dict[str, tuple[str, str]]:
    """Colour and line style of each kind of statistics."""
    averages = {
        average(m): (_AVERAGES[i % len(_AVERAGES)], "-") for i, m in enumerate(config.momenta)
    }
    return {ALGORITHM2: (PALETTE.blue, "-"), MERGED: (PALETTE.sky, "--"), **averages}


def _curves(cells: Sequence[Records], value: Any) -> np.ndarray:
    """Of those cells, [seeds, cells]."""
    return np.array([[value(run) for run in runs] for runs in cells], float).T


def _distance_of(kind: str):
    return lambda run: distance(run["parts"][kind])


def _panels(*, height: float):
    fig, axes = new_figure(rows=2, width=5.4, height=height)
    for axis, level in zip(axes, LEVELS, strict=True):
        axis.set_title(_TITLES[level], fontsize=10, loc="left")
        axis.set_xscale("log")
    return fig, dict(zip(LEVELS, axes, strict=True))


def _told(axes: Mapping[str, Any]) -> str:
    return ". ".join(f"{level.capitalize()} rate: {line_ends(ax)}" for level, ax in axes.items())


def _over_steps(axis, cells, size, level):
    """Steps of the cells of a batch size and level, and these cells; the axis labelled."""
    chosen = {c.step: runs for c, runs in cells.items() if c[:2] == (size, level)}
    axis.set_xticks(list(chosen), [str(step) for step in chosen])
    axis.minorticks_off()
    axis.set_xlabel("training step")
    return list(chosen), list(chosen.values())


def _draw_distance(config, cells, momentum, path) -> Figure:
    size = main_batch_size(config)
    fig, axes = _panels(height=7.2)
    for level, axis in axes.items():
        steps, runs = _over_steps(axis, cells, size, level)
        if not steps:
            continue
        for kind, (color, style) in _styles(config).items():
            curves = _curves(runs, _distance_of(kind))
            band(axis, steps, curves, label=kind, color=color, linestyle=style)
        removed = start_removed(momentum)
        curves = _curves(runs, _distance_of(removed))
        band(axis, steps, curves, label=removed, color=_GREY, linestyle=":")
        axis.set_yscale("log")
        axis.set_ylabel("distance to the truth, in σ")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="How far the statistics for inference are from those of the training set",
        alt="Distance to the full-set statistics against training step, both on log axes, from "
        f"first to last. {_told(axes)}.",
        caption=f"Batch {size}. Distance: root mean square over features and layers of the error "
        "of the mean, in units of the true σ, and of the error of ln σ. Lines: mean of the seeds; "
        f"bands: lowest to highest. {ALGORITHM2} and merged: {config.population_batches} batches. "
        "Dotted: without what is left of the initial 0 and 1, so that lag and noise remain.",
        claims=("population-beats-ema",),
    )


def _draw_accuracy(config, cells, path) -> Figure:
    size = main_batch_size(config)
    fig, axes = _panels(height=7.2)
    for level, axis in axes.items():
        steps, runs = _over_steps(axis, cells, size, level)
        if not steps:
            continue
        styles = _styles(config)
        del styles[MERGED]  # it would lie on Algorithm 2's
        for kind, (color, style) in {**styles, TRUTH: ("black", ":")}.items():
            curves = _curves(runs, lambda run, kind=kind: 100 * run["accuracy"][kind])
            label = "full training set" if kind == TRUTH else kind
            band(axis, steps, curves, label=label, color=color, linestyle=style)
        axis.set_ylabel("test accuracy, %")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="What the statistics do to test accuracy",
        alt="Test accuracy against training step on a log axis, from first to last, in per cent. "
        f"{_told(axes)}.",
        caption=f"Batch {size}; the same weights, evaluated by each kind of statistics. Lines: "
        "mean of the seeds; bands: lowest to highest.",
        claims=("population-statistics-classify-better",),
    )


def _draw_batches(config, cells, momentum, path) -> Figure:
    fig, axes = _panels(height=7.2)
    last = max(config.snapshots)
    for level, axis in axes.items():
        chosen = {c.batch_size: r for c, r in cells.items() if (c.level, c.step) == (level, last)}
        if not chosen:
            continue
        sizes, runs = list(chosen), list(chosen.values())
        for kind, (color, style) in _styles(config).items():
            curves = _curves(runs, _distance_of(kind))
            band(axis, sizes, curves, label=kind, color=color, linestyle=style)
        removed = start_removed(momentum)
        band(
            axis,
            sizes,
            _curves(runs, _distance_of(removed)),
            label=removed,
            color=_GREY,
            linestyle=":",
        )
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("batch size")
        axis.set_ylabel("distance to the truth, in σ")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title=f"Against the batch size, at step {last}",
        alt="Distance to the full-set statistics against batch size, both on log axes, from the "
        f"smallest to the largest. {_told(axes)}.",
        caption=f"At step {last}, rates tuned for each batch size. {ALGORITHM2} and merged: "
        f"{config.population_batches} batches. Lines: mean of the seeds; bands: lowest to highest.",
        claims=("population-beats-ema",),
    )


def _draw_counts(config, cells, path) -> Figure:
    fig, axes = _panels(height=7.2)
    last, numbers = max(config.snapshots), counts(config.most_population_batches)
    for level, axis in axes.items():
        chosen = {c.batch_size: r for c, r in cells.items() if (c.level, c.step) == (level, last)}
        for index, (size, runs) in enumerate(chosen.items()):
            color = _SIZES[index % len(_SIZES)]
            for kind, style in ((ALGORITHM2, "-"), (MERGED, "--")):
                curves = np.array([[distance(p) for p in run["counts"][kind]] for run in runs])
                label = f"{kind}, batch {size}"
                band(axis, numbers, curves, label=label, color=color, linestyle=style)
            if index == len(chosen) - 1:
                start = np.mean([distance(run["counts"][ALGORITHM2][0]) for run in runs])
                guide = start / np.sqrt(numbers)
                axis.plot(numbers, guide, color=_GREY, linewidth=1, label="1/√K")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
        axis.set_xlabel("K, number of batches")
        axis.set_ylabel("distance to the truth, in σ")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title=f"Against the number of batches, at step {last}",
        alt="Distance of Algorithm 2 and of merged batches to the full-set statistics against the "
        f"number of batches K, both on log axes, from the fewest to the most. {_told(axes)}.",
        caption=f"At step {last}, independent batches. Lines: mean of the seeds; bands: lowest to "
        "highest.",
    )
