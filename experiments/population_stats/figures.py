"""The figures of `experiments.population_stats`."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from bn_research.claims.alt_text import panel_ends
from bn_research.claims.figures import (
    GREY,
    PALETTE,
    Figure,
    band,
    new_figure,
    save_all,
    shared_legend,
)
from bn_research.claims.judging import Record
from bn_research.claims.plots import bands, log_ticks
from experiments.population_stats import Config
from experiments.population_stats.statistics import (
    ALGORITHM2,
    MERGED,
    TRUTH,
    average,
    counts,
    start_removed,
)
from experiments.population_stats.training import LEVELS, Records
from experiments.population_stats.verdicts import (
    Cell,
    Cells,
    best_momentum,
    distance,
    distance_of,
    grid,
    table,
)

_AVERAGES = (PALETTE.orange, PALETTE.vermillion, PALETTE.purple, PALETTE.green)
_SIZES = (PALETTE.purple, PALETTE.blue, PALETTE.vermillion, PALETTE.green, PALETTE.orange)
_TITLES = {"low": "low rate: a tenth of the best", "high": "high rate: the next above the best"}
_DISTANCE = "distance to the truth, in σ"


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the page; none where every cell was left out."""
    cells = grid(records.runs).cells
    draws = (
        distance_against_step,
        accuracy_against_step,
        distance_against_batch,
        distance_against_count,
    )
    return save_all(draws if cells else (), folder, config, cells)


def main_batch_size(config: Config) -> int:
    """The middle one of those run, which the figures over steps show."""
    return sorted(config.batch_sizes)[len(config.batch_sizes) // 2]


def _styles(config: Config) -> dict[str, tuple[str, str]]:
    """Colour and line style of each kind of statistics."""
    averages = {
        average(m): (_AVERAGES[i % len(_AVERAGES)], "-") for i, m in enumerate(config.momenta)
    }
    return {ALGORITHM2: (PALETTE.blue, "-"), MERGED: (PALETTE.sky, "--"), **averages}


def _distances(config: Config, cells: Cells) -> dict[str, tuple[str, str]]:
    """Styles of those whose distance is drawn: the average of the claims without its start, too."""
    return {**_styles(config), start_removed(best_momentum(cells, config.momenta)): (GREY, ":")}


def _panels():
    fig, axes = new_figure(rows=2, width=5.4, height=7.2)
    for axis, level in zip(axes, LEVELS, strict=True):
        axis.set_title(_TITLES[level], fontsize=10, loc="left")
        axis.set_xscale("log")
    return fig, dict(zip(LEVELS, axes, strict=True))


def _told(axes) -> str:
    return panel_ends({f"{level} rate": axis for level, axis in axes.items()})


def _draw_kinds(
    cells: Cells,
    along: str,
    where: Callable[[Cell], bool],
    looks: Mapping[str, tuple[str, str]],
    value: Callable[[str], Callable[[Record], float]],
    names: Mapping[str, str] | None = None,
):
    """Panels of both levels with a band for each kind of statistics, along a field of the cells."""
    fig, axes = _panels()
    for level, axis in axes.items():
        chosen = {c: runs for c, runs in cells.items() if c.level == level and where(c)}
        x = [getattr(cell, along) for cell in chosen]
        if chosen:
            curves = {kind: table(chosen, value(kind)) for kind in looks}
            bands(axis, x, curves, looks, names=names)
        log_ticks(axis, x, base=10)
        axis.set_xlabel({"step": "training step", "batch_size": "batch size"}[along])
    return fig, axes


def distance_against_step(config: Config, cells: Cells):
    """How far the statistics for inference are from those of the training set."""
    size, looks = main_batch_size(config), _distances(config, cells)
    fig, axes = _draw_kinds(cells, "step", lambda c: c.batch_size == size, looks, distance_of)
    for axis in axes.values():
        axis.set(yscale="log", ylabel=_DISTANCE)
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Distance to the full-set statistics against training step, both on log axes, from "
        f"first to last. {_told(axes)}",
        caption=f"Batch {size}. Distance: root mean square over features and layers of the error "
        "of the mean, in units of the true σ, and of the error of ln σ. Lines: mean of the seeds; "
        f"bands: lowest to highest. {ALGORITHM2} and merged: {config.population_batches} batches. "
        "Dotted: without what is left of the initial 0 and 1, so that lag and noise remain.",
        claims=("population-beats-ema",),
    )


def accuracy_against_step(config: Config, cells: Cells):
    """What the statistics do to test accuracy."""
    size, looks = main_batch_size(config), {**_styles(config), TRUTH: ("black", ":")}
    del looks[MERGED]  # it would lie on Algorithm 2's
    fig, axes = _draw_kinds(
        cells,
        "step",
        lambda cell: cell.batch_size == size,
        looks,
        lambda kind: lambda run: 100 * run["accuracy"][kind],
        {kind: "full training set" if kind == TRUTH else kind for kind in looks},
    )
    for axis in axes.values():
        axis.set_ylabel("test accuracy, %")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Test accuracy against training step on a log axis, from first to last, in per cent. "
        f"{_told(axes)}",
        caption=f"Batch {size}; the same weights, evaluated by each kind of statistics. Lines: "
        "mean of the seeds; bands: lowest to highest.",
        claims=("population-statistics-classify-better",),
    )


def distance_against_batch(config: Config, cells: Cells):
    """Against the batch size, at the last step."""
    last, looks = max(config.snapshots), _distances(config, cells)
    fig, axes = _draw_kinds(cells, "batch_size", lambda c: c.step == last, looks, distance_of)
    for axis in axes.values():
        axis.set(yscale="log", ylabel=_DISTANCE)
        axis.yaxis.minorticks_off()
    shared_legend(fig, columns=2)
    return fig, dict(
        title=f"Against the batch size, at step {last}",
        alt="Distance to the full-set statistics against batch size, both on log axes, from the "
        f"smallest to the largest. {_told(axes)}",
        caption=f"At step {last}, rates tuned for each batch size. {ALGORITHM2} and merged: "
        f"{config.population_batches} batches. Lines: mean of the seeds; bands: lowest to highest.",
        claims=("population-beats-ema",),
    )


def distance_against_count(config: Config, cells: Cells):
    """Against the number of batches, at the last step."""
    fig, axes = _panels()
    last, numbers = max(config.snapshots), counts(config.most_population_batches)
    for level, axis in axes.items():
        chosen = {c.batch_size: r for c, r in cells.items() if (c.level, c.step) == (level, last)}
        for (size, runs), color in zip(chosen.items(), itertools.cycle(_SIZES), strict=False):
            for kind, style in ((ALGORITHM2, "-"), (MERGED, "--")):
                curves = np.array([[distance(p) for p in run["counts"][kind]] for run in runs])
                label = f"{kind}, batch {size}"
                band(axis, numbers, curves, label=label, color=color, linestyle=style)
        if chosen:
            start = np.mean([distance(run["counts"][ALGORITHM2][0]) for run in runs])
            axis.plot(numbers, start / np.sqrt(numbers), color=GREY, linewidth=1, label="1/√K")
        axis.set(yscale="log", xlabel="K, number of batches", ylabel=_DISTANCE)
        log_ticks(axis, numbers)
        axis.yaxis.minorticks_off()
    shared_legend(fig, columns=2)
    return fig, dict(
        title=f"Against the number of batches, at step {last}",
        alt="Distance of Algorithm 2 and of merged batches to the full-set statistics against the "
        f"number of batches K, both on log axes, from the fewest to the most. {_told(axes)}",
        caption=f"At step {last}, independent batches. Lines: mean of the seeds; bands: lowest to "
        "highest.",
    )
