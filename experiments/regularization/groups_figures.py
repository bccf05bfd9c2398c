"""The figures of `experiments.regularization` about groups and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.estimate import estimate
from bn_research.claims.figures import (
    PALETTE,
    Figure,
    band,
    end_labels,
    new_figure,
    save_figure,
    shared_legend,
)
from bn_research.claims.formatting import format_number
from experiments.regularization.groups_verdicts import (
    DOSE,
    FROZEN,
    GAP,
    LOSS_GAP,
    PLAIN,
    POPULATION,
    TEST,
    Measure,
    by_seed,
    ladder_arm,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

# At the size of their groups, side by side: arm, name, colour, marker.
_MARKS = (
    (FROZEN, "BN, groups drawn once", PALETTE.sky, "D"),
    ("measured", "noise of the measured law", PALETTE.green, "o"),
    ("borrowed", "noise of another group", PALETTE.purple, "s"),
    ("additive", "noise for each element", PALETTE.vermillion, "v"),
)
_LINES = (
    (POPULATION, "population statistics", "black", "--"),
    (PLAIN, "no BN", PALETTE.orange, ":"),
)
_PANELS = (
    (GAP, "gap in accuracy, points"),
    (LOSS_GAP, "gap in loss, nats"),
    (TEST, "test accuracy, %"),
)


def draw(config: Any, records: Mapping[str, Records], folder: Path) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      records: of `regularization_groups.measure`.
      folder: where the PNG files go.
    """
    return [
        _draw_ladder(config, records["main"], folder / "batch_noise.png"),
        _draw_dose(config, records["main"], folder / "batch_noise_dose.png"),
        _draw_training(config, records["main"], folder / "batch_noise_training.png"),
    ]


def _draw_ladder(config, main, path) -> Figure:
    fig, axes = new_figure(rows=len(_PANELS), width=5.0, height=9.6)
    sizes = config.groups_sizes
    for axis, (measure, label) in zip(axes, _PANELS, strict=True):
        rows = np.stack([by_seed(main, ladder_arm(size), measure) for size in sizes], axis=1)
        line = band(axis, sizes, rows, label="BN by groups", color=PALETTE.blue, spread="interval")
        line.set(marker="o", markersize=5)
        _zoom(axis, config, main, measure)
        for arm, name, color, style in _LINES:
            _mark_line(axis, by_seed(main, arm, measure), name, color, style)
        for place, (arm, name, color, marker) in enumerate(_MARKS):
            x = config.groups_size * 2 ** (0.16 * (place - 1.5))
            _mark_point(axis, x, main, arm, measure, dict(label=name, color=color, marker=marker))
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_ylabel(label)
    axes[-1].set_xlabel("examples that share statistics")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Less noise, a wider gap?",
        alt="Three panels against the number of examples that share statistics, with BN by groups "
        "as a line, drawn noise as points at one group size, and other networks as horizontal "
        "lines. From the smallest group to the largest: "
        + " ".join(
            f"{words.capitalize()}: {line_ends(axis)}."
            for axis, (_, words) in zip(axes, _PANELS, strict=True)
        ),
        caption=f"{config.dataset}, {config.groups_examples} training examples, "
        f"{config.groups_network}, SGD batch {sizes[-1]} throughout. Mean and 95 % interval over "
        f"{config.groups_seeds} seeds, of each arm alone: differences paired by seed are surer. "
        f"Inference mode. Points, side by side for the eye: groups of {config.groups_size}, or "
        "population statistics with noise of such groups; ↓ and a number, far below.",
        claims=(
            "batch-noise-regularizes",
            "batch-noise-regularizes-by-loss",
            "reshuffling-regularizes",
        ),
    )


def _zoom(axis: Axes, config: Any, main: Records, measure: Measure) -> None:
    """Limits the y axis to the ladder and what lies near it."""
    arms = [*map(ladder_arm, config.groups_sizes), POPULATION, PLAIN, "measured", "additive"]
    means = [by_seed(main, arm, measure).mean() for arm in arms]
    margin = 0.25 * (max(means) - min(means)) or 1.0
    low, frozen = min(means) - margin, by_seed(main, FROZEN, measure).mean()
    if low - 4 * margin < frozen < low + margin:
        low = frozen - 2 * margin
    axis.set_ylim(low, max(means) + margin)


def _mark_line(axis: Axes, values: np.ndarray, name: str, color: str, style: str) -> None:
    axis.axhline(float(values.mean()), color=color, linestyle=style, linewidth=1.6, label=name)


def _mark_point(
    axis: Axes, x: float, main: Records, arm: str, measure: Measure, look: Mapping[str, Any]
) -> None:
    """A mean with its interval, none for one seed; where it lies below the axis, its value."""
    found = estimate(by_seed(main, arm, measure))
    low, high = axis.get_ylim()
    if found.mean < low:
        y = low + 0.05 * (high - low)
        # Its label apart, for its y is not the value.
        axis.plot([], [], linestyle="", markersize=6, **look)
        axis.plot(x, y, linestyle="", markersize=6, zorder=3, **{**look, "label": None})
        left = arm == FROZEN  # the leftmost of the points side by side
        text = f"{format_number(found.mean)} ↓  " if left else f"  ↓ {format_number(found.mean)}"
        style: dict[str, Any] = dict(fontsize=9, va="center", ha="right" if left else "left")
        axis.annotate(text, (x, y), color=look["color"], **style)
        return
    half = found.high - found.mean if np.isfinite(found.high) else 0.0
    axis.errorbar(
        x, found.mean, yerr=half, linestyle="", markersize=6, capsize=2.5, zorder=3, **look
    )


def _draw_dose(config, main, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.0, height=7.2)
    ladder = [ladder_arm(size) for size in config.groups_sizes]
    for axis, (measure, label) in zip(axes, _PANELS[1:], strict=True):
        doses = [by_seed(main, arm, DOSE).mean() for arm in ladder]
        means = [by_seed(main, arm, measure).mean() for arm in ladder]
        axis.plot(doses, means, "o-", color=PALETTE.blue, markersize=5, label="BN by groups")
        for x, y, size in zip(doses, means, config.groups_sizes, strict=True):
            axis.annotate(str(size), (x, y), xytext=(0, 6), textcoords="offset points", fontsize=8)
        _zoom(axis, config, main, measure)
        marks = ((POPULATION, "population statistics", "black", "^"), *_MARKS)
        for arm, name, color, marker in marks:
            look = dict(label=name, color=color, marker=marker)
            _mark_point(axis, by_seed(main, arm, DOSE).mean(), main, arm, measure, look)
        _mark_line(axis, by_seed(main, PLAIN, measure), "no BN", PALETTE.orange, ":")
        axis.set_xscale("log")
        axis.set_ylabel(label)
    axes[-1].set_xlabel("noise in the logits, of the signal's power")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Is it the amount of noise, or its law?",
        alt="Against the power of the noise in the logits on a log axis: BN by groups of each size "
        "as a line, population statistics with and without drawn noise and BN with frozen groups "
        "as points. From the smallest group, with the most noise, to the largest: "
        + " ".join(
            f"{words.capitalize()}: {line_ends(axis)}."
            for axis, (_, words) in zip(axes, _PANELS[1:], strict=True)
        ),
        caption=f"{config.dataset}; as the figure above, against the noise that reaches the "
        "logits of the trained network: variance over passes in training mode over the variance "
        "over examples. Numbers: group sizes. Mean, and for points the 95 % interval, over "
        f"{config.groups_seeds} seeds. A law that did nothing but set the amount of noise would "
        "lie on the line.",
    )


def _draw_training(config, main, path) -> Figure:
    fig, axis = new_figure(width=5.0, height=4.0)
    sizes = config.groups_sizes
    arms = [(ladder_arm(size), f"groups of {size}") for size in (config.groups_size, sizes[-1])]
    if sizes[0] != config.groups_size:
        arms.insert(0, (ladder_arm(sizes[0]), f"groups of {sizes[0]}"))
    arms += [("measured", "measured noise"), (POPULATION, "population"), (PLAIN, "no BN")]
    styles = ["-"] * (len(arms) - 3) + ["--", "--", ":"]
    colors = [PALETTE.sky, PALETTE.blue, PALETTE.purple][-(len(arms) - 3) :]
    colors += [PALETTE.green, "black", PALETTE.orange]
    for (arm, name), color, style in zip(arms, colors, styles, strict=True):
        losses = [np.array(r["loss"], dtype=float) for r in main if r["arm"] == arm]
        steps = config.groups_steps_per_dispatch * (np.arange(len(losses[0])) + 1)
        band(axis, steps, losses, label=name, color=color, linestyle=style)
    axis.set_yscale("log")
    axis.set_xlabel("steps")
    axis.set_ylabel("training loss, nats")
    end_labels(axis)
    return save_figure(
        fig,
        path,
        title="What the noise does to training",
        alt="Training loss in nats against steps, on a log axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"{config.dataset}; loss in training mode, with its noise, mean of "
        f"{config.groups_steps_per_dispatch} steps. Bands span {config.groups_seeds} seeds.",
    )
