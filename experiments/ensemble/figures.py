"""The figures of `experiments.ensemble`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.estimate import estimate
from bn_research.claims.figures import (
    PALETTE,
    Figure,
    band,
    new_figure,
    save_figure,
    shared_legend,
)
from bn_research.claims.formatting import format_number
from experiments.ensemble.scores import BINS
from experiments.ensemble.verdicts import (
    PUBLISHED,
    SEEDS,
    VARIED,
    Ensembles,
    first,
    most_draws,
    single,
)

_GREY = "#777777"
_COLORS = {VARIED: PALETTE.blue, SEEDS: PALETTE.vermillion}
_SHOWN = 100  # examples that a bin of the reliability diagram needs: an error below 0.05


def draw(config: Any, ensembles: Ensembles, folder: Path) -> list[Figure]:
    """All figures, in the order of the report."""
    return [
        _draw_errors(config, ensembles, folder / "errors.png"),
        _draw_sizes(config, ensembles, folder / "sizes.png"),
        _draw_reliability(config, ensembles, folder / "reliability.png"),
    ]


def _row(axis: Any, y: float, dots: Sequence[float], means: Sequence[float], color: str) -> str:
    """Each of the dots, in per cent, and the mean of means with its interval; returns that mean."""
    axis.plot(100 * np.asarray(dots), np.full(len(dots), y), "o", color=color, alpha=0.3, ms=4)
    found = estimate(means)
    if np.isfinite(found.low):
        axis.plot([100 * found.low, 100 * found.high], [y, y], color=color, linewidth=2)
    axis.plot(100 * found.mean, y, "D", color=color, markersize=7)
    return f"{100 * found.mean:.3g}"


def _draw_errors(config: Any, ensembles: Ensembles, path: Path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.0)
    names: list[str] = []
    means: list[str] = []
    for kind, these in ensembles.items():
        ones = [m["scores"]["error"] for e in these for m in e["members"]]
        singles = [single(e, "error") for e in these]
        means.append(_row(axes[0], len(names), ones, singles, _COLORS[kind]))
        six = [e["scores"]["error"] for e in these]
        means.append(_row(axes[0], len(names) + 1, six, six, _COLORS[kind]))
        names += [f"single, {kind}", f"ensemble, {kind}"]
    networks = [first(e) for e in ensembles[SEEDS]]
    asked = {"population statistics": [n["scores"] for n in networks]}
    for number in networks[0]["mc_bn"]:
        asked[f"MC-BN, {number} draws"] = [n["mc_bn"][number] for n in networks]
    for name, scores in asked.items():
        errors = [found["error"] for found in scores]
        means.append(_row(axes[0], len(names), errors, errors, PALETTE.green))
        names.append(name)
    means = [f"{name}: {mean}" for name, mean in zip(names, means, strict=True)]
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].set_xlabel("top-1 error, %")
    published: list[tuple[str, float]] = []
    for top, found in PUBLISHED.items():
        published += [(f"single, {top}", found.single), (f"ensemble, {top}", found.six)]
        if found.test is not None:
            published.append((f"ensemble, {top}, test set", found.test))
    for y, (_, value) in enumerate(published):
        axes[1].plot(value, y, "D", color="black", markersize=7)
        axes[1].annotate(
            f"{value:g}",
            (value, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes[1].set_yticks(range(len(published)), [name for name, _ in published])
    axes[1].set_ylim(len(published) - 0.5, -0.5)
    axes[1].set_xlim(0, 27)
    axes[1].set_xlabel("published: error on ImageNet, 144 crops, %")
    return save_figure(
        fig,
        path,
        title="Errors of single networks, of six together, and of MC-BN",
        alt="Above: top-1 test errors in per cent, as dots with their mean and its interval; "
        f"means: {'; '.join(means)}. Below: the published errors on ImageNet: "
        f"{'; '.join(f'{name}: {value:g}' for name, value in published)}.",
        caption=f"{config.dataset}. Pale dots: networks or ensembles; diamond and line: mean and "
        f"95 % interval over {config.seeds} ensembles (of a single network: over their means). "
        "Green: one network of each ensemble of one setting, by population statistics and by those "
        "of random training batches (MC-BN). Published: Ioffe & Szegedy "
        "(2015), section 4.2.3 and figure 4.",
        claims=("ensemble-of-six", "varied-settings-help"),
    )


def _draw_sizes(config: Any, ensembles: Ensembles, path: Path) -> Figure:
    fig, axis = new_figure(width=5.4, height=4.0)
    count = 0
    for kind, these in ensembles.items():
        errors = np.array([e["sizes"]["error"] for e in these])
        count = errors.shape[1]
        share = 100 * errors / np.maximum(errors[:, :1], np.finfo(float).tiny)
        sizes = np.arange(1, count + 1)
        band(axis, sizes, share, label=kind, color=_COLORS[kind])
    for (top, found), marker in zip(PUBLISHED.items(), ("D", "s"), strict=True):
        label = f"published, ImageNet {top}"
        axis.plot(count, 100 * found.left, marker, color="black", markersize=7, label=label)
    axis.axhline(100, color=_GREY, linestyle="--", linewidth=1.2)
    axis.set_xticks(range(1, count + 1))
    axis.set_xlabel("networks in the ensemble")
    axis.set_ylabel("error, % of a single network's")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Error against the size of the ensemble",
        alt="Top-1 test error against the number of networks in the ensemble, in per cent of the "
        f"mean error of a single one, from first to last: {line_ends(axis)}.",
        caption=f"{config.dataset}. Mean over all choices of so many of the six networks; line: "
        f"mean of {config.seeds} ensembles, band: lowest to highest. Published: Ioffe & Szegedy "
        "(2015), figure 4.",
        claims=("ensemble-of-six",),
    )


def _pooled(these: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and accuracy of the bins of all scores together that hold enough examples."""
    bins = [scores["bins"] for scores in these]
    count = np.array([b["count"] for b in bins], np.float64)
    total = count.sum(axis=0)
    kept = total >= _SHOWN
    confidence, accuracy = (
        (count * [b[field] for b in bins]).sum(axis=0)[kept] / total[kept]
        for field in ("confidence", "accuracy")
    )
    return confidence, accuracy


def _draw_reliability(config: Any, ensembles: Ensembles, path: Path) -> Figure:
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    networks, draws = [first(e) for e in ensembles[SEEDS]], most_draws(ensembles[SEEDS])
    curves = (
        ("single", [n["scores"] for n in networks], _GREY, "o"),
        (f"MC-BN, {draws} draws", [n["mc_bn"][draws] for n in networks], PALETTE.green, "^"),
        (f"ensemble, {SEEDS}", [e["scores"] for e in ensembles[SEEDS]], _COLORS[SEEDS], "s"),
        (f"ensemble, {VARIED}", [e["scores"] for e in ensembles[VARIED]], _COLORS[VARIED], "D"),
    )
    axes[0].plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1.2)
    axes[1].axhline(0, color="black", linestyle=":", linewidth=1.2)
    farthest = []
    for label, these, color, marker in curves:
        confidence, accuracy = _pooled(these)
        if len(accuracy):
            most = max(accuracy - confidence, key=abs)
            farthest.append(f"{label}: {format_number(float(f'{most:.2g}'))}")
        style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
        axes[0].plot(confidence, accuracy, label=label, **style)
        axes[1].plot(confidence, accuracy - confidence, **style)
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylabel("accuracy − confidence")
    for axis in axes:
        axis.set_xlim(0, 1.02)
        axis.set_xlabel("confidence")
    shared_legend(fig, columns=2)
    return save_figure(
        fig,
        path,
        title="Reliability of the predicted probabilities",
        alt="Above: accuracy against confidence in bins, of single networks, MC-BN and two kinds "
        "of ensemble, with the diagonal of perfect calibration. Below: accuracy less confidence; "
        f"farthest from 0: {'; '.join(farthest) or 'no bins'}.",
        caption=f"{config.dataset}. {BINS} bins of equal width, all {config.seeds} networks or "
        f"ensembles pooled; bins of fewer than {_SHOWN} examples are left out. Below the dotted "
        "line: too confident; above it: not confident enough.",
        claims=("ensemble-calibrates", "mc-bn-calibrates"),
    )
