"""Who is right where: errors of batch-norm layers against float64, as a table.

    python -m benchmarks.accuracy [--write]

Every figure is the largest error over 64 features of 8,192 values and over five seeds. Variance:
relative to float64's of the same (rounded) input. Gradient: of Σ g·y in x for random g, relative
to the largest entry of the feature. Needs `pip install -e '.[benchmarks]'`; layers whose package
is not installed are left out.
"""

import argparse
import functools
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import EPSILON, OTHERS, OURS, Peer, available, torch_batch_norm
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "accuracy.md"
SEEDS = range(5)
FEATURES = 64
EXAMPLES = 8192
DEVICES = 4


class Case(NamedTuple):
    """One question; x of shape (examples, features), or (devices, examples, features)."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    g: np.ndarray  # cotangent of y
    where: np.ndarray | None = None  # mask, like x with one feature


class Answer(NamedTuple):
    """What a layer makes of a case; of synced devices mean and var are the first's."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray


def case(
    ratio: float,
    dtype="float32",
    *,
    seed: int = 0,
    masked: bool = False,
    devices: int | None = None,
    examples: int = EXAMPLES,
    features: int = FEATURES,
) -> Case:
    """Normal values of mean/std = ratio; devices hold unequal shares when masked."""
    random = np.random.default_rng(seed)
    shape = (examples, features) if devices is None else (devices, examples // devices, features)
    x = np.asarray(random.standard_normal(shape) + ratio).astype(jnp.dtype(dtype))
    where = None
    if masked:
        share = 0.6 if devices is None else np.linspace(0.1, 0.9, devices)[:, None, None]
        where = random.random((*shape[:-1], 1)) < share
    scale, bias = 1 + random.random(features), random.standard_normal(features)
    g = random.standard_normal(shape)
    return Case(x, scale.astype("f4"), bias.astype("f4"), g.astype("f4"), where)


def reference(case: Case, group_size: int | None = None) -> Answer:
    """The closed form in float64."""
    features = case.x.shape[-1]
    size = group_size or case.x[..., 0].size
    x, g, where = (
        np.broadcast_to(v, case.x.shape).reshape(-1, size, features)
        for v in (case.x.astype(np.float64), case.g.astype(np.float64), _mask(case))
    )
    count = where.sum(1, keepdims=True)

    def mean(v):
        return np.where(where, v, 0).sum(1, keepdims=True) / np.maximum(count, 1)

    mu = mean(x)
    var = mean((x - mu) ** 2)
    rstd = 1 / np.sqrt(var + EPSILON)
    x_hat = (x - mu) * rstd
    slope = g * case.scale
    dx = np.where(where, rstd * (slope - mean(slope) - x_hat * mean(slope * x_hat)), 0)
    y = np.where(where, x_hat, 0) * case.scale.astype(np.float64) + case.bias
    weight = count / count.sum(0)
    mean_of_all, var_of_all = ((weight * v).sum((0, 1)) for v in (mu, var))
    shape = case.x.shape
    return Answer(y.reshape(shape), mean_of_all, var_of_all, dx.reshape(shape))


def _mask(case: Case) -> np.ndarray:
    return np.ones((), bool) if case.where is None else case.where


def answer(peer: Peer, case: Case, *, group_size: int | None = None) -> Answer:
    """What a layer of the JAX world gives: values in the program that also takes the gradient."""
    synced, masked = case.x.ndim == 3, case.where is not None
    run = _program(peer, case.x.shape[-1], synced, masked, group_size)
    y, mean, var, dx = (np.asarray(v, np.float64) for v in run(*case))
    if synced:
        mean, var = mean[0], var[0]
    return Answer(y, mean, var, dx)


@functools.cache
def _program(peer, features, synced, masked, group_size):
    step = peer.make(features)
    options = {"axis_name": "devices"} if synced else {}
    if group_size is not None:
        options["group_size"] = group_size

    def replica(x, scale, bias, g, where):
        def forward(x):
            y, mean, var = step(x, scale, bias, **options, **({"where": where} if masked else {}))
            return y, (mean, var)

        y, vjp, statistics = jax.vjp(forward, x, has_aux=True)
        return (y, *statistics, *vjp(g.astype(y.dtype)))

    if synced:
        axes = (0, None, None, 0, 0 if masked else None)
        replica = jax.vmap(replica, in_axes=axes, axis_name="devices")
    return jax.jit(replica)


def variance_error(got: Answer, expected: Answer) -> float:
    """Largest relative error; of a constant feature the absolute one."""
    error = np.abs(got.var - expected.var) / np.where(expected.var > 0, expected.var, 1)
    return float(np.max(error))  # NaN passes through


def gradient_error(got: Answer, expected: Answer) -> float:
    """Largest error of a feature, relative to its largest entry."""
    axes = tuple(range(got.dx.ndim - 1))
    error = np.max(np.abs(got.dx - expected.dx), axes)
    return float(np.max(error / np.max(np.abs(expected.dx), axes)))


def value_error(got: Answer, expected: Answer, case: Case) -> float:
    """Largest error of y where nothing is masked, in units of scale."""
    error = np.abs(got.y - expected.y) / case.scale
    return float(np.max(np.where(_mask(case), error, 0)))


def worst(
    peer: Peer | None, *, error: Callable[..., float], ratio: float, dtype: str, **options
) -> float:
    """Largest error over the seeds; peer None is PyTorch's layer."""
    errors = []
    for seed in SEEDS:
        asked = case(ratio, dtype, seed=seed, **options)
        got = (
            Answer(*torch_batch_norm(asked.x, asked.scale, asked.bias, asked.g))
            if peer is None
            else answer(peer, asked)
        )
        errors.append(error(got, reference(asked)))
    return float(np.max(errors))


def nan_under_mask(peer: Peer) -> float:
    """Gradient error when every masked element holds NaN."""
    asked = case(0.0, masked=True)
    dirty = asked._replace(x=np.where(_mask(asked), asked.x, np.float32(np.nan)))
    return gradient_error(answer(peer, dirty), reference(asked))


def masked_replica(peer: Peer) -> float:
    """Variance error when one of the synced replicas has no valid element."""
    asked = case(0.0, masked=True, devices=DEVICES)
    where = _mask(asked) & (np.arange(DEVICES) > 0)[:, None, None]
    asked = asked._replace(where=where)
    return variance_error(answer(peer, asked), reference(asked))


def _asking(
    error: Callable[..., float], ratio: float, dtype: str = "float32", **options
) -> Callable[[Peer | None], float]:
    return functools.partial(worst, error=error, ratio=ratio, dtype=dtype, **options)


COLUMNS: dict[str, Callable[[Peer | None], float]] = {
    "variance, mean/std 1e2": _asking(variance_error, 1e2),
    "variance, 1e3": _asking(variance_error, 1e3),
    "variance, 1e4": _asking(variance_error, 1e4),
    "gradient, 1e2": _asking(gradient_error, 1e2),
    "gradient, 1e3": _asking(gradient_error, 1e3),
    "gradient, 1e4": _asking(gradient_error, 1e4),
    "variance, bf16, 1e2": _asking(variance_error, 1e2, "bfloat16"),
    "variance, f16, 1e3": _asking(variance_error, 1e3, "float16"),
}
SYNCED = {"variance, synced, 1e3": _asking(variance_error, 1e3, devices=DEVICES)}
MASKED = {"gradient, NaN under the mask": nan_under_mask}
MASKED_AND_SYNCED = {
    "variance, masked and synced": _asking(variance_error, 0.0, masked=True, devices=DEVICES),
    "the same, one replica all masked": masked_replica,
}


def figures() -> dict[str, dict[str, float | None]]:
    """Layer -> column -> error; None where the layer lacks the feature."""
    table: dict[str, dict[str, float | None]] = {}
    for peer in available((OURS, *OTHERS)):
        row: dict[str, float | None] = {name: ask(peer) for name, ask in COLUMNS.items()}
        for columns, able in (
            (SYNCED, peer.syncs),
            (MASKED, peer.masks),
            (MASKED_AND_SYNCED, peer.masks and peer.syncs),
        ):
            row |= {name: ask(peer) if able else None for name, ask in columns.items()}
        table[peer.name] = row
    if torch_batch_norm is not None:
        row = {name: ask(None) for name, ask in COLUMNS.items()}
        table["PyTorch"] = row | dict.fromkeys((*SYNCED, *MASKED, *MASKED_AND_SYNCED))
    return table


def markdown(table: dict[str, dict[str, float | None]]) -> str:
    """The table with layers as columns, since there are fewer of them than questions."""
    names = list(table)
    lines = [
        "| largest relative error | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for question in next(iter(table.values())):
        cells = [_cell(table[name][question]) for name in names]
        lines.append(f"| {question} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(error: float | None) -> str:
    if error is None:
        return "–"
    if not np.isfinite(error):
        return "**NaN**"
    text = f"{error:.2g}" if error > 0.01 else f"{error:.0e}".replace("e-0", "e-")
    text = text.replace("e+0", "e")
    return f"**{text}**" if error > 1e-4 else text


def versions() -> str:
    """Versions of the libraries, for the line below a table."""
    found = []
    for package in ("jax", "flax", "dm-haiku", "equinox", "keras", "torch"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"{jax.default_backend()} {platform.machine()}"])


def main() -> None:
    """Prints the table; --write keeps it for the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    text = f"{markdown(figures())}\n\nMeasured with `python -m benchmarks.accuracy`: {versions()}."
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
