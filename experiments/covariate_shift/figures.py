"""The figures of `experiments.covariate_shift`."""

from collections.abc import Mapping
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
from bn_research.models.spec import num_weight_layers
from experiments.covariate_shift.verdicts import (
    DRIFT,
    OWN,
    PLAIN,
    SAME,
    SHIFT,
    Runs,
    drift_ratios,
    shift_ratios,
    small_weights,
)

_GREY = "#777777"
_COLORS = {PLAIN: PALETTE.vermillion, SAME: PALETTE.blue, OWN: PALETTE.green}
_SHORT = {PLAIN: "plain", SAME: "BN, same settings", OWN: "BN, its own best"}
_BAND = "Line: mean of {seeds} seeds; band: lowest to highest."


def draw(config: Any, runs: Mapping[str, Runs], folder: Path) -> list[Figure]:
    """All figures, in the order of the report; most are of the first comparison, the claims'.

    Args:
      config: of the run.
      runs: comparison -> arm -> records by seed.
      folder: where the PNG files go.
    """
    first = next(iter(runs.values()))
    small = runs.get(small_weights(config))
    judged = ("distribution-drift-reduced",)
    figures = [
        _draw_figure_1(config, first, "", judged, folder / "figure_1.png"),
        _draw_ratios(config, runs, folder / "ratios.png"),
        _draw_gradients(config, first, folder / "gradient_shift.png"),
        _draw_units(config, first, folder / "drift_by_unit.png"),
    ]
    if small is not None:
        words = f", with weights of {config.small_init_std:g}"
        figures.append(_draw_figure_1(config, small, words, (), folder / "figure_1_small.png"))
    return figures


def _curves(records, key, pick=lambda values: values) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and [seeds, steps] of a quantity; NaN where a run has ended before the others."""
    longest = max(records, key=lambda record: len(record["step"]))
    curves = np.full((len(records), len(longest["step"])), np.nan)
    for curve, record in zip(curves, records, strict=True):
        values = pick(np.array(record[key], float))
        curve[: len(values)] = values
    return np.array(longest["step"]), curves


def _draw_figure_1(config, runs, words, claims, path) -> Figure:
    fig, axes = new_figure(rows=3, width=5.4, height=8.4)
    for arm, records in runs.items():
        steps, curves = _curves(records, "evaluated")
        band(axes[0], steps, curves, label=_SHORT[arm], color=_COLORS[arm])
    axes[0].set_ylabel("test accuracy")
    low = min(np.nanmin(_curves(rs, "evaluated")[1][:, -1]) for rs in runs.values())
    axes[0].set_ylim(max(0.0, 2 * low - 1), 1.0)
    for axis, arm in zip(axes[1:], (PLAIN, SAME), strict=True):
        record = runs[arm][0]
        color = _COLORS[arm]
        fan = np.array(record["fan"], float)
        axis.fill_between(record["step"], fan[:, 0], fan[:, 2], color=_GREY, alpha=0.2, linewidth=0)
        axis.plot([], [], color=_GREY, alpha=0.3, linewidth=7, label="medians of 80 % of the units")
        if record["path"] is not None:
            low, middle, high = np.array(record["typical"], float).T
            axis.plot(record["step"], middle, color=color, label=f"{_SHORT[arm]}: median")
            for line in (low, high):
                axis.plot(record["step"], line, color=color, linewidth=1.0, linestyle="--")
        axis.set_ylabel(f"input of the {config.activations[0]}")
        axis.set_title(f"{_SHORT[arm]}: a typical unit's 15, 50, 85 %", fontsize=10.5, loc="left")
    axes[-1].set_xlabel("training steps")
    handles = {}
    for axis in (axes[0], axes[1]):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if ": median" not in label:
                handles[label] = handle
    fig.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=2, frameon=False
    )
    return save_figure(
        fig,
        path,
        title=f"Figure 1 of Ioffe & Szegedy, rebuilt{words}",
        alt="Above, test accuracy against training steps, from first to last: "
        f"{line_ends(axes[0])}. Below, the 15th, 50th and 85th percentiles of one unit's input "
        f"over the same steps; {line_ends(axes[1])}; {line_ends(axes[2])}.",
        caption=f"{config.dataset}, {config.network}, batches of {config.batch_size}. "
        f"{_BAND.format(seeds=config.seeds)} Below, seed 0: of the last hidden layer the unit "
        "whose drift is the median one; dashed its 15th and 85th percentile, grey the range of the "
        f"medians of the middle 80 % of all units. Percentiles of {config.measuring_images} test "
        "images, with BN by their own statistics, after its scale and bias; accuracy on test "
        "images by the running statistics.",
        claims=claims,
    )


def _draw_units(config, runs, path) -> Figure:
    fig, axis = new_figure(height=3.8, width=5.4)
    medians = []
    for arm, records in runs.items():
        paths = [np.sort(np.array(r["path"], float)) for r in records if r["path"] is not None]
        if paths:
            medians.append(f"{_SHORT[arm]}: {np.median(np.concatenate(paths)):.2g}")
        for index, values in enumerate(paths):
            share = (np.arange(len(values)) + 0.5) / len(values)
            label = _SHORT[arm] if index == 0 else None
            axis.plot(values, 100 * share, color=_COLORS[arm], linewidth=1.3, label=label)
    _log_x(axis)
    axis.set_xlabel("drift of a unit, in widths of its distribution")
    axis.set_ylabel("share of the units with less, %")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="How far the inputs of all last hidden units drift",
        alt="Cumulative share of the last hidden units against their drift on a logarithmic axis, "
        f"one S-shaped line for each seed. Median drift: {'; '.join(medians)}.",
        caption="Drift: the path of a unit's {15, 50, 85} percentiles over the whole training, in "
        f"widths r = p85 − p15, measured every {config.steps_per_dispatch} steps. A line for each "
        f"of {config.seeds} seeds. {config.dataset}, {config.activations[0]} units.",
        claims=("distribution-drift-reduced",),
    )


def _draw_gradients(config, runs, path) -> Figure:
    layers = range(2, num_weight_layers(config.network) + 1)
    fig, axes = new_figure(rows=len(layers), width=5.4, height=2.5 * len(layers) + 0.8)
    for axis, layer in zip(np.ravel(axes), layers, strict=True):
        for arm in (PLAIN, SAME):
            for key, line, words in (("relative", "-", "shift"), ("noise", ":", "noise floor")):
                steps, curves = _curves(runs[arm], key, lambda values, at=layer - 1: values[:, at])
                if key == "relative":
                    band(
                        axis,
                        steps,
                        np.where(curves > 0, curves, np.nan),
                        label=f"{_SHORT[arm]}: {words}",
                        color=_COLORS[arm],
                    )
                else:
                    axis.plot(
                        steps,
                        np.nanmean(curves, axis=0),
                        color=_COLORS[arm],
                        linestyle=line,
                        linewidth=1.4,
                        label=f"{_SHORT[arm]}: {words}",
                    )
        axis.set_yscale("log")
        head = " (head)" if layer == layers[-1] else ""
        axis.set_title(f"layer {layer}{head}", fontsize=10.5, loc="left")
        axis.set_ylabel("‖G − G′‖/‖G‖")
    np.ravel(axes)[-1].set_xlabel("training steps")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="How far a layer's gradient moves when the layers below take their step",
        alt="Relative gradient shift against training steps on a logarithmic axis, a panel for "
        "each layer from the second on, and the noise floors as dotted lines. In the last panel, "
        f"from first to last: {line_ends(np.ravel(axes)[-1])}.",
        caption="G: gradient on the batch of the next step; G′: the same after the layers below "
        "have taken that step. Dotted: the distance between the gradients of two disjoint batches "
        f"of {config.batch_size} at the same parameters, mean over seeds. {config.dataset}, "
        f"{config.activations[0]}, both at the plain network's settings. "
        f"{_BAND.format(seeds=config.seeds)}",
        claims=("gradient-shift-not-reduced",),
    )


def _draw_ratios(config, runs, path) -> Figure:
    count = len(runs)
    fig, axes = new_figure(rows=2, width=5.4, height=4.0 + 2.2 * count)
    markers, first_rows = "os^Dvp", []
    for axis, of, criterion in ((axes[0], drift_ratios, DRIFT), (axes[1], shift_ratios, SHIFT)):
        names: list[str] = []
        told = []
        for index, (name, arms) in enumerate(runs.items()):
            ratios = of(config, arms)
            names = list(ratios)
            for row, found in enumerate(ratios.values()):
                if found is None:
                    continue
                at = row + 0.3 * (index - (count - 1) / 2)
                mean = found.mean.low
                if row == 0:
                    told.append(f"{name}: {mean:.2g}")
                ends = [(mean - found.low,), (found.high - mean,)]
                sound = found.pairs > 1 and np.isfinite(found.high)
                axis.errorbar(
                    mean,
                    at,
                    xerr=ends if sound else None,
                    fmt=markers[index],
                    markersize=6,
                    capsize=3,
                    color=PALETTE[index],
                    label=name if row == 0 else None,
                )
        first_rows.append("; ".join(told))
        axis.axvline(1, color=_GREY, linewidth=1.2)
        if criterion != 1:
            axis.axvline(criterion, color=_GREY, linewidth=1.2, linestyle="--")
        _log_x(axis)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_yticks(range(len(names)), [_wrapped(name) for name in names])
        axis.grid(visible=False, axis="y")
    axes[1].set_xlabel("BN/plain")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="Drift and gradient shift, BN over plain",
        alt="Ratios of BN to plain with intervals on a logarithmic axis, a row for each way of "
        f"measuring. Above, of the drift of distributions; first row: {first_rows[0]}. Below, of "
        f"the gradient shift; first row: {first_rows[1]}.",
        caption="Geometric mean over seeds and its 95 % interval. The first row of each panel is "
        f"the claim's; grey: 1; dashed: {DRIFT}, at most which the drift must be. 'After the "
        "plateau' is not shown where a plain network stays on it.",
        claims=("distribution-drift-reduced", "gradient-shift-not-reduced"),
    )


def _log_x(axis) -> None:
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
    words = name.replace(", BN/plain", "").replace(", each", ",\neach").replace(" over ", "\nover ")
    return (
        words.replace(" after ", "\nafter ")
        .replace(" in units", "\nin units")
        .replace(" from", "\nfrom")
    )
