"""The figures of the noise of batches."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.judging import numbers
from bn_research.claims.plots import points, reference
from bn_research.probes.batch_noise import exact_moments, noise_law
from experiments.batch_noise import Config
from experiments.batch_noise.verdicts import REACH, Records, by_layer, shown_size

_MARKERS = "os^Dv"
_MOST_CURVES = 4  # of the smallest sizes; larger ones lie on the law


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    figures = (batch_noise_gaussian, batch_noise_features, pixels_are_not_examples)
    return save_all(figures, folder, config, records)


def batch_noise_gaussian(config: Config, records: Records):
    """How noisy batches make a Gaussian value."""
    fig, axis = new_figure(height=4.2)
    x = np.linspace(0, max(3.0, *config.law_points), 61)
    axis.axvspan(0, REACH, color=GREY, alpha=0.08, linewidth=0)
    axis.plot(x, noise_law(x, 1).var, color="black", linestyle="--", label="law, 1 + x̃²/2")
    order = np.argsort(config.law_points)
    for index, m in enumerate(sorted(config.law_sizes)[:_MOST_CURVES]):
        look: dict[str, Any] = dict(marker=_MARKERS[index], markersize=5, linestyle="none")
        axis.plot(x, m * exact_moments(x, m).var, label=f"exact, m = {m}", color=PALETTE[index])
        samples = [record["variances"][str(m)] for record in records["gaussian"]]
        means = (m * np.array(samples))[:, order].mean(axis=0)
        axis.plot(np.sort(config.law_points), means, color=PALETTE[index], **look)
    axis.set(xlabel="x̃, the value in units of the population", ylabel="m · Var(x̂ | x̃)")
    axis.set_ylim(bottom=0)
    shared_legend(fig)
    return fig, dict(
        alt="Variance of the normalized value times the batch size, against the value: parabolas "
        "that come up to the law as the batch grows; for small batches large values are much "
        "less noisy than the law says.",
        caption="Lines: exact variance of x̂ given x̃ in batches of m Gaussian values, times m; "
        "dashed: its limit, the law to first order. Marks: batches of samples, "
        f"{config.law_samples} for each of {config.seeds} seeds. Grey: the criterion's range.",
        claims=("batch-noise-law",),
    )


def batch_noise_features(config: Config, records: Records):
    """How noisy batches make the features of a trained network."""
    fig, axes = new_figure(rows=2, width=5.0, height=7.0)
    for axis, kind, words in zip(axes, ("dense", "conv"), ("dense", "convolutions"), strict=True):
        for index, own in enumerate(by_layer(records["features"], kind)):
            curves = [layer["curve"] for layer in own]
            x = np.array(curves[0]["x"])
            color = PALETTE[index if kind == "dense" else 2 + index % 4]
            axis.plot(x, numbers(curves, "law").mean(axis=0), color=color)
            look = dict(color=color, marker=_MARKERS[index % len(_MARKERS)], markersize=4.5)
            points(axis, x, numbers(curves, "measured"), label=own[0]["layer"], **look)
        if kind == "dense":
            look = dict(color="black", linestyle="--", linewidth=1.2)
            axis.plot(x, noise_law(x, 1).var, label="Gaussian law, 1 + x̃²/2", **look)
        axis.axvspan(-REACH, REACH, color=GREY, alpha=0.08, linewidth=0)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(f"m · Var(x̂ | x̃), {words}")
    axes[1].set_xlabel("x̃, the value in units of the population")
    shared_legend(fig, columns=3)
    return fig, dict(
        alt="Variance of the normalized value times the batch size, against the value: measured "
        "points along the curves of the law with the features' own moments, in dense layers above "
        "and in convolutions, which are less noisy, below.",
        caption=f"m = {shown_size(config)}. Marks: medians over features and examples in a bin of "
        f"x̃, mean of {config.seeds} seeds, bars from the lowest to the highest; lines: medians of "
        "the law with each feature's own skewness and kurtosis, of convolutions with what image "
        "means scatter. As of batches from an infinite set. Grey: the criterion's range.",
        claims=("batch-noise-law-of-real-features",),
    )


def pixels_are_not_examples(config: Config, records: Records):
    """Pixels are not examples."""
    layers, shown = by_layer(records["features"], "conv"), str(shown_size(config))
    fig, axis = new_figure(height=4.0)
    places = np.arange(len(layers))
    for place, (first, *_) in enumerate(layers):
        ends, heights = [place - 0.35, place + 0.35], [first["positions"]] * 2
        axis.plot(ends, heights, color="black", linewidth=2.2)
    axis.plot([], [], color="black", linewidth=2.2, label="h·w")
    reference(axis, y=1, label="one")
    for statistic, words, color, shift in (
        ("mean", "mean", PALETTE.blue, -0.12),
        ("var", "variance", PALETTE.vermillion, 0.12),
    ):
        found = [[one["sizes"][shown]["effective"][statistic] for one in own] for own in layers]
        measured, predicted, least, most = (
            np.array([numbers(own, key) for own in found])
            for key in ("measured", "predicted", "least", "most")
        )
        x, look = places + shift, dict[str, Any](color=color, linestyle="none")
        axis.vlines(x, least.min(axis=1), most.max(axis=1), color=color, alpha=0.35, linewidth=4)
        axis.plot(x, measured.mean(axis=1), marker="o", label=words, **look)
        look |= dict(marker="_", markersize=16, markeredgewidth=1.6)
        axis.plot(x, predicted.mean(axis=1), label=f"{words}: predicted", **look)
    axis.set_xticks(places, [f"{one['layer']}\nh·w = {one['positions']}" for one, *_ in layers])
    axis.set(yscale="log", xlim=(-0.6, len(layers) - 0.4))
    axis.set_ylabel("independent values an image is worth")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="For each convolution the independent values that one image is worth for the batch's "
        "mean and variance: a few, far below the number of its positions.",
        caption=f"Effective size over m, at m = {shown}: dots measured over random batches, dashes "
        "predicted by the scatter of image means; medians over features, mean of "
        f"{config.seeds} seeds. Bars: from the least to the most of the features of all seeds. "
        "Black: the number of positions, h·w.",
        claims=("pixels-are-not-examples",),
    )
