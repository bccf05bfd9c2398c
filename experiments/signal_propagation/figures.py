"""The figures of `experiments.signal_propagation`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import figures
from bn_research.claims.figures import GREY, PALETTE, band, new_figure, save_all, shared_legend
from bn_research.claims.judging import Record, by_seed, numbers
from bn_research.claims.plots import bands, log_ticks, over_seeds, points, reference
from bn_research.probes.mean_field import LIMIT, growth, residual_variances
from experiments.signal_propagation import Config, measurements
from experiments.signal_propagation.measurements import JACOBIAN_BATCH, JACOBIAN_WIDTH, Records

Drawn = tuple[Any, dict[str, Any]]  # a figure, and its words

_COLORS = {"BN": PALETTE.blue, "none": PALETTE.vermillion}
_NAMES = {"BN": "with BN", "none": "without BN"}
_THEORY: dict[str, Any] = dict(color="black", linewidth=1.2)  # its lines, each of its own style


def draw(config: Config, records: Records, folder: Path) -> list[figures.Figure]:
    """All figures, in the order of the report."""
    drawn = (_gradients, _jacobians, _residual_variance, _soft_rank, _depth)
    return save_all(drawn, folder, config, records)


def _gradients(config: Config, records: Records) -> Drawn:
    """BN makes gradients explode with depth, as mean-field theory says."""
    fig, axes = new_figure(rows=2, width=5.4, height=7.4)

    settings = [s | {"seed": r["seed"]} for r in records.gradients for s in r["settings"]]

    def found(activation: str, batch: int, key: str) -> np.ndarray:
        return numbers(by_seed(settings, activation=activation, batch_size=batch), key)

    layers = np.arange(config.gradient_depth)
    first, last = measurements.middle(config.gradient_depth)
    centre = (first + last) / 2
    for batch, color in zip(config.batch_sizes, itertools.cycle(PALETTE[:6]), strict=False):
        curves = found("relu", batch, "squared")
        band(axes[0], layers, curves, label=f"B = {batch}", color=color)
        height = np.interp(centre, layers, np.log(curves).mean(axis=0))
        theory = np.exp(height + (centre - layers) * np.log(growth("relu", batch)))
        label = "theory" if batch == config.batch_sizes[-1] else "_"
        axes[0].plot(layers, theory, linestyle=":", label=label, **_THEORY)
    control = numbers(records.gradients, lambda record: record["control"]["squared"])
    band(axes[0], layers, control, label="no BN, He", color=GREY, linestyle="--")
    axes[0].axvspan(first, last, color=GREY, alpha=0.08, linewidth=0)
    axes[0].set(yscale="log", xlabel="layer", ylabel="‖∂L/∂h‖², relative to the top")
    sizes = np.geomspace(min(config.batch_sizes), max(config.batch_sizes), 60)
    whole = np.unique(np.round(sizes).astype(int)).tolist()
    for activation, name, color, marker in (
        ("relu", "ReLU", PALETTE.blue, "o"),
        ("linear", "linear", PALETTE.vermillion, "s"),
    ):
        axes[1].plot(whole, [growth(activation, b) for b in whole], linestyle=":", **_THEORY)
        rates = np.transpose([found(activation, batch, "rate") for batch in config.batch_sizes])
        look = dict(color=color, marker=marker, markersize=5, capsize=3, label=name)
        points(axes[1], config.batch_sizes, rates, **look)
    reference(axes[1], y=LIMIT, label="π/(π − 1)")
    log_ticks(axes[1], config.batch_sizes)
    axes[1].set(xlabel="B, examples in a batch", ylabel="growth of ‖∂L/∂h‖² per layer")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Above, squared gradient norm against layer on a log axis: straight lines that rise "
        "towards the input for every batch size, steepest for the smallest batch, flat without "
        "BN. Below, growth per layer against batch size: points of ReLU fall towards pi over pi "
        "minus 1, points of linear networks towards 1, both on the curves of theory.",
        caption=f"Networks of {config.gradient_width} units at initialization. Above: ReLU, "
        f"gradient with respect to the pre-activations. {over_seeds(config.seeds)}. Dotted: "
        "the slope of mean-field theory through the middle. Grey: the layers that rates are taken "
        "from; the lowest layer is given its input, whose variance is another. Below: rates; bars: "
        "lowest to highest seed; dotted: theory.",
        claims=("gradient-explosion",),
    )


def _of_arms(records: Sequence[Record], key: str) -> dict[str, np.ndarray]:
    return {arm: numbers((record[arm] for record in records), key) for arm in _NAMES}


def _jacobians(config: Config, records: Records) -> Drawn:
    """The Jacobian of a BN layer does not have singular values near 1."""
    fig, axis = new_figure(height=3.6)
    curves = _of_arms(records.jacobians, "quantiles")
    share = np.linspace(0, 100, curves["BN"].shape[1])
    bands(axis, share, curves, _COLORS, names=_NAMES)
    reference(axis, y=1, color="black", linestyle=":", label="the conjecture: 1")
    axis.set(xlabel="singular values below, %", ylabel="singular value of a layer's Jacobian")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Quantiles of the singular values: about half are zero, the rest rise through 1 to "
        "more than 2, and the largest are larger with BN than without.",
        caption="Jacobian of a ReLU layer's pre-activations in those of the layer below, over a "
        f"batch of {JACOBIAN_BATCH}, {JACOBIAN_WIDTH} units: all {JACOBIAN_BATCH * JACOBIAN_WIDTH} "
        f"singular values in order. {over_seeds(config.seeds)}.",
        claims=("gradient-explosion",),
    )


def _residual_variance(config: Config, records: Records) -> Drawn:
    """BN turns the growth of a residual stream from exponential to linear."""
    fig, axis = new_figure(height=3.8)
    theory = residual_variances(config.residual_depth)
    layers = np.arange(config.residual_depth + 1)
    for arm, law, style in (("none", "$2^l$", ":"), ("BN", "1 + l", "--")):
        bands(axis, layers, {arm: numbers(records.residuals, arm)}, _COLORS, names=_NAMES)
        axis.plot(layers, theory[arm], linestyle=style, label=law, **_THEORY)
    axis.set(yscale="log", xlabel="l, residual layers", ylabel="variance of the stream")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Variance against layer on a log axis: without BN a straight line that doubles in each "
        "layer, with BN a flattening curve, both on the curves of theory.",
        caption="Mean square over units and examples at initialization, x ← x + W·relu(x) without "
        f"BN and x ← x + W·relu(BN(x)) with it. A seed is the mean of {config.residual_networks} "
        f"networks of {config.residual_width} units. {over_seeds(config.seeds)}.",
        claims=("residual-variance",),
    )


def _soft_rank(config: Config, records: Records) -> Drawn:
    """BN keeps deep linear networks from collapsing to rank 1."""
    fig, axes = new_figure(rows=2, width=5.0, height=6.6)
    widths = sorted(config.rank_widths)
    by_width = {width: by_seed(records.ranks, width=width) for width in config.rank_widths}
    widest = by_width[widths[-1]]
    bands(axes[0], widest[0]["layers"], _of_arms(widest, "ranks"), _COLORS, names=_NAMES)
    deep = {
        arm: np.transpose([_of_arms(found, key)[arm] for found in by_width.values()])
        for arm, key in (("BN", "mean"), ("none", "last"))
    }
    bands(axes[1], config.rank_widths, deep, _COLORS, names=_NAMES, marker="o", markersize=5)
    axes[1].plot(widths, widths, linestyle=":", label="d", **_THEORY)
    axes[1].plot(widths, np.sqrt(widths), linestyle="--", label="√d", **_THEORY)
    axes[0].set(xscale="log", xlabel="layer", ylabel=f"soft rank, d = {widths[-1]}")
    log_ticks(axes[1], config.rank_widths)
    axes[1].set(xlabel="d, units and examples", ylabel="soft rank of deep networks")
    for axis in axes:
        axis.set_yscale("log", base=2)
        low, high = axis.get_ylim()
        log_ticks(axis, [2**k for k in range(int(np.log2(high)) + 1)], side="y")
        axis.set_ylim(min(low, 0.9), high)
        axis.minorticks_off()
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Above, soft rank against layer: without BN it falls to 1, with BN it settles above. "
        "Below, soft rank of deep networks against width: 1 without BN at every width, with BN "
        "along the square root of d.",
        caption=f"Linear networks of d units on d examples, {config.rank_depth} layers; soft rank "
        "(Σλ)²/Σλ² of HHᵀ. Above: the widest. Below: with BN the mean over the upper half of the "
        f"layers, without it at the last. {over_seeds(config.seeds)}.",
        claims=("rank-collapse",),
    )


def _depth(config: Config, records: Records) -> Drawn:
    """Deep plain BN networks do not train; with skip connections they do."""
    fig, axis = new_figure(height=3.8)
    depths = sorted(config.train_depths)
    for residual, name, color in (
        (True, "residual BN", PALETTE.blue),
        (False, "plain BN", PALETTE.vermillion),
    ):
        found = [by_seed(records.trained, residual=residual, depth=depth) for depth in depths]
        accuracies = np.transpose([numbers(runs, "accuracy") for runs in found])
        band(axis, depths, accuracies, label=name, color=color, marker="o", markersize=5)
    reference(axis, y=1 / records.num_classes, label="chance")
    log_ticks(axis, depths)
    xlabel = "depth, hidden dense layers after the first"
    axis.set(ylim=(0, 1.03), xlabel=xlabel, ylabel="test accuracy")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Test accuracy against depth: of residual networks flat, of plain ones equal to it at "
        "the smallest depth and falling to chance at the largest.",
        caption=f"{config.dataset}, {config.train_width} units, {config.num_steps} steps of "
        "momentum SGD, each arm and depth at its best rate of the same grid. Test set, by "
        f"population statistics. {over_seeds(config.seeds)}.",
        claims=("deep-bn-untrainable",),
    )
