"""The claims of `experiments.transform`, and how its records decide them."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, median_interval, slope
from bn_research.claims.finding import INCONCLUSIVE, REPRODUCED, Finding, conjunction, decide
from bn_research.claims.judging import Record, by_seed, numbers
from experiments.transform import Config
from experiments.transform.measurements import ARMS, DENSE_UNITS, PASSES, REAL, SOURCES, Records

EXACT = 1e-12  # what counts as equal in float64
_JUDGED_DIM = 512

CLAIMS = (
    Claim(
        id="unit-normalization",
        statement="BN gives each feature mean 0 and variance 1",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3",
        criterion="Reproduced if on every batch of every seed (they take the ε in turn), for every "
        "feature that is not constant, mean 0, variance σ²/(σ² + ε) and largest |x̂| ≤ √(m − 1) "
        "hold to 1e-12 in float64; not reproduced if one is violated",
        expected="each to 1e-12",
    ),
    Claim(
        id="identity-recoverable",
        statement="γ and β can undo the normalization",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3",
        criterion="Reproduced if γ = √(σ² + ε) and β = μ give x back to 1e-12 of the feature's "
        "largest |x| on every batch of every seed, and on another batch the root mean square error "
        "falls as m to the power −0.5 ± 0.1 (interval over seeds) for each kind of real features; "
        "not reproduced if x does not come back to 1e-12",
        expected="1e-12; slope −0.5",
    ),
    Claim(
        id="no-decorrelation",
        statement="BN does not decorrelate features",
        source="Notes on Ioffe & Szegedy (2015)",
        criterion="Reproduced if the correlation matrix of BN(x) equals that of x to 1e-12 for "
        "every seed, batch size and ε, while ZCA takes every correlation below 1e-6; not "
        "reproduced if the matrices differ",
        expected="equal to 1e-12; ZCA: 0",
    ),
    Claim(
        id="whitening-cost",
        statement="Whitening by the covariance of a batch is impractical",
        source="Notes on Ioffe & Szegedy (2015); Paper section 3",
        criterion=f"Reproduced if the rank of every batch covariance is at most m − 1 and, at "
        f"d = {_JUDGED_DIM}, ZCA takes at least 3 times as long as BN, forward and with gradient "
        "(interval of the median over repetitions); not reproduced if a rank is higher or a ratio "
        "is surely below 3",
        expected="rank ≤ m − 1; ratio far above 3, growing with d",
    ),
)


def judge(config: Config, records: Records) -> list[Finding]:
    """The findings of all claims, in their order."""
    return [
        judge_unit(records.features, records.outlier),
        judge_identity(config, records.features),
        judge_decorrelation(records.features, records.whitening),
        judge_cost(records.features, records.times),
    ]


def _worst(records: Sequence[Record], key: str) -> float:
    """Largest of a deviation over sources, seeds and batch sizes; infinite when one is lost."""
    worst = numbers(records, key).max()
    return math.inf if math.isnan(worst) else float(worst)


def _within(value: float) -> str:
    return decide((value, value), at_most=EXACT)


def judge_unit(records: Sequence[Record], outlier: Record) -> Finding:
    """unit-normalization."""
    mean, var, excess = (_worst(records, key) for key in ("mean", "variance", "excess"))
    worst, share = max(mean, var, excess), _worst(records, "constant_share")
    real = [record for record in records if record["source"] in REAL]
    measured = {
        "largest |mean|": mean,
        "largest |variance - σ²/(σ² + ε)|": var,
        "largest excess of |x̂| over √(m - 1)": excess,
        "largest |x̂|/√(m - 1), real features": _worst(real, "reach"),
        "one outlier, ||x̂| - √(m - 1)|": _worst([outlier], "deviation"),
        "constant features, largest |x̂|": _worst(records, "constant_output"),
    }
    note = (
        "interval: the largest deviation of all, with no mean over seeds. Features that are "
        f"constant in a batch (up to {share:.0%} of all) have no variance: they must give 0"
    )
    return Finding(CLAIMS[0], measured, (worst, worst), _within(worst), note)


def transfer_slopes(config: Config, records: Sequence[Record]) -> dict[str, Estimate | None]:
    """Exponent of the error on another batch in m, over seeds; None when an error is no number."""
    slopes: dict[str, Estimate | None] = {}
    x = np.log(config.batch_sizes)
    for source in SOURCES:
        errors = numbers(by_seed(records, source=source), "transfer")
        whole = (errors > 0).all()  # 0 has no logarithm either
        slopes[source] = estimate([slope(x, y).mean for y in np.log(errors)]) if whole else None
    return slopes


def judge_identity(config: Config, records: Sequence[Record]) -> Finding:
    """identity-recoverable."""
    recovery = _worst(records, "recovery")
    slopes = transfer_slopes(config, records)
    real = {source: slopes[source] for source in REAL}
    laws = [fit is not None and decide(fit, at_least=-0.6, at_most=-0.4) for fit in real.values()]
    law = REPRODUCED if set(laws) == {REPRODUCED} else INCONCLUSIVE
    measured = {"largest |y - x|/max|x|": recovery}
    measured |= {f"slope, {name}": fit.mean if fit else math.nan for name, fit in slopes.items()}
    for source in slopes:
        errors = numbers(by_seed(records, source=source), "transfer")[:, -1]
        measured[f"error at m = {config.batch_sizes[-1]}, {source}"] = errors.mean()
    off = {s: max(abs(e + 0.5) for e in f.interval) if f else math.inf for s, f in real.items()}
    farthest = max(off, key=lambda source: off[source])
    shown = real[farthest]
    note = (
        f"interval: of the slope on another batch, {farthest}, the farthest from −0.5 of the "
        "real features. Errors are relative to the standard deviation of all examples. Control: "
        "heavy tails have no fourth moment, and theory puts them between −0.5 and −0.25"
    )
    verdict = conjunction(_within(recovery), law)
    return Finding(CLAIMS[1], measured, shown.interval if shown else None, verdict, note)


def judge_decorrelation(records: Sequence[Record], whitened: Sequence[Record]) -> Finding:
    """no-decorrelation."""
    change = _worst(records, "correlation_change")
    measured = {"largest change of a correlation": change}
    for name in ("raw", "BN", "ZCA"):
        measured[f"largest |correlation|, {name}"] = _worst(whitened, name)
    for source in REAL:
        sizes = numbers(by_seed(records, source=source), "correlation_size")
        measured[f"mean |correlation|, {source}"] = sizes.mean()
    whitens = measured["largest |correlation|, ZCA"] <= 1e-6
    control = REPRODUCED if whitens else INCONCLUSIVE
    note = (
        "interval: the largest change of all, with no mean over seeds. Control: BN, and "
        f"ZCA with ε = 0, of {DENSE_UNITS} dense pre-activations over all examples"
    )
    verdict = conjunction(_within(change), control)
    return Finding(CLAIMS[2], measured, (change, change), verdict, note)


def exponent(times: Sequence[Record], arm: str, kind: str) -> Estimate:
    """Exponent of an arm's median time in d."""
    medians = [np.median(record["seconds"][f"{arm} {kind}"]) for record in times]
    return slope(np.log([record["d"] for record in times]), np.log(medians))


def judge_cost(records: Sequence[Record], times: Sequence[Record]) -> Finding:
    """whitening-cost; times are compared repetition by repetition, for the arms ran in turn."""
    excess = _worst(records, "rank_excess")
    rank = decide((excess, excess), at_most=0)
    ratios: dict[tuple[int, str, str], Estimate] = {}
    for record in times:
        seconds = {name: np.array(found) for name, found in record["seconds"].items()}
        for arm, kind in itertools.product(ARMS[1:], PASSES):
            ratio = seconds[f"{arm} {kind}"] / seconds[f"BN {kind}"]
            ratios[record["d"], arm, kind] = median_interval(ratio)
    pairs = itertools.product(ARMS, PASSES)
    exponents = {(arm, kind): exponent(times, arm, kind).mean for arm, kind in pairs}
    named = {f"time {arm}/BN, d = {d}, {kind}": r.mean for (d, arm, kind), r in ratios.items()}
    judged = {name: ratio for name, ratio in named.items() if f"d = {_JUDGED_DIM}," in name}
    measured = {"largest excess of a rank over m - 1": excess} | judged
    for (arm, kind), value in exponents.items():
        measured[f"exponent of {arm} time, {kind}"] = value
        if arm != "BN":
            measured[f"exponent of time {arm}/BN, {kind}"] = value - exponents["BN", kind]
    measured |= named
    if not judged:
        note = f"d = {_JUDGED_DIM}, which the criterion is about, was not timed"
        return Finding(CLAIMS[3], measured, None, conjunction(rank, INCONCLUSIVE), note)
    zca = {kind: ratios[_JUDGED_DIM, "ZCA", kind] for kind in PASSES}
    smaller = min(zca, key=lambda kind: zca[kind].mean)
    note = (
        f"interval: of the median of time ZCA/BN at d = {_JUDGED_DIM}, {smaller}, over the "
        "repetitions of this run; another machine has another ratio"
    )
    verdict = conjunction(rank, *(decide(ratio, at_least=3) for ratio in zca.values()))
    return Finding(CLAIMS[3], measured, zca[smaller].interval, verdict, note)
