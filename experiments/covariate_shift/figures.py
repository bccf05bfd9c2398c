"""The figures of `experiments.covariate_shift`."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import figures, plots
from bn_research.claims.alt_text import line_ends
from bn_research.claims.figures import GREY, PALETTE, Figure, band, new_figure
from bn_research.models.spec import num_weight_layers
from experiments.covariate_shift import Config, verdicts
from experiments.covariate_shift.verdicts import DRIFT, OWN, PLAIN, SAME, SHIFT, Arms, Record

_COLORS = {PLAIN: PALETTE.vermillion, SAME: PALETTE.blue, OWN: PALETTE.green}
_SHORT = {PLAIN: "plain", SAME: "BN, same settings", OWN: "BN, its own best"}


def draw(config: Config, records: Mapping[str, Arms], folder: Path) -> list[Figure]:
    """All figures, in the order of the report; most are of the first comparison, the claims'."""
    small: Any = functools.partial(_figure_1, small=True)
    draws = [_figure_1, _ratios, _gradient_shift, _drift_by_unit, small]
    return figures.save_all(draws, folder, config, records)


def _first(records: Mapping[str, Arms]) -> Arms:
    return next(iter(records.values()))


def _curves(runs: Sequence[Record], key: str, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and [seeds, steps] of a quantity; NaN where a run has ended before the others."""
    steps = max((run["step"] for run in runs), key=len)
    found = [np.array(run[key], float) for run in runs]
    return np.array(steps), plots.padded([x[:, layer - 1] if layer else x for x in found])


def _figure_1(config: Config, records: Mapping[str, Arms], *, small: bool = False) -> Any:
    name = verdicts.small_weights(config) if small else next(iter(records))
    if name not in records:
        return None
    arms = records[name]
    fig, axes = new_figure(rows=3, width=5.4, height=8.4)
    ends = []
    for arm, runs in arms.items():
        steps, curves = _curves(runs, "evaluated")
        band(axes[0], steps, curves, label=_SHORT[arm], color=_COLORS[arm])
        ends.append(np.nanmin(curves[:, -1]))
    axes[0].set(ylabel="test accuracy", ylim=(max(0.0, 2 * min(ends) - 1), 1.0))
    for axis, arm in zip(axes[1:], (PLAIN, SAME), strict=True):
        run, color = arms[arm][0], _COLORS[arm]
        steps, fan = run["step"], np.array(run["fan"], float)
        axis.fill_between(steps, fan[:, 0], fan[:, 2], color=GREY, alpha=0.2, linewidth=0)
        axis.plot([], [], color=GREY, alpha=0.3, linewidth=7, label="medians of 80 % of the units")
        if run["path"] is not None:
            low, middle, high = np.array(run["typical"], float).T
            axis.plot(steps, middle, color=color, label=f"{_SHORT[arm]}: median")
            for line in (low, high):
                axis.plot(steps, line, color=color, linewidth=1.0, linestyle="--")
        axis.set_ylabel(f"input of the {config.activations[0]}")
        axis.set_title(f"{_SHORT[arm]}: a typical unit's 15, 50, 85 %", fontsize=10.5, loc="left")
    axes[-1].set_xlabel("training steps")
    entries = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes[:2]]
    shown = {label: handle for each in entries for handle, label in each if ": median" not in label}
    handles, labels = list(shown.values()), list(shown)
    fig.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    words = f", with weights of {config.small_init_std:g}" if small else ""
    return fig, dict(
        file="figure_1_small" if small else "figure_1",
        title=f"Figure 1 of Ioffe & Szegedy, rebuilt{words}",
        alt="Above, test accuracy against training steps, from first to last: "
        f"{line_ends(axes[0])}. Below, the 15th, 50th and 85th percentiles of one unit's input "
        f"over the same steps; {line_ends(axes[1])}; {line_ends(axes[2])}.",
        caption=f"{config.dataset}, {config.network}, batches of {config.batch_size}. "
        f"{plots.over_seeds(config.seeds)}. Below, seed 0: of the last hidden layer the unit "
        "whose drift is the median one; dashed its 15th and 85th percentile, grey the range of the "
        f"medians of the middle 80 % of all units. Percentiles of {config.measuring_images} test "
        "images, with BN by their own statistics, after its scale and bias; accuracy on test "
        "images by the running statistics.",
        claims=() if small else ("distribution-drift-reduced",),
    )


def _drift_by_unit(config: Config, records: Mapping[str, Arms]) -> Any:
    """How far the inputs of all last hidden units drift."""
    fig, axis = new_figure(height=3.8, width=5.4)
    medians = []
    for arm, runs in _first(records).items():
        paths = [np.sort(np.array(r["path"], float)) for r in runs if r["path"] is not None]
        if paths:
            medians.append(f"{_SHORT[arm]}: {np.median(np.concatenate(paths)):.2g}")
        for index, values in enumerate(paths):
            share = (np.arange(len(values)) + 0.5) / len(values)
            label = _SHORT[arm] if index == 0 else None
            axis.plot(values, 100 * share, color=_COLORS[arm], linewidth=1.3, label=label)
    _log_x(axis)
    words = "drift of a unit, in widths of its distribution"
    axis.set(xlabel=words, ylabel="share of the units with less, %")
    figures.shared_legend(fig)
    return fig, dict(
        alt="Cumulative share of the last hidden units against their drift on a logarithmic axis, "
        f"one S-shaped line for each seed. Median drift: {'; '.join(medians)}.",
        caption="Drift: the path of a unit's {15, 50, 85} percentiles over the whole training, in "
        f"widths r = p85 − p15, measured every {config.steps_per_dispatch} steps. A line for each "
        f"of {config.seeds} seeds. {config.dataset}, {config.activations[0]} units.",
        claims=("distribution-drift-reduced",),
    )


def _gradient_shift(config: Config, records: Mapping[str, Arms]) -> Any:
    """How far a layer's gradient moves when the layers below take their step."""
    layers = range(2, num_weight_layers(config.network) + 1)
    fig, axes = new_figure(rows=len(layers), width=5.4, height=2.5 * len(layers) + 0.8)
    panels = np.ravel(axes)
    for axis, layer in zip(panels, layers, strict=True):
        for arm in (PLAIN, SAME):
            runs, color = _first(records)[arm], _COLORS[arm]
            steps, curves = _curves(runs, "relative", layer)
            curves = np.where(curves > 0, curves, np.nan)
            band(axis, steps, curves, label=f"{_SHORT[arm]}: shift", color=color)
            noise = np.nanmean(_curves(runs, "noise", layer)[1], axis=0)
            look = dict(color=color, linestyle=":", linewidth=1.4)
            axis.plot(steps, noise, **look, label=f"{_SHORT[arm]}: noise floor")
        head = " (head)" if layer == layers[-1] else ""
        axis.set_title(f"layer {layer}{head}", fontsize=10.5, loc="left")
        axis.set(yscale="log", ylabel="‖G − G′‖/‖G‖")
    panels[-1].set_xlabel("training steps")
    figures.shared_legend(fig, columns=2)
    return fig, dict(
        alt="Relative gradient shift against training steps on a logarithmic axis, a panel for "
        "each layer from the second on, and the noise floors as dotted lines. In the last panel, "
        f"from first to last: {line_ends(panels[-1])}.",
        caption="G: gradient on the batch of the next step; G′: the same after the layers below "
        "have taken that step. Dotted: the distance between the gradients of two disjoint batches "
        f"of {config.batch_size} at the same parameters, mean over seeds. {config.dataset}, "
        f"{config.activations[0]}, both at the plain network's settings. "
        f"{plots.over_seeds(config.seeds)}.",
        claims=("gradient-shift-not-reduced",),
    )


def _ratios(config: Config, records: Mapping[str, Arms]) -> Any:
    """Drift and gradient shift, BN over plain."""
    count = len(records)
    fig, axes = new_figure(rows=2, width=5.4, height=4.0 + 2.2 * count)
    first_rows = []
    both = (verdicts.drift_ratios, DRIFT), (verdicts.shift_ratios, SHIFT)
    for axis, (of, criterion) in zip(axes, both, strict=True):
        told = []
        for index, (name, arms) in enumerate(records.items()):
            ratios = of(config, arms)
            look = dict(fmt="os^Dvp"[index], markersize=6, capsize=3, color=PALETTE[index])
            for row, found in enumerate(ratios.values()):
                if found is None:
                    continue
                mean = found.known
                if row == 0:
                    told.append(f"{name}: {mean:.2g}")
                sound = found.pairs > 1 and np.isfinite(found.high)
                bar = [(mean - found.low,), (found.high - mean,)] if sound else None
                y, label = row + 0.3 * (index - (count - 1) / 2), None if row else name
                axis.errorbar(mean, y, xerr=bar, **look, label=label)
        first_rows.append("; ".join(told))
        plots.reference(axis, x=1, linestyle="-")
        if criterion != 1:
            plots.reference(axis, x=criterion)
        _log_x(axis)
        plots.name_rows(axis, [_wrapped(name) for name in ratios])
        axis.grid(visible=False, axis="y")
    axes[1].set_xlabel("BN/plain")
    figures.shared_legend(fig)
    return fig, dict(
        alt="Ratios of BN to plain with intervals on a logarithmic axis, a row for each way of "
        f"measuring. Above, of the drift of distributions; first row: {first_rows[0]}. Below, of "
        f"the gradient shift; first row: {first_rows[1]}.",
        caption="Geometric mean over seeds and its 95 % interval. The first row of each panel is "
        f"the claim's; grey: 1; dashed: {DRIFT}, at most which the drift must be. 'After the "
        "plateau' is not shown where a plain network stays on it.",
        claims=("distribution-drift-reduced", "gradient-shift-not-reduced"),
    )


def _log_x(axis: Any) -> None:
    """A logarithmic axis of plain numbers; call it once all is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _wrapped(name: str) -> str:
    name = name.replace(", BN/plain", "").replace(", each", ",\neach")
    return re.sub(r" (over |after |in units|from)", r"\n\1", name)
