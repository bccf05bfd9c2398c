"""The figures of `experiments.regularization` about the noise of batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.figures import PALETTE, Figure, new_figure, save_figure, shared_legend
from bn_research.probes.batch_noise import exact_moments, noise_law
from experiments.regularization.noise_verdicts import REACH, shown_size

_MARKERS = "os^Dv"
_GREY = "#777777"
_LAW_LABEL = "Gaussian law, 1 + x̃²/2"
_MOST_CURVES = 4  # of the smallest sizes; larger ones lie on the law

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(config: Any, records: Records, folder: Path) -> list[Figure]:
    """All figures of this part, in the order of the report.

    Args:
      config: of the run.
      records: of `regularization_noise.measure`.
      folder: where the PNG files go.
    """
    return [
        _draw_gaussian(config, records["gaussian"], folder / "batch_noise_gaussian.png"),
        _draw_features(config, records["features"], folder / "batch_noise_features.png"),
        _draw_worth(config, records["features"], folder / "pixels_are_not_examples.png"),
    ]


def _draw_gaussian(config, gaussian, path) -> Figure:
    fig, axis = new_figure(height=4.2)
    x = np.linspace(0, max(3.0, *config.law_points), 61)
    axis.axvspan(0, REACH, color=_GREY, alpha=0.08, linewidth=0)
    axis.plot(x, noise_law(x, 1).var, color="black", linestyle="--", label="law, 1 + x̃²/2")
    points = np.array(sorted(config.law_points))
    order = np.argsort(config.law_points)
    for index, m in enumerate(sorted(config.law_sizes)[:_MOST_CURVES]):
        look = dict(color=PALETTE[index])
        axis.plot(x, m * exact_moments(x, m).var, label=f"exact, m = {m}", **look)
        samples = m * np.array([record["variances"][str(m)] for record in gaussian])[:, order]
        marker = _MARKERS[index % len(_MARKERS)]
        axis.plot(
            points, samples.mean(axis=0), marker=marker, markersize=5, linestyle="none", **look
        )
    axis.set_xlabel("x̃, the value in units of the population")
    axis.set_ylabel("m · Var(x̂ | x̃)")
    axis.set_ylim(bottom=0)
    shared_legend(fig)
    return save_figure(
        fig,
        path,
        title="How noisy batches make a Gaussian value",
        alt="Variance of the normalized value times the batch size, against the value: parabolas "
        "that come up to the law as the batch grows; for small batches large values are much "
        "less noisy than the law says.",
        caption="Lines: exact variance of x̂ given x̃ in batches of m Gaussian values, times m; "
        "dashed: its limit, the law to first order. Marks: batches of samples, "
        f"{config.law_samples} for each of {config.seeds} seeds. Grey: the criterion's range.",
        claims=("batch-noise-law",),
    )


def _draw_features(config, features, path) -> Figure:
    kinds = [
        (kind, [layer["layer"] for layer in features[0]["layers"] if layer["kind"] == kind])
        for kind in ("dense", "conv")
    ]
    fig, axes = new_figure(rows=2, width=5.0, height=7.0)
    for axis, (kind, names) in zip(axes, kinds, strict=True):
        for index, name in enumerate(names):
            curves = [_layer(record, name)["curve"] for record in features]
            x = np.array(curves[0]["x"])
            measured, law = (
                np.array([curve[key] for curve in curves], dtype=float)
                for key in ("measured", "law")
            )
            color = PALETTE[index if kind == "dense" else 2 + index % 4]
            mean = measured.mean(axis=0)
            axis.plot(x, law.mean(axis=0), color=color)
            axis.errorbar(
                x,
                mean,
                yerr=[mean - measured.min(axis=0), measured.max(axis=0) - mean],
                color=color,
                linestyle="none",
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.5,
                label=name,
            )
        if kind == "dense":
            reference = noise_law(x, 1).var
            axis.plot(x, reference, color="black", linestyle="--", linewidth=1.2, label=_LAW_LABEL)
        axis.axvspan(-REACH, REACH, color=_GREY, alpha=0.08, linewidth=0)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("m · Var(x̂ | x̃), " + {"dense": "dense", "conv": "convolutions"}[kind])
    axes[1].set_xlabel("x̃, the value in units of the population")
    shared_legend(fig, columns=3)
    return save_figure(
        fig,
        path,
        title="How noisy batches make the features of a trained network",
        alt="Variance of the normalized value times the batch size, against the value: measured "
        "points along the curves of the law with the features' own moments, in dense layers above "
        "and in convolutions, which are less noisy, below.",
        caption=f"m = {shown_size(config)}. Marks: medians over features and examples in a bin of "
        f"x̃, mean of {config.seeds} seeds, bars from the lowest to the highest; lines: medians of "
        "the law with each feature's own skewness and kurtosis, of convolutions with what image "
        "means scatter. As of batches from an infinite set. Grey: the criterion's range.",
        claims=("batch-noise-law-of-real-features",),
    )


def _draw_worth(config, features, path) -> Figure:
    layers = [layer for layer in features[0]["layers"] if layer["kind"] == "conv"]
    fig, axis = new_figure(height=4.0)
    places = np.arange(len(layers))
    positions = [layer["positions"] for layer in layers]
    for place, number in zip(places, positions, strict=True):
        axis.plot([place - 0.35, place + 0.35], [number] * 2, color="black", linewidth=2.2)
    axis.plot([], [], color="black", linewidth=2.2, label="h·w")
    axis.axhline(1, color=_GREY, linewidth=1.2, linestyle="--", label="one")
    shown = str(shown_size(config))
    for statistic, words, color, shift in (
        ("mean", "mean", PALETTE.blue, -0.12),
        ("var", "variance", PALETTE.vermillion, 0.12),
    ):
        found = {
            key: np.array(
                [
                    [_layer(r, layer["layer"])["sizes"][shown]["effective"][statistic][key]
                     for layer in layers]
                    for r in features
                ],
                dtype=float,
            )
            for key in ("measured", "predicted", "least", "most")
        }  # fmt: skip
        axis.vlines(
            places + shift,
            found["least"].min(axis=0),
            found["most"].max(axis=0),
            color=color,
            alpha=0.35,
            linewidth=4,
        )
        look = dict(color=color, linestyle="none")
        axis.plot(
            places + shift, found["measured"].mean(axis=0), marker="o", label=f"{words}", **look
        )
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
    labels = [f"{layer['layer']}\nh·w = {layer['positions']}" for layer in layers]
    axis.set_xticks(places, labels)
    axis.set_ylabel("independent values an image is worth")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Pixels are not examples",
        alt="For each convolution the independent values that one image is worth for the batch's "
        "mean and variance: a few, far below the number of its positions.",
        caption=f"Effective size over m, at m = {shown}: dots measured over random batches, dashes "
        "predicted by the scatter of image means; medians over features, mean of "
        f"{config.seeds} seeds. Bars: from the least to the most of the features of all seeds. "
        "Black: the number of positions, h·w.",
        claims=("pixels-are-not-examples",),
    )


def _layer(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(layer for layer in record["layers"] if layer["layer"] == name)
