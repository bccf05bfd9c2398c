"""The figures of `experiments.transform`."""

from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims import figures
from bn_research.claims.alt_text import panel_ends
from bn_research.claims.figures import GREY, PALETTE, Figure, band, new_figure
from bn_research.claims.formatting import MINUS
from bn_research.claims.judging import by_seed, numbers
from bn_research.claims.plots import log_ticks, over_seeds
from experiments.transform import Config
from experiments.transform.measurements import ARMS, PASSES, SOURCES, Records
from experiments.transform.verdicts import exponent, transfer_slopes

_NAMES = "blue vermillion green black purple blue vermillion green".split()
_COLORS = {n: getattr(PALETTE, color) for n, color in zip(SOURCES + ARMS, _NAMES, strict=True)}
_MARKERS = dict(zip(SOURCES, "osD+v", strict=True))
_POWERS = {"BN": 1, "ZCA": 3}  # of d, in theory


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the page."""
    draws = (clouds, correlations, another_batch, cost, rank)
    return figures.save_all(draws, folder, config, records)


def clouds(config: Config, records: Records):
    """BN stretches along the features, whitening along the principal axes."""
    fig, axes = new_figure(columns=2, rows=2, width=6.0, height=6.2)
    for axis, (title, points) in zip(axes.flat, records.clouds.items(), strict=True):
        axis.scatter(*points.T, s=4, color=PALETTE.sky, alpha=0.5, linewidth=0)
        mean = points.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(points.T, bias=True))
        root = vectors * np.sqrt(values)
        angle = np.linspace(0, 2 * np.pi, 200)
        for radius in (1, 2):
            ellipse = mean[:, None] + radius * root @ np.stack([np.cos(angle), np.sin(angle)])
            axis.plot(*ellipse, color=PALETTE.vermillion, linewidth=1.5)
        for direction in root.T:
            axis.plot(*(mean + np.outer((-2, 2), direction)).T, color="black", linewidth=1)
        rho = f"{np.corrcoef(points.T)[0, 1]:z.2f}".replace("-", MINUS)
        axis.set_title(f"{title}\ncorrelation {rho}", fontsize=10.5)
        axis.set_aspect("equal", adjustable="datalim")
    return fig, dict(
        alt="Four scatter plots of two correlated features: raw, after BN still a slanted ellipse, "
        "after ZCA a circle, and with gamma and beta the raw cloud again.",
        caption=f"Two of the dense pre-activations of {len(points)} examples. Ellipses: one and "
        "two standard deviations of the covariance; lines: its principal axes. BN centres the "
        "cloud and gives both features variance 1; the ellipse stays slanted, for the correlation "
        "stays.",
        claims=("unit-normalization", "no-decorrelation"),
    )


def correlations(config: Config, records: Records):
    """BN leaves every correlation as it was."""
    fig, axes = new_figure(columns=3, width=6.8, height=2.5)
    order = np.argsort(np.linalg.eigh(records.correlations["raw"])[1][:, -1])
    for axis, (title, matrix) in zip(axes, records.correlations.items(), strict=True):
        look = dict(vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        image = axis.imshow(matrix[np.ix_(order, order)], **look)
        axis.grid(visible=False)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=10.5)
    fig.colorbar(image, ax=list(axes), label="correlation", ticks=(-1, 0, 1), shrink=0.85)
    return fig, dict(
        alt="Three correlation matrices: raw and after BN the same pattern of positive and "
        "negative correlations, after ZCA the identity.",
        caption=f"Correlations of {len(matrix)} dense pre-activations over all examples, seed 0, "
        "in the order of the leading eigenvector: raw, after BN, and after ZCA whitening.",
        claims=("no-decorrelation",),
    )


def another_batch(config: Config, records: Records):
    """γ and β undo the normalization of their own batch only."""
    fig, axis = new_figure(height=3.8)
    for source, fitted in transfer_slopes(config, records.features).items():
        label = f"{source}: $m^{{{fitted.mean:.2f}}}$" if fitted else f"{source}: no fit"
        errors = numbers(by_seed(records.features, source=source), "transfer")
        look: Any = dict(color=_COLORS[source], marker=_MARKERS[source], markersize=6)
        band(axis, config.batch_sizes, errors, label=label, **look, markerfacecolor="none")
    theory = np.sqrt(3 / np.array(config.batch_sizes))
    axis.plot(config.batch_sizes, theory, "--", color=GREY, label="Gaussian theory: √(3/m)")
    axis.set(xlabel="m, examples in a batch", ylabel="relative error on another batch")
    axis.set_yscale("log")
    log_ticks(axis, config.batch_sizes)
    figures.shared_legend(fig, columns=2)
    return fig, dict(
        alt="Error of the recovered input against batch size, both logarithmic: falling lines of "
        "slope about minus one half, the heavy-tailed control above and flatter.",
        caption="γ and β that give batch A back exactly are used on a second batch B of the same "
        "size. Root mean square error, relative to the standard deviation of all examples. Line: "
        f"mean of {config.seeds} seeds, {config.pairs} pairs of batches each; band: lowest to "
        "highest. Offset (mean up to 1e6 standard deviations) and heavy tails (Student's t, 3 "
        "degrees of freedom) are controls.",
        claims=("identity-recoverable",),
    )


def cost(config: Config, records: Records):
    """What whitening costs."""
    fig, axes = new_figure(rows=2, width=5.4, height=6.4)
    dims = np.array([record["d"] for record in records.times])
    for axis, kind in zip(axes, PASSES, strict=True):
        for arm in ("ZCA", "Newton-Schulz", "BN"):
            seconds = np.array([record["seconds"][f"{arm} {kind}"] for record in records.times])
            low, middle, high = 1e3 * np.percentile(seconds, (25, 50, 75), axis=1)
            axis.fill_between(dims, low, high, color=_COLORS[arm], alpha=0.18, linewidth=0)
            label = f"{arm}: $d^{{{exponent(records.times, arm, kind).mean:.2f}}}$"
            axis.plot(dims, middle, "o-", color=_COLORS[arm], markersize=4, label=label)
            if arm in _POWERS:
                law = middle[-1] * (dims / dims[-1]) ** _POWERS[arm]
                axis.plot(dims, law, color=_COLORS[arm], linestyle=":", linewidth=1.2)
        axis.set(yscale="log", ylabel=f"milliseconds, {kind}")
        log_ticks(axis, list(dims))
        figures.end_labels(axis)
    axes[-1].set_xlabel("d, features")
    return fig, dict(
        alt="Milliseconds of a call against the number of features, both logarithmic, from the "
        f"fewest to the most. {panel_ends(dict(zip(PASSES, axes, strict=True)))}",
        caption=f"One call on {config.timed_batch} examples in float32. Line: median of "
        f"{config.repeats} repetitions, in turn with the other arms; band: their quartiles; "
        "exponents are least squares over all d. Dotted: theory for large d, d for BN and d³ for "
        "ZCA, through the last point.",
        claims=("whitening-cost",),
    )


def rank(config: Config, records: Records):
    """A batch of m examples spans m − 1 directions."""
    fig, axis = new_figure(height=3.4)
    sizes = config.batch_sizes
    axis.plot(sizes, np.array(sizes) - 1, color="black", linestyle="--", label="m − 1", zorder=3)
    for source in ("pixels", "dense"):
        rows = by_seed(records.features, source=source)
        look: Any = dict(color=_COLORS[source], marker=_MARKERS[source], markersize=5)
        label = f"{source}, {rows[0]['d']} features"
        band(axis, sizes, numbers(rows, "rank"), label=label, **look)
    log_ticks(axis, sizes)
    log_ticks(axis, sizes, side="y")
    axis.set(xlabel="m, examples in a batch", ylabel="rank of the covariance")
    figures.shared_legend(fig, columns=1)
    return fig, dict(
        alt="Rank of the batch covariance against batch size: both kinds of features follow "
        "m minus 1 until the rank is near their number.",
        caption="Numerical rank, from singular values in float64. Where it is below the number of "
        f"features the covariance has no inverse. {over_seeds(config.seeds)}.",
        claims=("whitening-cost",),
    )
