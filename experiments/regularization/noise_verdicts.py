"""The claims of `experiments.regularization` about the noise of batches, and what decides them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.finding import INCONCLUSIVE, Finding, conjunction, decide
from bn_research.probes.batch_noise import exact_moments, noise_law

REACH = 2  # |x̃|, from the centre: 95 % of Gaussian features
LEAST_SIZE = 128  # from which the first order is held to its 10 %
_TAIL = 3
_LAW, _SAMPLES = 0.10, 0.05  # relative deviations
_SHARE, _LEAST_WORTH = 0.5, 0.9
_STATISTICS = ("mean", "var")
_SPELLED = {"mean": "mean", "var": "variance"}

CLAIMS = (
    Claim(
        id="batch-noise-law",
        statement='"A training example is seen in conjunction with other examples": given its '
        "population-normalized value x̃, what BN makes of it has the variance (1 + x̃²/2)/m in "
        "batches of m",
        source="Notes' open question; Paper section 3.4. The law is this project's, to first order "
        "in 1/m",
        criterion=f"Reproduced if for Gaussian features, m ≥ {LEAST_SIZE} and |x̃| ≤ {REACH} (95 % "
        "of them) the exact variance deviates from the law by at most 10 %, and the variance over "
        "batches of Gaussian samples, the largest deviation of all sizes and x̃, from the exact one "
        "by at most 5 % (interval over seeds). Not reproduced if one of the two is surely more. "
        "The exact curve was known when the range of x̃ was chosen",
        expected="within 6 %; at |x̃| = 3 not: 16 % below the law at m = 128",
    ),
    Claim(
        id="batch-noise-law-of-real-features",
        statement="With a feature's own skewness γ₁ and kurtosis κ the variance is (1 + γ₁x̃ + "
        "(κ − 1)x̃²/4)/m in trained networks; of convolutions with effective sizes in the place of "
        "m",
        source="This project's, to first order in 1/m",
        criterion=f"Reproduced if for m ≥ {LEAST_SIZE} the median over features and examples with "
        f"|x̃| ≤ {REACH} of |measured/law − 1| is at most 0.10 in every hidden layer, its largest "
        "of all layers and sizes (interval over seeds). Not reproduced if it is surely more",
        expected="the scatter of the measurement, 0.67·√(2/batches), and a little more",
    ),
    Claim(
        id="pixels-are-not-examples",
        statement="A convolution's statistics over m images of h·w positions are as noisy as those "
        "of far fewer than m·h·w values",
        source="Against the effective mini-batch size m·h·w of Paper section 3.2; this project's",
        criterion="Reproduced if in every convolution the effective sizes σ²/Var(μ_B) and "
        "(κ − 1)σ⁴/Var(σ_B²), medians over features, are at most half of m·h·w and at least 0.9·m, "
        "and predicted by the scatter of image means (the design effect) within 10 %, median of "
        f"|measured/predicted − 1|: for all m ≥ {LEAST_SIZE} (intervals over seeds of the largest "
        "share, the smallest worth and the largest error). Not reproduced if one of these is "
        "surely violated",
        expected="a few values an image",
    ),
)


def large_sizes(config: Any) -> list[int]:
    """Sizes that the criteria are about; all where there are none."""
    return [m for m in config.law_sizes if m >= LEAST_SIZE] or list(config.law_sizes)


def shown_size(config: Any) -> int:
    """The size whose curves are kept."""
    return min(large_sizes(config))


def judge(config: Any, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Finding]:
    """Findings of all claims of this part.

    Args:
      config: of the run.
      records: of `regularization_noise.measure`.
    """
    return [
        _judge_law(config, records["gaussian"]),
        _judge_features(config, records["features"]),
        _judge_pixels(config, records["features"]),
    ]


def law_deviation(m: int, reach: float, *, above: float = 0.0) -> float:
    """The largest deviation of the exact variance from the law, signed, for above ≤ |x̃| ≤ reach."""
    x = np.linspace(above, reach, 41)
    deviations = exact_moments(x, m).var / noise_law(x, m).var - 1
    return float(deviations[np.argmax(np.abs(deviations))])


def _judge_law(config, gaussian) -> Finding:
    def off(record):
        return max(
            np.max(np.abs(np.array(var) / exact_moments(config.law_points, int(m)).var - 1))
            for m, var in record["variances"].items()
        )

    samples = estimate([off(record) for record in gaussian])
    sizes = [LEAST_SIZE, *(m for m in config.law_sizes if m > LEAST_SIZE)]
    worst = max(abs(law_deviation(m, REACH)) for m in sizes)
    measured = {
        f"largest |exact/law − 1|, m ≥ {LEAST_SIZE}, |x̃| ≤ {REACH}": worst,
        f"likewise, |x̃| ≤ {_TAIL}": max(abs(law_deviation(m, _TAIL)) for m in sizes),
        **_with_interval("largest |samples/exact − 1|", samples),
    }
    for m in sorted(config.law_sizes):
        for x in (0, REACH, _TAIL):
            measured[f"exact/law, m = {m}, |x̃| = {x}"] = 1 + law_deviation(m, x, above=x)
    small = [m for m in sorted(config.law_sizes) if m < LEAST_SIZE]
    note = (
        "interval: the exact number, which no seed changes. The exact curve was known when the "
        f"range of x̃ was chosen; up to |x̃| = {_TAIL} the law would fail. Large values are less "
        "noisy than the law says: x̂ never leaves ±√(m − 1). Samples: "
        f"{config.law_samples} batches of each size and seed"
    )
    if small:
        note += f". Below the criterion's m: {', '.join(f'{m}' for m in small)}"
    verdict = conjunction(decide((worst, worst), at_most=_LAW), decide(samples, at_most=_SAMPLES))
    return Finding(CLAIMS[0], measured, (worst, worst), verdict, note)


def _judge_features(config, features) -> Finding:
    large = large_sizes(config)

    def over(key: str, pick: Callable, kind: str | None = None) -> Estimate:
        return estimate(
            [
                pick(layer["sizes"][str(m)][key] for layer in _layers(record, kind) for m in large)
                for record in features
            ]
        )

    off = over("deviation", max)
    measured = {
        **_with_interval("largest median of |measured/law − 1|", off),
        **_with_interval("largest, dense layers", over("deviation", max, "dense")),
        **_with_interval("largest, convolutions", over("deviation", max, "conv")),
        **_with_interval("largest, Gaussian formula, dense layers", over("gaussian", max, "dense")),
        "scatter of the measurement": 0.6745 * float(np.sqrt(2 / config.law_batches)),
    }
    for layer in features[0]["layers"]:
        name = layer["layer"]
        own = [_named(record, name) for record in features]
        measured[f"kurtosis, {name}"] = float(np.mean([one["kurtosis"] for one in own]))
        measured[f"|skewness|, {name}"] = float(np.mean([one["skewness"] for one in own]))
        measured[f"share of |x̃| ≤ {REACH}, {name}"] = float(
            np.mean([one["within reach"] for one in own])
        )
        for m in sorted(config.law_sizes):
            ratios = [one["sizes"][str(m)]["ratio"] for one in own]
            measured[f"measured/law, m = {m}, {name}"] = float(np.mean(ratios))
    losses = [record["loss"] for record in features]
    note = (
        "interval: over seeds, of the largest of all layers and sizes. "
        f"{config.law_batches} batches of each size, without replacement from {config.law_images} "
        "training images at most, whose finiteness the law allows for; the measurement's own "
        "scatter is in the deviation. Pre-activations of a network after "
        f"{config.law_steps} steps, training loss {_mean(losses):.3g}; each layer is normalized by "
        "the whole set"
    )
    note += _strange(features)
    return Finding(
        CLAIMS[1], measured, off.interval, _held(config, decide(off, at_most=_LAW)), note
    )


def _judge_pixels(config, features) -> Finding:
    large = large_sizes(config)

    def over(
        key: str,
        pick: Callable,
        *,
        of_all: bool = False,
        statistics: Sequence[str] = _STATISTICS,
    ) -> Estimate:
        return estimate(
            [
                pick(
                    layer["sizes"][str(m)]["effective"][statistic][key]
                    / (layer["positions"] if of_all else 1)
                    for layer in _layers(record, "conv")
                    for m in large
                    for statistic in statistics
                )
                for record in features
            ]
        )

    share = over("measured", max, of_all=True)
    worth, error = over("measured", min), over("error", max)
    measured = {
        **_with_interval("largest effective size/(m·h·w)", share),
        **_with_interval(
            "largest, of the mean", over("measured", max, of_all=True, statistics=("mean",))
        ),
        **_with_interval(
            "largest, of the variance", over("measured", max, of_all=True, statistics=("var",))
        ),
        **_with_interval("smallest effective size/m", worth),
        **_with_interval("largest median of |measured/predicted − 1|", error),
    }
    shown = str(shown_size(config))
    for layer in _layers(features[0], "conv"):
        name = layer["layer"]
        own = [_named(record, name)["sizes"][shown] for record in features]
        measured[f"h·w, {name}"] = layer["positions"]
        for statistic in _STATISTICS:
            worths = [one["effective"][statistic] for one in own]
            words = f"values an image is worth, {_SPELLED[statistic]}, {name}"
            measured |= _with_interval(words, estimate([one["measured"] for one in worths]))
            measured[f"{words}: predicted"] = _mean([one["predicted"] for one in worths])
            measured[f"{words}: least feature"] = min(one["least"] for one in worths)
            measured[f"{words}: most feature"] = max(one["most"] for one in worths)
        measured[f"noise over that of m·h·w values, {name}"] = _mean(
            [one["per value"] for one in own]
        )
    verdict = conjunction(
        decide(share, at_most=_SHARE),
        decide(worth, at_least=_LEAST_WORTH),
        decide(error, at_most=_LAW),
    )
    note = (
        f"interval: over seeds, of the largest share of m·h·w. Worths at m = {shown}, medians over "
        "features; the least and the most are of all features and seeds, as predicted. An image "
        "can be worth more than h·w values for the mean: behind a filter that takes differences "
        "its positions balance out"
    )
    note += _strange(features)
    return Finding(CLAIMS[2], measured, share.interval, _held(config, verdict), note)


def _layers(record: Mapping[str, Any], kind: str | None) -> list[Mapping[str, Any]]:
    return [layer for layer in record["layers"] if kind in (None, layer["kind"])]


def _named(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(layer for layer in record["layers"] if layer["layer"] == name)


def _with_interval(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name}, low": found.low, f"{name}, high": found.high}


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([np.nan if value is None else value for value in values]))


def _held(config: Any, verdict: str) -> str:
    """Inconclusive without a size that the criterion is about."""
    return verdict if max(config.law_sizes) >= LEAST_SIZE else INCONCLUSIVE


def _strange(features: Sequence[Mapping[str, Any]]) -> str:
    """What a reader must know of runs that went wrong."""
    words = ""
    diverged = sum(record["diverged"] > 0 for record in features)
    constant = sum(layer["constant"] for record in features for layer in record["layers"])
    if diverged:
        words += f". Of {len(features)} runs {diverged} had steps that were not finite"
    if constant:
        words += f". Left out: {constant} constant features"
    return words
