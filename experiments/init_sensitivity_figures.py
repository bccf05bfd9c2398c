"""The figures of `experiments.init_sensitivity`."""

import math
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


def draw(
    config: Any,
    signal: list[dict],
    best: dict[str, list[dict]],
    steps: np.ndarray,
    exponent: Any,
    folder: Path,
) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      signal: records of the signal at initialization.
      best: role -> records of its best rate, by seed.
      steps: steps to leave the plateau, [ε, seed], NaN where it was not left.
      exponent: Estimate of the exponent of the steps in ε, or None.
      folder: where the PNG files go.
    """
    return [
        _draw_signal(config, signal, folder / "signal_by_layer.png"),
        _draw_losses(config, best, folder / "loss_curves.png"),
        _draw_widths(config, best, folder / "accuracy_against_a.png"),
        _draw_escape(config, steps, exponent, folder / "escape_time.png"),
        _draw_grid(config, best, folder / "epsilon_optimizer_bias.png"),
    ]


def grid_cell(epsilon: float, optimizer: str, use_bias: bool) -> str:
    """Name of a cell of the ε × optimizer × bias grid of BN on the last layer."""
    return f"last ε={epsilon:g} {optimizer}{' bias' if use_bias else ''}"


def _draw_signal(config, signal, path):
    fig, axis = new_figure(height=4.4)
    markers = "os^Dv"
    for index, network in enumerate(config.signal_networks):
        records = [
            r for r in signal if r["network"] == network and r["input_scale"] == "standardized"
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
            marker=markers[index % len(markers)],
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
    )


def _draw_losses(config, best, path):
    nearest = min(config.widths, key=lambda a: abs(math.log(a / config.a)))
    curves = {
        "plain, SGD": ("plain", PALETTE.black, "-"),
        "plain, Adam": ("plain, Adam", PALETTE.purple, ":"),
        "plain, He init": ("plain, He", PALETTE.green, "-"),
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
    )


def _draw_escape(config, steps, exponent, path):
    fig, axis = new_figure()
    epsilons = np.array(config.escape_epsilons)
    for row, epsilon in enumerate(epsilons):
        escaped = steps[row][np.isfinite(steps[row])]
        axis.plot(np.full(len(escaped), epsilon), escaped, "o", color=PALETTE.blue, markersize=5)
        lost = int(np.isnan(steps[row]).sum())
        if lost:
            axis.plot(epsilon, config.escape_steps, "^", color=PALETTE.vermillion, markersize=7)
            axis.annotate(
                f"{lost} not yet",
                (epsilon, config.escape_steps),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    if exponent is not None:
        whole = np.isfinite(steps).all(axis=1)
        x, y = np.log10(epsilons[whole]), np.log10(steps[whole]).mean(axis=1)
        middle = x.mean(), y.mean()
        ends = np.array([x.min(), x.max()])
        line = middle[1] + exponent.mean * (ends - middle[0])
        axis.plot(10**ends, 10**line, color=PALETTE.blue, label=f"fit: ε^{exponent.mean:.2f}")
        half = middle[1] + 0.5 * (ends - middle[0])
        axis.plot(10**ends, 10**half, color=PALETTE.black, linestyle="--", label="theory: ε^0.5")
        shared_legend(fig)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("ε of the BN before the softmax")
    axis.set_ylabel("steps to leave the plateau")
    return save_figure(
        fig,
        path,
        title="ε decides how long the plateau is",
        alt="Steps until the loss leaves ln 10 against epsilon, both logarithmic: a straight "
        "line of slope about one half.",
        caption=f"BN on the last layer, SGD at rate {config.escape_rate:g}, no biases. A run has "
        "left the plateau when a batch's loss is 0.1 below that of guessing. Points: seeds; "
        f"triangles: not yet after {config.escape_steps} steps, left out of the fit.",
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
    axis.grid(visible=False)
    axis.set_xticks(
        range(len(columns)),
        [
            f"{o.replace('sgd', 'SGD').replace('adam', 'Adam')}"
            + ("\nbiases" if b else "\nno biases")
            for o, b in columns
        ],
    )
    axis.set_yticks(range(len(config.epsilons)), [f"ε = {e:g}" for e in config.epsilons])
    return save_figure(
        fig,
        path,
        title="BN on the last layer: ε, optimizer and biases",
        alt="Table of test accuracies by epsilon, optimizer and biases.",
        caption=f"Test accuracy after {config.num_steps} steps, mean of {config.seeds} seeds, each "
        "cell at its best rate of its optimizer's grid.",
    )
