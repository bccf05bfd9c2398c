"""The figures of `experiments.loss_surface`."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends, panel_ends
from bn_research.claims.figures import PALETTE, Figure, band, new_figure, save_all, shared_legend
from bn_research.claims.judging import Record, numbers
from bn_research.claims.plots import bands, log_ticks, over_seeds, padded, reference
from bn_research.models.spec import num_logits
from bn_research.probes.step_direction import FACTORS
from experiments.loss_surface import Config, verdicts
from experiments.loss_surface.verdicts import ARMS, LOW, LOW_BN, OWN, PLAIN, SAME, Records

_COLORS = {
    PLAIN: PALETTE.vermillion,
    SAME: PALETTE.blue,
    OWN: PALETTE.green,
    LOW: PALETTE.vermillion,
    LOW_BN: PALETTE.blue,
}
_MARKERS = {PLAIN: "s", SAME: "o", OWN: "^"}


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the page."""
    lower = functools.partial(
        _along_the_step,
        roles=(LOW, LOW_BN),
        file="along_the_step_lower_rate",
        title="How loss and gradient change along the step, at the next lower rate",
    )
    draws = (_along_the_step, lower, _profile, _sharpness, _stable_rates, _edge_of_stability)
    return save_all(draws, folder, config, records)


def _roles(records: Records) -> tuple[str, ...]:
    """Those that differ: BN at its own rate is left out where that is the plain network's."""
    rates = [records.surfaces[role][0]["rate"] for role in (OWN, SAME)]
    return (PLAIN, SAME) if rates[0] == rates[1] else (PLAIN, SAME, OWN)


def _label(role: str, records: Sequence[Record]) -> str:
    return f"{'plain' if role in (PLAIN, LOW) else 'BN'}, η = {records[0]['rate']:g}"


def _along_the_step(
    config: Config, records: Records, *, roles: tuple[str, ...] = (), **words: str
) -> tuple[Any, dict[str, Any]]:
    """How loss and gradient change along the step."""
    names = {
        "loss range": "range of the loss\n(nats)",
        "gradient distance": "largest distance of\ngradients (nats/unit of θ)",
        "effective smoothness": "effective β-smoothness\n(nats/unit of θ²)",
        "relative gradient distance": "largest relative\ndistance of gradients",
    }
    fig, axes = new_figure(rows=len(names), width=5.0, height=9.6)
    steps = np.arange(0, config.num_steps, config.steps_per_dispatch)
    runs = {role: records.surfaces[role] for role in roles or _roles(records)}
    labels = {role: _label(role, found) for role, found in runs.items()}
    for axis, (name, quantity) in zip(axes, names.items(), strict=True):
        curves = {
            role: [verdicts.surface_curves(record, len(steps))[name] for record in found]
            for role, found in runs.items()
        }
        bands(axis, steps, curves, _COLORS, names=labels)
        axis.set(yscale="log", ylabel=quantity)
    axes[-1].set_xlabel("step of SGD")
    shared_legend(fig)
    return fig, dict(
        alt="Four panels against steps, on logarithmic axes, from first to last. "
        + panel_ends(dict(zip(names, axes, strict=True))),
        caption=f"Over {FACTORS[0]:g} to {FACTORS[-1]:g} times the step of SGD, on the batch that "
        f"gives it (Santurkar et al., 2018, figure 4). {over_seeds(config.seeds)}. The last panel "
        "alone is free of the scale of weights and gradients.",
        claims=("smoother-along-the-step",),
        **words,
    )


def _profile(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """The loss along one step."""
    times = (0, config.num_steps // config.steps_per_dispatch // 2)
    fig, axes = new_figure(rows=2, width=5.0, height=6.4)
    for axis, index in zip(axes, times, strict=True):
        for role in _roles(records):
            runs = records.surfaces[role]
            surfaces = [r["surface"] for r in runs if index < len(r["surface"]["loss"])]
            if surfaces:
                start = np.array([[found["start_loss"][index]] for found in surfaces], float)
                loss = np.array([found["loss"][index] for found in surfaces], float)
                curves = np.pad(loss - start, ((0, 0), (1, 0)))
                band(axis, (0, *FACTORS), curves, label=_label(role, runs), color=_COLORS[role])
        reference(axis, y=0, linestyle=":", linewidth=1)
        axis.set_title(f"step {index * config.steps_per_dispatch}", fontsize=10.5, loc="left")
        axis.set_ylabel("change of the loss (nats)")
    axes[-1].set_xlabel("distance along the step, in steps")
    shared_legend(fig)
    return fig, dict(
        alt="Change of the loss against the distance along the step, from 0 to 4 steps. "
        + panel_ends({"at the start of training": axes[0], "half way": axes[1]}),
        caption="Loss of the batch that gives the step, less its loss at the start. "
        f"{over_seeds(config.seeds)}. Each arm's unit is its own step.",
        claims=("smoother-along-the-step",),
    )


def _sharpness(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """λmax during SGD, statistics differentiated through or frozen."""
    fig, axis = new_figure(width=5.4, height=4.4)
    steps = sorted(config.curvature_steps)
    shown = _roles(records)
    for place, role in enumerate(shown):
        runs = records.surfaces[role]
        for kind, fill, words in (("through", "full", ""), ("frozen", "none", ", frozen")):
            label = f"{_label(role, runs)}{words}"
            shift = 0.2 * (place - (len(shown) - 1) / 2) + (0.07 if kind == "frozen" else 0.0)
            look = dict(color=_COLORS[role], fillstyle=fill, markersize=6, alpha=0.8)
            for record in runs if kind in runs[0] else ():
                values = np.array(record[kind]["largest"], float) * record["rate"]
                values[~(values > 0)] = np.nan
                x = np.arange(len(values)) + shift
                axis.plot(x, values, _MARKERS[role], linestyle="none", label=label, **look)
                label = "_"
    reference(axis, y=2, color="black", label="2, limit of a quadratic")
    axis.set_xticks(range(len(steps)), [f"step {step}" for step in steps])
    axis.set(xlim=(-0.5, len(steps) - 0.5), yscale="log", ylabel="rate · λmax")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Rate times the largest eigenvalue of the Hessian at a few steps of SGD, a mark for "
        f"each seed, with a dashed line at 2. Seed 0, from first to last: {line_ends(axis)}.",
        caption=f"Hessian of {config.fixed_examples} fixed examples; a mark for each seed. Hollow: "
        "the statistics of BN are frozen, so that it is a fixed affine map: another matrix, though "
        "the loss is the same.",
        claims=("sharpness-sets-the-rate",),
    )


def _stable_rates(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """Which rates are stable?"""
    fig, axis = new_figure(width=5.0, height=3.8)
    factors, guessing = sorted(config.descent_factors), math.log(num_logits(config.network))
    top = 2 * guessing
    for arm, role in ARMS.items():
        runs = [records.descents[arm, factor] for factor in factors]
        losses = np.transpose([numbers(found, verdicts.final_loss) for found in runs])
        curves = np.minimum(losses, top)  # what is not finite is infinite here
        band(axis, factors, curves, label=arm, color=_COLORS[role], marker=_MARKERS[role])
    reference(axis, y=guessing, linestyle=":", linewidth=1.5, label="guessing")
    reference(axis, x=1, color="black", label="2/λmax")
    log_ticks(axis, factors)
    axis.set_xlabel("rate, in units of the network's own 2/λmax at the start")
    axis.set_ylabel(f"loss after {config.descent_steps} steps (nats)")
    shared_legend(fig)
    return fig, dict(
        alt="Training loss after a few steps of gradient descent against the rate in units of 2 "
        "over the largest eigenvalue at initialization, from the smallest to the largest: "
        f"{line_ends(axis)}.",
        caption=f"Gradient descent by {config.fixed_examples} fixed examples. "
        f"{over_seeds(config.seeds)}. Losses above {top:.1f}, or not finite, are drawn there.",
        claims=("sharpness-sets-the-rate",),
    )


def _edge_of_stability(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """λmax along gradient descent."""
    fig, axes = new_figure(rows=2, width=5.0, height=6.2)
    steps = np.arange(config.edge_steps)
    for arm, runs in records.edges.items():
        label, color = f"{arm}, η ≈ {numbers(runs, 'rate').mean():.2g}", _COLORS[ARMS[arm]]
        curves = verdicts.edge_curves(config, runs)
        band(axes[0], steps[:: config.steps_per_dispatch], curves, label=label, color=color)
        losses = padded([record["loss"] for record in runs], config.edge_steps)
        band(axes[1], steps, losses, label=label, color=color)
    reference(axes[0], y=2, color="black", label="2")
    axes[0].set(yscale="log", ylabel="rate · λmax")
    axes[1].set(yscale="log", ylabel="training loss (nats)", xlabel="step of gradient descent")
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(NullFormatter())  # their numbers would touch
    shared_legend(fig)
    return fig, dict(
        alt="Against steps of gradient descent, from first to last. Above, rate times the largest "
        f"eigenvalue of the Hessian: {line_ends(axes[0])}. Below, training loss: "
        f"{line_ends(axes[1])}.",
        caption=f"Gradient descent by {config.fixed_examples} fixed examples at "
        f"{config.edge_factor:g} times each network's own 2/λmax at the start; statistics of that "
        f"batch are differentiated through. {over_seeds(config.seeds)}. Dashed: 2, the limit of "
        "stability on a quadratic (Cohen et al., 2021).",
        claims=("edge-of-stability",),
    )
