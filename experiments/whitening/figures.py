"""The figures of `experiments.whitening`."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends, panel_ends
from bn_research.claims.figures import PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.judging import by_seed
from bn_research.claims.plots import bands, log_ticks, over_seeds, padded, reference
from bn_research.normalization.input_whitening import TRANSFORMS
from experiments.whitening import Config
from experiments.whitening.verdicts import PLACES, Records, kinds, smoothed, steps_of, steps_ratio

_HUES = PALETTE.vermillion, PALETTE.orange, PALETTE.purple, PALETTE.blue, PALETTE.green
_COLORS = dict(zip(TRANSFORMS, _HUES, strict=True))
_MARKERS = dict(zip(TRANSFORMS, "osD^v", strict=True))


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the page."""
    return save_all((_steps, _targets, _losses, _regression), folder, config, records)


def _steps(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """Steps to a loss, by what was done to the inputs."""
    fig, axis = new_figure(width=6.2, height=3.8)
    names, told = kinds(config), []
    looks = (-0.12, PALETTE.vermillion), (0.12, PALETTE.blue)
    for (placement, label), (shift, color) in zip(PLACES.items(), looks, strict=True):
        look = dict(markersize=5, color=color, alpha=0.7, label=label)
        for place, name in enumerate(names):
            found = steps_of(config, records, placement, name)
            lows = [steps.low for steps in found]
            told.append(f"{name}, {label}: {min(lows):g} to {max(lows):g}")
            for steps in found:
                axis.plot(place + shift, steps.low, "^" if steps.is_censored else "o", **look)
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    axis.set_ylabel(f"steps to a loss of {config.target_loss:g}")
    kappas = [f"κ {records.spectra[name]['condition_number']:.0e}" for name in names]
    rows = [name.replace(", ", "\n") for name in names]
    axis.set_xticks(range(len(names)), list(map("{}\n{}".format, rows, kappas)))
    shared_legend(fig)
    return fig, dict(
        alt="Steps to the target loss on a log axis, one mark a seed, without BN and with it on "
        f"the hidden layers. Fewest and most: {'; '.join(told)}.",
        caption="Each arm at its own best rate; a mark is a seed, a triangle one that had not "
        "reached the loss by its last step. κ: condition number of E[x̃·x̃ᵀ] over the training "
        "images, without directions in which they do not vary. ZCA and PCA differ by a rotation, "
        "which the random first layer does not see.",
        claims=("whitened-inputs-converge-faster",),
    )


def _targets(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """Ratios of steps, by the loss to reach."""
    fig, axis = new_figure(width=5.4, height=3.6)
    targets = sorted((config.target_loss, *config.other_targets))
    for a, b, color, marker in (
        ("raw", "scaled", PALETTE.purple, "D"),
        ("raw", "zca", PALETTE.blue, "^"),
        ("scaled", "zca", PALETTE.black, "o"),
    ):
        found = [steps_ratio(config, records, a, b, target) for target in targets]
        low, high = np.clip(np.transpose([ratio.interval for ratio in found]), 0.05, 20)
        known = [np.nan if ratio.mean.is_censored else ratio.mean.low for ratio in found]
        axis.fill_between(targets, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(targets, known, marker=marker, markersize=5, color=color, label=f"{a}/{b}")
    reference(axis, y=1, color="black", linestyle=":")
    log_ticks(axis, targets, base=10)
    log_ticks(axis, (0.2, 0.5, 1, 2, 5, 10, 20), base=10, side="y")
    axis.set(ylim=(0.2, 20), xlabel="loss to reach, nats", ylabel="ratio of steps, without BN")
    axis.invert_xaxis()
    shared_legend(fig)
    return fig, dict(
        alt="Ratios of steps without BN, with bands, against the training loss to reach, from the "
        f"lowest to the highest: {line_ends(axis)}; a dotted line marks 1.",
        caption="Without BN, each arm at the rate that was best for the claim's target. Line: "
        "geometric mean; band: 95 % interval over seeds, open where a seed never got there, and "
        "without a line where the mean is a bound only.",
        claims=("whitened-inputs-converge-faster",),
    )


def _losses(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """Training loss on raw, scaled and whitened images."""
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    steps = np.arange(config.window, config.num_steps + 1)
    for axis, (placement, label) in zip(axes, PLACES.items(), strict=True):
        curves = {}
        for name in TRANSFORMS:
            runs = by_seed(records.trained, placement=placement, inputs=name)
            curves[name] = padded([smoothed(r, config.window)[1] for r in runs], len(steps))
        bands(axis, steps, curves, _COLORS)
        reference(axis, y=config.target_loss, color="black", linestyle=":")
        axis.set(yscale="log", ylabel="training loss, nats")
        axis.set_title(label, fontsize=10.5)
    axes[-1].set_xlabel("steps")
    shared_legend(fig)
    return fig, dict(
        alt="Training loss against steps on a log axis, from first to last; a dotted line marks "
        "the target. "
        + panel_ends({"without BN": axes[0], "with BN on the hidden layers": axes[1]}),
        caption=f"Mean over the last {config.window} steps. {over_seeds(config.seeds)}; cross: a "
        "seed lost. Dotted: the target loss.",
    )


def _regression(config: Config, records: Records) -> tuple[Any, dict[str, Any]]:
    """Linear regression: theory and measurement."""
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    settings = [s for record in records.regressions for s in record["settings"]]
    for name in TRANSFORMS:
        ended = [s for s in settings if s["name"] == name and s["measured_steps"] is not None]
        points = [(s["predicted_steps"], s["measured_steps"]) for s in ended]
        look = dict(color=_COLORS[name], markersize=5, markerfacecolor="none", label=name)
        axes[0].plot(*np.transpose(points), _MARKERS[name], **look)
    ends = [end(s["predicted_steps"] for s in settings) for end in (min, max)]
    axes[0].plot(ends, ends, color="black", linestyle=":", linewidth=1.2, label="theory")
    axes[0].set(xscale="log", yscale="log", xlabel="steps to 1e-6, predicted", ylabel="measured")
    raw = [s for s in settings if s["name"] == "raw" and s["correlated"]]
    norms = sorted(config.mean_norms)
    for kappa, color in zip(sorted(config.condition_numbers), PALETTE, strict=False):
        found = [[s for s in raw if (s["kappa"], s["mean_norm"]) == (kappa, n)] for n in norms]
        tops = [np.mean([s["top_eigenvalue"] for s in group]) for group in found]
        axes[1].plot(norms, tops, "o", markersize=5, color=color, label=f"κ(Σ) = {kappa:g}")
    line = np.linspace(0, max(config.mean_norms), 50)
    axes[1].plot(line, line**2 + 1, color="black", linestyle="--", linewidth=1.2, label="‖μ‖² + 1")
    axes[1].set(yscale="log", xlabel="‖μ‖, norm of the inputs' mean", ylabel="λmax of E[x̃·x̃ᵀ]")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Above, measured against predicted steps of gradient descent, both logarithmic, along "
        "the diagonal. Below, the top eigenvalue against the norm of the mean, from the smallest "
        f"to the largest: {line_ends(axes[1])}.",
        caption="Above: every setting and seed, in float64, at the best constant rate. Below: a "
        "mean adds an eigenvalue near ‖μ‖², which the rate must be small for.",
        claims=("whitened-inputs-converge-faster",),
    )
