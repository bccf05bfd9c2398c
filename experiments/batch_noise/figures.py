"""The figures of the noise of batches."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.judging import numbers
from bn_research.claims.plots import points, reference
from bn_research.probes.batch_noise import exact_moments, noise_law
from experiments.batch_noise import Config
from experiments.batch_noise.verdicts import REACH, Records, layer_named, layers_of, shown_size

_MARKERS = "os^Dv"
_MOST_CURVES = 4  # of the smallest sizes; larger ones lie on the law

Drawn = tuple[Any, dict[str, Any]]


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    figures = (batch_noise_gaussian, batch_noise_features, pixels_are_not_examples)
    return save_all(figures, folder, config, records)


def batch_noise_gaussian(config: Config, records: Records) -> Drawn:
    """How noisy batches make a Gaussian value."""
    fig, axis = new_figure(height=4.2)
    x = np.linspace(0, max(3.0, *config.law_points), 61)
    axis.axvspan(0, REACH, color=GREY, alpha=0.08, linewidth=0)
    axis.plot(x, noise_law(x, 1).var, color="black", linestyle="--", label="law, 1 + x̃²/2")
    order = np.argsort(config.law_points)
    for index, m in enumerate(sorted(config.law_sizes)[:_MOST_CURVES]):
        color, marker = PALETTE[index], _MARKERS[index % len(_MARKERS)]
        axis.plot(x, m * exact_moments(x, m).var, label=f"exact, m = {m}", color=color)
        samples = [record["variances"][str(m)] for record in records["gaussian"]]
        axis.plot(
            np.sort(config.law_points),
            (m * np.array(samples))[:, order].mean(axis=0),
            marker=marker,
            markersize=5,
            linestyle="none",
            color=color,
        )
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


def batch_noise_features(config: Config, records: Records) -> Drawn:
    """How noisy batches make the features of a trained network."""
    features = records["features"]
    fig, axes = new_figure(rows=2, width=5.0, height=7.0)
    for axis, kind in zip(axes, ("dense", "conv"), strict=True):
        for index, layer in enumerate(layers_of(features[0], kind)):
            curves = [layer_named(record, layer["layer"])["curve"] for record in features]
            x = np.array(curves[0]["x"])
            color = PALETTE[index if kind == "dense" else 2 + index % 4]
            axis.plot(x, numbers(curves, "law").mean(axis=0), color=color)
            points(
                axis,
                x,
                numbers(curves, "measured"),
                color=color,
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                label=layer["layer"],
            )
        if kind == "dense":
            look = dict(color="black", linestyle="--", linewidth=1.2)
            axis.plot(x, noise_law(x, 1).var, label="Gaussian law, 1 + x̃²/2", **look)
        axis.axvspan(-REACH, REACH, color=GREY, alpha=0.08, linewidth=0)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("m · Var(x̂ | x̃), " + {"dense": "dense", "conv": "convolutions"}[kind])
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


def pixels_are_not_examples(config: Config, records: Records) -> Drawn:
    """Pixels are not examples."""
    features, shown = records["features"], str(shown_size(config))
    layers = layers_of(features[0], "conv")
    fig, axis = new_figure(height=4.0)
    places = np.arange(len(layers))
    for place, layer in enumerate(layers):
        ends, heights = [place - 0.35, place + 0.35], [layer["positions"]] * 2
        axis.plot(ends, heights, color="black", linewidth=2.2)
    axis.plot([], [], color="black", linewidth=2.2, label="h·w")
    reference(axis, y=1, label="one")
    for statistic, words, color, shift in (
        ("mean", "mean", PALETTE.blue, -0.12),
        ("var", "variance", PALETTE.vermillion, 0.12),
    ):
        rows = [
            [one["sizes"][shown]["effective"][statistic] for one in layers_of(record, "conv")]
            for record in features
        ]
        found = {
            key: np.array([numbers(row, key) for row in rows])
            for key in ("measured", "predicted", "least", "most")
        }
        least, most = found["least"].min(axis=0), found["most"].max(axis=0)
        axis.vlines(places + shift, least, most, color=color, alpha=0.35, linewidth=4)
        look = dict(color=color, linestyle="none")
        axis.plot(places + shift, found["measured"].mean(axis=0), marker="o", label=words, **look)
        axis.plot(
            places + shift,
            found["predicted"].mean(axis=0),
            marker="_",
            markersize=16,
            markeredgewidth=1.6,
            label=f"{words}: predicted",
            **look,
        )
    axis.set_yscale("log")
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.set_xticks(places, [f"{one['layer']}\nh·w = {one['positions']}" for one in layers])
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
