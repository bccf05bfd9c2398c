"""The claims of `experiments.signal_propagation`, and how its records decide them."""

import math
from collections.abc import Sequence

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import estimate, paired_difference, slope
from bn_research.claims.finding import Finding, conjunction, decide, verdict_of
from bn_research.claims.judging import Record, at_end, by_seed, listed, lost, numbers
from bn_research.probes.mean_field import LIMIT, residual_gradient, residual_variances
from experiments.signal_propagation import Config, measurements
from experiments.signal_propagation.measurements import JACOBIAN_BATCH, JACOBIAN_WIDTH, Records

_WIDE = 1000  # units from which the mean-field theory is held to its 3 %
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


def judge(config: Config, records: Records) -> list[Finding]:
    """A finding for each claim, in their order."""
    return [
        judge_gradients(config, records.gradients, records.jacobians),
        judge_residual(config, records.residuals),
        judge_ranks(config, records.ranks),
        judge_training(config, records.trained),
    ]


def judge_gradients(
    config: Config, records: Sequence[Record], jacobians: Sequence[Record]
) -> Finding:
    """gradient-explosion."""
    settings, shown = records[0]["settings"], {"relu": "ReLU", "linear": "linear"}
    names = [f"{shown[s['activation']]}, batch {s['batch_size']}" for s in settings]
    theory = [setting["theory"] for setting in settings]
    rates = numbers(records, lambda record: [s["rate"] for s in record["settings"]])
    relu = [name.startswith("ReLU") for name in names]
    deviations = rates / theory - 1
    off = estimate(np.abs(deviations).max(axis=1))
    lowest = estimate(rates[:, relu].min(axis=1))
    seed, worst = np.unravel_index(np.argmax(np.abs(deviations)), deviations.shape)
    measured = {
        "largest |measured/theory − 1|": off.mean,
        "largest, over seeds": abs(deviations[seed, worst]),
        "lowest rate, ReLU": lowest.mean,
    }
    for name, column, expected in zip(names, rates.T, theory, strict=True):
        measured |= {f"rate, {name}": column.mean(), f"theory, {name}": expected}
    measured["rate, ReLU without BN"] = numbers(records, lambda r: r["control"]["rate"]).mean()
    shares = {"near_one": "share from 0.5 to 2", "zero": "share of zeros"}
    for arm, name in (("BN", "BN"), ("none", "no BN")):
        for key in ("largest", "rms", "near_one", "zero"):
            words = shares.get(key, f"{key} singular value")
            measured[f"Jacobian, {name}: {words}"] = np.mean([j[arm][key] for j in jacobians])
    note = (
        "interval: over seeds, of the largest deviation of all batch sizes and activations. The "
        f"largest of all is {names[worst]}: {deviations[seed, worst]:+.1%}. Jacobians: of a ReLU "
        f"layer of {JACOBIAN_WIDTH} units over a batch of {JACOBIAN_BATCH}, all "
        "singular values; zero are those of directions that ReLU, or BN's two projections, take "
        "away"
    )
    wide = config.gradient_width >= _WIDE
    if not wide:
        note += f". Width {config.gradient_width} is below {_WIDE}, which the criterion is about"
    verdict = verdict_of(reproduced=wide and off.high <= _RATE, refuted=lowest.high < _ABOUT_ONE)
    return Finding(CLAIMS[0], measured, off.interval, verdict, note)


def judge_residual(config: Config, records: Sequence[Record]) -> Finding:
    """residual-variance."""
    theory = residual_variances(config.residual_depth)
    deviations = {
        name: np.abs(numbers(records, name) / expected - 1).max(axis=1)
        for name, expected in theory.items()
    }
    off = estimate(np.maximum(*deviations.values()))
    bn, none, within, gradient = (
        numbers(records, name) for name in ("BN", "none", "within", "gradient")
    )
    contrast = estimate([math.log2(a / b) for a, b in zip(none[:, -1], bn[:, -1], strict=True)])
    expected_contrast = math.log2(theory["none"][-1] / theory["BN"][-1])
    spread = within.mean(axis=0)
    measured = {
        "largest relative deviation": off.mean,
        "largest, BN": deviations["BN"].max(),
        "largest, no BN": deviations["none"].max(),
        "mean square at the last layer, BN": bn[:, -1].mean(),
        "theory, BN": theory["BN"][-1],
        "mean square at the last layer, no BN": none[:, -1].mean(),
        "theory, no BN": theory["none"][-1],
        "variance over the batch per layer, BN": (spread[-1] - spread[0]) / config.residual_depth,
        "1 − 1/π": 1 / LIMIT,
        "squared gradient, bottom over top, BN": gradient.mean(axis=0)[0],
        "theory for a large batch": residual_gradient(config.residual_depth)[0],
    }
    return Finding(
        CLAIMS[1],
        measured,
        off.interval,
        verdict_of(reproduced=off.high <= _VARIANCE, refuted=contrast.high < expected_contrast / 2),
        note="interval: over seeds, of the largest deviation of all layers, with and without BN; a "
        f"seed is the mean of {config.residual_networks} networks of {config.residual_width} "
        "units. The law is about the mean square; of it, a part is common to all examples, and "
        "the variance over the batch, which BN divides by, grows as 1 + (1 − 1/π)·l",
    )


def judge_ranks(config: Config, records: Sequence[Record]) -> Finding:
    """rank-collapse."""
    widths = config.rank_widths

    def values(name: str, key: str) -> np.ndarray:  # [seeds, widths]
        return np.transpose(
            [numbers(by_seed(records, width=d), lambda r: r[name][key]) for d in widths]
        )

    largest = estimate(values("none", "last").max(axis=1))
    kept, above = values("BN", "mean"), values("BN", "thresholded")
    exponent = estimate([slope(np.log(widths), np.log(row)).mean for row in kept])
    bound = (1 - measurements.THRESHOLD) ** 2 * values("BN", "last")
    measured = {
        "exponent of the soft rank in d, BN": exponent.mean,
        "smallest soft rank/√d, BN": (kept / np.sqrt(widths)).min(),
        "largest soft rank at the last layer, no BN": largest.mean,
        "largest, over seeds, no BN": values("none", "last").max(),
        "smallest rank_τ/((1 − τ)²·r), BN": (above / bound).min(),
    }
    for index, d in enumerate(widths):
        rank = f"rank_τ, τ = {measurements.THRESHOLD:g}, d = {d}"
        measured[f"soft rank, d = {d}, BN"] = kept[:, index].mean()
        measured[f"{rank}, BN"] = above[:, index].mean()
        measured[f"{rank}, no BN"] = values("none", "thresholded")[:, index].mean()
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


def judge_training(config: Config, records: Sequence[Record]) -> Finding:
    """deep-bn-untrainable."""
    depths = sorted(config.train_depths)

    def of(residual: bool, depth: int, key: str = "accuracy") -> np.ndarray:
        return numbers(by_seed(records, residual=residual, depth=depth), key)

    shallow, deep = (paired_difference(of(True, d), of(False, d)) for d in (depths[0], depths[-1]))
    measured = {
        f"residual − plain, depth {depths[-1]}": deep.mean,
        f"residual − plain, depth {depths[0]}": shallow.mean,
    }
    for depth in depths:
        for residual, arm in ((False, "plain"), (True, "residual")):
            at = f"{arm}, depth {depth}"
            measured[f"test accuracy, {at}"] = of(residual, depth).mean()
            measured[f"training loss at the end, {at}"] = of(residual, depth, "loss").mean()
            measured[f"rate, {at}"] = of(residual, depth, "rate")[0]
    ends = {r["rate"] for r in records if at_end(r["rate"], config.learning_rates)}
    note = (
        f"interval: over seeds, of residual − plain at depth {depths[-1]}; at depth {depths[0]} "
        f"it is {shallow.low:.3f} to {shallow.high:.3f}. {config.num_steps} steps of momentum SGD; "
        "each arm and depth at the rate that gave the lowest training loss on a seed apart. Test "
        "accuracy by population statistics, training loss by those of the batch, over the last "
        "tenth of the steps"
        + listed("Chosen at an end of the grid", [f"{rate:g}" for rate in sorted(ends)])
        + lost(records)
    )
    verdict = conjunction(
        decide(deep, at_least=_DEEP), decide(shallow, at_least=-_SHALLOW, at_most=_SHALLOW)
    )
    return Finding(CLAIMS[3], measured, deep.interval, verdict, note)
