"""The figures of `experiments.init_sensitivity`."""

import itertools
import math
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
from experiments.init_sensitivity.signal_figures import draw_layers, draw_prediction
from experiments.init_sensitivity.verdicts import (
    Best,
    escape_epsilons,
    escape_slope,
    escape_steps,
    grid_cell,
    layer_cells,
)


def draw(config: Any, signal: list[dict], best: Best, folder: Path) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      signal: records of the signal at initialization.
      best: role -> records of its best rate, by seed.
      folder: where the PNG files go.
    """
    figures = [
        _draw_losses(config, best, folder / "loss_curves.png"),
        _draw_widths(config, best, folder / "accuracy_against_a.png"),
        _draw_escape(config, best, folder / "escape_time.png"),
        _draw_grid(config, best, folder / "epsilon_optimizer_bias.png"),
    ]
    if config.layers:
        figures.append(_draw_single(config, best, folder / "single_layer.png"))
    return [
        *figures,
        draw_layers(config, signal, folder / "signal_by_layer.png"),
        draw_prediction(config, signal, folder / "signal_against_theory.png"),
        _draw_schemes(config, best, folder / "schemes.png"),
    ]


def _draw_losses(config, best, path):
    nearest = min(config.widths, key=lambda a: abs(math.log(a / config.a)))
    curves = {
        "plain, SGD": ("plain", PALETTE.black, "-"),
        "plain, Adam": ("plain, Adam", PALETTE.purple, ":"),
        "plain, He init": ("plain, he", PALETTE.green, "-"),
        "BN last, ε = 0, SGD": (grid_cell(0.0, "sgd", False), PALETTE.blue, "-"),
        f"BN last, ε = {config.epsilons[-1]:g}, SGD": (
            grid_cell(config.epsilons[-1], "sgd", False),
            PALETTE.orange,
            "--",
        ),
        f"BN last, ε = {config.epsilons[-1]:g}, Adam": (
            grid_cell(config.epsilons[-1], "adam", False),
            PALETTE.sky,
            "-",
        ),
        "BN on all layers": (f"all a={nearest:g}", PALETTE.vermillion, "-"),
    }
    curves = {label: curve for label, curve in curves.items() if curve[0] in best}
    fig, axis = new_figure(height=4.2)
    window = max(1, config.num_steps // 40)
    for label, (role, color, style) in curves.items():
        rows = [_smooth(record["loss"], config.num_steps, window) for record in best[role]]
        x = np.arange(1, config.num_steps + 1)
        band(axis, x, rows, label=label, color=color, linestyle=style)
    axis.set_ylim(0, 3.2)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats)")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Which arm trains",
        alt="Training loss against steps: plain SGD stays flat at ln 10; BN on the last layer "
        "with epsilon 0, BN on all layers and He initialization fall.",
        caption=f"Each arm at its best rate of its grid; initialization U(−{config.a:g}, "
        f"{config.a:g}) except He's (BN on all layers: {nearest:g}). Line: mean of {config.seeds} "
        f"seeds; band: lowest to highest; smoothed over {window} steps. The arms on the plateau at "
        "ln(classes) lie on one another.",
        claims=("no-training-without-bn", "bn-last-layer-suffices"),
    )


def _smooth(loss: list[float | None], length: int, window: int) -> np.ndarray:
    """Running mean of the last `window` losses, padded with NaN to the length."""
    values = np.full(length, np.nan)
    loss = loss[:length]
    values[: len(loss)] = np.array(loss, dtype=float)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(length)])


def _draw_widths(config, best, path):
    fig, axis = new_figure()
    for placement, label, color in (
        ("all", "BN on all layers", PALETTE.vermillion),
        ("none", "plain", PALETTE.black),
    ):
        rows = np.array(
            [[record["accuracy"] for record in best[f"{placement} a={a:g}"]] for a in config.widths]
        ).T
        line = band(axis, config.widths, rows, label=label, color=color)
        line.set_marker("o")
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xlabel("a, weights from U(−a, a)")
    axis.set_ylabel("test accuracy")
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="How small may the initial weights be?",
        alt="Test accuracy against a: with BN on all layers it stays high from 1e-4 to 1, without "
        "BN it is high near 0.1 only.",
        caption=f"After {config.width_steps} steps, each point at its best rate of the grid "
        f"{config.width_rates}. Line: mean of {config.seeds} seeds; band: lowest to highest.",
        claims=("init-robustness",),
    )


def _column(optimizer: str, use_bias: bool) -> str:
    name = {"sgd": "SGD", "adam": "Adam"}[optimizer]
    return f"{name}, {'biases' if use_bias else 'no biases'}"


def _draw_escape(config, best, path):
    fig, axis = new_figure(height=4.4)
    rates = {"sgd": config.escape_rate, "adam": config.adam_escape_rate}
    columns = list(itertools.product(config.optimizers, config.biases))
    for (optimizer, use_bias), color, marker in zip(columns, PALETTE, "os^D", strict=False):
        steps = escape_steps(config, best, optimizer, use_bias)
        epsilons = np.array(escape_epsilons(config, optimizer))
        exponent = escape_slope(config, best, optimizer, use_bias)
        label = _column(optimizer, use_bias)
        label += f": ε^{exponent.mean:.2f}" if exponent else ": no fit"
        x = np.repeat(epsilons, config.seeds)
        # Side by side, so that a whole column of seeds that has not left can be counted.
        shown = np.where(np.isfinite(steps), steps, np.nan).ravel()
        axis.plot(x, shown, marker, color=color, markersize=5, alpha=0.7, label=label)
        lost = np.isnan(steps).sum(axis=1)
        for epsilon in epsilons[lost > 0]:
            axis.plot(epsilon, 1.25 * config.escape_steps, marker, color=color, fillstyle="none")
        whole = lost == 0
        if exponent is not None:
            logs = np.log10(epsilons[whole]), np.log10(steps[whole]).mean(axis=1)
            ends = np.array([logs[0].min(), logs[0].max()])
            line = logs[1].mean() + exponent.mean * (ends - logs[0].mean())
            axis.plot(10**ends, 10**line, color=color)
            if (optimizer, use_bias) == ("sgd", False):
                half = logs[1].mean() + 0.5 * (ends - logs[0].mean())
                axis.plot(10**ends, 10**half, color="black", linestyle="--", label="theory: ε^0.50")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter("")  # their numbers would overlap
    axis.set_xlabel("ε of the BN before the softmax")
    axis.set_ylabel("steps to leave the plateau")
    shared_legend(fig, columns=1)
    return save_figure(
        fig,
        path,
        title="ε and the optimizer decide how long the plateau is",
        alt="Steps until the loss leaves ln 10 against epsilon, both logarithmic: with SGD and no "
        "biases a straight line of slope about one half; Adam leaves at far larger epsilon.",
        caption=f"BN on the last layer, SGD at rate {rates['sgd']:g}, Adam at {rates['adam']:g}. A "
        "run has left the plateau when a batch's loss is 0.1 below that of guessing. Points: "
        f"{config.seeds} seeds; hollow, above: some seed had not left after {config.escape_steps} "
        "steps, or diverged, and its ε is left out of the fit.",
        claims=("bn-last-layer-suffices",),
    )


def _draw_single(config, best, path):
    fig, axis = new_figure(height=3.8)
    layers = [*config.layers, max(config.layers) + 1]
    for (optimizer, epsilon), color in zip(layer_cells(config), PALETTE, strict=False):
        roles = [grid_cell(epsilon, optimizer, False, layer) for layer in (*config.layers, "last")]
        rows = [
            [record["accuracy"] for record in best[role]]
            if role in best
            else [np.nan] * config.seeds
            for role in roles
        ]
        name = {"sgd": "SGD", "adam": "Adam"}[optimizer]
        line = band(axis, layers, np.array(rows).T, label=f"{name}, ε = {epsilon:g}", color=color)
        line.set_marker("o")
    axis.axhline(1 / num_logits(config.network), color="#777777", linestyle=":")
    axis.set_ylim(0, 1)
    axis.set_xticks(layers)
    axis.set_xlabel("the one weight layer with BN")
    axis.set_ylabel("test accuracy")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Which single layer's BN is enough?",
        alt="Test accuracy against the number of the one layer with BN, from the first layer to "
        f"the last: {line_ends(axis)}.",
        caption=f"Weights from U(−{config.a:g}, {config.a:g}), no biases, {config.num_steps} steps "
        f"at the best rate of each point's grid. Line: mean of {config.seeds} seeds; band: lowest "
        "to highest; dotted: guessing.",
        claims=("last-layer-only",),
    )


def _draw_schemes(config, best, path):
    nearest = min(config.widths, key=lambda a: abs(math.log(a / config.a)))
    names = {
        "he": "He",
        "lecun": "LeCun",
        "glorot": "Glorot",
        "orthogonal": "orthogonal",
        "fixup": "Fixup-style: He, head of zeros",
    }
    arms = {f"plain, U(−{config.a:g}, {config.a:g})": "plain"}
    arms |= {f"plain, {names[scheme]}": f"plain, {scheme}" for scheme in config.schemes}
    arms |= {
        f"BN last, ε = 0, U(−{config.a:g}, {config.a:g})": grid_cell(0.0, "sgd", False),
        f"BN on all layers, U(−{nearest:g}, {nearest:g})": f"all a={nearest:g}",
    }
    fig, axis = new_figure(height=1.2 + 0.34 * len(arms), width=5.6)
    means = []
    for row, (label, role) in enumerate(arms.items()):
        values = [record["accuracy"] for record in best[role]]
        means.append(f"{label}: {np.mean(values):.2f}")
        color = PALETTE.blue if label.startswith("BN") else PALETTE.black
        axis.plot(values, np.full(len(values), row), "o", color=color, alpha=0.5, markersize=5)
        axis.plot(np.mean(values), row, "|", color=color, markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel("test accuracy")
    return save_figure(
        fig,
        path,
        title="Initializations beside BN",
        alt=f"Test accuracy of each seed, rows by initialization. Means: {'; '.join(means)}.",
        caption=f"SGD, each at the best rate of its grid, after {config.num_steps} steps (BN on "
        f"all layers: {config.width_steps}). Points: {config.seeds} seeds; bar: their mean.",
        claims=("no-training-without-bn",),
    )


def _draw_grid(config, best, path):
    columns = [(optimizer, bias) for optimizer in config.optimizers for bias in config.biases]
    table = np.array(
        [
            [
                np.mean([r["accuracy"] for r in best[grid_cell(epsilon, *column)]])
                for column in columns
            ]
            for epsilon in config.epsilons
        ]
    )
    fig, axis = new_figure(height=1.4 + 0.45 * len(config.epsilons))
    axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        axis.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            color="white" if value > 0.6 else "black",
        )
    rows = [
        f"ε = {epsilon:g}: {', '.join(f'{value:.2f}' for value in values)}"
        for epsilon, values in zip(config.epsilons, table, strict=True)
    ]
    axis.grid(visible=False)
    axis.set_xticks(
        range(len(columns)),
        [_column(*column).replace(", ", "\n") for column in columns],
    )
    axis.set_yticks(range(len(config.epsilons)), [f"ε = {e:g}" for e in config.epsilons])
    return save_figure(
        fig,
        path,
        title="BN on the last layer: ε, optimizer and biases",
        alt=f"Table of test accuracies, columns {'; '.join(_column(*c) for c in columns)}. "
        f"{'. '.join(rows)}.",
        caption=f"Test accuracy after {config.num_steps} steps, mean of {config.seeds} seeds, each "
        "cell at its best rate of its optimizer's grid.",
        claims=("bn-last-layer-suffices",),
    )
