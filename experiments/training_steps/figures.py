"""The figures of `experiments.training_steps`."""

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
from bn_research.claims.formatting import MINUS
from experiments.training_steps.arms import (
    BASELINE,
    LADDER,
    PLAIN,
    PUBLISHED,
    SIGMOID,
    TUNED,
    TUNED_BN,
    X5,
    X30,
)
from experiments.training_steps.verdicts import (
    Records,
    accuracies,
    against,
    best,
    contributions,
    gain,
)

_GREY = "#777777"
_COLORS = dict(
    zip(
        (*LADDER, TUNED),
        (
            PALETTE.black,
            PALETTE.blue,
            PALETTE.vermillion,
            PALETTE.purple,
            PALETTE.green,
            _GREY,
        ),
        strict=True,
    )
)
_WORDS = {
    "batch_norm": "BN, to Inception",
    "learning_rate": "rate ×5",
    "dropout": "no dropout",
    "l2": "L2 ÷5",
    "rate_decay": "decay ×6",
    "local_response_norm": "no LRN",
    "shuffling": "reshuffled",
    "photometric_distortion": "less distortion",
}
_SPAN = (0.1, 100.0)  # of ratios that are drawn; what lies beyond is an arrow


def draw(config: Any, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report; that of the switches where they were trained."""
    figures = [
        _draw_ratios(config, records, folder / "ratios.png"),
        _draw_accuracy(config, records, folder / "accuracy.png"),
    ]
    if contributions(config, records):
        figures.append(_draw_switches(config, records, folder / "switches.png"))
    return figures


def _curves(config: Any, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """[seeds, evaluations]; NaN after the end of a run that was lost."""
    length = config.num_steps // config.steps_per_dispatch
    curves = np.full((len(records), length), np.nan)
    for curve, record in zip(curves, records, strict=True):
        values = accuracies(record)
        curve[: len(values)] = values
    return curves


def _draw_accuracy(config: Any, records: Records, path: Path) -> Figure:
    fig, axis = new_figure(width=5.4, height=4.4)
    every = config.steps_per_dispatch
    steps = np.arange(every, config.num_steps + 1, every)
    for name in (*LADDER, TUNED):
        style = "--" if name == TUNED else "-"
        curves = _curves(config, records[name])
        band(axis, steps, curves, label=name, color=_COLORS[name], linestyle=style)
    target = float(np.mean([best(record) for record in records[PLAIN]]))
    axis.axhline(target, color="black", linestyle=":", linewidth=1.2, label=f"best of {PLAIN}")
    axis.set_xscale("log")
    axis.set_xlabel("training steps")
    axis.set_ylabel("test accuracy")
    axis.set_ylim(0, 1.02)
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Test accuracy of the paper's ladder",
        alt="Test accuracy against training steps, on a logarithmic axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"{config.dataset}; base rate {config.base_rate:g}, {PLAIN} tuned at "
        f"{records[TUNED][0]['rate']:g}. Line: mean of {config.seeds} seeds; band: lowest to "
        "highest; a cross ends a run that was lost. Dotted: the best accuracy of Inception at the "
        "base rate, mean over seeds.",
        claims=("fewer-steps-same-rate", "fewer-steps-tuned", "fewer-steps-x30"),
    )


def _mark(axis: Any, y: float, mean: tuple[float, float], interval: tuple[float, float], **style):
    """A point with its interval on a logarithmic axis; arrows where they leave what is drawn."""
    color, label = style["color"], style.get("label")
    low, high = np.clip(interval, *_SPAN)
    axis.plot([low, high], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
    for end, edge, arrow in ((interval[0], _SPAN[0], "<"), (interval[1], _SPAN[1], ">")):
        if (end < edge) if arrow == "<" else (end > edge):
            axis.plot(edge, y, marker=arrow, color=color, markersize=6, clip_on=False)
    if mean[0] == mean[1]:
        axis.plot(mean[0], y, style["marker"], color=color, markersize=7, label=label)
    elif mean[0] > 0 or np.isfinite(mean[1]):  # a bound: its end that is known, hollow
        end, symbol = (mean[1], 4) if np.isfinite(mean[1]) else (mean[0], 5)  # caret left, right
        axis.plot(end, y, marker=symbol, color=color, markersize=9)


def _draw_ratios(config: Any, records: Records, path: Path) -> Figure:
    fig, axis = new_figure(width=5.4, height=3.9)
    arms: tuple[str, ...] = (BASELINE, X5, X30, SIGMOID)
    rows = (
        (PLAIN, "plain at the base rate", PALETTE.blue, "o", -0.2),
        (TUNED, "plain at its own best rate", PALETTE.vermillion, "s", 0.0),
    )
    told = []
    for baseline, label, color, marker, shift in rows:
        axis.plot([], [], marker, color=color, label=label)
        for y, arm in enumerate(arms):
            found = against(records[baseline], records[arm])
            if baseline == PLAIN:
                told.append(f"{arm}: {found.mean}")
            _mark(axis, y + shift, found.mean, found.interval, color=color, marker=marker)
    both = against(records[TUNED], records[TUNED_BN])
    arms = (*arms, TUNED_BN)
    _mark(axis, len(arms) - 1, both.mean, both.interval, color=PALETTE.vermillion, marker="s")
    published = {y: PUBLISHED[arm].ratio for y, arm in enumerate(arms) if arm in PUBLISHED}
    shown = [(ratio, y + 0.2) for y, ratio in published.items() if ratio is not None]
    axis.plot(*zip(*shown, strict=True), "D", color="black", label="published, ImageNet")
    for y, ratio in published.items():
        if ratio is None:
            axis.annotate("published: not reached", (1.2, y + 0.2), va="center", fontsize=9)
    axis.axvline(1, color=_GREY, linestyle="--", linewidth=1.2)
    axis.set_xscale("log")
    axis.set_xlim(*_SPAN)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.5, -0.5)
    ticks = (0.1, 1, 10, 100)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlabel("times fewer steps to plain's best accuracy")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="How many times fewer steps",
        alt="For each network with BN the ratio of steps, with its interval, against plain at two "
        "rates, beside the published ratio, on a logarithmic axis. Against plain at the base rate: "
        f"{'; '.join(told)}.",
        caption=f"{config.dataset}; geometric mean over {config.seeds} seeds with its 95 % "
        "interval; right of 1, fewer steps with BN. A caret is the bound of a mean where a seed "
        "never reached the target; an arrow, an interval that goes on. Published: Ioffe & Szegedy "
        "(2015), figure 3, steps to 72.2 %.",
        claims=("fewer-steps-same-rate", "fewer-steps-tuned", "fewer-steps-x30"),
    )


def _draw_switches(config: Any, records: Records, path: Path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    found = {
        "batch_norm": (
            against(records[PLAIN], records[BASELINE]),
            gain(records[BASELINE], records[PLAIN]),
        ),
        **contributions(config, records),
    }
    names = [_WORDS[name] for name in found]
    told = [
        f"{name}: {steps.mean} and {100 * accuracy.mean:.2g}".replace("-", MINUS)
        for name, (steps, accuracy) in zip(names, found.values(), strict=True)
    ]
    for y, (steps, accuracy) in enumerate(found.values()):
        _mark(axes[0], y, steps.mean, steps.interval, color=PALETTE.blue, marker="o")
        low, high = (100 * end for end in accuracy.interval)
        axes[1].plot([low, high], [y, y], color=PALETTE.blue, linewidth=1.8)
        axes[1].plot(100 * accuracy.mean, y, "o", color=PALETTE.blue, markersize=7)
    axes[0].axvline(1, color=_GREY, linestyle="--", linewidth=1.2)
    axes[0].set_xscale("log")
    axes[0].set_xlim(*_SPAN)
    ticks = (0.1, 1, 10, 100)
    axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_xlabel("times fewer steps than without the change")
    axes[1].axvline(0, color=_GREY, linestyle="--", linewidth=1.2)
    axes[1].set_xlabel("final test accuracy gained by the change, points")
    for axis in axes:
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    return save_figure(
        fig,
        path,
        title="What each of the paper's changes does alone",
        alt="For BN, and each of the paper's changes made alone to BN-Baseline, with intervals: "
        "above, the ratio of steps to the plain network's best accuracy; below, the difference in "
        f"final accuracy. Ratio and points: {'; '.join(told)}.",
        caption=f"{config.dataset}; BN added to Inception, and below it one change at a time to "
        f"{BASELINE}. Above: steps to the best accuracy of Inception at the base rate, as in the "
        "claims; right of 1, fewer with the change; a caret is a bound of the mean, where a seed "
        "never reached it. Below: mean of the last tenth of the run, paired by seed. "
        f"{config.seeds} seeds, 95 % intervals.",
    )
