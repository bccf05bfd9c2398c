"""The figures of `experiments.training_steps`."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.bounded import Ratio
from bn_research.claims.estimate import Estimate
from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.formatting import MINUS
from bn_research.claims.judging import numbers
from bn_research.claims.plots import (
    bands,
    interval_row,
    name_rows,
    over_seeds,
    padded,
    reference,
)
from experiments.training_steps import Config
from experiments.training_steps.networks import (
    BASELINE,
    PLAIN,
    PUBLISHED,
    SIGMOID,
    TUNED,
    TUNED_BN,
    X5,
    X30,
)
from experiments.training_steps.verdicts import (
    Arms,
    Records,
    against,
    best,
    contributions,
    gain,
)

_LOOKS: dict[str, Any] = {
    PLAIN: PALETTE.black,
    BASELINE: PALETTE.blue,
    X5: PALETTE.vermillion,
    X30: PALETTE.purple,
    SIGMOID: PALETTE.green,
    TUNED: (GREY, "--"),
}
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
    curves = {name: padded([r["accuracy"] for r in arms[name]], len(steps)) for name in _LOOKS}
    bands(axis, steps, curves, _LOOKS)
    target = numbers(arms[PLAIN], best).mean()
    reference(axis, y=target, color="black", linestyle=":", label=f"best of {PLAIN}")
    axis.set(xscale="log", xlabel="training steps", ylabel="test accuracy", ylim=(0, 1.02))
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Test accuracy against training steps, on a logarithmic axis, from first to last: "
        f"{line_ends(axis)}.",
        caption=f"{config.dataset}; base rate {config.base_rate:g}, {PLAIN} tuned at "
        f"{arms[TUNED][0]['rate']:g}. {over_seeds(config.seeds)}; a cross ends a run that was "
        "lost. Dotted: the best accuracy of Inception at the base rate, mean over seeds.",
        claims=("fewer-steps-same-rate", "fewer-steps-tuned", "fewer-steps-x30"),
    )


def _ratios(config: Config, arms: Arms) -> Any:
    """How many times fewer steps."""
    fig, axis = new_figure(width=5.4, height=3.9)
    names = (BASELINE, X5, X30, SIGMOID)
    rows = (
        (PLAIN, "plain at the base rate", PALETTE.blue, "o", -0.2),
        (TUNED, "plain at its own best rate", PALETTE.vermillion, "s", 0.0),
    )
    told = [f"{name}: {against(arms[PLAIN], arms[name]).mean}" for name in names]
    for baseline, label, color, marker, shift in rows:
        axis.plot([], [], marker, color=color, label=label)
        for y, name in enumerate(names):
            _mark(axis, y + shift, against(arms[baseline], arms[name]), color, marker)
    both = against(arms[TUNED], arms[TUNED_BN])
    _mark(axis, len(names), both, PALETTE.vermillion, "s")
    published = np.array([PUBLISHED[PLAIN] / PUBLISHED[name] for name in names])
    heights, reached = np.arange(len(names)) + 0.2, published > 0
    look = {"color": "black", "label": "published, ImageNet"}
    axis.plot(published[reached], heights[reached], "D", **look)
    for height in heights[~reached]:
        axis.annotate("published: not reached", (1.2, height), va="center", fontsize=9)
    _ratio_axis(axis, "times fewer steps to plain's best accuracy")
    name_rows(axis, (*names, TUNED_BN))
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
    rows: dict[str, tuple[Ratio, Estimate]] = {"batch_norm": batch_norm, **found}
    told = []
    for y, (name, (steps, accuracy)) in enumerate(rows.items()):
        _mark(axes[0], y, steps, PALETTE.blue, "o")
        points = accuracy.mapped(lambda share: 100 * share)
        interval_row(axes[1], y, points, color=PALETTE.blue, width=1.8)
        told.append(f"{_WORDS[name]}: {steps.mean} and {points.mean:.2g}".replace("-", MINUS))
    _ratio_axis(axes[0], "times fewer steps than without the change")
    reference(axes[1], x=0)
    axes[1].set_xlabel("final test accuracy gained by the change, points")
    for axis in axes:
        name_rows(axis, [_WORDS[name] for name in rows])
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
    reference(axis, x=1)
    ticks = (0.1, 1, 10, 100)
    axis.set(xscale="log", xlim=_SPAN, xlabel=label)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _mark(axis: Any, y: float, found: Ratio, color: str, marker: str) -> None:
    """A ratio with its interval on a logarithmic axis; arrows where they leave what is drawn."""
    mean, (low, high) = found.mean, found.interval
    axis.plot(
        np.clip((low, high), *_SPAN), [y, y], color=color, linewidth=1.8, solid_capstyle="butt"
    )
    for beyond, edge, arrow in ((low < _SPAN[0], _SPAN[0], "<"), (high > _SPAN[1], _SPAN[1], ">")):
        if beyond:
            axis.plot(edge, y, marker=arrow, color=color, markersize=6, clip_on=False)
    if not mean.is_censored:
        axis.plot(mean.low, y, marker, color=color, markersize=7)
    elif mean.low > 0 or np.isfinite(mean.high):  # a bound: its end that is known
        caret = 4 if np.isfinite(mean.high) else 5  # left, right
        axis.plot(found.known, y, marker=caret, color=color, markersize=9)
