"""The figures about groups, noise and dropout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bn_research.claims import figures, plots
from bn_research.claims.alt_text import line_ends, panel_ends
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.figures import GREY, PALETTE
from bn_research.claims.formatting import format_number
from bn_research.claims.judging import by_seed, numbers
from experiments.regularization import Config, verdicts
from experiments.regularization.verdicts import FROZEN, PLAIN, POPULATION, Runs, ladder_arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Look = dict[str, Any]

_NO_BN: Look = dict(label="no BN", color=PALETTE.orange, linestyle=":", linewidth=1.6)
_NO_NOISE: Look = dict(label="population statistics", color="black")
_MARKS = {
    POPULATION: dict(**_NO_NOISE, marker="^"),
    FROZEN: dict(label="BN, groups drawn once", color=PALETTE.sky, marker="D"),
    "measured": dict(label="noise of the measured law", color=PALETTE.green, marker="o"),
    "borrowed": dict(label="noise of another group", color=PALETTE.purple, marker="s"),
    "additive": dict(label="noise for each element", color=PALETTE.vermillion, marker="v"),
}
_PANELS = {
    "gap in accuracy, points": verdicts.GAP,
    "gap in loss, nats": verdicts.LOSS_GAP,
    "test accuracy, %": verdicts.TEST,
}


def draw(config: Config, records: verdicts.Records, folder: Path) -> list[figures.Figure]:
    """All figures, in the order of the report."""
    draws = (batch_noise, batch_noise_dose, batch_noise_training, dropout, variance_shift)
    return figures.save_all(draws, folder, config, records)


def batch_noise(config: Config, records: verdicts.Records):
    """Less noise, a wider gap?"""
    runs, sizes = records["groups"], config.groups_sizes
    fig, axes = figures.new_figure(rows=len(_PANELS), width=5.0, height=9.6)
    panels = dict(zip(_PANELS, axes, strict=True))
    for label, axis in panels.items():
        measure = _PANELS[label]
        ladder = np.stack([measure.of_arm(runs, ladder_arm(size)) for size in sizes], axis=1)
        look: Look = dict(color=PALETTE.blue, marker="o", markersize=5)
        figures.band(axis, sizes, ladder, label="BN by groups", spread="interval", **look)
        _zoom(axis, config, runs, measure)
        for arm, other in ((POPULATION, {**_NO_NOISE, "linewidth": 1.6}), (PLAIN, _NO_BN)):
            plots.reference(axis, y=measure.of_arm(runs, arm).mean(), **other)
        for place, arm in enumerate([*_MARKS][1:]):  # at the size of their groups, side by side
            _mark(axis, config.groups_size * 2 ** (0.16 * (place - 1.5)), runs, arm, measure)
        plots.log_ticks(axis, sizes)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("examples that share statistics")
    figures.shared_legend(fig, columns=2)
    return fig, dict(
        alt="Three panels against the number of examples that share statistics, with BN by groups "
        "as a line, drawn noise as points at one group size, and other networks as horizontal "
        f"lines. From the smallest group to the largest: {panel_ends(panels)}",
        caption=f"{config.dataset}, {config.groups_examples} training examples, "
        f"{config.groups_network}, SGD batch {sizes[-1]} throughout. Mean and 95 % interval over "
        f"{config.groups_seeds} seeds, of each arm alone: differences paired by seed are surer. "
        f"Inference mode. Points, side by side for the eye: groups of {config.groups_size}, or "
        "population statistics with noise of such groups; ↓ and a number, far below.",
        claims=tuple(claim.id for claim in verdicts.CLAIMS[:3]),
    )


def _zoom(axis: Axes, config: Config, runs: Runs, measure: verdicts.Measure) -> None:
    """Limits the y axis to the ladder and what lies near it."""
    arms = [*map(ladder_arm, config.groups_sizes), POPULATION, PLAIN, "measured", "additive"]
    means = [measure.of_arm(runs, arm).mean() for arm in arms]
    margin = 0.25 * (max(means) - min(means)) or 1.0
    low, frozen = min(means) - margin, measure.of_arm(runs, FROZEN).mean()
    if low - 4 * margin < frozen < low + margin:
        low = frozen - 2 * margin
    axis.set_ylim(low, max(means) + margin)


def _mark(axis: Axes, x: float, runs: Runs, arm: str, measure: verdicts.Measure) -> None:
    """A mean with its interval, none for one seed; where it lies below the axis, its value."""
    found, (low, high) = estimate(measure.of_arm(runs, arm)), axis.get_ylim()
    look = dict(linestyle="", markersize=6, **_MARKS[arm])
    if found.mean >= low:
        half = found.high - found.mean if np.isfinite(found.high) else 0.0
        axis.errorbar(x, found.mean, yerr=half, capsize=2.5, zorder=3, **look)
        return
    y, left = low + 0.05 * (high - low), arm == FROZEN  # the leftmost has its number to its left
    axis.plot([], [], **look)  # its label apart, for its y is not the value
    axis.plot(x, y, zorder=3, **{**look, "label": None})
    text = f"{format_number(found.mean)} ↓  " if left else f"  ↓ {format_number(found.mean)}"
    style: Look = dict(fontsize=9, va="center", ha="right" if left else "left")
    axis.annotate(text, (x, y), color=look["color"], **style)


def batch_noise_dose(config: Config, records: verdicts.Records):
    """Is it the amount of noise, or its law?"""
    runs = records["groups"]
    ladder = [ladder_arm(size) for size in config.groups_sizes]
    fig, axes = figures.new_figure(rows=2, width=5.0, height=7.2)
    panels = dict(zip(list(_PANELS)[1:], axes, strict=True))
    for label, axis in panels.items():
        measure = _PANELS[label]
        doses = [verdicts.DOSE.of_arm(runs, arm).mean() for arm in ladder]
        means = [measure.of_arm(runs, arm).mean() for arm in ladder]
        axis.plot(doses, means, "o-", color=PALETTE.blue, markersize=5, label="BN by groups")
        for x, y, size in zip(doses, means, config.groups_sizes, strict=True):
            axis.annotate(str(size), (x, y), xytext=(0, 6), textcoords="offset points", fontsize=8)
        _zoom(axis, config, runs, measure)
        for arm in _MARKS:
            _mark(axis, verdicts.DOSE.of_arm(runs, arm).mean(), runs, arm, measure)
        plots.reference(axis, y=measure.of_arm(runs, PLAIN).mean(), **_NO_BN)
        axis.set(xscale="log", ylabel=label)
    axes[-1].set_xlabel("noise in the logits, of the signal's power")
    figures.shared_legend(fig, columns=2)
    return fig, dict(
        alt="Against the power of the noise in the logits on a log axis: BN by groups of each size "
        "as a line, population statistics with and without drawn noise and BN with frozen groups "
        "as points. From the smallest group, with the most noise, to the largest: "
        f"{panel_ends(panels)}",
        caption=f"{config.dataset}; as the figure above, against the noise that reaches the "
        "logits of the trained network: variance over passes in training mode over the variance "
        "over examples. Numbers: group sizes. Mean, and for points the 95 % interval, over "
        f"{config.groups_seeds} seeds. A law that did nothing but set the amount of noise would "
        "lie on the line.",
    )


def batch_noise_training(config: Config, records: verdicts.Records):
    """What the noise does to training."""
    fig, axis = figures.new_figure(width=5.0, height=4.0)
    sizes = sorted({config.groups_sizes[0], config.groups_size, config.groups_sizes[-1]})
    colors = (PALETTE.sky, PALETTE.blue, PALETTE.purple)[-len(sizes) :]
    looks: Look = {f"groups of {size}": c for size, c in zip(sizes, colors, strict=True)}
    looks |= {
        "measured noise": (PALETTE.green, "--"),
        "population": ("black", "--"),
        "no BN": (PALETTE.orange, ":"),
    }
    arms = (*map(ladder_arm, sizes), "measured", POPULATION, PLAIN)
    losses = [numbers(by_seed(records["groups"], arm=arm), "loss") for arm in arms]
    each = config.groups_steps_per_dispatch
    steps = np.arange(each, config.groups_steps + 1, each)
    plots.bands(axis, steps, dict(zip(looks, losses, strict=True)), looks)
    axis.set(yscale="log", xlabel="steps", ylabel="training loss, nats")
    figures.end_labels(axis)
    return fig, dict(
        alt="Training loss in nats against steps, on a log axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"{config.dataset}; loss in training mode, with its noise, mean of "
        f"{each} steps. Bands span {config.groups_seeds} seeds.",
    )


def tuned_curve(tuning: Runs, norm: str) -> list[dict[str, float]]:
    """Means over seeds at each dropout rate, by the learning rate of the best validation accuracy.

    Of validation and test accuracy and training loss, in the order of the dropout rates.
    """
    keys = ("validation_accuracy", "test_accuracy", "train_loss")
    curve = []
    for dropout in sorted({run["dropout"] for run in tuning}):
        found = by_seed(tuning, norm=norm, dropout=dropout)
        settings = [by_seed(found, rate=rate) for rate in sorted({run["rate"] for run in found})]
        means = [{"dropout": dropout} | {k: numbers(r, k).mean() for k in keys} for r in settings]
        curve.append(max(means, key=lambda mean: mean["validation_accuracy"]))
    return curve


def dropout(config: Config, records: verdicts.Records):
    """What dropout gains with BN and without."""
    fig, (top, middle, bottom) = figures.new_figure(rows=3, width=5.0, height=8.6)
    for norm, name, color, marker in (
        ("none", "without BN", PALETTE.vermillion, "s"),
        ("batch", "with BN", PALETTE.blue, "o"),
    ):
        curve = tuned_curve(records["dropout_tuning"], norm)
        x = [point["dropout"] for point in curve]
        look = dict(color=color, marker=marker, markersize=5)
        top.plot(x, [100 * p["test_accuracy"] for p in curve], label=name, **look)
        middle.plot(x, [point["train_loss"] for point in curve], label=name, **look)
        _mark_cells(top, records["dropout"], norm, look)
    top.set(xlabel="dropout rate (tuning runs)", ylabel="test accuracy, %")
    middle.set(xlabel="dropout rate (tuning runs)", ylabel="training loss, nats", yscale="log")
    plain, bn, interaction = verdicts.gains(records["dropout"])
    rows = {
        "with BN": (bn, PALETTE.blue),
        "without BN": (plain, PALETTE.vermillion),
        "without − with": (interaction, PALETTE.black),
    }
    _intervals(bottom, rows, "gain of dropout in test accuracy, points")
    figures.shared_legend(fig, columns=2)
    gained = "; ".join(f"{name}: {100 * found.mean:.2g}" for name, (found, _) in rows.items())
    return fig, dict(
        alt="Against the dropout rate, from none to the most: test accuracy in per cent, "
        f"{line_ends(top)}; training loss, {line_ends(middle)}. Below, the gain of dropout in "
        f"points of test accuracy, with intervals: {gained}.",
        caption=f"{config.dataset}, {config.dropout_network}, {config.dropout_examples} training "
        f"examples, batch {config.dropout_batch_size}. Above: mean of "
        f"{config.dropout_tuning_seeds} tuning seeds, each dropout rate at its learning rate of "
        "the best validation accuracy; in inference mode. Open marks, and below: the cells at "
        f"their best rates, {config.dropout_seeds} other seeds; bars: 95 % intervals.",
        claims=("less-need-for-dropout",),
    )


def _mark_cells(axis: Axes, runs: Runs, norm: str, look: Look) -> None:
    """The two cells of a network, at their dropout rates, with their intervals over seeds."""
    x_shift = 0.008 if norm == "batch" else -0.008
    look = dict(look, markersize=9, markerfacecolor="none", linestyle="", elinewidth=1.6, capsize=3)
    for cell in (cell for cell, (of_norm, _) in verdicts.CELLS.items() if of_norm == norm):
        own = verdicts.of_cell(runs, cell)
        found = estimate(100 * numbers(own, "test_accuracy"))
        half = found.high - found.mean if np.isfinite(found.high) else None
        axis.errorbar(own[0]["dropout"] + x_shift, found.mean, yerr=half, **look)


def _intervals(axis: Axes, rows: dict[str, tuple[Estimate, str]], what: str) -> None:
    """A row for each estimate, in points of per cent."""
    axis.set_xlabel(what)
    for row, (found, color) in enumerate(rows.values()):
        plots.interval_row(axis, row, found.mapped(lambda x: 100 * x), color=color, width=2.2)
    plots.reference(axis, x=0)
    plots.name_rows(axis, list(rows))


def variance_shift(config: Config, records: verdicts.Records):
    """Dropout below a BN layer makes its statistics wrong."""
    fig, (top, bottom) = figures.new_figure(rows=2, width=5.0, height=6.4)
    rows = {}
    for place, color, marker, offset in (
        ("before", PALETTE.vermillion, "v", -0.12),
        ("after", PALETTE.orange, "s", 0.0),
        ("last", PALETTE.blue, "o", 0.12),
    ):
        runs = by_seed(records["shift"], dropout_placement=place)
        ratios = numbers(runs, "ratio")
        layers = np.arange(1, ratios.shape[1] + 1)
        look = dict(color=color, marker=marker, markersize=6, linestyle="-", linewidth=1.2)
        plots.points(top, layers + offset, ratios, label=verdicts.PLACED[place], **look)
        if place == "before":
            closed = numbers(runs, "closed_form").mean(axis=0)
            dash: Look = dict(marker="_", markersize=18, markeredgewidth=1.6, linestyle="none")
            top.plot(layers + offset, closed, label="before: closed form", color=GREY, **dash)
        rows[verdicts.PLACED[place]] = verdicts.accuracy_lost(runs), color
    plots.reference(top, y=1)
    top.set_yscale("log", base=2)
    ticks = [2.0**k for k in range(int(np.floor(np.log2(top.get_ylim()[0]))), 1)]
    plots.log_ticks(top, ticks, side="y")
    top.set_xticks(layers, [str(layer) for layer in layers])
    top.set(xlabel="BN layer", ylabel="variance, inference / statistics")
    _intervals(bottom, rows, "accuracy lost to the shift, points")
    figures.shared_legend(fig, columns=2)
    rate = format_number(config.dropout_shift_rate)
    return fig, dict(
        alt="Above, variance of each BN layer's input in inference over that of its statistics, "
        "for three placements of dropout: below 1 where dropout is below the layer, 1 where it is "
        "not. Below, the test accuracy that this costs, with intervals.",
        caption=f"{config.dataset}, {config.dropout_network}, BN on the hidden layers, dropout "
        f"rate {rate}. Above: median over units, mean of {config.seeds} seeds; "
        "bars from lowest to highest seed; grey: (1 − p)·Var/(Var + p·mean²) of the pre-activation "
        "in training, for the dropout right before BN alone. Below: test accuracy by statistics "
        "taken anew with dropout off less that by statistics taken with it on; bars: 95 % "
        "intervals.",
        claims=("dropout-before-bn-shifts-variance",),
    )
