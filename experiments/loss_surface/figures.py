"""The figures of `experiments.loss_surface`."""

import math
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
from bn_research.models.spec import num_logits
from bn_research.probes.step_direction import FACTORS
from experiments.loss_surface.summaries import (
    Descents,
    Record,
    edge_curve,
    final_loss,
    surface_curves,
)
from experiments.loss_surface.verdicts import ARMS, LOW, LOW_BN, OWN, PLAIN, SAME

_GREY = "#777777"
_COLORS = {
    PLAIN: PALETTE.vermillion,
    SAME: PALETTE.blue,
    OWN: PALETTE.green,
    LOW: PALETTE.vermillion,
    LOW_BN: PALETTE.blue,
    "BN": PALETTE.blue,
}
_MARKERS = {PLAIN: "s", SAME: "o", OWN: "^", "BN": "o"}
_BAND = "Line: mean of {} seeds; band: lowest to highest."


def draw(
    config: Any,
    surfaces: Mapping[str, Sequence[Record]],
    descents: Descents,
    edges: Mapping[str, Sequence[Record]],
    folder: Path,
) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      surfaces: records of SGD by role.
      descents: records of gradient descent by arm and multiple of 2/λmax.
      edges: records of the gradient descent along which λmax was followed, by arm.
      folder: where the PNG files go.
    """
    return [
        _draw_surface(config, _roles(surfaces), folder / "along_the_step.png"),
        _draw_surface(config, _lower(surfaces), folder / "along_the_step_lower_rate.png"),
        _draw_profile(config, surfaces, folder / "profile.png"),
        _draw_sharpness(config, surfaces, folder / "sharpness.png"),
        _draw_stable(config, descents, folder / "stable_rates.png"),
        _draw_edge(config, edges, folder / "edge_of_stability.png"),
    ]


def _label(role: str, records: Sequence[Record]) -> str:
    return f"{'plain' if role in (PLAIN, LOW) else 'BN'}, η = {records[0]['rate']:g}"


def _roles(surfaces: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    """Those that differ: BN at its own rate is left out where that is the plain network's."""
    same = surfaces[OWN][0]["rate"] == surfaces[SAME][0]["rate"]
    roles = (PLAIN, SAME) if same else (PLAIN, SAME, OWN)
    return {role: surfaces[role] for role in roles}


def _lower(surfaces: Mapping[str, Sequence[Record]]) -> dict[str, Sequence[Record]]:
    return {role: surfaces[role] for role in (LOW, LOW_BN)}


def _draw_surface(config, roles, path) -> Figure:
    names = {
        "loss range": "range of the loss\n(nats)",
        "gradient distance": "largest distance of\ngradients (nats/unit of θ)",
        "effective smoothness": "effective β-smoothness\n(nats/unit of θ²)",
        "relative gradient distance": "largest relative\ndistance of gradients",
    }
    fig, axes = new_figure(rows=len(names), width=5.0, height=9.6)
    dispatches = config.num_steps // config.steps_per_dispatch
    steps = np.arange(dispatches) * config.steps_per_dispatch
    for axis, (name, words) in zip(axes, names.items(), strict=True):
        for role, records in roles.items():
            curves = [surface_curves(record, dispatches)[name] for record in records]
            band(axis, steps, curves, label=_label(role, records), color=_COLORS[role])
        axis.set_yscale("log")
        axis.set_ylabel(words)
    axes[-1].set_xlabel("step of SGD")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="How loss and gradient change along the step"
        + ("" if PLAIN in roles else ", at the next lower rate"),
        alt="Four panels against steps, on logarithmic axes, from first to last. "
        + " ".join(
            f"{name.capitalize()}: {line_ends(axis)}."
            for name, axis in zip(names, axes, strict=True)
        ),
        caption=f"Over {FACTORS[0]:g} to {FACTORS[-1]:g} times the step of SGD, on the batch that "
        f"gives it (Santurkar et al., 2018, figure 4). {_BAND.format(config.seeds)} The last panel "
        "alone is free of the scale of weights and gradients.",
        claims=("smoother-along-the-step",),
    )


def _draw_profile(config, surfaces, path) -> Figure:
    dispatches = config.num_steps // config.steps_per_dispatch
    times = (0, dispatches // 2)
    fig, axes = new_figure(rows=2, width=5.0, height=6.4)
    for axis, index in zip(axes, times, strict=True):
        for role, records in _roles(surfaces).items():
            found = [
                np.array(record["surface"]["loss"][index], float)
                - np.array(record["surface"]["start_loss"][index], float)
                for record in records
                if index < len(record["surface"]["loss"])
            ]
            if found:
                curves = np.concatenate([np.zeros((len(found), 1)), found], axis=1)
                label = _label(role, records)
                band(axis, (0, *FACTORS), curves, label=label, color=_COLORS[role])
        axis.axhline(0, color=_GREY, linewidth=1, linestyle=":")
        axis.set_title(f"step {index * config.steps_per_dispatch}", fontsize=10.5, loc="left")
        axis.set_ylabel("change of the loss (nats)")
    axes[-1].set_xlabel("distance along the step, in steps")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="The loss along one step",
        alt="Change of the loss against the distance along the step, from 0 to 4 steps. At the "
        f"start of training: {line_ends(axes[0])}. Half way: {line_ends(axes[1])}.",
        caption=f"Loss of the batch that gives the step, less its loss at the start. "
        f"{_BAND.format(config.seeds)} Each arm's unit is its own step.",
        claims=("smoother-along-the-step",),
    )


def _draw_sharpness(config, surfaces, path) -> Figure:
    fig, axis = new_figure(width=5.4, height=4.4)
    steps = sorted(config.curvature_steps)
    shown = _roles(surfaces)
    for place, (role, records) in enumerate(shown.items()):
        for kind, fill, words in (("through", "full", ""), ("frozen", "none", ", frozen")):
            label = f"{_label(role, records)}{words}"
            for record in records if kind in records[0] else ():
                values = np.array(record[kind]["largest"], float) * record["rate"]
                x = np.arange(len(values)) + 0.2 * (place - (len(shown) - 1) / 2)
                axis.plot(
                    x + (0.07 if kind == "frozen" else 0.0),
                    np.where(values > 0, values, np.nan),
                    _MARKERS[role],
                    color=_COLORS[role],
                    fillstyle=fill,
                    markersize=6,
                    alpha=0.8,
                    linestyle="none",
                    label=label,
                )
                label = "_"
    axis.axhline(2, color="black", linestyle="--", linewidth=1.2, label="2, limit of a quadratic")
    axis.set_yscale("log")
    axis.set_xticks(range(len(steps)), [f"step {step}" for step in steps])
    axis.set_xlim(-0.5, len(steps) - 0.5)
    axis.set_ylabel("rate · λmax")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="λmax during SGD, statistics differentiated through or frozen",
        alt="Rate times the largest eigenvalue of the Hessian at a few steps of SGD, a mark for "
        f"each seed, with a dashed line at 2. Seed 0, from first to last: {line_ends(axis)}.",
        caption=f"Hessian of {config.fixed_examples} fixed examples; a mark for each seed. Hollow: "
        "the statistics of BN are frozen, so that it is a fixed affine map: another matrix, though "
        "the loss is the same.",
        claims=("sharpness-sets-the-rate",),
    )


def _draw_stable(config, descents, path) -> Figure:
    fig, axis = new_figure(width=5.0, height=3.8)
    guessing = math.log(num_logits(config.network))
    factors = sorted(config.descent_factors)
    top = 2 * guessing
    for arm in ARMS:
        losses = np.array(
            [[final_loss(record) for record in descents[arm, f]] for f in factors], float
        )
        role = PLAIN if arm == "plain" else SAME
        lost = ~np.isfinite(losses) | (losses > top)
        curves = np.where(lost, top, losses).T
        line = band(axis, factors, curves, label=arm, color=_COLORS[role])
        line.set_marker(_MARKERS[role])
    axis.axhline(guessing, color=_GREY, linestyle=":", label="guessing")
    axis.axvline(1, color="black", linestyle="--", linewidth=1.2, label="2/λmax")
    axis.set_xscale("log", base=2)
    axis.set_xticks(factors, [f"{f:g}" for f in factors])
    axis.minorticks_off()
    axis.set_xlabel("rate, in units of the network's own 2/λmax at the start")
    axis.set_ylabel(f"loss after {config.descent_steps} steps (nats)")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="Which rates are stable?",
        alt="Training loss after a few steps of gradient descent against the rate in units of 2 "
        "over the largest eigenvalue at initialization, from the smallest to the largest: "
        f"{line_ends(axis)}.",
        caption=f"Gradient descent by {config.fixed_examples} fixed examples. "
        f"{_BAND.format(config.seeds)} Losses above {top:.1f}, or not finite, are drawn there.",
        claims=("sharpness-sets-the-rate",),
    )


def _draw_edge(config, edges, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.0, height=6.2)
    dispatches = config.edge_steps // config.steps_per_dispatch
    steps = np.arange(dispatches) * config.steps_per_dispatch
    for arm, records in edges.items():
        color = _COLORS[PLAIN if arm == "plain" else SAME]
        curves = [edge_curve(config, record) for record in records]
        label = f"{arm}, η ≈ {np.mean([record['rate'] for record in records]):.2g}"
        band(axes[0], steps, curves, label=label, color=color)
        losses = np.full((len(records), config.edge_steps), np.nan)
        for row, record in zip(losses, records, strict=True):
            row[: len(record["loss"])] = record["loss"]
        band(axes[1], np.arange(config.edge_steps), losses, label=label, color=color)
    axes[0].axhline(2, color="black", linestyle="--", linewidth=1.2, label="2")
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(NullFormatter())  # their numbers would touch
    axes[0].set_ylabel("rate · λmax")
    axes[1].set_ylabel("training loss (nats)")
    axes[1].set_xlabel("step of gradient descent")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="λmax along gradient descent",
        alt="Against steps of gradient descent, from first to last. Above, rate times the largest "
        f"eigenvalue of the Hessian: {line_ends(axes[0])}. Below, training loss: "
        f"{line_ends(axes[1])}.",
        caption=f"Gradient descent by {config.fixed_examples} fixed examples at "
        f"{config.edge_factor:g} times each network's own 2/λmax at the start; statistics of that "
        f"batch are differentiated through. {_BAND.format(config.seeds)} Dashed: 2, the limit of "
        "stability on a quadratic (Cohen et al., 2021).",
        claims=("edge-of-stability",),
    )
