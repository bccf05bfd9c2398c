"""A probe of the signal as a figure."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import PALETTE, Figure, new_figure, save_figure
from bn_research.probes.signal.layers import Layers
from bn_research.probes.signal.verdict import in_words

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 24  # layers, above which the figure numbers them
_LOWEST = 1e-4  # of the largest singular value, where bars of smaller ones end


def draw(signal: Layers, path: str | Path) -> Figure:
    """See `Signal.figure`."""
    layers, verdict = list(signal.values()), in_words(signal)
    places = np.arange(1, len(layers) + 1)
    ranges = np.array([layer.jacobian or (np.nan,) * 3 for layer in layers], np.float64)
    has_jacobians = bool(np.any(np.isfinite(ranges) & (ranges > 0)))
    named = len(layers) <= _NAMED
    longest = max(len(layer.name) for layer in layers) if named else 0
    count = 3 + has_jacobians
    fig, axes = new_figure(rows=count, width=4.6, height=1.55 * count + 0.4 + 0.065 * longest)
    std, gradient, *middle, rank = axes
    sizes = [_positive(layer.std) for layer in layers]
    _curve(std, places, sizes, PALETTE.blue, "pre-activation\nstd")
    sizes = [
        np.nan if layer.log10_gradient_norm is None else _positive(10**layer.log10_gradient_norm)
        for layer in layers
    ]
    _curve(gradient, places, sizes, PALETTE.vermillion, "gradient\n‖∂L/∂h‖")
    if middle:
        _draw_ranges(middle[0], places, ranges)
    ranks = [layer.soft_rank for layer in layers]
    _curve(rank, places, ranks, PALETTE.purple, "soft rank")
    most = [layer.max_rank for layer in layers]
    rank.plot(places, most, ":", color="#777777", drawstyle="steps-mid")
    _log_scale(rank, np.array([*ranks, *most], np.float64))
    for axis in axes:
        axis.set_xlim(0.5, len(layers) + 0.5)
        if axis is not rank:
            axis.tick_params(labelbottom=False)
        if named:
            axis.set_xticks(places)
    if named:
        rank.set_xticklabels([layer.name for layer in layers], rotation=90, fontsize=8)
    else:
        rank.set_xlabel("layer")
    fig.align_ylabels()
    return save_figure(
        fig,
        path,
        title="Signal at initialization",
        alt=f"Pre-activations, gradients and soft rank of {len(layers)} layers; {verdict}",
        caption="From the first layer to the last: standard deviation of the pre-activations, norm "
        "of the gradient with respect to them, "
        + (
            "singular values of the Jacobian from the layer before (bars: smallest to largest, "
            "line: rms), "
            if has_jacobians
            else ""
        )
        + "and how many different directions the examples take (dotted: as many as there can be). "
        "Zeros and what is unknown are left out. " + verdict.replace("\n", " "),
    )


def _positive(value: float) -> float:
    return value if value > 0 and math.isfinite(value) else math.nan


def _curve(axis: Axes, places: np.ndarray, values: Any, color: str, label: str) -> None:
    values = np.asarray(values, np.float64)
    axis.plot(places, values, "o-", color=color, markersize=4)
    axis.set_ylabel(label)
    _log_scale(axis, values)


def _draw_ranges(axis: Axes, places: np.ndarray, ranges: np.ndarray) -> None:
    smallest, rms, largest = np.where(np.isfinite(ranges), ranges, np.nan).T
    floor = _LOWEST * np.nanmax(largest)
    low = np.where(smallest < floor, floor, smallest)  # half of a ReLU's singular values are 0
    width = min(6, 150 / len(places))  # of the 250 points that the panel has
    axis.vlines(places, low, largest, color=PALETTE.green, alpha=0.3, linewidth=width)
    _curve(axis, places, np.where(rms > 0, rms, np.nan), PALETTE.green, "Jacobian's σ")
    _log_scale(axis, np.concatenate([low, largest]))


def _log_scale(axis: Axes, values: np.ndarray) -> None:
    """A logarithmic axis of whole decades, and ticks at few powers of ten."""
    values = values[np.isfinite(values) & (values > 0)]
    axis.set_yscale("log")
    low, high = (values.min(), values.max()) if len(values) else (1.0, 1.0)
    low, high = math.floor(np.log10(low)), math.ceil(np.log10(high))
    high = max(high, low + 1)
    room = 0.08 * (high - low)
    axis.set_ylim(10.0 ** (low - room), 10.0 ** (high + room))
    axis.set_yticks(10.0 ** np.arange(low, high + 1, math.ceil((high - low) / 4)))
    axis.minorticks_off()
