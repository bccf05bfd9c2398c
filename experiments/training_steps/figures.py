"""The figures of `experiments.training_steps`."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import plots
from bn_research.claims.alt_text import line_ends
from bn_research.claims.bounded import Ratio
from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.formatting import MINUS
from bn_research.claims.judging import numbers
from experiments.training_steps import Config
from experiments.training_steps.networks import BASELINE, LADDER, PLAIN, PUBLISHED, TUNED, TUNED_BN
from experiments.training_steps.verdicts import Arms, Records, against, best, contributions, gain

_COLORS = ("black", "blue", "vermillion", "purple", "green")
_LOOKS: dict[str, Any] = {n: getattr(PALETTE, c) for n, c in zip(LADDER, _COLORS, strict=True)}
_LOOKS[TUNED] = GREY, "--"
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


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    return save_all([_ratios, _accuracy, _switches], folder, config, records.by_arm)


def _accuracy(config: Config, arms: Arms) -> Any:
    """Test accuracy of the paper's ladder."""
    fig, axis = new_figure(width=5.4, height=4.4)
    every = config.steps_per_dispatch
    steps = np.arange(every, config.num_steps + 1, every)
    curves = {n: plots.padded([r["accuracy"] for r in arms[n]], len(steps)) for n in _LOOKS}
    plots.bands(axis, steps, curves, _LOOKS)
    target = numbers(arms[PLAIN], best).mean()
    plots.reference(axis, y=target, color="black", linestyle=":", label=f"best of {PLAIN}")
    axis.set(xscale="log", xlabel="training steps", ylabel="test accuracy", ylim=(0, 1.02))
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Test accuracy against training steps, on a logarithmic axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"{config.dataset}; base rate {config.base_rate:g}, {PLAIN} tuned at "
        f"{arms[TUNED][0]['rate']:g}. {plots.over_seeds(config.seeds)}; a cross ends a run that "
        "was lost. Dotted: the best accuracy of Inception at the base rate, mean over seeds.",
        claims=("fewer-steps-same-rate", "fewer-steps-tuned", "fewer-steps-x30"),
    )


def _ratios(config: Config, arms: Arms) -> Any:
    """How many times fewer steps."""
    fig, axis = new_figure(width=5.4, height=3.9)
    names = LADDER[1:]
    told = [f"{name}: {against(arms[PLAIN], arms[name]).mean}" for name in names]
    for baseline, rate, color, marker, shift in (
        (PLAIN, "the base rate", PALETTE.blue, "o", -0.2),
        (TUNED, "its own best rate", PALETTE.vermillion, "s", 0.0),
    ):
        axis.plot([], [], marker, color=color, label=f"plain at {rate}")
        for y, name in enumerate(names):
            _mark(axis, y + shift, against(arms[baseline], arms[name]), color, marker)
    _mark(axis, len(names), against(arms[TUNED], arms[TUNED_BN]), color, marker)
    published = np.array([PUBLISHED[PLAIN] / PUBLISHED[name] for name in names])
    heights, reached = np.arange(len(names)) + 0.2, published > 0
    shown = published[reached], heights[reached]
    axis.plot(*shown, "D", color="black", label="published, ImageNet")
    for height in heights[~reached]:
        axis.annotate("published: not reached", (1.2, height), va="center", fontsize=9)
    _ratio_axis(axis, "times fewer steps to plain's best accuracy")
    plots.name_rows(axis, (*names, TUNED_BN))
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="For each network with BN the ratio of steps, with its interval, against plain at two "
        "rates, beside the published ratio, on a logarithmic axis. Against plain at the base rate: "
        f"{'; '.join(told)}.",
        caption=f"{config.dataset}; geometric mean over {config.seeds} seeds with its 95 % "
        "interval; right of 1, fewer steps with BN. A caret is the bound of a mean where a seed "
        "never reached the target; an arrow, an interval that goes on. Published: Ioffe & Szegedy "
        "(2015), figure 3, steps to 72.2 %.",
        claims=("fewer-steps-same-rate", "fewer-steps-tuned", "fewer-steps-x30"),
    )


def _switches(config: Config, arms: Arms) -> Any:
    """What each of the paper's changes does alone."""
    found = contributions(config, arms)
    if not found:
        return None
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    batch_norm = against(arms[PLAIN], arms[BASELINE]), gain(arms[BASELINE], arms[PLAIN])
    rows, told = {"batch_norm": batch_norm, **found}, []
    for y, (name, (steps, accuracy)) in enumerate(rows.items()):
        _mark(axes[0], y, steps, PALETTE.blue, "o")
        points = accuracy.mapped(lambda share: 100 * share)
        plots.interval_row(axes[1], y, points, color=PALETTE.blue, width=1.8)
        told.append(f"{_WORDS[name]}: {steps.mean} and {points.mean:.2g}".replace("-", MINUS))
    _ratio_axis(axes[0], "times fewer steps than without the change")
    plots.reference(axes[1], x=0)
    axes[1].set_xlabel("final test accuracy gained by the change, points")
    for axis in axes:
        plots.name_rows(axis, [_WORDS[name] for name in rows])
    return fig, dict(
        alt="For BN, and each of the paper's changes made alone to BN-Baseline, with intervals: "
        "above, the ratio of steps to the plain network's best accuracy; below, the difference in "
        f"final accuracy. Ratio and points: {'; '.join(told)}.",
        caption=f"{config.dataset}; BN added to Inception, and below it one change at a time to "
        f"{BASELINE}. Above: steps to the best accuracy of Inception at the base rate, as in the "
        "claims; right of 1, fewer with the change; a caret is a bound of the mean, where a seed "
        "never reached it. Below: mean of the last tenth of the run, paired by seed. "
        f"{config.seeds} seeds, 95 % intervals.",
    )


def _ratio_axis(axis: Any, label: str) -> None:
    plots.reference(axis, x=1)
    ticks = (0.1, 1, 10, 100)
    axis.set(xscale="log", xlim=_SPAN, xlabel=label)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _mark(axis: Any, y: float, found: Ratio, color: str, marker: str) -> None:
    """A ratio with its interval on a logarithmic axis; arrows where they leave what is drawn."""
    mean, (low, high) = found.mean, found.interval
    look = dict(color=color, linewidth=1.8, solid_capstyle="butt")
    axis.plot(np.clip((low, high), *_SPAN), [y, y], **look)
    for beyond, edge, arrow in ((low < _SPAN[0], _SPAN[0], "<"), (high > _SPAN[1], _SPAN[1], ">")):
        if beyond:
            axis.plot(edge, y, marker=arrow, color=color, markersize=6, clip_on=False)
    if not mean.is_censored:
        axis.plot(mean.low, y, marker, color=color, markersize=7)
    elif mean.low > 0 or np.isfinite(mean.high):  # a bound: its end that is known
        caret = 4 if np.isfinite(mean.high) else 5  # left, right
        axis.plot(found.known, y, marker=caret, color=color, markersize=9)
