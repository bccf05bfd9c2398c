"""The figures of `experiments.scale_invariance`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import PALETTE, Figure, band, new_figure, save_figure, shared_legend

_FLOOR = 1e-17  # where a deviation of zero is drawn
_NETWORKS = {
    "BN": PALETTE.blue,
    "BN, ε > 0": PALETTE.sky,
    "BN, bias inside": PALETTE.purple,
    "no BN": PALETTE.vermillion,
}
_GREY = "#777777"


def draw(config: Any, records: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path):
    """All figures, in the order of the report.

    Args:
      config: of the run.
      records: by kind: backprop, losses, tangent, effective, exponential, equilibrium.
      folder: where the PNG files go.
    """
    return [
        _draw_identities(config, records["backprop"], folder / "identities.png"),
        _draw_losses(config, records["losses"], folder / "loss_against_scale.png"),
        _draw_growth(config, records["tangent"], folder / "norm_growth.png"),
        _draw_effective(config, records["effective"], folder / "effective_rate.png"),
        _draw_exponential(config, records["exponential"], folder / "exponential_rate.png"),
        _draw_angles(config, records["equilibrium"], folder / "equilibrium_angle.png"),
        _draw_approach(config, records["equilibrium"], folder / "approach.png"),
    ]


def _draw_losses(config, records, path) -> Figure:
    fig, axis = new_figure(height=3.8)
    names = [name for name in _NETWORKS if name in records[0]]
    for name in names:
        curves = np.array([record[name] for record in records], dtype=float)
        line = band(axis, config.scales, curves, label=name, color=_NETWORKS[name])
        line.set(linewidth=3.2 if name == "BN, ε > 0" else 1.8)
        if name == "BN":
            line.set(linestyle="--", color=PALETTE.black, zorder=4)
    axis.axhline(np.log(10), color=_GREY, linestyle=":", linewidth=1.2)
    axis.set_xscale("log")
    steady = np.array([[record[name] for name in names[:3]] for record in records], dtype=float)
    axis.set_ylim(np.log(10) - 0.5, steady.max() + 1)  # without BN it grows as a³ and more
    axis.set_xlabel("a, factor of all hidden kernels")
    axis.set_ylabel("training loss at initialization")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="With BN the loss does not see the scale of the weights",
        alt="Loss against the factor of the weights, logarithmic: flat with BN and epsilon 0; with "
        "epsilon 1e-5 flat but for the smallest factors; without BN it leaves the figure, and with "
        "a bias inside it is not flat.",
        caption="Kernels of all layers but the head times a; BN with ε = 0, and with "
        f"ε = {config.epsilon:g}. Bias inside: BN on the last layer "
        "alone, and biases below it, which are not scaled. Dotted: ln 10. Line: mean of "
        f"{config.seeds} seeds; band: lowest to highest.",
        claims=("scale-invariant-backprop",),
    )


def _draw_identities(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    colors = dict(
        zip(("value", "input gradient", "weight gradient", "exact form"), PALETTE, strict=False)
    )
    for name, color in colors.items():
        curves = [
            record[interface][name] for record in records for interface in ("functions", "linen")
        ]
        worst = np.maximum(np.max(curves, axis=0), _FLOOR)
        axes[0].plot(config.scales, worst, "o-", color=color, markersize=4, label=name)
    axes[0].axhline(1e-12, color=_GREY, linestyle=":")
    axes[0].set_ylabel("largest deviation")
    shown = {
        "no BN": (lambda record: record["no BN"], PALETTE.vermillion),
        "bias inside": (lambda record: record["bias inside"], PALETTE.purple),
        f"ε = {config.epsilon:g} ignored": (
            lambda record: record["functions"]["ε ignored"],
            PALETTE.sky,
        ),
        "bias right before BN": (lambda record: record["bias before BN"], PALETTE.black),
    }
    for label, (pick, color) in shown.items():
        worst = np.maximum(np.max([pick(record) for record in records], axis=0), _FLOOR)
        axes[1].plot(config.scales, worst, "s-", color=color, markersize=4, label=label)
    axes[1].set_ylabel("largest deviation, controls")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axes[1].set_xlabel("a, factor of the weights")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="The identities hold to the last digits of float64, and only with BN",
        alt="Deviations against the factor of the weights, logarithmic: about 1e-15 for all four "
        "identities; of order one without BN and with a bias inside.",
        caption="Largest over seeds, dense and conv layers, pure functions and linen; relative to "
        "the largest value. Value: BN(aWu) against BN(Wu); gradients likewise; exact form: "
        "BN_ε(aWu) against BN_{ε/a²}(Wu) with its gradients. Below: what must deviate does; with "
        "ε ignored, BN_ε(aWu) against BN_ε(Wu), small weights do. A bias right before BN changes "
        "nothing. Dotted: 1e-12.",
        claims=("scale-invariant-backprop",),
    )


def _draw_growth(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    first = next(record for record in records if record["network"] == "BN")
    squared, predicted = (np.array(first[key], dtype=float) for key in ("squared", "predicted"))
    for layer, color in zip(range(squared.shape[1]), PALETTE, strict=False):
        label = f"hidden layer {layer + 1}"
        axes[0].plot(first["steps"], squared[:, layer], color=color, linewidth=3.2, alpha=0.5)
        axes[0].plot(first["steps"], predicted[:, layer], "--", color=color, label=label)
    control = next(record for record in records if record["network"] == "no BN")
    axes[0].plot(
        control["steps"],
        np.array(control["squared"], dtype=float)[:, -1],
        color=_GREY,
        linewidth=3.2,
        alpha=0.5,
    )
    axes[0].plot(
        control["steps"],
        np.array(control["predicted"], dtype=float)[:, -1],
        "--",
        color=_GREY,
        label="no BN, last hidden",
    )
    axes[0].set_ylabel("‖w‖², over that at the start")
    axes[0].legend(frameon=False, fontsize=9)
    for name in dict.fromkeys(record["network"] for record in records):
        curves = np.array([r["shares"] for r in records if r["network"] == name], dtype=float)
        curves = np.maximum(curves, _FLOOR)
        band(axes[1], first["steps"], curves, label=name, color=_NETWORKS[name])
    axes[1].axhline(1e-12, color=_GREY, linestyle=":")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("largest |⟨w, ∇L⟩|/(‖w‖‖∇L‖)")
    axes[1].set_xlabel("step of plain SGD")
    axes[1].legend(frameon=False, fontsize=9, loc="center right")
    return save_figure(
        fig,
        path,
        title="The gradient is a tangent, so the weights grow as by Pythagoras",
        alt="Above, squared norms of three hidden layers grow along the dashed theory, and without "
        "BN leave it; below, the radial share of the gradient is 1e-16 with BN and 0.01 to 1 "
        "without.",
        caption="Above, seed 0: ‖w‖² (broad) against ‖w₀‖² + Σ η²‖∇L‖² (dashed). Below: share of "
        f"the gradient that is radial, largest over hidden layers; mean of {config.seeds} seeds, "
        "band: lowest to highest. Dotted: 1e-12.",
        claims=("gradient-is-tangent",),
    )


def _draw_effective(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=5.6)
    for record in records:
        axes[0].plot(
            record["steps"],
            record["loss"],
            color=PALETTE.blue if record["momentum"] else PALETTE.vermillion,
            linewidth=1,
            alpha=0.7,
            label=f"momentum {record['momentum']:g}",
        )
        for (c, values), color in zip(record["differences"].items(), PALETTE[2:], strict=False):
            axes[1].plot(
                record["steps"],
                np.maximum(np.array(values, dtype=float), _FLOOR),
                color=color,
                linewidth=1,
                label=f"c = {c}",
            )
    axes[0].set_ylabel("training loss")
    axes[1].axhline(1e-10, color=_GREY, linestyle=":")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("|difference|")
    axes[1].set_xlabel("step")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="Only η/‖w‖² counts",
        alt="Above, losses of training; below, differences between losses of equivalent settings, "
        "far below the dotted line at 1e-10.",
        caption="Above: loss of each batch with η, λ and w₀, each seed. Below: its difference from "
        "the loss with c²η, λ/c² and c·w₀; zero is drawn at 1e-17. Dotted: 1e-10.",
        claims=("effective-learning-rate",),
    )


def _draw_exponential(config, records, path) -> Figure:
    fig, axes = new_figure(rows=3, width=5.4, height=7.6)
    first = records[0]
    axes[0].plot(first["steps"], first["constant"], color=PALETTE.orange, linewidth=1,
                 label="constant rate, no decay")  # fmt: skip
    axes[0].plot(first["steps"], first["decay"], color=PALETTE.sky, linewidth=3.2,
                 label="constant rate, weight decay")  # fmt: skip
    axes[0].plot(first["steps"], first["exponential"], "--", color=PALETTE.black, linewidth=1,
                 label="growing rate, no decay")  # fmt: skip
    axes[0].set_ylabel("training loss")
    axes[0].set_yscale("log")
    for record in records:
        axes[1].plot(record["steps"], record["rates"], color=PALETTE.black, linewidth=1.4)
        difference = np.maximum(np.array(record["differences"], dtype=float), _FLOOR)
        axes[2].plot(record["steps"], difference, color=PALETTE.blue, linewidth=1, alpha=0.7)
    axes[1].set_yscale("log")
    axes[1].set_ylabel("rate without decay")
    axes[2].axhline(1e-10, color=_GREY, linestyle=":")
    axes[2].set_yscale("log")
    axes[2].set_ylabel("|difference of losses|")
    axes[2].set_xlabel("step of momentum SGD")
    shared_legend(fig, columns=1)
    return save_figure(
        fig,
        path,
        title="Weight decay is an exponentially growing rate",
        alt="Above, the losses with decay and with a growing rate lie on each other, that of a "
        "constant rate without decay does not; the rate grows exponentially; the difference of the "
        "losses stays below 1e-10.",
        caption="Above: loss of each batch, seed 0. Middle: the rate that stands for the decay. "
        f"Below: difference of the two losses, each of {len(records)} seeds; zero is drawn at "
        "1e-17. Rounding errors grow with the steps as training amplifies them. Dotted: 1e-10.",
        claims=("exponential-rate-equals-weight-decay",),
    )


def _draw_angles(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    judged = [record for record in records if record["network"] == config.network]
    theory = np.array([min(r["predicted"] for r in judged), max(r["predicted"] for r in judged)])
    theory *= (0.8, 1.25)
    axes[0].plot(theory, theory, color=_GREY, linewidth=1.2)
    axes[0].fill_between(theory, 0.95 * theory, 1.05 * theory, color=_GREY, alpha=0.25, linewidth=0)
    axes[1].axhspan(0.95, 1.05, color=_GREY, alpha=0.25, linewidth=0)
    axes[1].axhline(1, color=_GREY, linewidth=1.2)
    layers = judged[0]["layers"]
    for index, color in zip(range(len(layers)), PALETTE, strict=False):
        for momentum, marker in zip(
            dict.fromkeys(r["momentum"] for r in judged), "os", strict=False
        ):
            chosen = [record for record in judged if record["momentum"] == momentum]
            x = np.array([record["predicted"] for record in chosen])
            y = np.array([record["rms"][index] for record in chosen])
            label = f"layer {index + 1}, momentum {momentum:g}"
            look = dict(color=color, markersize=5, fillstyle="none", alpha=0.7)
            shift = 1 + 0.02 * (index - 1)  # side by side
            axes[0].plot(x * shift, y, marker, label=label, **look)
            axes[1].plot(x * shift, y / x, marker, **look)
    ratios = np.array([np.array(record["rms"]) / record["predicted"] for record in judged])
    ticks = sorted({record["predicted"] for record in judged})
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.xaxis.set_minor_formatter("")
    axes[0].set_yscale("log")
    axes[0].set_ylabel("angle per step, rms, radians")
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(min(low, 0.9), max(high, 1.1))
    axes[1].set_ylabel("measured over theory")
    axes[1].set_xlabel("√(2ηλ/(1 + α)), radians")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="In equilibrium decay and rate set the angle per step",
        alt="Measured angle per step against theory on logarithmic axes, around the diagonal; "
        f"below, their ratio, from {ratios.min():.3g} to {ratios.max():.3g}.",
        caption="Each point: a hidden layer, a seed and a setting of (η, λ, α); root mean square "
        "over the second half of the run. Grey: within 5 % of theory.",
        claims=("equilibrium-angle",),
    )


def _draw_approach(config, records, path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.2)
    judged = next(r for r in records if r["momentum"] == config.momentum)
    wide = next(r for r in records if r["network"] != config.network)
    for record, axis in zip((judged, wide), axes, strict=True):
        angles = np.array(record["angles"], dtype=float)
        for index, color in zip(range(angles.shape[1]), PALETTE, strict=False):
            axis.plot(record["steps"], np.maximum(angles[:, index], 1e-9), color=color, linewidth=1,
                      label=f"hidden layer {index + 1}")  # fmt: skip
        axis.axhline(record["predicted"], color=PALETTE.black, linestyle="--", linewidth=1.4)
        axis.set_yscale("log")
        axis.set_ylabel("angle of a step, radians")
        title = f"{record['network']}, momentum {record['momentum']:g}, loss {record['loss']:.2g}"
        axis.set_title(title, fontsize=10)
    axes[-1].set_xlabel("step")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="The way to equilibrium",
        alt="Angle of single steps against time, in the judged network and in the wide one, around "
        "the dashed value that theory predicts for their root mean square.",
        caption="Dashed: √(2ηλ/(1 + α)). Single steps, thinned out for the figure; the loss is the "
        "mean over the second half. The better a network fits its training set, the more its "
        "gradients come in bursts: the law then holds for the mean square, not for the typical "
        "step.",
    )
