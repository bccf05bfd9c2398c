"""The claims of `experiments.signal_propagation`, and how records of measurements decide them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate, paired_difference, slope
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
    decide,
)
from experiments.signal_propagation.measurements import (
    JACOBIAN_BATCH,
    JACOBIAN_WIDTH,
    THRESHOLD,
)
from experiments.signal_propagation.theory import LIMIT, residual_gradient, residual_variances

WIDE = 1000  # units from which the mean-field theory is held to its 3 %
_RATE, _VARIANCE = 0.03, 0.05  # relative deviations from theory
_ABOUT_ONE = (1 + LIMIT) / 2  # a ReLU rate below it is nearer to 1 than to π/(π − 1)
_COLLAPSED, _EXPONENT = 1.5, 0.5
_DEEP, _SHALLOW = 0.2, 0.05  # of accuracy

CLAIMS = (
    Claim(
        id="gradient-explosion",
        statement="Deep plain BN networks explode backwards at initialization; their layers' "
        "Jacobians do not have singular values near 1",
        source="Yang et al. (2019), arXiv 1902.08129, against the conjecture of Paper section 3.3",
        criterion="Reproduced if the squared gradient norm with respect to the pre-activations "
        "grows per layer, over the middle layers of networks of width 1000 and more, as mean-field "
        "theory says: the largest |measured/theory − 1| of all batch sizes, ReLU and linear, is at "
        "most 0.03 (interval over seeds). Not reproduced if ReLU's rate is about 1: its lowest of "
        f"all batch sizes is surely below {_ABOUT_ONE:.2f}, half way to π/(π − 1)",
        expected="ReLU: π/(π − 1) = 1.467 at large batch, more at small; linear: (B − 2)/(B − 3)",
    ),
    Claim(
        id="residual-variance",
        statement="With BN the variance of a residual stream grows as 1 + l, without it as 2^l",
        source="De & Smith (2020), arXiv 2002.10444",
        criterion="Reproduced if the largest relative deviation of the mean square over units and "
        "examples from 1 + l with BN, and from 2^l without, over all layers is at most 0.05 "
        "(interval over seeds). Not reproduced without the contrast: log₂ of their ratio at the "
        "last layer is surely below half of what theory says",
        expected="deviations below 0.05",
    ),
    Claim(
        id="rank-collapse",
        statement="Deep linear networks collapse to rank 1 without BN and keep a soft rank of at "
        "least c·√d with it",
        source="Daneshmand et al. (2020), arXiv 2003.01652, theorem 2: the mean over layers of "
        "(Tr M)²/‖M‖² is Ω(√d)",
        criterion="Reproduced if without BN the soft rank at the last layer is at most "
        f"{_COLLAPSED} at the width where it is largest (interval over seeds), and with BN the "
        f"exponent in d of its mean over the upper half of the layers is at least {_EXPONENT} "
        "(interval over seeds of least-squares slopes). Not reproduced if one of the two is surely "
        "violated",
        expected="without BN 1; with BN an exponent of 0.5 or more",
    ),
    Claim(
        id="deep-bn-untrainable",
        statement="Deep plain BN networks do not train; with skip connections they do",
        source="Yang et al. (2019), arXiv 1902.08129: vanilla networks with BN and without skip "
        "connections are not trainable at large depths; the depths and margins are this project's",
        criterion="Reproduced if at the largest depth the test accuracy of residual BN networks "
        f"exceeds that of plain ones by at least {_DEEP}, and at the smallest the two differ by "
        f"at most {_SHALLOW} (paired intervals over seeds, rates tuned alike). Not reproduced if "
        "one of the two is surely violated",
        expected="plain near chance at the largest depth, equal to residual at the smallest",
    ),
)


def judge_gradients(config: Any, records: Sequence[dict], jacobians: Sequence[dict]) -> Finding:
    """gradient-explosion."""

    def deviation(setting: dict) -> float:
        return setting["rate"] / setting["theory"] - 1

    settings = [setting for record in records for setting in record["settings"]]
    off = estimate([max(abs(deviation(s)) for s in r["settings"]) for r in records])
    lowest = estimate(
        [min(s["rate"] for s in r["settings"] if s["activation"] == "relu") for r in records]
    )
    worst = max(settings, key=lambda setting: abs(deviation(setting)))
    verdict = REPRODUCED if decide(off, at_most=_RATE) == REPRODUCED else INCONCLUSIVE
    note = (
        "interval: over seeds, of the largest deviation of all batch sizes and activations. The "
        f"largest of all is {_named(worst)}: {deviation(worst):+.1%}. Jacobians: of a ReLU layer "
        f"of {JACOBIAN_WIDTH} units over a batch of {JACOBIAN_BATCH}, all "
        "singular values; zero are those of directions that ReLU, or BN's two projections, take "
        "away"
    )
    if config.gradient_width < WIDE:
        verdict = INCONCLUSIVE
        note += f". Width {config.gradient_width} is below {WIDE}, which the criterion is about"
    if lowest.high < _ABOUT_ONE:
        verdict = NOT_REPRODUCED
    measured = {
        "largest |measured/theory − 1|": off.mean,
        "largest, over seeds": abs(deviation(worst)),
        "lowest rate, ReLU": lowest.mean,
    }
    for setting in records[0]["settings"]:
        rates = [s["rate"] for s in settings if _named(s) == _named(setting)]
        measured[f"rate, {_named(setting)}"] = float(np.mean(rates))
        measured[f"theory, {_named(setting)}"] = setting["theory"]
    measured["rate, ReLU without BN"] = float(np.mean([r["control"]["rate"] for r in records]))
    for name, shown in (("BN", "BN"), ("none", "no BN")):
        for key, words in (
            ("largest", "largest singular value"),
            ("rms", "rms singular value"),
            ("near_one", "share from 0.5 to 2"),
            ("zero", "share of zeros"),
        ):
            values = [jacobian[name][key] for jacobian in jacobians]
            measured[f"Jacobian, {shown}: {words}"] = float(np.mean(values))
    return Finding(CLAIMS[0], measured, off.interval, verdict, note)


def _named(setting: dict) -> str:
    activation = {"relu": "ReLU", "linear": "linear"}[setting["activation"]]
    return f"{activation}, batch {setting['batch_size']}"


def judge_residual(config: Any, records: Sequence[dict]) -> Finding:
    """residual-variance."""
    theory = residual_variances(config.residual_depth)
    deviations = {
        name: [float(np.max(np.abs(np.array(r[name]) / expected - 1))) for r in records]
        for name, expected in theory.items()
    }
    off = estimate(np.max(list(deviations.values()), axis=0))
    contrast = estimate([math.log2(r["none"][-1] / r["BN"][-1]) for r in records])
    expected_contrast = math.log2(theory["none"][-1] / theory["BN"][-1])
    verdict = REPRODUCED if decide(off, at_most=_VARIANCE) == REPRODUCED else INCONCLUSIVE
    if contrast.high < expected_contrast / 2:
        verdict = NOT_REPRODUCED
    gradient = np.mean([r["gradient"] for r in records], axis=0)
    within = np.mean([r["within"] for r in records], axis=0)
    measured = {
        "largest relative deviation": off.mean,
        "largest, BN": max(deviations["BN"]),
        "largest, no BN": max(deviations["none"]),
        "mean square at the last layer, BN": float(np.mean([r["BN"][-1] for r in records])),
        "theory, BN": float(theory["BN"][-1]),
        "mean square at the last layer, no BN": float(np.mean([r["none"][-1] for r in records])),
        "theory, no BN": float(theory["none"][-1]),
        "variance over the batch per layer, BN": (within[-1] - within[0]) / config.residual_depth,
        "1 − 1/π": 1 / LIMIT,
        "squared gradient, bottom over top, BN": gradient[0],
        "theory for a large batch": residual_gradient(config.residual_depth)[0],
    }
    return Finding(
        CLAIMS[1],
        measured,
        off.interval,
        verdict,
        note="interval: over seeds, of the largest deviation of all layers, with and without BN; a "
        f"seed is the mean of {config.residual_networks} networks of {config.residual_width} "
        "units. The law is about the mean square; of it, a part is common to all examples, and "
        "the variance over the batch, which BN divides by, grows as 1 + (1 − 1/π)·l",
    )


def judge_ranks(config: Any, records: Sequence[dict]) -> Finding:
    """rank-collapse."""
    widths, seeds = config.rank_widths, range(config.seeds)
    by_key = {(r["width"], r["seed"]): r for r in records}

    def values(name: str, key: str) -> np.ndarray:
        return np.array([[by_key[d, s][name][key] for d in widths] for s in seeds], float)

    largest = estimate(values("none", "last").max(axis=1))
    kept = values("BN", "mean")
    exponent = estimate([slope(np.log(widths), np.log(row)).mean for row in kept])
    bound = (1 - THRESHOLD) ** 2 * values("BN", "last")
    measured = {
        "exponent of the soft rank in d, BN": exponent.mean,
        "smallest soft rank/√d, BN": float((kept / np.sqrt(widths)).min()),
        "largest soft rank at the last layer, no BN": largest.mean,
        "largest, over seeds, no BN": float(values("none", "last").max()),
        "smallest rank_τ/((1 − τ)²·r), BN": float((values("BN", "thresholded") / bound).min()),
    }
    for index, d in enumerate(widths):
        measured[f"soft rank, d = {d}, BN"] = float(kept[:, index].mean())
        measured[f"rank_τ, τ = {THRESHOLD:g}, d = {d}, BN"] = float(
            values("BN", "thresholded")[:, index].mean()
        )
        measured[f"rank_τ, τ = {THRESHOLD:g}, d = {d}, no BN"] = float(
            values("none", "thresholded")[:, index].mean()
        )
    return Finding(
        CLAIMS[2],
        measured,
        exponent.interval,
        conjunction(decide(largest, at_most=_COLLAPSED), decide(exponent, at_least=_EXPONENT)),
        note=f"interval: of the exponent, over seeds. {config.rank_depth} layers, batches of d "
        "examples; soft rank r = (Σλ)²/Σλ² of HHᵀ, and rank_τ the number of λ at least τ times "
        "their mean. BN subtracts the mean here; the theorem's BN does not, and it has a small "
        "multiple of W beside the identity where this network has W alone. Theory without BN: the "
        f"second largest λ falls as exp(−l/d), so the depth must be many times {max(widths)}",
    )


def judge_training(config: Any, records: Sequence[dict]) -> Finding:
    """deep-bn-untrainable."""
    depths = config.train_depths
    by_key = {(r["residual"], r["depth"], r["seed"]): r for r in records}

    def of(residual: bool, depth: int, key: str) -> list[float]:
        return [by_key[residual, depth, seed][key] for seed in range(config.seeds)]

    gaps = {
        depth: paired_difference(of(True, depth, "accuracy"), of(False, depth, "accuracy"))
        for depth in depths
    }
    deep, shallow = gaps[max(depths)], gaps[min(depths)]
    measured = {
        f"residual − plain, depth {max(depths)}": deep.mean,
        f"residual − plain, depth {min(depths)}": shallow.mean,
    }
    diverged = sum(record["diverged"] > 0 for record in records)
    for depth in sorted(depths):
        for residual, arm in ((False, "plain"), (True, "residual")):
            accuracy = of(residual, depth, "accuracy")
            measured[f"test accuracy, {arm}, depth {depth}"] = float(np.mean(accuracy))
            measured[f"training loss at the end, {arm}, depth {depth}"] = float(
                np.mean([math.nan if x is None else x for x in of(residual, depth, "loss")])
            )
            measured[f"rate, {arm}, depth {depth}"] = by_key[residual, depth, 0]["rate"]
    note = (
        f"interval: over seeds, of residual − plain at depth {max(depths)}; at depth {min(depths)} "
        f"it is {shallow.low:.3f} to {shallow.high:.3f}. {config.num_steps} steps of momentum SGD; "
        "each arm and depth at the rate that gave the lowest training loss on a seed apart. Test "
        "accuracy by population statistics, training loss by those of the batch, over the last "
        "tenth of the steps"
    )
    ends = [rate for rate in {r["rate"] for r in records} if rate in _ends(config.learning_rates)]
    if ends:
        note += f". Chosen at an end of the grid: {', '.join(f'{r:g}' for r in sorted(ends))}"
    if diverged:
        note += f". Of {len(records)} runs {diverged} had steps that were not finite and not taken"
    return Finding(
        CLAIMS[3],
        measured,
        deep.interval,
        conjunction(
            decide(deep, at_least=_DEEP), decide(shallow, at_least=-_SHALLOW, at_most=_SHALLOW)
        ),
        note,
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
