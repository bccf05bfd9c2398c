"""The figures of `experiments.ensemble`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bn_research.claims.alt_text import line_ends
from bn_research.claims.estimate import estimate
from bn_research.claims.figures import GREY, PALETTE, Figure, new_figure, save_all, shared_legend
from bn_research.claims.formatting import format_number
from bn_research.claims.plots import bands, interval_row, name_rows, reference
from bn_research.probes.predictions import BINS, pooled
from experiments.ensemble import Config
from experiments.ensemble.training import SEEDS, VARIED, Records
from experiments.ensemble.verdicts import PUBLISHED, first, most_draws, single

_COLORS = {VARIED: PALETTE.blue, SEEDS: PALETTE.vermillion}
_SHOWN = 100  # examples that a bin of the reliability diagram needs: an error below 0.05


def draw(config: Config, records: Records, folder: Path) -> list[Figure]:
    """All figures, in the order of the page."""
    return save_all((errors, sizes, reliability), folder, config, records)


def errors(config: Config, records: Records):
    """Errors of single networks, of six together, and of MC-BN."""
    fig, axes = new_figure(rows=2, width=5.4, height=6.0)
    rows: dict[str, tuple[Sequence[float], Sequence[float], str]] = {}  # dots, and means of some
    for kind, these in records.ensembles.items():
        ones = [m["scores"]["error"] for e in these for m in e["members"]]
        rows[f"single, {kind}"] = ones, [single(e, "error") for e in these], _COLORS[kind]
        six = [e["scores"]["error"] for e in these]
        rows[f"ensemble, {kind}"] = six, six, _COLORS[kind]
    networks = [first(e) for e in records.ensembles[SEEDS]]
    found = [n["scores"]["error"] for n in networks]
    rows["population statistics"] = found, found, PALETTE.green
    for number in networks[0]["mc_bn"]:
        found = [n["mc_bn"][number]["error"] for n in networks]
        rows[f"MC-BN, {number} draws"] = found, found, PALETTE.green
    means = []
    for y, (name, (dots, averaged, color)) in enumerate(rows.items()):
        shown = 100 * np.asarray(dots)
        axes[0].plot(shown, np.full(len(dots), y), "o", color=color, alpha=0.3, ms=4)
        mean = estimate(averaged).mapped(lambda error: 100 * error)
        interval_row(axes[0], y, mean, color=color, marker="D")
        means.append(f"{name}: {mean.mean:.3g}")
    name_rows(axes[0], list(rows))
    axes[0].set_xlabel("top-1 error, %")
    published: dict[str, float] = {}
    for top, (alone, together, test) in PUBLISHED.items():
        published |= {f"single, {top}": alone, f"ensemble, {top}": together}
        published |= {f"ensemble, {top}, test set": test} if test is not None else {}
    look = dict(xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
    for y, value in enumerate(published.values()):
        axes[1].plot(value, y, "D", color="black", markersize=7)
        axes[1].annotate(f"{value:g}", (value, y), **look)
    name_rows(axes[1], list(published))
    axes[1].set(xlim=(0, 27), xlabel="published: error on ImageNet, 144 crops, %")
    return fig, dict(
        alt="Above: top-1 test errors in per cent, as dots with their mean and its interval; "
        f"means: {'; '.join(means)}. Below: the published errors on ImageNet: "
        f"{'; '.join(f'{name}: {value:g}' for name, value in published.items())}.",
        caption=f"{config.dataset}. Pale dots: networks or ensembles; diamond and line: mean and "
        f"95 % interval over {config.seeds} ensembles (of a single network: over their means). "
        "Green: one network of each ensemble of one setting, by population statistics and by those "
        "of random training batches (MC-BN). Published: Ioffe & Szegedy "
        "(2015), section 4.2.3 and figure 4.",
        claims=("ensemble-of-six", "varied-settings-help"),
    )


def sizes(config: Config, records: Records):
    """Error against the size of the ensemble."""
    fig, axis = new_figure(width=5.4, height=4.0)
    shares = {}
    for kind, these in records.ensembles.items():
        found = np.array([e["sizes"]["error"] for e in these])
        shares[kind] = 100 * found / np.maximum(found[:, :1], np.finfo(float).tiny)
    counts = range(1, found.shape[1] + 1)
    bands(axis, counts, shares, _COLORS)
    for (top, of_top), marker in zip(PUBLISHED.items(), ("D", "s"), strict=True):
        label = f"published, ImageNet {top}"
        axis.plot(counts[-1], 100 * of_top.left, marker, color="black", markersize=7, label=label)
    reference(axis, y=100)
    axis.set_xticks(counts)
    axis.set(xlabel="networks in the ensemble", ylabel="error, % of a single network's")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Top-1 test error against the number of networks in the ensemble, in per cent of the "
        f"mean error of a single one, from first to last: {line_ends(axis)}.",
        caption=f"{config.dataset}. Mean over all choices of so many of the six networks; line: "
        f"mean of {config.seeds} ensembles, band: lowest to highest. Published: Ioffe & Szegedy "
        "(2015), figure 4.",
        claims=("ensemble-of-six",),
    )


def reliability(config: Config, records: Records):
    """Reliability of the predicted probabilities."""
    fig, axes = new_figure(rows=2, width=5.4, height=6.6)
    varied, seeds = records.ensembles[VARIED], records.ensembles[SEEDS]
    networks, draws = [first(e) for e in seeds], most_draws(seeds)
    curves = (
        ("single", [n["scores"] for n in networks], GREY, "o"),
        (f"MC-BN, {draws} draws", [n["mc_bn"][draws] for n in networks], PALETTE.green, "^"),
        (f"ensemble, {SEEDS}", [e["scores"] for e in seeds], _COLORS[SEEDS], "s"),
        (f"ensemble, {VARIED}", [e["scores"] for e in varied], _COLORS[VARIED], "D"),
    )
    axes[0].plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1.2)
    reference(axes[1], y=0, color="black", linestyle=":")
    farthest = []
    for label, these, color, marker in curves:
        confidence, accuracy = pooled([one["bins"] for one in these], at_least=_SHOWN)
        if len(accuracy):
            most = max(accuracy - confidence, key=abs)
            farthest.append(f"{label}: {format_number(float(f'{most:.2g}'))}")
        style = {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
        axes[0].plot(confidence, accuracy, label=label, **style)
        axes[1].plot(confidence, accuracy - confidence, **style)
    axes[0].set(xlim=(0, 1.02), xlabel="confidence", ylabel="accuracy", ylim=(0, 1.02))
    axes[1].set(xlim=(0, 1.02), xlabel="confidence", ylabel="accuracy − confidence")
    shared_legend(fig, columns=2)
    return fig, dict(
        alt="Above: accuracy against confidence in bins, of single networks, MC-BN and two kinds "
        "of ensemble, with the diagonal of perfect calibration. Below: accuracy less confidence; "
        f"farthest from 0: {'; '.join(farthest) or 'no bins'}.",
        caption=f"{config.dataset}. {BINS} bins of equal width, all {config.seeds} networks or "
        f"ensembles pooled; bins of fewer than {_SHOWN} examples are left out. Below the dotted "
        "line: too confident; above it: not confident enough.",
        claims=("ensemble-calibrates", "mc-bn-calibrates"),
    )
