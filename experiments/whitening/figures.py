"""The figures of `experiments.whitening`."""

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
from experiments.whitening.inputs import TRANSFORMS
from experiments.whitening.verdicts import kinds, smoothed, steps_ratio, steps_to_target

_COLORS = dict(
    zip(
        TRANSFORMS,
        (PALETTE.vermillion, PALETTE.orange, PALETTE.purple, PALETTE.blue, PALETTE.green),
        strict=True,
    )
)
_MARKERS = dict(zip(TRANSFORMS, "osD^v", strict=True))
_PLACES = {"none": "without BN", "hidden": "BN on hidden layers"}


def draw(
    config: Any,
    regressions: Sequence[Mapping[str, Any]],
    spectra: Mapping[str, Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[Figure]:
    """All figures, in the order of the report."""
    return [
        _draw_steps(config, spectra, trained, folder / "steps.png"),
        _draw_targets(config, trained, folder / "targets.png"),
        _draw_losses(config, trained, folder / "losses.png"),
        _draw_regression(regressions, folder / "regression.png"),
    ]


def _draw_steps(config, spectra, trained, path) -> Figure:
    fig, axis = new_figure(width=6.2, height=3.8)
    names, told = kinds(config), []
    places = np.arange(len(names))
    for shift, (placement, label), color in zip(
        (-0.12, 0.12), _PLACES.items(), (PALETTE.vermillion, PALETTE.blue), strict=True
    ):
        for place, name in zip(places, names, strict=True):
            found = [
                steps_to_target(config, record)
                for record in trained
                if (record["placement"], record["inputs"]) == (placement, name)
            ]
            shown = label if place == 0 else "_"
            ends = [f(steps.low for steps in found) for f in (min, max)]
            told.append(f"{name}, {label}: {ends[0]:g} to {ends[1]:g}")
            for steps in found:
                axis.plot(
                    place + shift,
                    steps.low,
                    marker="^" if steps.is_censored else "o",
                    markersize=5,
                    color=color,
                    alpha=0.7,
                    linestyle="",
                    label=shown,
                )
                shown = "_"
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    axis.set_ylabel(f"steps to a loss of {config.target_loss:g}")
    axis.set_xticks(
        places,
        [
            f"{name.replace(', ', chr(10))}\nκ {spectra[name]['condition_number']:.0e}"
            for name in names
        ],
    )
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="Steps to a loss, by what was done to the inputs",
        alt="Steps to the target loss on a log axis, one mark a seed, without BN and with it on "
        f"the hidden layers. Fewest and most: {'; '.join(told)}.",
        caption="Each arm at its own best rate; a mark is a seed, a triangle one that had not "
        "reached the loss by its last step. κ: condition number of E[x̃·x̃ᵀ] over the training "
        "images, without directions in which they do not vary. ZCA and PCA differ by a rotation, "
        "which the random first layer does not see.",
        claims=("whitened-inputs-converge-faster",),
    )


def _draw_targets(config, trained, path) -> Figure:
    fig, axis = new_figure(width=5.4, height=3.6)
    targets = sorted((config.target_loss, *config.other_targets))
    for (a, b), color, marker in (
        (("raw", "scaled"), PALETTE.purple, "D"),
        (("raw", "zca"), PALETTE.blue, "^"),
        (("scaled", "zca"), PALETTE.black, "o"),
    ):
        found = [steps_ratio(config, trained, "none", a, b, target) for target in targets]
        low, high = (
            np.array([np.clip(getattr(r, end), 0.05, 20) for r in found]) for end in ("low", "high")
        )
        known = [r.mean.low if r.mean.low == r.mean.high else np.nan for r in found]
        axis.fill_between(targets, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(targets, known, marker=marker, markersize=5, color=color, label=f"{a}/{b}")
    axis.axhline(1, color="black", linestyle=":", linewidth=1.2)
    axis.set(xscale="log", yscale="log", ylim=(0.2, 20))
    axis.invert_xaxis()
    axis.set_xticks(targets, [f"{target:g}" for target in targets])
    axis.minorticks_off()
    axis.set_yticks((0.2, 0.5, 1, 2, 5, 10, 20), ("0.2", "0.5", "1", "2", "5", "10", "20"))
    axis.set_xlabel("loss to reach, nats")
    axis.set_ylabel("ratio of steps, without BN")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="Ratios of steps, by the loss to reach",
        alt="Ratios of steps without BN, with bands, against the training loss to reach, from the "
        f"lowest to the highest: {line_ends(axis)}; a dotted line marks 1.",
        caption="Without BN, each arm at the rate that was best for the claim's target. Line: "
        "geometric mean; band: 95 % interval over seeds, open where a seed never got there, and "
        "without a line where the mean is a bound only.",
        claims=("whitened-inputs-converge-faster",),
    )


def _draw_losses(config, trained, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    for axis, (placement, label) in zip(axes, _PLACES.items(), strict=True):
        for name in TRANSFORMS:
            curves = np.full((config.seeds, config.num_steps - config.window + 1), np.nan)
            for record in trained:
                if (record["placement"], record["inputs"]) == (placement, name):
                    loss = smoothed(record, config.window)[1]
                    curves[record["seed"], : len(loss)] = loss
            steps = np.arange(config.window, config.num_steps + 1)
            band(axis, steps, curves, label=name, color=_COLORS[name])
        axis.axhline(config.target_loss, color="black", linestyle=":", linewidth=1.2)
        axis.set_yscale("log")
        axis.set_ylabel("training loss, nats")
        axis.set_title(label, fontsize=10.5)
    axes[-1].set_xlabel("steps")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="Training loss on raw, scaled and whitened images",
        alt="Training loss against steps on a log axis, from first to last; a dotted line marks "
        f"the target. Without BN: {line_ends(axes[0])}. With BN on the hidden layers: "
        f"{line_ends(axes[1])}.",
        caption=f"Mean over the last {config.window} steps. Line: mean of {config.seeds} seeds; "
        "band: lowest to highest; cross: a seed lost. Dotted: the target loss.",
    )


def _draw_regression(regressions, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    settings = [s for record in regressions for s in record["settings"]]
    for name in TRANSFORMS:
        points = [
            (s["predicted_steps"], s["measured_steps"])
            for s in settings
            if s["name"] == name and s["measured_steps"] is not None
        ]
        axes[0].plot(
            *np.transpose(points),
            marker=_MARKERS[name],
            color=_COLORS[name],
            markersize=5,
            markerfacecolor="none",
            linestyle="",
            label=name,
        )
    ends = [
        min(s["predicted_steps"] for s in settings),
        max(s["predicted_steps"] for s in settings),
    ]
    axes[0].plot(ends, ends, color="black", linestyle=":", linewidth=1.2, label="theory")
    axes[0].set(xscale="log", yscale="log")
    axes[0].set_xlabel("steps to 1e-6, predicted")
    axes[0].set_ylabel("measured")
    raw = [s for s in settings if s["name"] == "raw" and s["correlated"]]
    kappas = sorted({s["kappa"] for s in raw})
    for kappa, color in zip(kappas, PALETTE, strict=False):
        norms = sorted({s["mean_norm"] for s in raw})
        values = [
            np.mean(
                [s["top_eigenvalue"] for s in raw if (s["kappa"], s["mean_norm"]) == (kappa, n)]
            )
            for n in norms
        ]
        axes[1].plot(
            norms,
            values,
            marker="o",
            markersize=5,
            linestyle="",
            color=color,
            label=f"κ(Σ) = {kappa:g}",
        )
    line = np.linspace(0, max(s["mean_norm"] for s in raw), 50)
    axes[1].plot(line, line**2 + 1, color="black", linestyle="--", linewidth=1.2, label="‖μ‖² + 1")
    axes[1].set_yscale("log")
    axes[1].set_xlabel("‖μ‖, norm of the inputs' mean")
    axes[1].set_ylabel("λmax of E[x̃·x̃ᵀ]")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="Linear regression: theory and measurement",
        alt="Above, measured against predicted steps of gradient descent, both logarithmic, along "
        "the diagonal. Below, the top eigenvalue against the norm of the mean, from the smallest "
        f"to the largest: {line_ends(axes[1])}.",
        caption="Above: every setting and seed, in float64, at the best constant rate. Below: a "
        "mean adds an eigenvalue near ‖μ‖², which the rate must be small for.",
        claims=("whitened-inputs-converge-faster",),
    )
