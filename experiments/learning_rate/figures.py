"""The figures of `experiments.learning_rate`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.bounded import Bounded
from bn_research.claims.figures import (
    PALETTE,
    Figure,
    band,
    new_figure,
    save_figure,
    shared_legend,
)
from bn_research.models.cnn import NormPlacement
from bn_research.models.spec import num_weight_layers
from experiments.learning_rate.search import Searches, Setting
from experiments.learning_rate.verdicts import (
    BN_NAMES,
    BOOSTED,
    NAMES,
    NOT_BELOW,
    PUBLISHED_BATCH,
    PUBLISHED_FACTOR,
    REPRODUCED_FROM,
    Records,
    advantage,
    network_name,
)

_GREY = "#777777"
_COLORS: dict[NormPlacement, str] = {
    "none": PALETTE.black,
    "last": PALETTE.orange,
    "hidden": PALETTE.green,
    "all": PALETTE.blue,
}
_MARKERS: dict[NormPlacement, str] = {"none": "s", "last": "D", "hidden": "^", "all": "o"}
_TOP = 10.0  # losses above are drawn here


def draw(
    config: Any,
    searches: Searches,
    boosted: Mapping[str, Records],
    sigmoid: Mapping[tuple[str, Any], Records],
    num_classes: int,
    folder: Path,
) -> list[Figure]:
    """All figures, in the order of the report.

    Args:
      config: of the run.
      searches: of all settings.
      boosted: records by seed of the three rates on the CNN at the paper's batch.
      sigmoid: (network, placement) -> records by seed at the best rate.
      num_classes: of the data set.
      folder: where the PNG files go.
    """
    return [
        _draw_ratios(config, searches, folder / "ratio.png"),
        _draw_limits(config, searches, folder / "largest_stable_rate.png"),
        _draw_losses(config, searches, num_classes, folder / "loss_against_rate.png"),
        _draw_boosted(config, boosted, num_classes, folder / "thirty_times.png"),
        _draw_sigmoid(config, sigmoid, num_classes, folder / "sigmoid.png"),
    ]


def _panels(searches: Searches):
    """A figure with a panel for each network, and (axis, network, batch sizes) of each."""
    networks: dict[str, list[int]] = {}
    for setting in searches:
        sizes = networks.setdefault(setting.network, [])
        if setting.batch_size not in sizes:
            sizes.append(setting.batch_size)
    fig, axes = new_figure(rows=len(networks), width=5.2, height=1.2 + 3.1 * len(networks))
    panels = []
    for axis, (network, sizes) in zip(np.atleast_1d(axes), networks.items(), strict=True):
        axis.set_title(f"{network_name(network)}: {network}", fontsize=10, loc="left")
        axis.set_xscale("log", base=2)
        panels.append((axis, network, sizes))
    return fig, panels


def _told(panels: Any) -> str:
    return ". ".join(f"{network_name(name)}, {line_ends(axis)}" for axis, name, _ in panels)


def _shown(number: Bounded) -> float:
    """Where to draw a number: at its finite bound where it has one."""
    return number.low if math.isinf(number.high) else number.high


def _draw_limits(config, searches, path) -> Figure:
    fig, panels = _panels(searches)
    for axis, network, sizes in panels:
        for place, placement in enumerate(config.placements):
            color, marker = _COLORS[placement], _MARKERS[placement]
            rows = [searches[Setting(network, placement, size)].limits for size in sizes]
            shown = np.array([[_shown(number) for number in row] for row in rows])
            shift = 2 ** (0.09 * (place - (len(config.placements) - 1) / 2))
            for size, row in zip(sizes, rows, strict=True):
                for number in row:
                    mark: Any = marker
                    if number.is_censored:
                        mark = "$\\uparrow$" if math.isinf(number.high) else "$\\downarrow$"
                    at = size * shift, _shown(number)
                    axis.plot(*at, marker=mark, color=color, alpha=0.45, markersize=5)
            mean = np.exp(np.log(shown).mean(axis=1))
            (line,) = axis.plot(np.array(sizes) * shift, mean, color=color, label=NAMES[placement])
            line.set(marker="_", markersize=11)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("batch size")
        axis.set_ylabel("largest stable rate")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="The largest rate that trains",
        alt="Largest stable learning rate against batch size, both logarithmic, from the smallest "
        f"batch to the largest. {_told(panels)}.",
        caption=f"Momentum SGD, {config.num_steps} steps, He initialization. Points: "
        f"{config.seeds} seeds; line: their geometric mean. Arrows: bounds, where the grid ends "
        "before the answer; the line then runs through the bound.",
        claims=("higher-learning-rates", "advantage-shrinks-with-batch"),
    )


def _draw_ratios(config, searches, path) -> Figure:
    fig, panels = _panels(searches)
    for axis, network, sizes in panels:
        middle: list[float] = []
        for place, placement in enumerate(p for p in config.placements if p in BN_NAMES):
            gains = [advantage(searches, network, size, placement) for size in sizes]
            mean = np.array([_shown(gain.mean) for gain in gains])
            shift = 2 ** (0.12 * (place - 1))
            low = np.array([gain.low for gain in gains])
            high = np.array([gain.high for gain in gains])
            middle.extend(mean)
            spans = mean - low, np.minimum(high, mean * 1e6) - mean
            options = dict(color=_COLORS[placement], marker=_MARKERS[placement], markersize=5)
            axis.errorbar(
                np.array(sizes) * shift,
                mean,
                np.maximum(spans, 0),
                capsize=3,
                label=BN_NAMES[placement],
                **options,
            )
        for level, style, label in (
            (REPRODUCED_FROM, "--", f"criterion: reproduced from {REPRODUCED_FROM}"),
            (NOT_BELOW, ":", f"criterion: not reproduced below {NOT_BELOW}"),
            (PUBLISHED_FACTOR, "-.", f"published: {PUBLISHED_FACTOR}× a rate (Inception)"),
        ):
            color = PALETTE.purple if level == PUBLISHED_FACTOR else _GREY
            axis.axhline(level, color=color, linestyle=style, linewidth=1.2, label=label)
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(min(0.5, *middle) / 2, 2 * max(150, *middle))
        ticks = [1, 3, 10, 30, 100]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_minor_formatter("")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("batch size")
        axis.set_ylabel("largest stable rate, BN/plain")
    shared_legend(fig, columns=1)
    return save_figure(
        fig,
        path,
        title="How much larger the rate may be",
        alt="Ratio of the largest stable rates with and without BN, with intervals, against batch "
        f"size, from the smallest to the largest. {_told(panels)}.",
        caption=f"Geometric mean of {config.seeds} seeds, paired, with the 95 % interval; one "
        "that is wider than the panel is cut off. The published 30 is the ratio of "
        "two rates that trained Inception with and without BN at batch 32, not of limits.",
        claims=("higher-learning-rates", "advantage-shrinks-with-batch"),
    )


def _draw_losses(config, searches, num_classes, path) -> Figure:
    fig, panels = _panels(searches)
    for axis, network, sizes in panels:
        size = min(sizes, key=lambda size: abs(math.log(size / PUBLISHED_BATCH)))
        for placement in config.placements:
            found = searches[Setting(network, placement, size)]
            losses = np.minimum(found.losses, _TOP)
            axis.plot(
                found.rates,
                losses,
                color=_COLORS[placement],
                marker=_MARKERS[placement],
                markersize=4,
                label=NAMES[placement],
            )
            lost = ~np.isfinite(found.losses)
            axis.plot(np.array(found.rates)[lost], losses[lost], "x", color=_COLORS[placement])
        axis.axhline(
            math.log(num_classes), color=_GREY, linestyle=":", linewidth=1.2, label="guessing, ln C"
        )
        axis.axhline(
            math.log(num_classes) / 2,
            color=_GREY,
            linestyle="--",
            linewidth=1.2,
            label="stable below half of it",
        )
        axis.set_ylim(0, _TOP * 1.04)
        axis.set_yscale("symlog", linthresh=3)
        ticks = [0, 1, 2, 3, 10]
        axis.set_yticks(ticks, [*map(str, ticks[:-1]), f"{ticks[-1]}+"])
        axis.set_xlabel("learning rate")
        axis.set_ylabel(f"final training loss, batch {size}")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Loss at the end against the rate",
        alt="Final training loss against learning rate: each curve is a valley; with BN on all "
        "layers it is wider to the right.",
        caption=f"Mean over the last tenth of {config.num_steps} steps, on the one seed that "
        f"chooses the best rates. Losses above {_TOP:g} are drawn there; crosses: steps that were "
        "not finite.",
        claims=("higher-learning-rates",),
    )


def _draw_boosted(config, boosted, num_classes, path) -> Figure:
    fig, axis = new_figure(height=3.8)
    window = max(1, config.num_steps // 20)
    colors = (PALETTE.black, PALETTE.vermillion, PALETTE.blue)
    for name, color in zip(BOOSTED, colors, strict=True):
        records = boosted[name]
        rows = [_smooth(record["loss"], config.num_steps, window) for record in records]
        label = f"{name}: {records[0]['learning_rate']:.3g}"
        band(axis, np.arange(1, config.num_steps + 1), rows, label=label, color=color)
    axis.axhline(math.log(num_classes), color=_GREY, linestyle=":", linewidth=1.2)
    axis.set_ylim(0, 1.5 * math.log(num_classes))
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats)")
    shared_legend(fig, columns=1)
    return save_figure(
        fig,
        path,
        title=f"Does {PUBLISHED_FACTOR} times the plain network's best rate train?",
        alt="Training loss against steps, from first to last, each arm with its rate: "
        f"{line_ends(axis)}.",
        caption=f"CNN, batch {PUBLISHED_BATCH}, BN on all layers. Line: mean of {config.seeds} "
        f"seeds; band: lowest to highest; smoothed over {window} steps; dotted: guessing. Losses "
        "above 1.5 times that are cut off.",
        claims=("higher-learning-rates",),
    )


def _smooth(loss: list[float | None], length: int, window: int) -> np.ndarray:
    """Running mean of the last `window` losses, NaN from a lost step on."""
    values = np.full(length, np.nan)
    values[: len(loss)] = np.array(loss, dtype=float)
    return np.array([values[max(0, i + 1 - window) : i + 1].mean() for i in range(length)])


def _draw_sigmoid(config, sigmoid, num_classes, path) -> Figure:
    networks = config.sigmoid_networks
    fig, axis = new_figure(width=5.2, height=3.6)
    x = np.arange(len(networks))
    placements: tuple[NormPlacement, ...] = ("none", "all")
    for placement, shift in zip(placements, (-0.06, 0.06), strict=True):
        rows = np.array(
            [[record["accuracy"] for record in sigmoid[n, placement]] for n in networks]
        )
        color = _COLORS[placement]
        for seed in rows.T:
            axis.plot(x + shift, seed, _MARKERS[placement], color=color, alpha=0.5, markersize=5)
        axis.plot(x + shift, rows.mean(axis=1), color=color, label=NAMES[placement])
    axis.axhline(1 / num_classes, color=_GREY, linestyle=":", linewidth=1.2, label="guessing")
    axis.axhline(
        3 / num_classes, color=_GREY, linestyle="--", linewidth=1.2, label="criterion: 3× guessing"
    )
    axis.set_xticks(x, [f"{num_weight_layers(n)} layers\n{_wrapped(n)}" for n in networks])
    axis.set_xlim(-0.5, len(networks) - 0.5)
    axis.set_ylim(0, 1)
    axis.set_ylabel("test accuracy")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Deep networks of sigmoids",
        alt="Test accuracy of sigmoid CNNs of growing depth, from the shallowest to the deepest: "
        f"{line_ends(axis)}.",
        caption=f"Sigmoid CNNs, Glorot initialization, {config.sigmoid_steps} steps of momentum "
        f"SGD, each at its best rate of the same grid. Points: {config.seeds} seeds; line: mean.",
        claims=("sigmoid-trainable",),
    )


def _wrapped(network: str) -> str:
    """A spec in lines of four layers."""
    tokens = network.split()
    return "\n".join(" ".join(tokens[i : i + 4]) for i in range(0, len(tokens), 4))
