"""The figures of `experiments.signal_propagation`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import (
    PALETTE,
    Figure,
    band,
    new_figure,
    save_figure,
    shared_legend,
)
from experiments.signal_propagation.measurements import (
    JACOBIAN_BATCH,
    JACOBIAN_WIDTH,
    middle,
)
from experiments.signal_propagation.theory import LIMIT, growth, residual_variances

_GREY = "#777777"
_COLORS = {"BN": PALETTE.blue, "none": PALETTE.vermillion}
_NAMES = {"BN": "with BN", "none": "without BN"}
_BAND = "Line: mean of {seeds} seeds; band: lowest to highest."


def draw(
    config: Any, records: Mapping[str, Sequence[Mapping[str, Any]]], num_classes: int, folder: Path
) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      records: by kind: gradients, jacobians, residuals, ranks, trained.
      num_classes: of the data set, for the accuracy of chance.
      folder: where the PNG files go.
    """
    return [
        _draw_gradients(config, records["gradients"], folder / "gradients.png"),
        _draw_jacobians(config, records["jacobians"], folder / "jacobians.png"),
        _draw_residual(config, records["residuals"], folder / "residual_variance.png"),
        _draw_ranks(config, records["ranks"], folder / "soft_rank.png"),
        _draw_training(config, records["trained"], num_classes, folder / "depth.png"),
    ]


def _settings(records, activation, batch_size) -> list[Mapping[str, Any]]:
    return [
        setting
        for record in records
        for setting in record["settings"]
        if (setting["activation"], setting["batch_size"]) == (activation, batch_size)
    ]


def _draw_gradients(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=7.4)
    layers = np.arange(config.gradient_depth)
    first, last = middle(config.gradient_depth)
    colors = (*PALETTE[:5], PALETTE.sky)
    for index, batch in enumerate(config.batch_sizes):
        settings = _settings(records, "relu", batch)
        curves = np.array([setting["squared"] for setting in settings], dtype=float)
        color = colors[index % len(colors)]
        band(axes[0], layers, curves, label=f"B = {batch}", color=color)
        centre = (first + last) / 2
        height = np.interp(centre, layers, np.log(curves).mean(axis=0))
        theory = np.exp(height + (centre - layers) * np.log(settings[0]["theory"]))
        label = "_" if index < len(config.batch_sizes) - 1 else "theory"
        axes[0].plot(layers, theory, color="black", linestyle=":", linewidth=1.2, label=label)
    control = np.array([record["control"]["squared"] for record in records], dtype=float)
    band(axes[0], layers, control, label="no BN, He", color=_GREY, linestyle="--")
    axes[0].axvspan(first, last, color=_GREY, alpha=0.08, linewidth=0)
    axes[0].set_yscale("log")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("‖∂L/∂h‖², relative to the top")
    sizes = np.geomspace(min(config.batch_sizes), max(config.batch_sizes), 60)
    for activation, name, color, marker in (
        ("relu", "ReLU", PALETTE.blue, "o"),
        ("linear", "linear", PALETTE.vermillion, "s"),
    ):
        whole = np.unique(np.round(sizes).astype(int))
        theory = [growth(activation, int(size)) for size in whole]
        axes[1].plot(whole, theory, color="black", linestyle=":", linewidth=1.2)
        rates = np.array(
            [[s["rate"] for s in _settings(records, activation, b)] for b in config.batch_sizes]
        )
        middle_rate = rates.mean(axis=1)
        spread = [middle_rate - rates.min(axis=1), rates.max(axis=1) - middle_rate]
        axes[1].errorbar(
            config.batch_sizes,
            middle_rate,
            spread,
            color=color,
            marker=marker,
            markersize=5,
            linestyle="",
            capsize=3,
            label=name,
        )
    axes[1].axhline(LIMIT, color=_GREY, linestyle="--", linewidth=1.2, label="π/(π − 1)")
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(config.batch_sizes, [str(size) for size in config.batch_sizes])
    axes[1].minorticks_off()
    axes[1].set_xlabel("B, examples in a batch")
    axes[1].set_ylabel("growth of ‖∂L/∂h‖² per layer")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="BN makes gradients explode with depth, as mean-field theory says",
        alt="Above, squared gradient norm against layer on a log axis: straight lines that rise "
        "towards the input for every batch size, steepest for the smallest batch, flat without "
        "BN. Below, growth per layer against batch size: points of ReLU fall towards pi over pi "
        "minus 1, points of linear networks towards 1, both on the curves of theory.",
        caption=f"Networks of {config.gradient_width} units at initialization. Above: ReLU, "
        f"gradient with respect to the pre-activations. {_BAND.format(seeds=len(records))} Dotted: "
        "the slope of mean-field theory through the middle. Grey: the layers that rates are taken "
        "from; the lowest layer is given its input, whose variance is another. Below: rates; bars: "
        "lowest to highest seed; dotted: theory.",
        claims=("gradient-explosion",),
    )


def _draw_jacobians(config, records, path) -> Figure:
    fig, axis = new_figure(height=3.6)
    for name in ("BN", "none"):
        curves = np.array([record[name]["quantiles"] for record in records], dtype=float)
        share = np.linspace(0, 100, curves.shape[1])
        band(axis, share, curves, label=_NAMES[name], color=_COLORS[name])
    axis.axhline(1, color="black", linestyle=":", linewidth=1.2, label="the conjecture: 1")
    axis.set_xlabel("singular values below, %")
    axis.set_ylabel("singular value of a layer's Jacobian")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="The Jacobian of a BN layer does not have singular values near 1",
        alt="Quantiles of the singular values: about half are zero, the rest rise through 1 to "
        "more than 2, and the largest are larger with BN than without.",
        caption="Jacobian of a ReLU layer's pre-activations in those of the layer below, over a "
        f"batch of {JACOBIAN_BATCH}, {JACOBIAN_WIDTH} units: all {JACOBIAN_BATCH * JACOBIAN_WIDTH} "
        f"singular values in order. {_BAND.format(seeds=len(records))}",
        claims=("gradient-explosion",),
    )


def _draw_residual(config, records, path) -> Figure:
    fig, axis = new_figure(height=3.8)
    layers = np.arange(config.residual_depth + 1)
    theory = residual_variances(config.residual_depth)
    for name, law in (("none", "2^l"), ("BN", "1 + l")):
        curves = np.array([record[name] for record in records], dtype=float)
        band(axis, layers, curves, label=_NAMES[name], color=_COLORS[name])
        shown = "$2^l$" if law == "2^l" else law
        style = "--" if name == "BN" else ":"
        axis.plot(layers, theory[name], color="black", linestyle=style, linewidth=1.2, label=shown)
    axis.set_yscale("log")
    axis.set_xlabel("l, residual layers")
    axis.set_ylabel("variance of the stream")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="BN turns the growth of a residual stream from exponential to linear",
        alt="Variance against layer on a log axis: without BN a straight line that doubles in each "
        "layer, with BN a flattening curve, both on the curves of theory.",
        caption="Mean square over units and examples at initialization, x ← x + W·relu(x) without "
        f"BN and x ← x + W·relu(BN(x)) with it. A seed is the mean of {config.residual_networks} "
        f"networks of {config.residual_width} units. {_BAND.format(seeds=len(records))}",
        claims=("residual-variance",),
    )


def _draw_ranks(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.0, height=6.6)
    widest = max(config.rank_widths)
    of_widest = [record for record in records if record["width"] == widest]
    for name in ("BN", "none"):
        curves = np.array([record[name]["ranks"] for record in of_widest], dtype=float)
        band(axes[0], of_widest[0]["layers"], curves, label=_NAMES[name], color=_COLORS[name])
        key = "mean" if name == "BN" else "last"
        rows = np.array(
            [
                [r[name][key] for r in records if r["width"] == width]
                for width in config.rank_widths
            ],
            dtype=float,
        )
        line = band(axes[1], config.rank_widths, rows.T, label=_NAMES[name], color=_COLORS[name])
        line.set(marker="o", markersize=5)
    widths = np.array(sorted(config.rank_widths), dtype=float)
    for values, style, label in ((widths, ":", "d"), (np.sqrt(widths), "--", "√d")):
        axes[1].plot(widths, values, color="black", linestyle=style, linewidth=1.2, label=label)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel(f"soft rank, d = {widest}")
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(config.rank_widths, [str(width) for width in config.rank_widths])
    axes[1].set_xlabel("d, units and examples")
    axes[1].set_ylabel("soft rank of deep networks")
    for axis in axes:
        axis.set_yscale("log", base=2)
        low, high = axis.get_ylim()
        ticks = [2**k for k in range(0, int(np.log2(high)) + 1)]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(min(low, 0.9), high)
        axis.minorticks_off()
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="BN keeps deep linear networks from collapsing to rank 1",
        alt="Above, soft rank against layer: without BN it falls to 1, with BN it settles above. "
        "Below, soft rank of deep networks against width: 1 without BN at every width, with BN "
        "along the square root of d.",
        caption=f"Linear networks of d units on d examples, {config.rank_depth} layers; soft rank "
        "(Σλ)²/Σλ² of HHᵀ. Above: the widest. Below: with BN the mean over the upper half of the "
        f"layers, without it at the last. {_BAND.format(seeds=config.seeds)}",
        claims=("rank-collapse",),
    )


def _draw_training(config, records, num_classes, path) -> Figure:
    fig, axis = new_figure(height=3.8)
    depths = sorted(config.train_depths)
    for residual, name, color in (
        (True, "residual BN", PALETTE.blue),
        (False, "plain BN", PALETTE.vermillion),
    ):
        rows = [
            [r["accuracy"] for r in records if (r["residual"], r["depth"]) == (residual, depth)]
            for depth in depths
        ]
        line = band(axis, depths, np.array(rows, dtype=float).T, label=name, color=color)
        line.set(marker="o", markersize=5)
    axis.axhline(1 / num_classes, color=_GREY, linestyle="--", linewidth=1.2, label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(depths, [str(depth) for depth in depths])
    axis.minorticks_off()
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("depth, hidden dense layers after the first")
    axis.set_ylabel("test accuracy")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="Deep plain BN networks do not train; with skip connections they do",
        alt="Test accuracy against depth: of residual networks flat, of plain ones equal to it at "
        "the smallest depth and falling to chance at the largest.",
        caption=f"{config.dataset}, {config.train_width} units, {config.num_steps} steps of "
        "momentum SGD, each arm and depth at its best rate of the same grid. Test set, by "
        f"population statistics. {_BAND.format(seeds=config.seeds)}",
        claims=("deep-bn-untrainable",),
    )
