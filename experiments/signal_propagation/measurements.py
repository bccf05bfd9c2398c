"""What `experiments.signal_propagation` measures in networks before training; each is a record.

Float32, BN with ε = 0 and without scale and bias. Layers are scanned: a program's size does not
grow with the depth.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bn_research.claims.judging import Record
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.normalization import batch_norm
from bn_research.probes.mean_field import growth
from bn_research.training.compiler import compiler_options
from bn_research.training.cores import use_cpu_cores
from experiments.signal_propagation import Config
from experiments.signal_propagation.networks import train_by_depth

ACTIVATIONS = {"relu": 0.0, "linear": 1.0}  # their slope below 0
THRESHOLD = 0.5  # τ of the thresholded soft rank
JACOBIAN_WIDTH, JACOBIAN_BATCH = 32, 16  # small enough for all singular values
_JACOBIAN_DEPTH = 20  # layers below it, after which the batch has forgotten the input
_QUANTILES = 101  # of the singular values that are kept
_POINTS = 120  # depths of a soft rank that are kept
_MOST_DOUBLINGS = 100  # of a squared norm; float32 ends at 2^128


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    least = min(config.batch_sizes)
    deepest = int(_MOST_DOUBLINGS / math.log2(growth("relu", least)))
    what = f"or gradients leave float32's range at batch {least}"
    at_most(config, deepest, what, "gradient_depth")
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    at_most(config, len(images.train.label), "the training set", "batch_size")
    return images


class Records(NamedTuple):
    """What verdicts and figures are made of."""

    gradients: Sequence[Record]
    jacobians: Sequence[Record]
    residuals: Sequence[Record]
    ranks: Sequence[Record]
    trained: Sequence[Record]
    num_classes: int  # of the data set


def measure(config: Config, images: Images, path: Path) -> Records:
    """Measurements before training, and the networks that are trained."""
    runs = 2 * len(config.train_depths) * (len(config.learning_rates) + config.seeds)
    ledger, steps = Ledger(path / "metrics.jsonl"), runs * config.num_steps
    with Runner(path, ledger, total_steps=steps, strategy="devices") as runner:

        def each(name: str, measurement: Callable[..., Record], *given: Any) -> list[Record]:
            return [
                runner.get(f"{name} seed={s}", measurement, *given, s) for s in range(config.seeds)
            ]

        return Records(
            each("gradients", _measure_gradients, config),
            each("Jacobian", _measure_jacobian),
            each("residual stream", measure_residual, config),
            [r for d in config.rank_widths for r in each(f"rank d={d}", measure_ranks, config, d)],
            train_by_depth(config, images, runner),
            images.num_classes,
        )


def _compiled(level: int, *static: str) -> Callable[[Any], Any]:
    options = compiler_options(level)
    return functools.partial(jax.jit, static_argnames=static, compiler_options=options)


def _layer(h: Array, weight: Array, norm: bool, slope: Array | float = 0.0) -> Array:
    """Pre-activations of the next layer, W·φ(BN(h)) or W·φ(h).

    φ(y) is y above 0 and slope·y below: 0 is ReLU, 1 is none. One program serves both.
    """
    y = batch_norm(h, epsilon=0.0)[0] if norm else h
    return jnp.where(y > 0, y, slope * y) @ weight


@_compiled(1, "norm")
def squared_gradients(
    key: Array,
    h: Float[Array, "batch width"],
    weights: Float[Array, "depth width width"],
    slope: float | Float[Array, ""],
    factor: float | Float[Array, ""] = 1.0,
    *,
    norm: bool,
) -> Float[Array, "depth"]:
    """Squared norms of ∂L/∂h_l for L = ⟨g, h_depth⟩ with Gaussian g, drawn by the key.

    h is h_0, the lowest pre-activations; slope is that of φ below 0, as in `_layer`. All weights
    are taken times the factor, and pre-activations are normalized or not.
    """

    def top(shifts):
        def step(h, layer):
            weight, shift = layer
            return _layer(h + shift, factor * weight, norm, slope), None

        return jax.lax.scan(step, h, (weights, shifts))[0]

    last, backward = jax.vjp(top, jnp.zeros((len(weights), *h.shape), h.dtype))
    (gradients,) = backward(jax.random.normal(key, last.shape, last.dtype))
    return jnp.sum(jnp.square(gradients), axis=(1, 2))


@_compiled(1, "depth", "width")
def _weights(key, *, depth, width):
    """Gaussian of variance 1/width."""
    return jax.random.normal(key, (depth, width, width)) * width**-0.5


@_compiled(0, "batch", "width")
def _input(key, *, batch, width):
    return jax.random.normal(key, (batch, width))


def middle(depth: int) -> tuple[int, int]:
    """First and last layer of those that rates are taken from, far from both ends."""
    return depth // 4, depth - 1 - depth // 4


def rate(squared: Sequence[float] | np.ndarray) -> float:
    """Mean growth per layer of squared norms, lowest first, from the last middle layer down."""
    first, last = middle(len(squared))
    return float((squared[first] / squared[last]) ** (1 / (last - first)))


def _measure_gradients(config: Config, seed: int) -> Record:
    """Squared gradient norms by layer, of all batch sizes and activations with the same weights."""
    keys, width = jax.random.split(jax.random.key(seed), 3), config.gradient_width
    weights = _weights(keys[0], depth=config.gradient_depth, width=width)

    def setting(activation: str, batch: int, factor: float = 1.0, norm: bool = True) -> Record:
        h = _input(jax.random.fold_in(keys[1], batch), batch=batch, width=width)
        found = squared_gradients(keys[2], h, weights, ACTIVATIONS[activation], factor, norm=norm)
        norms = np.asarray(found, np.float64)
        return {
            "activation": activation,
            "batch_size": batch,
            "rate": rate(norms),
            "theory": growth(activation, batch),
            "squared": norms / norms[-1],
        }

    settings = [setting(a, batch) for a in ACTIVATIONS for batch in config.batch_sizes]
    control = setting("relu", config.batch_sizes[-1], 2**0.5, norm=False)
    return {"seed": seed, "settings": settings, "control": control}


@_compiled(0, "norm")
def layer_jacobian(
    h: Float[Array, "batch width"], weights: Float[Array, "layers width width"], *, norm: bool
) -> Float[Array, "outputs inputs"]:
    """Jacobian of a ReLU layer's pre-activations in those of the layer below, over the batch.

    The layer is the last; those below it are passed first. Without BN the weights are those of He.
    """
    weights = weights if norm else weights * 2**0.5
    h, _ = jax.lax.scan(lambda h, weight: (_layer(h, weight, norm), None), h, weights[:-1])
    jacobian = jax.jacrev(lambda h: _layer(h, weights[-1], norm))(h)
    return jacobian.reshape(h.size, h.size)


def _measure_jacobian(seed: int) -> Record:
    """Singular values of a layer's Jacobian, with BN and without (He)."""
    keys = jax.random.split(jax.random.key(seed), 2)
    h = _input(keys[0], batch=JACOBIAN_BATCH, width=JACOBIAN_WIDTH)
    weights = _weights(keys[1], depth=_JACOBIAN_DEPTH + 1, width=JACOBIAN_WIDTH)
    record: dict[str, Any] = {"seed": seed}
    for name in ("BN", "none"):
        jacobian = layer_jacobian(h, weights, norm=name == "BN")
        values = np.linalg.svd(np.asarray(jacobian, np.float64), compute_uv=False)
        record[name] = {
            "largest": values[0],
            "rms": np.sqrt(np.mean(values**2)),
            "near_one": np.mean((values >= 0.5) & (values <= 2)),
            "zero": np.mean(values < 1e-5 * values[0]),
            "quantiles": np.quantile(values, np.linspace(0, 1, _QUANTILES)),
        }
    return record


@_compiled(1, "depth", "width", "batch")
def _streams(keys, *, depth, width, batch):
    """Means over networks, one for each key: [depth + 1] numbers for the input and each layer."""

    def measures(streams):
        normalized, plain = streams
        return {
            "BN": jnp.mean(jnp.square(normalized)),
            "within": jnp.mean(jnp.var(normalized, axis=0)),
            "none": jnp.mean(jnp.square(plain)),
        }

    def network(key):
        keys = jax.random.split(key, 3)
        weights = jax.random.normal(keys[0], (depth, width, width)) * (2 / width) ** 0.5
        x = jax.random.normal(keys[1], (batch, width))

        def top(shifts):
            def step(streams, layer):
                weight, shift = layer
                below = zip((streams[0] + shift, streams[1]), (True, False), strict=True)
                return tuple(x + _layer(x, weight, norm) for x, norm in below), measures(streams)

            last, below = jax.lax.scan(step, (x, x), (weights, shifts))
            return last[0], jax.tree.map(jnp.append, below, measures(last))

        _, backward, found = jax.vjp(top, jnp.zeros((depth, *x.shape)), has_aux=True)
        gradient = jax.random.normal(keys[2], x.shape)
        squared = jnp.sum(jnp.square(backward(gradient)[0]), axis=(1, 2))
        return {**found, "gradient": jnp.append(squared / jnp.sum(jnp.square(gradient)), 1.0)}

    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.lax.map(network, keys))


def measure_residual(config: Config, seed: int) -> Record:
    """A residual stream of ReLU layers with and without BN: means over networks, by layer.

    "BN" and "none" are the mean square over units, examples and networks; "within" is the variance
    over the batch with BN, and "gradient" the squared gradient norm there over that at the top.
    """
    found = _streams(
        jax.random.split(jax.random.key(seed), config.residual_networks),
        depth=config.residual_depth,
        width=config.residual_width,
        batch=config.residual_batch,
    )
    return {"seed": seed, **{name: np.asarray(v, np.float64) for name, v in found.items()}}


def soft_rank(gram: Array) -> Array:
    """Participation ratio of the spectrum of a symmetric positive matrix, r = (Σλ)²/Σλ²."""
    return jnp.square(jnp.trace(gram)) / jnp.sum(jnp.square(gram))


def thresholded_rank(eigenvalues: np.ndarray, threshold: float = THRESHOLD) -> int:
    """rank_τ: number of eigenvalues that are at least τ times their mean.

    By Paley and Zygmund's inequality it is at least (1 − τ)²·r.
    """
    return int(np.sum(eigenvalues >= threshold * np.mean(eigenvalues)))


@_compiled(1, "width", "depth")
def _ranks(key, *, width, depth):
    """Soft rank after each layer of a linear network, with BN and without; the last HᵀH/d too.

    Both have the same weights and a batch of d examples. Without BN the output is scaled to mean
    square 1 after each layer, which no rank sees and which keeps it in range.
    """

    def gram(h):
        return h.T @ h / width

    def step(outputs, index):
        weight = jax.random.normal(jax.random.fold_in(key, index), (width, width)) * width**-0.5
        normalized, plain = outputs
        normalized = batch_norm(normalized @ weight, epsilon=0.0)[0]
        plain = plain @ weight
        plain = plain / jnp.sqrt(jnp.mean(jnp.square(plain)))
        return (normalized, plain), (soft_rank(gram(normalized)), soft_rank(gram(plain)))

    x = jax.random.normal(jax.random.fold_in(key, depth), (width, width))
    last, ranks = jax.lax.scan(step, (x, x), jnp.arange(depth))
    return ranks, jax.tree.map(gram, last)


def measure_ranks(config: Config, width: int, seed: int) -> Record:
    """Soft ranks of a linear network of d units on d examples, with BN and without."""
    depth = config.rank_depth
    ranks, grams = _ranks(jax.random.key(seed), width=width, depth=depth)
    kept = np.unique(np.geomspace(1, depth, _POINTS).astype(int))
    record: dict[str, Any] = {"width": width, "seed": seed, "layers": kept}
    for name, values, gram in zip(("BN", "none"), ranks, grams, strict=True):
        values = np.asarray(values, np.float64)
        eigenvalues = np.linalg.eigvalsh(np.asarray(gram, np.float64))
        record[name] = {
            "last": values[-1],
            "mean": np.mean(values[depth // 2 :]),
            "thresholded": thresholded_rank(eigenvalues),
            "ranks": values[kept - 1],
        }
    return record
