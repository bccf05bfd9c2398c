"""The figures of `experiments.scale_invariance`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import figures
from bn_research.claims.figures import GREY, PALETTE, band, new_figure, save_all, shared_legend
from bn_research.claims.judging import Record, by_seed, numbers
from bn_research.claims.plots import bands, over_seeds, reference
from experiments.scale_invariance import Config, identities

Records = Mapping[str, Sequence[Record]]  # by kind
Drawn = tuple[Any, dict[str, Any]]  # a figure, and its words

_FLOOR = 1e-17  # where a deviation of zero is drawn
_LIMIT: dict[str, Any] = dict(linestyle=":", linewidth=1.5)
_NETWORKS = {
    "BN": PALETTE.blue,
    "BN, ε > 0": PALETTE.sky,
    "BN, bias inside": PALETTE.purple,
    "no BN": PALETTE.vermillion,
}


def draw(config: Config, records: Records, folder: Path) -> list[figures.Figure]:
    """All figures, in the order of the report."""
    exact = (_identities, _loss_against_scale, _norm_growth, _effective_rate, _exponential_rate)
    return save_all((*exact, _equilibrium_angle, _approach), folder, config, records)


def _drawn(deviations: Any) -> np.ndarray:
    """Deviations as a logarithmic axis can show them."""
    return np.maximum(np.array(deviations, dtype=float), _FLOOR)


def _identities(config: Config, records: Records) -> Drawn:
    """The identities hold to the last digits of float64, and only with BN."""
    found = records["backprop"]
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    functions = [record["functions"] for record in found]
    both = [record[interface] for record in found for interface in identities.INTERFACES]
    above, below = (axes[0], "o-"), (axes[1], "s-")
    for (axis, marks), chosen, name, label, color in (
        *((above, both, kind, kind, c) for kind, c in zip(identities.KINDS, PALETTE, strict=False)),
        (below, found, "no BN", "no BN", PALETTE.vermillion),
        (below, found, "bias inside", "bias inside", PALETTE.purple),
        (below, functions, "ε ignored", f"ε = {config.epsilon:g} ignored", PALETTE.sky),
        (below, found, "bias before BN", "bias right before BN", PALETTE.black),
    ):
        worst = _drawn(numbers(chosen, name).max(axis=0))
        axis.plot(config.scales, worst, marks, color=color, markersize=4, label=label)
    reference(axes[0], y=1e-12, **_LIMIT)
    for axis, words in zip(axes, ("largest deviation", "largest deviation, controls"), strict=True):
        axis.set(ylabel=words, xscale="log", yscale="log")
    axes[1].set_xlabel("a, factor of the weights")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Deviations against the factor of the weights, logarithmic: about 1e-15 for all four "
        "identities; of order one without BN and with a bias inside.",
        caption="Largest over seeds, dense and conv layers, pure functions and linen; relative to "
        "the largest value. Value: BN(aWu) against BN(Wu); gradients likewise; exact form: "
        "BN_ε(aWu) against BN_{ε/a²}(Wu) with its gradients. Below: what must deviate does; with "
        "ε ignored, BN_ε(aWu) against BN_ε(Wu), small weights do. A bias right before BN changes "
        "nothing. Dotted: 1e-12.",
        claims=("scale-invariant-backprop",),
    )


def _loss_against_scale(config: Config, records: Records) -> Drawn:
    """With BN the loss does not see the scale of the weights."""
    fig, axis = new_figure(height=3.8)
    curves = {name: numbers(records["losses"], name) for name in _NETWORKS}
    for name, rows in curves.items():
        width = 3.2 if name == "BN, ε > 0" else 1.8
        line = band(axis, config.scales, rows, label=name, color=_NETWORKS[name], linewidth=width)
        if name == "BN":
            line.set(linestyle="--", color=PALETTE.black, zorder=4)
    reference(axis, y=np.log(10), linestyle=":")
    steady = max(rows.max() for name, rows in curves.items() if name != "no BN")
    axis.set(
        xscale="log",
        ylim=(np.log(10) - 0.5, steady + 1),  # without BN it grows as a³ and more
        xlabel="a, factor of all hidden kernels",
        ylabel="training loss at initialization",
    )
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Loss against the factor of the weights, logarithmic: flat with BN and epsilon 0; with "
        "epsilon 1e-5 flat but for the smallest factors; without BN it leaves the figure, and with "
        "a bias inside it is not flat.",
        caption="Kernels of all layers but the head times a; BN with ε = 0, and with "
        f"ε = {config.epsilon:g}. Bias inside: BN on the last layer alone, and biases below it, "
        f"which are not scaled. Dotted: ln 10. {over_seeds(config.seeds)}.",
        claims=("scale-invariant-backprop",),
    )


def _norm_growth(config: Config, records: Records) -> Drawn:
    """The gradient is a tangent, so the weights grow as by Pythagoras."""
    found = records["tangent"]
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    first, control = (by_seed(found, network=name)[0] for name in ("BN", "no BN"))
    steps, hidden = first["steps"], range(len(first["squared"][0]))[: len(PALETTE)]
    shown = [(first, layer, PALETTE[layer], f"hidden layer {layer + 1}") for layer in hidden]
    for record, layer, color, label in (*shown, (control, -1, GREY, "no BN, last hidden")):
        squared, predicted = numbers([record], "squared")[0], numbers([record], "predicted")[0]
        axes[0].plot(steps, squared[:, layer], color=color, linewidth=3.2, alpha=0.5)
        axes[0].plot(steps, predicted[:, layer], "--", color=color, label=label)
    axes[0].set_ylabel("‖w‖², over that at the start")
    axes[0].legend(frameon=False, fontsize=9)
    names = dict.fromkeys(record["network"] for record in found)
    shares = {name: _drawn(numbers(by_seed(found, network=name), "shares")) for name in names}
    bands(axes[1], steps, shares, _NETWORKS)
    reference(axes[1], y=1e-12, **_LIMIT)
    axes[1].set(yscale="log", ylabel="largest |⟨w, ∇L⟩|/(‖w‖‖∇L‖)", xlabel="step of plain SGD")
    axes[1].legend(frameon=False, fontsize=9, loc="center right")
    return fig, dict(
        alt="Above, squared norms of three hidden layers grow along the dashed theory, and without "
        "BN leave it; below, the radial share of the gradient is 1e-16 with BN and 0.01 to 1 "
        "without.",
        caption="Above, seed 0: ‖w‖² (broad) against ‖w₀‖² + Σ η²‖∇L‖² (dashed). Below: share of "
        f"the gradient that is radial, largest over hidden layers; mean of {config.seeds} seeds, "
        "band: lowest to highest. Dotted: 1e-12.",
        claims=("gradient-is-tangent",),
    )


def _effective_rate(config: Config, records: Records) -> Drawn:
    """Only η/‖w‖² counts."""
    fig, axes = new_figure(rows=2, width=5.4, height=5.6)
    for record in records["effective"]:
        steps, label = record["steps"], f"momentum {record['momentum']:g}"
        color = PALETTE.blue if record["momentum"] else PALETTE.vermillion
        axes[0].plot(steps, record["loss"], color=color, linewidth=1, alpha=0.7, label=label)
        for (c, values), color in zip(record["differences"].items(), PALETTE[2:], strict=False):
            axes[1].plot(steps, _drawn(values), color=color, linewidth=1, label=f"c = {c}")
    axes[0].set_ylabel("training loss")
    reference(axes[1], y=1e-10, **_LIMIT)
    axes[1].set(yscale="log", ylabel="|difference|", xlabel="step")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Above, losses of training; below, differences between losses of equivalent settings, "
        "far below the dotted line at 1e-10.",
        caption="Above: loss of each batch with η, λ and w₀, each seed. Below: its difference from "
        "the loss with c²η, λ/c² and c·w₀; zero is drawn at 1e-17. Dotted: 1e-10.",
        claims=("effective-learning-rate",),
    )


def _exponential_rate(config: Config, records: Records) -> Drawn:
    """Weight decay is an exponentially growing rate."""
    found = records["exponential"]
    fig, axes = new_figure(rows=3, width=5.4, height=7.6)
    for key, label, style, color, width in (
        ("constant", "constant rate, no decay", "-", PALETTE.orange, 1),
        ("decay", "constant rate, weight decay", "-", PALETTE.sky, 3.2),
        ("exponential", "growing rate, no decay", "--", PALETTE.black, 1),
    ):
        look = dict(color=color, linewidth=width, label=label)
        axes[0].plot(found[0]["steps"], found[0][key], style, **look)
    for record in found:
        steps, difference = record["steps"], _drawn(record["differences"])
        axes[1].plot(steps, record["rates"], color=PALETTE.black, linewidth=1.4)
        axes[2].plot(steps, difference, color=PALETTE.blue, linewidth=1, alpha=0.7)
    reference(axes[2], y=1e-10, **_LIMIT)
    axes[0].set(yscale="log", ylabel="training loss")
    axes[1].set(yscale="log", ylabel="rate without decay")
    axes[2].set(yscale="log", ylabel="|difference of losses|", xlabel="step of momentum SGD")
    shared_legend(fig, columns=1)
    return fig, dict(
        alt="Above, the losses with decay and with a growing rate lie on each other, that of a "
        "constant rate without decay does not; the rate grows exponentially; the difference of the "
        "losses stays below 1e-10.",
        caption="Above: loss of each batch, seed 0. Middle: the rate that stands for the decay. "
        f"Below: difference of the two losses, each of {config.seeds} seeds; zero is drawn at "
        "1e-17. Rounding errors grow with the steps as training amplifies them. Dotted: 1e-10.",
        claims=("exponential-rate-equals-weight-decay",),
    )


def _equilibrium_angle(config: Config, records: Records) -> Drawn:
    """In equilibrium decay and rate set the angle per step."""
    judged = [record for record in records["equilibrium"] if record["network"] == config.network]
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    ticks = sorted({record["predicted"] for record in judged})
    theory = np.array([ticks[0], ticks[-1]]) * (0.8, 1.25)
    axes[0].plot(theory, theory, color=GREY, linewidth=1.2)
    axes[0].fill_between(theory, 0.95 * theory, 1.05 * theory, color=GREY, alpha=0.25, linewidth=0)
    axes[1].axhspan(0.95, 1.05, color=GREY, alpha=0.25, linewidth=0)
    reference(axes[1], y=1, linestyle="-")
    momenta = dict.fromkeys(record["momentum"] for record in judged)
    for index, (_, color) in enumerate(zip(judged[0]["layers"], PALETTE, strict=False)):
        shift = 1 + 0.02 * (index - 1)  # side by side
        look = dict(color=color, markersize=5, fillstyle="none", alpha=0.7)
        for momentum, marker in zip(momenta, "os", strict=False):
            chosen = [record for record in judged if record["momentum"] == momentum]
            x, y = numbers(chosen, "predicted"), numbers(chosen, "rms")[:, index]
            label = f"layer {index + 1}, momentum {momentum:g}"
            axes[0].plot(x * shift, y, marker, label=label, **look)
            axes[1].plot(x * shift, y / x, marker, **look)
    ratios = numbers(judged, "rms") / numbers(judged, "predicted")[:, None]
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.xaxis.set_minor_formatter("")
    axes[0].set(yscale="log", ylabel="angle per step, rms, radians")
    low, high = axes[1].get_ylim()
    axes[1].set(
        ylim=(min(low, 0.9), max(high, 1.1)),
        ylabel="measured over theory",
        xlabel="√(2ηλ/(1 + α)), radians",
    )
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Measured angle per step against theory on logarithmic axes, around the diagonal; "
        f"below, their ratio, from {ratios.min():.3g} to {ratios.max():.3g}.",
        caption="Each point: a hidden layer, a seed and a setting of (η, λ, α); root mean square "
        "over the second half of the run. Grey: within 5 % of theory.",
        claims=("equilibrium-angle",),
    )


def _approach(config: Config, records: Records) -> Drawn:
    """The way to equilibrium."""
    found = records["equilibrium"]
    fig, axes = new_figure(rows=2, width=5.4, height=6.2)
    judged = next(r for r in found if r["momentum"] == config.momentum)
    wide = next(r for r in found if r["network"] != config.network)
    for record, axis in zip((judged, wide), axes, strict=True):
        angles = np.maximum(np.array(record["angles"], dtype=float), 1e-9)
        for index, (curve, color) in enumerate(zip(angles.T, PALETTE, strict=False), 1):
            look = dict(color=color, linewidth=1, label=f"hidden layer {index}")
            axis.plot(record["steps"], curve, **look)
        reference(axis, y=record["predicted"], color=PALETTE.black, linewidth=1.4)
        axis.set(yscale="log", ylabel="angle of a step, radians")
        title = f"{record['network']}, momentum {record['momentum']:g}, loss {record['loss']:.2g}"
        axis.set_title(title, fontsize=10)
    axes[-1].set_xlabel("step")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Angle of single steps against time, in the judged network and in the wide one, around "
        "the dashed value that theory predicts for their root mean square.",
        caption="Dashed: √(2ηλ/(1 + α)). Single steps, thinned out for the figure; the loss is the "
        "mean over the second half. The better a network fits its training set, the more its "
        "gradients come in bursts: the law then holds for the mean square, not for the typical "
        "step.",
    )
