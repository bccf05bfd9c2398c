"""What BN does to features, in float64, and the time it takes beside whitening, in float32."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bn_research import data
from bn_research.lab.fields import at_most
from bn_research.lab.workdir import Ledger
from bn_research.normalization import batch_norm
from bn_research.normalization.whitening import batch_covariance, covariance, whiten
from experiments.transform import Config

REAL = ("pixels", "dense", "conv")  # verdicts are about these and the controls alike, except
CONTROLS = ("offset", "heavy tails")  # that the law of the error is asked of real features alone
SOURCES = REAL + CONTROLS
ARMS = ("BN", "ZCA", "Newton-Schulz")
PASSES = ("forward", "with gradient")

DENSE_UNITS = 32  # fewer than digits have pixels that vary, so that ZCA has full rank
_EPSILON = 1e-5  # the layer's default, in figures and controls
_CONV_CHANNELS = 8
_CONTROL_FEATURES = 32
_LARGEST_OFFSET = 6  # log10 of mean/std
_TAIL_FREEDOM = 3.0  # the variance is finite and the fourth moment is not
_SECONDS_A_SAMPLE = 0.01  # a program that is faster is called again until these have passed


class Records(NamedTuple):
    """What the run measured, and what it shows of the first seed."""

    features: list[dict[str, Any]]  # of each source and seed: numbers for each batch size
    whitening: list[dict[str, Any]]  # of each seed
    outlier: dict[str, Any]
    times: list[dict[str, Any]]  # of each d
    clouds: dict[str, np.ndarray]  # two features [examples, 2], raw and transformed
    correlations: dict[str, np.ndarray]  # [d, d]


def prepare(config: Config) -> np.ndarray:
    """Pixels, float64 from 0 to 1, [N, height, width, channels]."""
    builder = data.prepare(
        config.dataset, data_dir=config.data_dir or None, manual_dir=config.manual_dir or None
    )
    image = data.load_examples(builder, "train", limit=config.examples or None).image
    at_most(config, len(image) // 2, f"half of {len(image)} examples", "batch_sizes")
    return image / float(data.FULL_SCALE[config.dataset])


def measure(config: Config, pixels: np.ndarray, path: Path) -> Records:
    """Measures what is not yet in the workdir."""
    seeds, ask = range(config.seeds), functools.partial
    plan: dict[str, Callable[[], dict[str, Any]]] = {
        f"{source} seed={seed}": ask(measure_source, config, pixels, source, seed)
        for seed in seeds
        for source in SOURCES
    }
    plan |= {f"whitening seed={seed}": ask(measure_whitening, pixels, seed) for seed in seeds}
    plan["one outlier"] = ask(measure_outlier, config)
    plan |= {f"time d={d}": ask(measure_time, config, d) for d in config.dims}
    found = Ledger(path / "metrics.jsonl").get_all(plan, unit="measurement")
    sources, whitening, (outlier,), times = (
        [record for record in found if field in record]
        for field in ("source", "raw", "deviation", "seconds")
    )
    return Records(sources, whitening, outlier, times, clouds(pixels), _correlations(pixels, 0))


def features(source: str, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Features of every example, float64 [N, ..., d]; the seed draws what is random in them."""
    rng = np.random.default_rng([seed, SOURCES.index(source)])
    flat = pixels.reshape(len(pixels), -1)
    if source == "pixels":
        return flat
    if source == "dense":
        return flat @ _he_normal(rng, (flat.shape[1], DENSE_UNITS))
    if source == "conv":  # 3×3, stride 2, no padding
        patches = np.lib.stride_tricks.sliding_window_view(pixels, (3, 3), (1, 2))[:, ::2, ::2]
        return np.tensordot(patches, _he_normal(rng, (*patches.shape[3:], _CONV_CHANNELS)), 3)
    shape = len(pixels), _CONTROL_FEATURES
    if source == "offset":
        return rng.standard_normal(shape) + np.logspace(0, _LARGEST_OFFSET, _CONTROL_FEATURES)
    return rng.standard_t(_TAIL_FREEDOM, shape)


def _he_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[:-1]))


_normalized = jax.jit(lambda x, scale, bias, eps: batch_norm(x, scale, bias, epsilon=eps)[0])
_covariance = jax.jit(lambda x: covariance(batch_covariance(x)))
_whitened = jax.jit(lambda x, epsilon: whiten(x, epsilon=epsilon)[0])


def _float64(program: Callable[..., Any], *arguments: Any) -> np.ndarray:
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
    before, after = _rows(x), _rows(standardize(x, epsilon))
    back = _rows(standardize(x, epsilon, *undoing(x, epsilon)))
    constant, size = np.ptp(before, axis=1) == 0, np.abs(before).max(axis=1)
    spread, varying = np.var(before, axis=1)[~constant], after[~constant]
    bound, reach = math.sqrt(before.shape[1] - 1), _largest(varying)
    return {
        "mean": _largest(varying.mean(axis=1)),
        "variance": _largest(np.var(varying, axis=1) - spread / (spread + epsilon)),
        "excess": float(np.maximum(reach - bound, 0)),
        "reach": reach / bound,
        "constant_share": float(constant.mean()),
        "constant_output": _largest(after[constant]),
        "recovery": _largest(np.abs(back - before).max(axis=1) / np.where(size > 0, size, 1)),
    }


def _largest(values: np.ndarray) -> float:
    """Largest absolute value; 0 of none, NaN where there is one."""
    return float(np.max(np.abs(values), initial=0.0))


def transfer_error(a: np.ndarray, b: np.ndarray, epsilon: float) -> float:
    """Mean square of y − b where y is BN of batch b with γ and β that undo that of batch a."""
    return float(np.mean(np.square(standardize(b, epsilon, *undoing(a, epsilon)) - b)))


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
    rng = np.random.default_rng([seed, len(SOURCES)])
    scale = math.sqrt(np.mean(np.var(x.reshape(-1, x.shape[-1]), axis=0)))
    record: dict[str, list[float]] = {}
    for m in config.batch_sizes:
        deviations, errors = [], []
        pairs = [rng.choice(len(x), 2 * m, replace=False) for _ in range(config.pairs)]
        for chosen, epsilon in zip(pairs, itertools.cycle(config.epsilons), strict=False):
            deviations.append(identities(x[chosen[:m]], epsilon))
            errors.append(transfer_error(x[chosen[:m]], x[chosen[m:]], epsilon))
        row = {key: np.max([found[key] for found in deviations]) for key in deviations[0]}
        row["transfer"] = math.sqrt(np.mean(errors)) / scale
        row |= _second_order(x[pairs[0][:m]], config.epsilons)
        for key, value in row.items():
            record.setdefault(key, []).append(float(value))
    return {"source": source, "seed": seed, "d": x.shape[-1], **record}


def _second_order(x: np.ndarray, epsilons: Sequence[float]) -> dict[str, float]:
    """Correlations before and after BN, and the rank of the covariance, of one batch."""
    rows = x.reshape(-1, x.shape[-1])
    varies = np.ptp(rows, axis=0) > 0
    before = correlation(x[..., varies])
    after = [correlation(standardize(x, epsilon)[..., varies]) for epsilon in epsilons]
    rank = np.linalg.matrix_rank(_float64(_covariance, rows))
    return {
        "correlation_change": np.max([_largest(matrix - before) for matrix in after]),
        "correlation_size": np.mean(_off_diagonal(before)),
        "rank": rank,
        "rank_excess": max(rank - (len(rows) - 1), 0),
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
    """Largest correlation of dense pre-activations: as they are, after BN, after ZCA."""
    return {name: [np.max(_off_diagonal(m))] for name, m in _correlations(pixels, seed).items()}


def _correlations(pixels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Correlations of dense pre-activations of all examples: as they are, after BN, after ZCA."""
    x = features("dense", pixels, seed)
    outputs = x, standardize(x, _EPSILON), _float64(_whitened, x, np.float64(0))
    return dict(zip(("raw", "BN", "ZCA"), map(correlation, outputs), strict=True))


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


def measure_time(config: Config, d: int) -> dict[str, Any]:
    """Seconds of a call of each arm and pass, in turn, `repeats` times."""
    rng = np.random.default_rng(d)
    x, weights = jnp.asarray(rng.standard_normal((2, config.timed_batch, d)), jnp.float32)
    arguments = x, jnp.ones(d), jnp.zeros(d), weights
    programs = {f"{arm} {kind}": _timed_program(arm, kind) for arm in ARMS for kind in PASSES}
    jax.block_until_ready([program(*arguments) for program in programs.values()])  # compiles
    seconds: dict[str, list[float]] = {key: [] for key in programs}
    for _ in range(config.repeats):
        for key, program in programs.items():
            seconds[key].append(_seconds_a_call(program, arguments))
    return {"d": d, "seconds": seconds}


def _timed_program(arm: str, kind: str) -> Callable[..., Any]:
    """A transform with γ and β; with gradient, that of Σ weights·y in x, γ and β."""
    method: Any = arm.lower().replace("-", "_")
    transform = batch_norm if arm == "BN" else functools.partial(whiten, method=method)

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
