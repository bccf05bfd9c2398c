"""The figures of `experiments.population_stats`."""

import itertools
from pathlib import Path

import numpy as np

from bn_research.claims import figures, plots
from bn_research.claims.alt_text import panel_ends
from bn_research.claims.figures import GREY, PALETTE
from experiments.population_stats import Config, statistics, verdicts
from experiments.population_stats.statistics import ALGORITHM2, MERGED, TRUTH, average
from experiments.population_stats.training import LEVELS, Records
from experiments.population_stats.verdicts import Cells, distance, part

_AVERAGES = (PALETTE.orange, PALETTE.vermillion, PALETTE.purple, PALETTE.green)
_SIZES = (PALETTE.purple, PALETTE.blue, PALETTE.vermillion, PALETTE.green, PALETTE.orange)
_TITLES = {"low": "low rate: a tenth of the best", "high": "high rate: the next above the best"}
_DISTANCE = "distance to the truth, in σ"


def draw(config: Config, records: Records, folder: Path) -> list[figures.Figure]:
    """All figures, in the order of the page; none where every cell was left out."""
    cells, _ = verdicts.grid(records.runs)
    over_steps = (distance_against_step, accuracy_against_step)
    draws = (*over_steps, distance_against_batch, distance_against_count) if cells else ()
    return figures.save_all(draws, folder, config, cells)


def main_batch_size(config: Config) -> int:
    """The middle one of those run, which the figures over steps show."""
    return sorted(config.batch_sizes)[len(config.batch_sizes) // 2]


def _styles(config: Config) -> dict[str, tuple[str, str]]:
    """Colour and line style of each kind of statistics."""
    colors = zip(config.momenta, itertools.cycle(_AVERAGES), strict=False)
    averages = {average(momentum): (color, "-") for momentum, color in colors}
    return {ALGORITHM2: (PALETTE.blue, "-"), MERGED: (PALETTE.sky, "--"), **averages}


def _panels():
    fig, axes = figures.new_figure(rows=2, width=5.4, height=7.2)
    for axis, level in zip(axes, LEVELS, strict=True):
        axis.set_title(_TITLES[level], fontsize=10, loc="left")
        axis.set_xscale("log")
    return fig, {f"{level} rate": axis for level, axis in zip(LEVELS, axes, strict=True)}


def _draw_kinds(cells: Cells, along: str, fixed: dict[str, int], looks, value, scale=1):
    """Panels of both levels with a band for each kind of statistics, along a field of the cells.

    The other field is fixed; value: kind -> (record -> what is drawn, but for its scale).
    """
    fig, axes = _panels()
    for level, axis in zip(LEVELS, axes.values(), strict=True):
        chosen = part(cells, level=level, **fixed)
        x = [getattr(cell, along) for cell in chosen]
        if chosen:
            curves = {kind: scale * verdicts.table(chosen, value(kind)) for kind in looks}
            names = {kind: "full training set" if kind == TRUTH else kind for kind in looks}
            plots.bands(axis, x, curves, looks, names=names)
        plots.log_ticks(axis, x, base=10)
        axis.set_xlabel({"step": "training step", "batch_size": "batch size"}[along])
    figures.shared_legend(fig, columns=2)
    return fig, axes


def _draw_distances(config: Config, cells: Cells, along: str, **fixed: int):
    """Likewise of distances; the average of the claims without its start, too."""
    _, removed, _ = statistics.averages(verdicts.best_momentum(cells, config.momenta))
    looks = {**_styles(config), removed: (GREY, ":")}
    fig, axes = _draw_kinds(cells, along, fixed, looks, verdicts.distance_of)
    for axis in axes.values():
        axis.set(yscale="log", ylabel=_DISTANCE)
    return fig, axes


def distance_against_step(config: Config, cells: Cells):
    """How far the statistics for inference are from those of the training set."""
    size = main_batch_size(config)
    fig, axes = _draw_distances(config, cells, "step", batch_size=size)
    return fig, dict(
        alt="Distance to the full-set statistics against training step, both on log axes, from "
        f"first to last. {panel_ends(axes)}",
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
        cells, "step", {"batch_size": size}, looks, verdicts.accuracy_by, scale=100
    )
    for axis in axes.values():
        axis.set_ylabel("test accuracy, %")
    return fig, dict(
        alt="Test accuracy against training step on a log axis, from first to last, in per cent. "
        f"{panel_ends(axes)}",
        caption=f"Batch {size}; the same weights, evaluated by each kind of statistics. Lines: "
        "mean of the seeds; bands: lowest to highest.",
        claims=("population-statistics-classify-better",),
    )


def distance_against_batch(config: Config, cells: Cells):
    """Against the batch size, at the last step."""
    last = max(config.snapshots)
    fig, axes = _draw_distances(config, cells, "batch_size", step=last)
    for axis in axes.values():
        axis.yaxis.minorticks_off()
    return fig, dict(
        title=f"Against the batch size, at step {last}",
        alt="Distance to the full-set statistics against batch size, both on log axes, from the "
        f"smallest to the largest. {panel_ends(axes)}",
        caption=f"At step {last}, rates tuned for each batch size. {ALGORITHM2} and merged: "
        f"{config.population_batches} batches. Lines: mean of the seeds; bands: lowest to highest.",
        claims=("population-beats-ema",),
    )


def distance_against_count(config: Config, cells: Cells):
    """Against the number of batches, at the last step."""
    fig, axes = _panels()
    last, numbers = max(config.snapshots), statistics.counts(config.most_population_batches)
    for level, axis in zip(LEVELS, axes.values(), strict=True):
        chosen = part(cells, level=level, step=last)
        for (cell, runs), color in zip(chosen.items(), itertools.cycle(_SIZES), strict=False):
            for kind, style in ((ALGORITHM2, "-"), (MERGED, "--")):
                curves = np.array([[distance(p) for p in run["counts"][kind]] for run in runs])
                label = f"{kind}, batch {cell.batch_size}"
                figures.band(axis, numbers, curves, label=label, color=color, linestyle=style)
        if chosen:
            start = np.mean([distance(run["counts"][ALGORITHM2][0]) for run in runs])
            axis.plot(numbers, start / np.sqrt(numbers), color=GREY, linewidth=1, label="1/√K")
        axis.set(yscale="log", xlabel="K, number of batches", ylabel=_DISTANCE)
        plots.log_ticks(axis, numbers)
        axis.yaxis.minorticks_off()
    figures.shared_legend(fig, columns=2)
    return fig, dict(
        title=f"Against the number of batches, at step {last}",
        alt="Distance of Algorithm 2 and of merged batches to the full-set statistics against the "
        f"number of batches K, both on log axes, from the fewest to the most. {panel_ends(axes)}",
        caption=f"At step {last}, independent batches. Lines: mean of the seeds; bands: lowest to "
        "highest.",
    )
