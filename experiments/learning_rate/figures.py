"""The figures of `experiments.learning_rate`."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends, panel_ends
from bn_research.claims.bounded import Bounded
from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.judging import numbers
from bn_research.claims.plots import bands, log_ticks, over_seeds, padded, reference, running_mean
from bn_research.models.spec import num_weight_layers
from experiments.learning_rate import PUBLISHED_BATCH, PUBLISHED_FACTOR, Config, Placement, verdicts
from experiments.learning_rate.search import Setting
from experiments.learning_rate.training import BOOSTED, Records
from experiments.learning_rate.verdicts import NAMES, NOT_BELOW, REPRODUCED_FROM, TRAINS

_LOOKS: dict[str, dict[str, Any]] = {  # by placement
    "none": dict(color=PALETTE.black, marker="s"),
    "last": dict(color=PALETTE.orange, marker="D"),
    "hidden": dict(color=PALETTE.green, marker="^"),
    "all": dict(color=PALETTE.blue, marker="o"),
}
_TOP = 10.0  # losses above are drawn here


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    draws = [_ratio, _largest_stable_rate, _loss_against_rate, _thirty_times, _sigmoid]
    return save_all(draws, folder, config, records)


def _panels(config: Config) -> tuple[Any, dict[str, Any]]:
    """A figure, and its panel for each network by name."""
    networks = config.batch_sizes
    fig, axes = new_figure(rows=len(networks), width=5.2, height=1.2 + 3.1 * len(networks))
    panels = {}
    for axis, network in zip(np.atleast_1d(axes), networks, strict=True):
        name = verdicts.network_name(network)
        axis.set_title(f"{name}: {network}", fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        panels[name] = axis
    return fig, panels


def _shown(number: Bounded) -> float:
    """Where to draw a number: at its finite bound where it has one."""
    return number.low if math.isinf(number.high) else number.high


def _largest_stable_rate(config: Config, records: Records) -> Any:
    """The largest rate that trains."""
    fig, panels = _panels(config)
    for axis, (network, sizes) in zip(panels.values(), config.batch_sizes.items(), strict=True):
        for place, placement in enumerate(config.placements):
            look = dict(alpha=0.45, markersize=5, **_LOOKS[placement])
            x = np.array(sizes) * 2 ** (0.09 * (place - (len(config.placements) - 1) / 2))
            means = []
            for at, size in zip(x, sizes, strict=True):
                limits = records.searches[Setting(network, placement, size)].limits
                means.append(np.exp(np.log([_shown(number) for number in limits]).mean()))
                for number in limits:
                    arrow = "$\\uparrow$" if math.isinf(number.high) else "$\\downarrow$"
                    mark = {"marker": arrow} if number.is_censored else {}
                    axis.plot(at, _shown(number), **look | mark)
            look = dict(color=look["color"], marker="_", markersize=11)
            axis.plot(x, means, label=NAMES[placement], **look)
        axis.set_yscale("log", base=2)
        log_ticks(axis, sizes)
        axis.set(xlabel="batch size", ylabel="largest stable rate")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Largest stable learning rate against batch size, both logarithmic, from the smallest "
        f"batch to the largest. {panel_ends(panels)}",
        caption=f"Momentum SGD, {config.num_steps} steps, He initialization. Points: "
        f"{config.seeds} seeds; line: their geometric mean. Arrows: bounds, where the grid ends "
        "before the answer; the line then runs through the bound.",
        claims=("higher-learning-rates", "advantage-shrinks-with-batch"),
    )


def _ratio(config: Config, records: Records) -> Any:
    """How much larger the rate may be."""
    fig, panels = _panels(config)
    for axis, (network, sizes) in zip(panels.values(), config.batch_sizes.items(), strict=True):
        middle: list[float] = []
        for place, placement in enumerate(p for p in config.placements if p != "none"):
            gains = [verdicts.advantage(records.searches, network, n, placement) for n in sizes]
            mean = np.array([_shown(gain.mean) for gain in gains])
            low, high = np.transpose([gain.interval for gain in gains])
            middle.extend(mean)
            spans = np.maximum((mean - low, np.minimum(high, mean * 1e6) - mean), 0)
            look = dict(capsize=3, markersize=5, label=NAMES[placement], **_LOOKS[placement])
            axis.errorbar(np.array(sizes) * 2 ** (0.12 * (place - 1)), mean, spans, **look)
        for level, color, style, words in (
            (REPRODUCED_FROM, GREY, "--", "criterion: reproduced from {}"),
            (NOT_BELOW, GREY, ":", "criterion: not reproduced below {}"),
            (PUBLISHED_FACTOR, PALETTE.purple, "-.", "published: {}× a rate (Inception)"),
        ):
            reference(axis, y=level, color=color, linestyle=style, label=words.format(level))
        axis.set_yscale("log", nonpositive="clip")
        log_ticks(axis, sizes)
        ticks = [1, 3, 10, 30, 100]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_minor_formatter("")
        axis.set_ylim(min(0.5, *middle) / 2, 2 * max(150, *middle))
        axis.set(xlabel="batch size", ylabel="largest stable rate, BN/plain")
    shared_legend(fig, columns=1)
    return fig, dict(
        alt="Ratio of the largest stable rates with and without BN, with intervals, against batch "
        f"size, from the smallest to the largest. {panel_ends(panels)}",
        caption=f"Geometric mean of {config.seeds} seeds, paired, with the 95 % interval; one "
        "that is wider than the panel is cut off. The published 30 is the ratio of "
        "two rates that trained Inception with and without BN at batch 32, not of limits.",
        claims=("higher-learning-rates", "advantage-shrinks-with-batch"),
    )


def _loss_against_rate(config: Config, records: Records) -> Any:
    """Loss at the end against the rate."""
    fig, panels = _panels(config)
    guessing = math.log(records.num_classes)
    for axis, (network, sizes) in zip(panels.values(), config.batch_sizes.items(), strict=True):
        size = min(sizes, key=lambda size: abs(math.log(size / PUBLISHED_BATCH)))
        for placement in config.placements:
            found, look = records.searches[Setting(network, placement, size)], _LOOKS[placement]
            rates, losses = np.array(found.rates), np.minimum(found.losses, _TOP)
            axis.plot(rates, losses, markersize=4, label=NAMES[placement], **look)
            lost = ~np.isfinite(found.losses)
            axis.plot(rates[lost], losses[lost], "x", color=look["color"])
        reference(axis, y=guessing, linestyle=":", label="guessing, ln C")
        reference(axis, y=guessing / 2, label="stable below half of it")
        axis.set_yscale("symlog", linthresh=3)
        axis.set_yticks([0, 1, 2, 3, _TOP], ["0", "1", "2", "3", f"{_TOP:g}+"])
        labels = dict(xlabel="learning rate", ylabel=f"final training loss, batch {size}")
        axis.set(ylim=(0, _TOP * 1.04), **labels)
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Final training loss against learning rate: each curve is a valley; with BN on all "
        "layers it is wider to the right.",
        caption=f"Mean over the last tenth of {config.num_steps} steps, on the one seed that "
        f"chooses the best rates. Losses above {_TOP:g} are drawn there; crosses: steps that were "
        "not finite.",
        claims=("higher-learning-rates",),
    )


def _thirty_times(config: Config, records: Records) -> Any:
    """Does 30 times the plain network's best rate train?"""
    fig, axis = new_figure(height=3.8)
    steps, window = config.num_steps, max(1, config.num_steps // 20)
    guessing, curves, names = math.log(records.num_classes), {}, {}
    for name in BOOSTED:
        runs = records.boosted[name]
        curves[name] = running_mean(padded([run["loss"] for run in runs], steps), window)
        names[name] = f"{name}: {runs[0]['learning_rate']:.3g}"
    colors = dict(zip(BOOSTED, (PALETTE.black, PALETTE.vermillion, PALETTE.blue), strict=True))
    bands(axis, np.arange(1, steps + 1), curves, colors, names=names)
    reference(axis, y=guessing, linestyle=":")
    axis.set(ylim=(0, 1.5 * guessing), xlabel="step", ylabel="training loss (nats)")
    shared_legend(fig, columns=1)
    return fig, dict(
        alt="Training loss against steps, from first to last, each arm with its rate: "
        f"{line_ends(axis)}.",
        caption=f"CNN, batch {PUBLISHED_BATCH}, BN on all layers. {over_seeds(config.seeds)}; "
        f"smoothed over {window} steps; dotted: guessing. Losses above 1.5 times that are cut off.",
        claims=("higher-learning-rates",),
    )


def _sigmoid(config: Config, records: Records) -> Any:
    """Deep networks of sigmoids."""
    networks, guessing = config.sigmoid_networks, 1 / records.num_classes
    fig, axis = new_figure(width=5.2, height=3.6)
    shifts: dict[Placement, float] = {"none": -0.06, "all": 0.06}
    for placement, shift in shifts.items():
        rows = np.array([numbers(records.sigmoid[n, placement], "accuracy") for n in networks])
        x, look = np.arange(len(networks)) + shift, _LOOKS[placement]
        axis.plot(x, rows, linestyle="none", alpha=0.5, markersize=5, **look)
        axis.plot(x, rows.mean(axis=1), color=look["color"], label=NAMES[placement])
    reference(axis, y=guessing, linestyle=":", label="guessing")
    reference(axis, y=TRAINS * guessing, label=f"criterion: {TRAINS:g}× guessing")
    names = []
    for network in networks:  # four layers of a spec in a line
        layers = network.split()
        lines = [" ".join(layers[i : i + 4]) for i in range(0, len(layers), 4)]
        names.append("\n".join([f"{num_weight_layers(network)} layers", *lines]))
    axis.set_xticks(range(len(networks)), names)
    axis.set(xlim=(-0.5, len(networks) - 0.5), ylim=(0, 1), ylabel="test accuracy")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Test accuracy of sigmoid CNNs of growing depth, from the shallowest to the deepest: "
        f"{line_ends(axis)}.",
        caption=f"Sigmoid CNNs, Glorot initialization, {config.sigmoid_steps} steps of momentum "
        f"SGD, each at its best rate of the same grid. Points: {config.seeds} seeds; line: mean.",
        claims=("sigmoid-trainable",),
    )
