"""What does batch normalization do to its input, and what would whitening cost instead?

Ioffe & Szegedy (2015, section 3) normalize each feature by itself because whitening all of them
together is expensive. This experiment checks the transform on batches of real and synthetic
features in float64: that it gives zero mean and unit variance, that γ and β can undo it, and that
it leaves correlations alone. Then it times the transform against the whitening it stands for.

    python -m experiments.transform --preset=smoke|quick|standard --workdir=DIR

    smoke     digits, 2 seeds: every line runs, verdicts may be inconclusive
    quick     digits, 3 seeds, time up to d = 512: a first answer in 90 s on 2 CPU cores
    standard  Fashion-MNIST, 5 seeds, time up to d = 1024: within 15 min on 2 CPU cores

Features are real: pixels from 0 to 1 (at the border many hardly ever change), and pre-activations
of a random dense and a random convolutional layer (whose m counts positions too, as in section
3.2). Controls: Gaussian features with a mean of up to 1e6 standard deviations, features with heavy
tails (Student's t, 3 degrees of freedom), and one outlier among zeros.

Theory. For x̂ = (x − μ)/√(σ² + ε) over m elements the variance is σ²/(σ² + ε), and no |x̂| exceeds
√(m − 1), which one outlier among equals attains. With γ = √(σ² + ε) and β = μ of the same batch
y = x. With γ and β of batch A on batch B, for ε = 0, the mean of (y − x)² is
(μ_A − μ_B)² + (σ_A − σ_B)², about σ²·(2/m)·(1 + (k − 1)/4) with the kurtosis k, 3 for a Gaussian:
the error falls as m^(−1/2). Where k is infinite it falls more slowly, for these heavy tails as
m^(−1/4) in the end. The covariance of m examples has rank m − 1 at most. BN costs O(m·d); whitening
forms a d × d covariance, O(m·d²), and its inverse root, O(d³).

| claim | expected |
|---|---|
| unit-normalization | every deviation below 1e-12 |
| identity-recoverable | same batch: below 1e-12; another: slope −0.5, heavy tails −0.5 to −0.25 |
| no-decorrelation | correlations differ by less than 1e-12; ZCA takes them to 0 |
| whitening-cost | rank min(m − 1, d); at d = 512 ZCA costs some ten times BN, or more |
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bn_research import data
from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate, slope
from bn_research.claims.finding import INCONCLUSIVE, REPRODUCED, Finding, conjunction, decide
from bn_research.lab.experiment import Experiment
from bn_research.lab.workdir import Ledger
from bn_research.normalization import batch_norm
from bn_research.normalization.whitening import batch_covariance, covariance, whiten
from experiments.transform.figures import draw

REAL = ("pixels", "dense", "conv")  # verdicts are about these and the controls alike, except
CONTROLS = ("offset", "heavy tails")  # that the law of the error is asked of real features alone
ARMS = ("BN", "ZCA", "Newton-Schulz")
PASSES = ("forward", "with gradient")

EXACT = 1e-12  # what counts as equal in float64
_EPSILON = 1e-5  # the layer's default, in figures and controls
_JUDGED_DIM = 512
_DENSE_UNITS = 32  # fewer than digits have pixels that vary, so that ZCA has full rank
_CONV_CHANNELS = 8
_CONTROL_FEATURES = 32
_LARGEST_OFFSET = 6  # log10 of mean/std
_TAIL_FREEDOM = 3.0  # the variance is finite and the fourth moment is not
_SECONDS_A_SAMPLE = 0.01  # a program that is faster is called again until these have passed

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


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run."""

    seeds: int = 3  # 0, 1, …; a seed draws the random layers, the controls and the batches
    dataset: str = "digits"
    data_dir: str = ""  # where tfds keeps prepared sets; "" is its default
    manual_dir: str = ""  # where source files lie; "" is the set's default
    examples: int = 0  # of the training split; 0 is all
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    pairs: int = 64  # of disjoint batches, for each size and seed; they take the ε in turn
    epsilons: tuple[float, ...] = (0.0, 1e-5, 1e-3)
    dims: tuple[int, ...] = (64, 128, 256, 512)  # features of the timed transforms
    timed_batch: int = 2048  # twice the largest d: every covariance has full rank
    repeats: int = 11  # of each timing


PRESETS = {
    "smoke": Config(seeds=2, batch_sizes=(8, 32), pairs=3, dims=(8, 16), timed_batch=64, repeats=2),
    "quick": Config(),
    "standard": Config(
        seeds=5,
        dataset="fashion_mnist",
        examples=8192,
        batch_sizes=(8, 16, 32, 64, 128, 256, 512),
        dims=(64, 128, 256, 512, 1024),
        repeats=25,
    ),
}


def prepare(config: Config) -> np.ndarray:
    """Checks the config and loads the pixels, float64 from 0 to 1, [N, height, width, channels]."""
    for name, least in (
        ("seeds", 1),
        ("examples", 0),
        ("pairs", len(config.epsilons)),
        ("repeats", 1),
    ):
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: at least {least} is needed")
    for name in ("batch_sizes", "dims"):
        sizes = getattr(config, name)
        if len(set(sizes)) < 2 or min(sizes) < 2:
            raise ValueError(
                f"{name}={sizes} is not allowed: at least two different sizes are needed, from 2 up"
            )
    if not config.epsilons or not min(config.epsilons) >= 0:
        raise ValueError(f"epsilons={config.epsilons} is not allowed: give numbers ≥ 0")
    if config.timed_batch <= max(config.dims):
        raise ValueError(
            f"timed_batch={config.timed_batch} is not allowed: it must be above the largest of "
            f"dims={config.dims}, or the covariance is singular"
        )
    builder = data.prepare(
        config.dataset, data_dir=config.data_dir or None, manual_dir=config.manual_dir or None
    )
    image = data.load_examples(builder, "train", limit=config.examples or None).image
    if 2 * max(config.batch_sizes) > len(image):
        raise ValueError(
            f"batch_sizes={config.batch_sizes} is not allowed: two batches of the largest must fit "
            f"into {len(image)} examples"
        )
    return image / float(data.FULL_SCALE[config.dataset])


def features(source: str, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Features of every example, float64 [N, ..., d]; the seed draws what is random in them."""
    rng = np.random.default_rng([seed, (*REAL, *CONTROLS).index(source)])
    if source == "pixels":
        return pixels.reshape(len(pixels), -1)
    if source == "dense":
        flat = pixels.reshape(len(pixels), -1)
        return flat @ _he_normal(rng, (flat.shape[1], _DENSE_UNITS))
    if source == "conv":  # 3×3, stride 2, no padding
        patches = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), (1, 2))[:, ::2, ::2]
        return np.tensordot(patches, _he_normal(rng, (*patches.shape[3:], _CONV_CHANNELS)), 3)
    shape = len(pixels), _CONTROL_FEATURES
    if source == "offset":
        return rng.standard_normal(shape) + np.logspace(0, _LARGEST_OFFSET, _CONTROL_FEATURES)
    return rng.standard_t(_TAIL_FREEDOM, shape)


def _he_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[:-1]))


# --- the transform and what is compared with it, in float64 ---


@jax.jit
def _normalized(x, scale, bias, epsilon):
    return batch_norm(x, scale, bias, epsilon=epsilon)[0]


@jax.jit
def _covariance(x):
    return covariance(batch_covariance(x))


@jax.jit
def _whitened(x, epsilon):
    return whiten(x, epsilon=epsilon)[0]


def _float64(program: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Result of a program in float64, as a NumPy array."""
    with jax.enable_x64(True):
        return np.asarray(program(*arguments))


def standardize(
    x: np.ndarray, epsilon: float, scale: np.ndarray | float = 1.0, bias: np.ndarray | float = 0.0
) -> np.ndarray:
    """BN of a batch, float64 [..., d]."""
    per_feature = (np.broadcast_to(value, x.shape[-1:]) for value in (scale, bias))
    return _float64(_normalized, x, *map(np.array, per_feature), np.float64(epsilon))


def _rows(x: np.ndarray) -> np.ndarray:
    """[..., d] as [d, elements]: NumPy sums along the last axis pairwise, so to 1e-15."""
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)


def undoing(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """γ and β that undo BN of this batch, by NumPy: √(σ² + ε) and μ, [d] each."""
    rows = _rows(x)
    return np.sqrt(np.var(rows, axis=1) + epsilon), rows.mean(axis=1)


def identities(x: np.ndarray, epsilon: float) -> dict[str, float]:
    """Largest deviations of BN(x), float64 [..., d], from what NumPy says of x, over features."""
    x_hat = standardize(x, epsilon)
    recovered = standardize(x, epsilon, *undoing(x, epsilon))
    before, after, back = _rows(x), _rows(x_hat), _rows(recovered)
    constant = np.ptp(before, axis=1) == 0
    spread = np.var(before, axis=1)[~constant]
    bound = math.sqrt(before.shape[1] - 1)
    size = np.abs(before).max(axis=1)
    error = np.abs(back - before).max(axis=1) / np.where(size > 0, size, 1)
    reach = _largest(after[~constant])
    return {
        "mean": _largest(after[~constant].mean(axis=1)),
        "variance": _largest(np.var(after[~constant], axis=1) - spread / (spread + epsilon)),
        "excess": float(np.maximum(reach - bound, 0)),
        "reach": reach / bound,
        "constant_share": float(constant.mean()),
        "constant_output": _largest(after[constant]),
        "recovery": _largest(error),
    }


def _largest(values: np.ndarray) -> float:
    """Largest absolute value; 0 of none, NaN where there is one."""
    return float(np.max(np.abs(values), initial=0.0))


def transfer_error(a: np.ndarray, b: np.ndarray, epsilon: float) -> float:
    """Mean square of y − b where y is BN of batch b with γ and β that undo that of batch a."""
    y = standardize(b, epsilon, *undoing(a, epsilon))
    return float(np.mean(np.square(y - b)))


def correlation(x: np.ndarray) -> np.ndarray:
    """Correlation matrix of features, none of them constant; [..., d] to [d, d]."""
    rows = _rows(x)
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.abs(matrix[~np.eye(len(matrix), dtype=bool)])


def measure_source(config: Config, pixels: np.ndarray, source: str, seed: int) -> dict[str, Any]:
    """Record of one kind of features and one seed: a number for each batch size."""
    x = features(source, pixels, seed)
    rng = np.random.default_rng([seed, len(REAL + CONTROLS)])
    scale = math.sqrt(np.mean(np.var(x.reshape(-1, x.shape[-1]), axis=0)))
    record: dict[str, list[float]] = {}
    for m in config.batch_sizes:
        deviations: list[dict[str, float]] = []
        errors = []
        for pair in range(config.pairs):
            chosen = rng.choice(len(x), 2 * m, replace=False)
            a, b = x[chosen[:m]], x[chosen[m:]]
            epsilon = config.epsilons[pair % len(config.epsilons)]
            deviations.append(identities(a, epsilon))
            errors.append(transfer_error(a, b, epsilon))
            if not pair:
                first = a
        row = {key: np.max([found[key] for found in deviations]) for key in deviations[0]}
        row["transfer"] = math.sqrt(np.mean(errors)) / scale
        row |= _second_order(first, config.epsilons)
        for key, value in row.items():
            record.setdefault(key, []).append(float(value))
    return {"source": source, "seed": seed, "d": x.shape[-1], **record}


def _second_order(x: np.ndarray, epsilons: Sequence[float]) -> dict[str, float]:
    """Correlations before and after BN, and the rank of the covariance, of one batch."""
    varies = np.ptp(x.reshape(-1, x.shape[-1]), axis=0) > 0
    before = correlation(x[..., varies])
    changes = [
        _largest(correlation(standardize(x, epsilon)[..., varies]) - before) for epsilon in epsilons
    ]
    rank = np.linalg.matrix_rank(_float64(_covariance, x.reshape(-1, x.shape[-1])))
    return {
        "correlation_change": np.max(changes),
        "correlation_size": np.mean(_off_diagonal(before)),
        "rank": rank,
        "rank_excess": max(rank - (math.prod(x.shape[:-1]) - 1), 0),
    }


def measure_outlier(config: Config) -> dict[str, Any]:
    """Deviation of max |x̂| from √(m − 1) for one outlier among zeros, by batch size; ε = 0."""
    deviations = []
    for m in config.batch_sizes:
        x = np.zeros((m, 2))
        x[0] = 1.0, -1e3
        deviations.append(_largest(_largest(standardize(x, 0.0)) - np.sqrt(m - 1.0)))
    return {"deviation": deviations}


def measure_whitening(pixels: np.ndarray, seed: int) -> dict[str, Any]:
    """Correlations of dense pre-activations of all examples: as they are, after BN, after ZCA."""
    matrices = _correlation_matrices(pixels, seed)
    return {name: [np.max(_off_diagonal(matrix))] for name, matrix in matrices.items()}


def _correlation_matrices(pixels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    x = features("dense", pixels, seed)
    outputs = {
        "raw": x,
        "BN": standardize(x, _EPSILON),
        "ZCA": _float64(_whitened, x, np.float64(0)),
    }
    return {name: correlation(output) for name, output in outputs.items()}


# --- time, in float32 ---


def measure_time(config: Config, d: int) -> dict[str, Any]:
    """Seconds of a call of each arm and pass, in turn, `repeats` times."""
    rng = np.random.default_rng(d)
    x, weights = (
        jnp.asarray(rng.standard_normal((config.timed_batch, d)), jnp.float32) for _ in range(2)
    )
    arguments = x, jnp.ones(d), jnp.zeros(d), weights
    programs = {f"{arm} {kind}": _timed_program(arm, kind) for arm in ARMS for kind in PASSES}
    for program in programs.values():  # compiles
        jax.block_until_ready(program(*arguments))
    seconds: dict[str, list[float]] = {key: [] for key in programs}
    for _ in range(config.repeats):
        for key, program in programs.items():
            seconds[key].append(_seconds_a_call(program, arguments))
    return {"d": d, "seconds": seconds}


def _timed_program(arm: str, kind: str) -> Callable[..., Any]:
    """A transform with γ and β; with gradient, that of Σ weights·y in x, γ and β."""
    transform = {
        "BN": batch_norm,
        "ZCA": functools.partial(whiten, method="zca"),
        "Newton-Schulz": functools.partial(whiten, method="newton_schulz"),
    }[arm]

    def forward(x, scale, bias, weights):
        return transform(x, scale, bias)

    def loss(x, scale, bias, weights):
        y, moments = transform(x, scale, bias)
        return jnp.sum(weights * y), (y, moments)

    gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(forward if kind == "forward" else gradient)


def _seconds_a_call(program: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    calls, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < _SECONDS_A_SAMPLE:
        jax.block_until_ready(program(*arguments))
        calls, elapsed = calls + 1, time.perf_counter() - start
    return elapsed / calls


# --- verdicts ---


def _worst(records: Sequence[Mapping[str, Any]], key: str) -> float:
    """Largest of a deviation over sources, seeds and batch sizes; infinite when one is lost."""
    values = [value for record in records for value in record[key]]
    return math.inf if None in values else max(values)


def _within(value: float) -> str:
    return decide((value, value), at_most=EXACT)


def judge_unit(records: list[dict], outlier: dict) -> Finding:
    """unit-normalization."""
    mean, var, excess = (_worst(records, key) for key in ("mean", "variance", "excess"))
    worst = max(mean, var, excess)
    share = _worst(records, "constant_share")
    measured = {
        "largest |mean|": mean,
        "largest |variance - σ²/(σ² + ε)|": var,
        "largest excess of |x̂| over √(m - 1)": excess,
        "largest |x̂|/√(m - 1), real features": _worst(
            [r for r in records if r["source"] in REAL], "reach"
        ),
        "one outlier, ||x̂| - √(m - 1)|": _worst([outlier], "deviation"),
        "constant features, largest |x̂|": _worst(records, "constant_output"),
    }
    return Finding(
        CLAIMS[0],
        measured,
        (worst, worst),
        _within(worst),
        note="interval: the largest deviation of all, with no mean over seeds. Features that are "
        f"constant in a batch (up to {share:.0%} of all) have no variance: they must give 0",
    )


def transfer_slopes(config: Config, records: list[dict]) -> dict[str, Estimate | None]:
    """Exponent of the error on another batch in m, over seeds; None when an error is no number."""
    slopes: dict[str, Estimate | None] = {}
    x = np.log(config.batch_sizes)
    for source in (*REAL, *CONTROLS):
        rows = [record["transfer"] for record in records if record["source"] == source]
        whole = all(value for row in rows for value in row)  # 0 has no logarithm either
        slopes[source] = estimate([slope(x, np.log(row)).mean for row in rows]) if whole else None
    return slopes


def judge_identity(config: Config, records: list[dict]) -> Finding:
    """identity-recoverable."""
    recovery = _worst(records, "recovery")
    slopes = transfer_slopes(config, records)
    real = {source: slopes[source] for source in REAL}
    laws = {
        decide(fitted, at_least=-0.6, at_most=-0.4) if fitted else INCONCLUSIVE
        for fitted in real.values()
    }
    law = REPRODUCED if laws == {REPRODUCED} else INCONCLUSIVE
    measured = {"largest |y - x|/max|x|": recovery}
    for source, fitted in slopes.items():
        measured[f"slope, {source}"] = fitted.mean if fitted else math.nan
    for source in slopes:
        errors = [record["transfer"][-1] for record in records if record["source"] == source]
        measured[f"error at m = {config.batch_sizes[-1]}, {source}"] = float(
            np.mean(np.array(errors, dtype=float))
        )
    farthest = max(real, key=lambda source: _distance(real[source]))
    shown = real[farthest]
    return Finding(
        CLAIMS[1],
        measured,
        shown.interval if shown else None,
        conjunction(_within(recovery), law),
        note=f"interval: of the slope on another batch, {farthest}, the farthest from −0.5 of the "
        "real features. Errors are relative to the standard deviation of all examples. Control: "
        "heavy tails have no fourth moment, and theory puts them between −0.5 and −0.25",
    )


def _distance(fitted: Estimate | None) -> float:
    return max(abs(end + 0.5) for end in fitted.interval) if fitted else math.inf


def judge_decorrelation(records: list[dict], whitened: list[dict]) -> Finding:
    """no-decorrelation."""
    change = _worst(records, "correlation_change")
    largest = {name: _worst(whitened, name) for name in ("raw", "BN", "ZCA")}
    measured = {"largest change of a correlation": change}
    measured |= {f"largest |correlation|, {name}": value for name, value in largest.items()}
    for source in REAL:
        sizes = [r["correlation_size"] for r in records if r["source"] == source]
        measured[f"mean |correlation|, {source}"] = float(np.mean(sizes))
    control = REPRODUCED if largest["ZCA"] <= 1e-6 else INCONCLUSIVE
    return Finding(
        CLAIMS[2],
        measured,
        (change, change),
        conjunction(_within(change), control),
        note="interval: the largest change of all, with no mean over seeds. Control: BN, and "
        f"ZCA with ε = 0, of {_DENSE_UNITS} dense pre-activations over all examples",
    )


def median_interval(values: Sequence[float]) -> Estimate:
    """Median with its 95 % interval from order statistics; infinite below 6 values.

    The k-th smallest and the k-th largest of n values enclose the median but with probability
    2·P(Binomial(n, 1/2) < k), whatever the distribution.
    """
    from scipy import stats

    ordered, n = sorted(values), len(values)
    k = int(stats.binom.ppf(0.025, n, 0.5))
    low, high = (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)
    return Estimate(float(np.median(ordered)), low, high, n)


def time_ratios(record: Mapping[str, Any], arm: str, kind: str) -> list[float]:
    """Time of an arm over BN's, repetition by repetition: they ran in turn."""
    seconds = record["seconds"]
    return list(np.divide(seconds[f"{arm} {kind}"], seconds[f"BN {kind}"]))


def exponent(times: list[dict], arm: str, kind: str) -> Estimate:
    """Exponent of an arm's median time in d."""
    medians = [np.median(record["seconds"][f"{arm} {kind}"]) for record in times]
    return slope(np.log([record["d"] for record in times]), np.log(medians))


def judge_cost(records: list[dict], times: list[dict]) -> Finding:
    """whitening-cost."""
    excess = _worst(records, "rank_excess")
    rank = decide((excess, excess), at_most=0)
    ratios = {
        (record["d"], arm, kind): median_interval(time_ratios(record, arm, kind))
        for record in times
        for arm in ARMS[1:]
        for kind in PASSES
    }
    exponents = {(arm, kind): exponent(times, arm, kind).mean for arm in ARMS for kind in PASSES}
    judged = {key: ratio for key, ratio in ratios.items() if key[0] == _JUDGED_DIM}
    measured: dict[str, float] = {"largest excess of a rank over m - 1": excess}
    measured |= {_ratio_name(*key): ratio.mean for key, ratio in judged.items()}
    for (arm, kind), value in exponents.items():
        measured[f"exponent of {arm} time, {kind}"] = value
        if arm != "BN":
            measured[f"exponent of time {arm}/BN, {kind}"] = value - exponents["BN", kind]
    measured |= {_ratio_name(*key): ratio.mean for key, ratio in ratios.items()}
    if not judged:
        note = f"d = {_JUDGED_DIM}, which the criterion is about, was not timed"
        return Finding(CLAIMS[3], measured, None, conjunction(rank, INCONCLUSIVE), note)
    zca = {kind: judged[_JUDGED_DIM, "ZCA", kind] for kind in PASSES}
    smaller = min(zca, key=lambda kind: zca[kind].mean)
    return Finding(
        CLAIMS[3],
        measured,
        zca[smaller].interval,
        conjunction(rank, *(decide(ratio, at_least=3) for ratio in zca.values())),
        note=f"interval: of the median of time ZCA/BN at d = {_JUDGED_DIM}, {smaller}, over the "
        "repetitions of this run; another machine has another ratio",
    )


def _ratio_name(d: int, arm: str, kind: str) -> str:
    return f"time {arm}/BN, d = {d}, {kind}"


def run(config: Config, pixels: np.ndarray, path: Path):
    """Measures what is not yet in the workdir, decides, and draws."""
    ledger = Ledger(path / "metrics.jsonl")
    seeds = range(config.seeds)
    plan: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        *(
            (
                f"{source} seed={seed}",
                functools.partial(measure_source, config, pixels, source, seed),
            )
            for seed in seeds
            for source in (*REAL, *CONTROLS)
        ),
        *(
            (f"whitening seed={seed}", functools.partial(measure_whitening, pixels, seed))
            for seed in seeds
        ),
        ("one outlier", functools.partial(measure_outlier, config)),
        *((f"time d={d}", functools.partial(measure_time, config, d)) for d in config.dims),
    ]
    measured = {}
    with tqdm(plan, unit="measurement", dynamic_ncols=True) as bar:
        for name, measure in bar:
            bar.set_description(name)
            measured[name] = ledger.get(name, measure)
    records = [measured[f"{source} seed={seed}"] for seed in seeds for source in (*REAL, *CONTROLS)]
    whitened = [measured[f"whitening seed={seed}"] for seed in seeds]
    times = [measured[f"time d={d}"] for d in config.dims]
    findings = [
        judge_unit(records, measured["one outlier"]),
        judge_identity(config, records),
        judge_decorrelation(records, whitened),
        judge_cost(records, times),
    ]
    figures = draw(
        config,
        records,
        times,
        transfer_slopes(config, records),
        {(arm, kind): exponent(times, arm, kind) for arm in ARMS for kind in PASSES},
        clouds(pixels),
        _correlation_matrices(pixels, 0),
        path / "figures",
    )
    return findings, figures


def clouds(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Two dense pre-activations of up to 500 examples, raw and transformed: correlated, unlike."""
    x = features("dense", pixels, 0)[:500]
    size = np.log(x.std(axis=0))
    unlike = np.abs(correlation(x)) * np.abs(size[:, None] - size)
    x = x[:, list(np.unravel_index(np.argmax(unlike), unlike.shape))]
    return {
        "raw": x,
        "BN": standardize(x, _EPSILON),
        "ZCA whitening": _float64(_whitened, x, np.float64(_EPSILON)),
        "BN with γ = √(σ² + ε), β = μ": standardize(x, _EPSILON, *undoing(x, _EPSILON)),
    }


EXPERIMENT = Experiment(
    __name__,
    title="What does batch normalization do to its input?",
    presets=PRESETS,
)
