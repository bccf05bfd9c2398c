"""The figures of `experiments.init_sensitivity`."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import plots
from bn_research.claims.alt_text import line_ends
from bn_research.claims.figures import PALETTE, Figure, band, new_figure, save_all, shared_legend
from bn_research.claims.judging import by_seed, numbers
from bn_research.claims.plots import over_seeds
from bn_research.models.spec import num_logits
from experiments.init_sensitivity import Config
from experiments.init_sensitivity.training import Cell, Records, last_cells, layer_rows
from experiments.init_sensitivity.verdicts import OPTIMIZERS, RESCUED, accuracies, escape

_MARKERS = "os^Dv"
_BAND = 0.5  # of the claim about the signal, in decades


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    draws = [
        _loss_curves,
        _accuracy_against_a,
        _escape_time,
        _epsilon_optimizer_bias,
        _single_layer,
        _signal_by_layer,
        _signal_against_theory,
        _schemes,
    ]
    return save_all(draws, folder, config, records)


def _nearest(config: Config) -> float:
    """The width of the robustness sweep that comes next to the run's own."""
    return min(config.widths, key=lambda a: abs(math.log(a / config.a)))


def _loss_curves(config: Config, records: Records) -> Any:
    """Which arm trains."""
    nearest, epsilon = _nearest(config), config.epsilons[-1]
    shown = {  # label -> role and look
        "plain, SGD": ("plain", PALETTE.black, "-"),
        "plain, Adam": ("plain, Adam", PALETTE.purple, ":"),
        "plain, He init": ("plain, he", PALETTE.green, "-"),
        "BN last, ε = 0, SGD": (str(RESCUED), PALETTE.blue, "-"),
        f"BN last, ε = {epsilon:g}, SGD": (str(Cell(epsilon)), PALETTE.orange, "--"),
        f"BN last, ε = {epsilon:g}, Adam": (str(Cell(epsilon, "adam")), PALETTE.sky, "-"),
        "BN on all layers": (f"all a={nearest:g}", PALETTE.vermillion, "-"),
    }
    steps, window = config.num_steps, max(1, config.num_steps // 40)
    fig, axis = new_figure(height=4.2)
    for label, (role, color, style) in shown.items():
        if role in records.best:
            losses = plots.padded([r["loss"][:steps] for r in records.best[role]], steps)
            curves, x = plots.running_mean(losses, window), np.arange(1, steps + 1)
            band(axis, x, curves, label=label, color=color, linestyle=style)
    axis.set(ylim=(0, 3.2), xlabel="step", ylabel="training loss (nats)")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Training loss against steps: plain SGD stays flat at ln 10; BN on the last layer "
        "with epsilon 0, BN on all layers and He initialization fall.",
        caption=f"Each arm at its best rate of its grid; initialization U(−{config.a:g}, "
        f"{config.a:g}) except He's (BN on all layers: {nearest:g}). {over_seeds(config.seeds)}; "
        f"smoothed over {window} steps. The arms on the plateau at ln(classes) lie on one another.",
        claims=("no-training-without-bn", "bn-last-layer-suffices"),
    )


def _accuracy_against_a(config: Config, records: Records) -> Any:
    """How small may the initial weights be?"""
    fig, axis = new_figure()
    arms = {"BN on all layers": ("all", PALETTE.vermillion), "plain": ("none", PALETTE.black)}
    for label, (placement, color) in arms.items():
        rows = [accuracies(records.best, f"{placement} a={a:g}") for a in config.widths]
        band(axis, config.widths, np.transpose(rows), label=label, color=color, marker="o")
    axis.set(xscale="log", ylim=(0, 1), xlabel="a, weights from U(−a, a)", ylabel="test accuracy")
    shared_legend(fig)
    return fig, dict(
        alt="Test accuracy against a: with BN on all layers it stays high from 1e-4 to 1, without "
        "BN it is high near 0.1 only.",
        caption=f"After {config.width_steps} steps, each point at its best rate of the grid "
        f"{config.width_rates}. {over_seeds(config.seeds)}.",
        claims=("init-robustness",),
    )


def _column(optimizer: str, use_bias: bool) -> str:
    return f"{OPTIMIZERS[optimizer]}, {'biases' if use_bias else 'no biases'}"


def _escape_time(config: Config, records: Records) -> Any:
    """ε and the optimizer decide how long the plateau is."""
    fig, axis = new_figure(height=4.4)
    for column, color, marker in zip(config.columns, PALETTE, _MARKERS, strict=False):
        epsilons, steps, exponent = escape(config, records.best, *column)
        label = f"{_column(*column)}: {f'ε^{exponent.mean:.2f}' if exponent else 'no fit'}"
        whole, x = np.isfinite(steps).all(axis=1), np.repeat(epsilons, config.seeds)
        axis.plot(x, steps.ravel(), marker, color=color, markersize=5, alpha=0.7, label=label)
        for epsilon in epsilons[~whole]:
            axis.plot(epsilon, 1.25 * config.escape_steps, marker, color=color, fillstyle="none")
        if exponent is None:
            continue
        x = np.log10(epsilons[whole])
        height = np.log10(steps[whole]).mean(axis=1).mean()
        ends = np.array([x.min(), x.max()])
        axis.plot(10**ends, 10 ** (height + exponent.mean * (ends - x.mean())), color=color)
        if column == ("sgd", False):
            half = 10 ** (height + 0.5 * (ends - x.mean()))
            axis.plot(10**ends, half, color="black", linestyle="--", label="theory: ε^0.50")
    labels = dict(xlabel="ε of the BN before the softmax", ylabel="steps to leave the plateau")
    axis.set(xscale="log", yscale="log", **labels)
    axis.xaxis.set_minor_formatter("")  # their numbers would overlap
    shared_legend(fig, columns=1)
    return fig, dict(
        alt="Steps until the loss leaves ln 10 against epsilon, both logarithmic: with SGD and no "
        "biases a straight line of slope about one half; Adam leaves at far larger epsilon.",
        caption=f"BN on the last layer, SGD at rate {config.escape_rate:g}, Adam at "
        f"{config.adam_escape_rate:g}. A run has left the plateau when a batch's loss is 0.1 below "
        f"that of guessing. Points: {config.seeds} seeds; hollow, above: some seed had not left "
        f"after {config.escape_steps} steps, or diverged, and its ε is left out of the fit.",
        claims=("bn-last-layer-suffices",),
    )


def _epsilon_optimizer_bias(config: Config, records: Records) -> Any:
    """BN on the last layer: ε, optimizer and biases."""
    columns = [_column(*column) for column in config.columns]
    means = [accuracies(records.best, cell).mean() for cell in last_cells(config)]
    table = np.reshape(means, (len(config.epsilons), len(columns)))
    names = [f"ε = {epsilon:g}" for epsilon in config.epsilons]
    fig, axis = new_figure(height=1.4 + 0.45 * len(names))
    axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value > 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axis.grid(visible=False)
    axis.set_xticks(range(len(columns)), [column.replace(", ", "\n") for column in columns])
    axis.set_yticks(range(len(names)), names)
    cells = [", ".join(f"{value:.2f}" for value in values) for values in table]
    rows = map("{}: {}.".format, names, cells)
    return fig, dict(
        alt=f"Table of test accuracies, columns {'; '.join(columns)}. {' '.join(rows)}",
        caption=f"Test accuracy after {config.num_steps} steps, mean of {config.seeds} seeds, each "
        "cell at its best rate of its optimizer's grid.",
        claims=("bn-last-layer-suffices",),
    )


def _single_layer(config: Config, records: Records) -> Any:
    """Which single layer's BN is enough?"""
    if not config.layers:
        return None
    fig, axis = new_figure(height=3.8)
    layers, best = [*config.layers, max(config.layers) + 1], records.best
    unknown = np.full(config.seeds, math.nan)
    for row, color in zip(layer_rows(config), PALETTE, strict=False):
        found = [accuracies(best, cell) if str(cell) in best else unknown for cell in row]
        label = f"{OPTIMIZERS[row[0].optimizer]}, ε = {row[0].epsilon:g}"
        band(axis, layers, np.transpose(found), label=label, color=color, marker="o")
    plots.reference(axis, y=1 / num_logits(config.network), linestyle=":", linewidth=1.5)
    labels = dict(xlabel="the one weight layer with BN", ylabel="test accuracy")
    axis.set(ylim=(0, 1), xticks=layers, **labels)
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Test accuracy against the number of the one layer with BN, from the first layer to "
        f"the last: {line_ends(axis)}.",
        caption=f"Weights from U(−{config.a:g}, {config.a:g}), no biases, {config.num_steps} steps "
        f"at the best rate of each point's grid. {over_seeds(config.seeds)}; dotted: guessing.",
        claims=("last-layer-only",),
    )


def _networks(config: Config) -> Iterator[tuple[str, str, str]]:
    """Those whose signal is measured, each with a colour and a marker."""
    looks = itertools.cycle(PALETTE), itertools.cycle(_MARKERS)
    return zip(config.signal_networks, *looks, strict=False)


def _signal_by_layer(config: Config, records: Records) -> Any:
    """The signal dies layer by layer."""
    fig, axis = new_figure(height=4.4)
    for network, color, marker in _networks(config):
        group = by_seed(records.signal, network=network, input_scale="standardized", a=config.a)
        measured = numbers(group, "measured")
        layers = np.arange(1, measured.shape[1] + 1)
        axis.plot(layers, group[0]["predicted"], color=color, linewidth=1, linestyle="--")
        look = dict(color=color, marker=marker, markersize=5, label=network)
        plots.points(axis, layers, measured, **look)
    axis.axhspan(-12, -10, color="#dddddd", zorder=0)
    axis.text(1, -11, "the Notes: “of the order of 1e-11”", va="center", fontsize=9)
    axis.set(xlabel="weight layer", ylabel="log₁₀ root mean square of pre-activations")
    shared_legend(fig, columns=1)
    return fig, dict(
        alt="log10 of the pre-activation scale against the layer, for several networks: straight "
        "falls of one to two decades a layer, measured points on the theory's dashed lines.",
        caption=f"At initialization, weights from U(−{config.a:g}, {config.a:g}), no BN, "
        f"standardized images resized to {config.signal_size}×{config.signal_size}×3. Points: mean "
        f"of {config.seeds} seeds, bars from the lowest to the highest; dashed: theory.",
        claims=("tiny-init-vanishing-signal",),
    )


def _signal_against_theory(config: Config, records: Records) -> Any:
    """Predicted against measured scale, every layer of every network."""
    fig, (top, bottom) = new_figure(rows=2, height=6.4)
    for network, color, marker in _networks(config):
        group = [record for record in records.signal if record["network"] == network]
        predicted, measured = (numbers(group, key).ravel() for key in ("predicted", "measured"))
        look = dict(color=color, markersize=3.5, alpha=0.5)
        top.plot(predicted, measured, marker, label=network, **look)
        bottom.plot(predicted, measured - predicted, marker, **look)
    ends = top.get_xlim()
    top.plot(ends, ends, color="black", linewidth=1, linestyle="--")
    bottom.axhspan(-_BAND, _BAND, color="#dddddd", zorder=0)
    plots.reference(bottom, y=0, color="black", linewidth=1)
    top.set_ylabel("log₁₀ σ measured")
    bottom.set(xlabel="log₁₀ σ by theory", ylabel="measured − theory")
    shared_legend(fig, columns=1)
    scales, widths = (sorted({r[key] for r in records.signal}) for key in ("input_scale", "a"))
    return fig, dict(
        alt="Measured log10 scale of the pre-activations against theory: points along the diagonal "
        "over many decades; below, their differences, mostly within half a decade.",
        caption=f"A point for each weight layer, network, seed ({config.seeds}), input scale "
        f"({', '.join(scales)}) at a = {config.a:g}, and a = "
        f"{', '.join(f'{a:g}' for a in widths)} on standardized images. Dashed: theory; grey: the "
        "half decade of the claim.",
        claims=("tiny-init-vanishing-signal",),
    )


def _schemes(config: Config, records: Records) -> Any:
    """Initializations beside BN."""
    nearest, uniform = _nearest(config), f"U(−{config.a:g}, {config.a:g})"
    names = dict(he="He", lecun="LeCun", glorot="Glorot", fixup="Fixup-style: He, head of zeros")
    arms = {
        f"plain, {uniform}": "plain",
        **{f"plain, {names.get(scheme, scheme)}": f"plain, {scheme}" for scheme in config.schemes},
        f"BN last, ε = 0, {uniform}": str(RESCUED),
        f"BN on all layers, U(−{nearest:g}, {nearest:g})": f"all a={nearest:g}",
    }
    fig, axis = new_figure(height=1.2 + 0.34 * len(arms), width=5.6)
    means = []
    for row, (label, role) in enumerate(arms.items()):
        values = accuracies(records.best, role)
        means.append(f"{label}: {values.mean():.2f}")
        color = PALETTE.blue if label.startswith("BN") else PALETTE.black
        axis.plot(values, np.full(len(values), row), "o", color=color, alpha=0.5, markersize=5)
        axis.plot(values.mean(), row, "|", color=color, markersize=14, markeredgewidth=2)
    plots.name_rows(axis, list(arms))
    axis.set(xlim=(0, 1), xlabel="test accuracy")
    return fig, dict(
        alt=f"Test accuracy of each seed, rows by initialization. Means: {'; '.join(means)}.",
        caption=f"SGD, each at the best rate of its grid, after {config.num_steps} steps (BN on "
        f"all layers: {config.width_steps}). Points: {config.seeds} seeds; bar: their mean.",
        claims=("no-training-without-bn",),
    )
