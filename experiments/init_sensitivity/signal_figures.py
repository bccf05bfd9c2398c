"""The figures of `experiments.init_sensitivity` about the signal before training."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import PALETTE, Figure, new_figure, save_figure, shared_legend

_MARKERS = "os^Dv"
_BAND = 0.5  # of the claim, in decades


def draw_layers(config: Any, signal: list[dict], path: Path) -> Figure:
    """Scale of the pre-activations, layer by layer."""
    fig, axis = new_figure(height=4.4)
    for index, network in enumerate(config.signal_networks):
        records = [
            r
            for r in signal
            if r["network"] == network and r["input_scale"] == "standardized" and r["a"] == config.a
        ]
        color = PALETTE[index % len(PALETTE)]
        measured = np.array([record["measured"] for record in records])
        layers = np.arange(1, measured.shape[1] + 1)
        axis.plot(layers, records[0]["predicted"], color=color, linewidth=1, linestyle="--")
        axis.errorbar(
            layers,
            measured.mean(axis=0),
            yerr=[
                measured.mean(axis=0) - measured.min(axis=0),
                measured.max(axis=0) - measured.mean(axis=0),
            ],
            color=color,
            linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            label=network,
        )
    axis.axhspan(-12, -10, color="#dddddd", zorder=0)
    axis.text(1, -11, "the Notes: “of the order of 1e-11”", va="center", fontsize=9)
    axis.set_xlabel("weight layer")
    axis.set_ylabel("log₁₀ root mean square of pre-activations")
    shared_legend(fig, columns=1)
    return save_figure(
        fig,
        path,
        title="The signal dies layer by layer",
        alt="log10 of the pre-activation scale against the layer, for several"
        " networks: straight falls of one to two decades a layer, measured points on the "
        "theory's dashed lines.",
        caption=f"At initialization, weights from U(−{config.a:g}, {config.a:g}), no BN, "
        f"standardized images resized to {config.signal_size}×{config.signal_size}×3. Points: mean "
        f"of {config.seeds} seeds, bars from the lowest to the highest; dashed: theory.",
        claims=("tiny-init-vanishing-signal",),
    )


def draw_prediction(config: Any, signal: list[dict], path: Path) -> Figure:
    """Every layer of every network: measured against predicted scale, and their difference."""
    fig, (top, bottom) = new_figure(rows=2, height=6.4)
    for index, network in enumerate(config.signal_networks):
        records = [record for record in signal if record["network"] == network]
        predicted = np.concatenate([record["predicted"] for record in records])
        measured = np.concatenate([record["measured"] for record in records])
        look = dict(
            color=PALETTE[index % len(PALETTE)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle="none",
            markersize=3.5,
            alpha=0.5,
        )
        top.plot(predicted, measured, label=network, **look)
        bottom.plot(predicted, measured - predicted, **look)
    low, high = top.get_xlim()
    top.plot([low, high], [low, high], color="black", linewidth=1, linestyle="--")
    bottom.axhspan(-_BAND, _BAND, color="#dddddd", zorder=0)
    bottom.axhline(0, color="black", linewidth=1, linestyle="--")
    bottom.set_xlabel("log₁₀ σ by theory")
    top.set_ylabel("log₁₀ σ measured")
    bottom.set_ylabel("measured − theory")
    shared_legend(fig, columns=1)
    widths = sorted({record["a"] for record in signal})
    scales = sorted({record["input_scale"] for record in signal})
    return save_figure(
        fig,
        path,
        title="Predicted against measured scale, every layer of every network",
        alt="Measured log10 scale of the pre-activations against theory: points along the diagonal "
        "over many decades; below, their differences, mostly within half a decade.",
        caption=f"A point for each weight layer, network, seed ({config.seeds}), input scale "
        f"({', '.join(scales)}) at a = {config.a:g}, and a = "
        f"{', '.join(f'{a:g}' for a in widths)} on standardized images. Dashed: theory; grey: the "
        f"half decade of the claim.",
        claims=("tiny-init-vanishing-signal",),
    )
