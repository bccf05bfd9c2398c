"""Part of `experiments.regularization`: how noisy is an example seen in conjunction with others?

The theory and the probes are those of `bn_research.probes.batch_noise`. Measured are batches of
Gaussian samples, and the pre-activations of a small trained CNN, in convolutions and dense layers,
each layer normalized by the statistics of the whole set.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bn_research.lab.images import Images, check_network
from bn_research.lab.runner import Runner
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.spec import Conv, Dense, parse_spec
from bn_research.probes.batch_noise import noise_law, variance_law
from bn_research.probes.batch_noise_sampling import (
    Population,
    conditional_moments,
    describe_population,
    effective_batch_size,
    measured_noise,
    predicted_noise,
)
from bn_research.training.compiler import compiler_options
from bn_research.training.loop import run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState, create_train_state
from bn_research.training.step import make_train_step
from bn_research.training.sweep import Member, Sweep
from experiments.regularization.noise_verdicts import CLAIMS, REACH, judge, shown_size

__all__ = ["CLAIMS", "check", "check_images", "judge", "measure", "total_steps"]

BIN_WIDTH = 0.5  # of x̃, in the curves
_BINS = np.arange(-3, 3 + BIN_WIDTH, BIN_WIDTH)  # their centres
_LEAST_IN_BIN = 20  # values that a median is taken of
_ELEMENTS = 2**22  # of Gaussian samples at once

# The least that each number may be; of a tuple, each of its entries.
_LEAST = {
    "law_sizes": 3,  # below, the others of a batch have no variance
    "law_samples": 2,
    "law_batches": 2,
    "law_examples": 1,
    "law_images": 4,
    "law_batch_size": 2,
    "law_steps": 1,
    "law_steps_per_dispatch": 1,
}


def check(config: Any) -> None:
    """ValueError in one line for a field of this part that is out of range."""
    for name, least in _LEAST.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name}={value} is not allowed: whole numbers from {least} up are needed"
                )
    for name in ("law_sizes", "law_points"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name}={values} is not allowed: give 1 or more, all different")
    if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in config.law_points):
        raise ValueError(f"law_points={config.law_points} is not allowed: give numbers from 0 up")
    if not (isinstance(config.law_rate, int | float) and 0 < config.law_rate < math.inf):
        raise ValueError(f"law_rate={config.law_rate} is not allowed: give a positive number")
    if config.law_steps % config.law_steps_per_dispatch:
        raise ValueError(
            f"law_steps={config.law_steps} is not allowed: it must be a multiple of "
            f"law_steps_per_dispatch={config.law_steps_per_dispatch}"
        )
    kinds = {type(layer) for layer in parse_spec(config.law_network)[:-1]}
    if not {Conv, Dense} <= kinds:
        raise ValueError(
            f"law_network={config.law_network!r} is not allowed: it needs a convolution and a "
            "dense layer before its head"
        )


def check_images(config: Any, images: Images) -> None:
    """ValueError in one line unless there are enough images of the right size."""
    check_network(config.law_network, images, config.dataset)
    whole = len(images.train.label)
    count = min(config.law_images, whole)
    for name, most, why in (
        ("law_sizes", count // 2, f"half of {count} images, so that batches differ"),
        ("law_examples", count, "the images measured"),
        ("law_batch_size", whole, f"the training images of {config.dataset}"),
    ):
        value = getattr(config, name)
        if (max(value) if isinstance(value, tuple) else value) > most:
            raise ValueError(f"{name}={value} is not allowed: at most {most}, {why}")


def total_steps(config: Any) -> int:
    """Training steps of this part, for the progress bar."""
    return config.seeds * config.law_steps


def measure(config: Any, images: Images, runner: Runner) -> dict[str, list[dict[str, Any]]]:
    """What is not yet in the ledger.

    Args:
      config: of the experiment.
      images: the data set.
      runner: of the experiment.

    Returns:
      "gaussian": for each seed the variance of x̂ over batches of Gaussian samples. "features": for
      each seed the layers of its network, see `measure_layer`, and how it was trained.
    """
    seeds = range(config.seeds)
    samples = functools.partial(gaussian_variances, config)
    gaussian = [
        runner.get(f"noise of Gaussian samples seed={seed}", functools.partial(samples, seed))
        for seed in seeds
    ]
    shape = (1, *images.train.image.shape[1:])

    def record(member: Member, state: TrainState, history: Any) -> dict[str, Any]:
        runner.describe(f"noise of features seed={member.seed}")
        return {
            "seed": member.seed,
            "loss": float(np.mean(history.loss[-max(1, config.law_steps // 10) :])),
            "diverged": history.diverged,
            "layers": _measure_layers(config, images, state, member.seed),
        }

    runner.describe("network of the noise")
    rate = jnp.float32(config.law_rate)
    features = runner.train(
        _create_program(config.law_network, shape),
        _sweep(config.law_network, config.law_batch_size, config.law_steps_per_dispatch),
        [Member(f"noise of features seed={s}", s, rate, config.law_steps) for s in seeds],
        images.train,
        record=record,
    )
    return {"gaussian": gaussian, "features": features}


def gaussian_variances(config: Any, seed: int) -> dict[str, Any]:
    """Variance of x̂ at each of `law_points`, over batches of Gaussian samples, by size."""
    rng = np.random.default_rng([seed, 0])
    x = np.array(config.law_points, np.float64)[:, None]
    variances = {}
    for m in config.law_sizes:
        normalized = []
        together = max(1, _ELEMENTS // m)
        for start in range(0, config.law_samples, together):
            others = rng.standard_normal((min(together, config.law_samples - start), m - 1))
            mean = (others.sum(axis=1) + x) / m
            square = (np.square(others).sum(axis=1) + x**2) / m
            normalized.append((x - mean) / np.sqrt(square - mean**2))
        variances[str(m)] = np.var(np.concatenate(normalized, axis=1), axis=1, ddof=1).tolist()
    return {"seed": seed, "variances": variances}


def _measure_layers(config, images, state, seed):
    count = min(config.law_images, len(images.train.label))
    params = jax.device_get(state.params)  # off its lane's device: one program for all of them
    sown = _forward(config.law_network)(params, images.train.image[:count])
    layers = []
    for number, features in enumerate(sown, start=1):
        population = describe_population(np.asarray(features))
        rng = np.random.default_rng([seed, number])
        kind = "conv" if population.num_positions > 1 else "dense"
        layers.append(
            {"layer": f"{kind}{number}", "kind": kind, **measure_layer(config, population, rng)}
        )
    return layers


def measure_layer(config: Any, population: Population, rng: np.random.Generator) -> dict[str, Any]:
    """How noisy x̂ is in one layer, against theory; medians over features, or values |x̃| ≤ 2.

    Of each size: "ratio" and "deviation", the medians of measured/law and of its distance from 1,
    the law with what the features' own statistics scatter; "gaussian", that distance for the
    Gaussian formula; "per value", the median of measured over the law for as many independent
    values; and "effective", of the mean and the variance: examples that an image is worth, by
    measurement and as predicted, the median of |measured/predicted − 1|, and the predictions for
    the least and the most of the features.
    """
    chosen = rng.choice(population.num_examples, config.law_examples, replace=False)
    x = population.normalized[chosen].astype(np.float64)
    near = np.abs(x) <= REACH  # false for constant features, which are NaN
    shape = {"skewness": population.skewness, "kurtosis": population.kurtosis}
    count = population.num_examples
    sizes, curve = {}, {}
    for m in config.law_sizes:
        infinite = (count - 1) / (count - m)  # noise of an infinite set, over that of ours
        moments = conditional_moments(
            population, chosen, m, num_batches=config.law_batches, rng=rng
        )
        predicted = predicted_noise(population, m)
        var, law = moments.var * infinite, variance_law(x, predicted) * infinite
        independent = noise_law(x, m * population.num_positions, **shape).var
        ratio = (var / law)[near]
        sizes[str(m)] = {
            "ratio": np.median(ratio),
            "deviation": np.median(np.abs(ratio - 1)),
            "gaussian": np.median(np.abs((var / noise_law(x, m).var)[near] - 1)),
            "per value": np.median((var / independent)[near]),
            "effective": _effective(config, population, m, predicted, rng),
        }
        if m == shown_size(config):
            curve = {"x": _BINS, "measured": _binned(x, m * var), "law": _binned(x, m * law)}
    return {
        "positions": population.num_positions,
        "features": len(population.kurtosis),
        "constant": int(np.isnan(population.kurtosis).sum()),
        "skewness": np.nanmedian(np.abs(population.skewness)),
        "kurtosis": np.nanmedian(population.kurtosis),
        "within reach": np.mean(near),
        "sizes": sizes,
        "curve": curve,
    }


def _effective(config, population, m, predicted, rng):
    noise = measured_noise(population, m, num_batches=config.law_batches, rng=rng)
    found = {}
    for name, measured, theory in zip(
        ("mean", "var"),
        effective_batch_size(population, m, noise),
        effective_batch_size(population, m, predicted),
        strict=True,
    ):
        found[name] = {
            "measured": np.nanmedian(measured) / m,
            "predicted": np.nanmedian(theory) / m,
            "error": np.nanmedian(np.abs(measured / theory - 1)),
            "least": np.nanmin(theory) / m,
            "most": np.nanmax(theory) / m,
        }
    return found


def _binned(x: np.ndarray, values: np.ndarray) -> list[float]:
    bins = np.round((x - _BINS[0]) / BIN_WIDTH)
    groups = [values[bins == number] for number in range(len(_BINS))]
    return [float(np.median(g)) if len(g) >= _LEAST_IN_BIN else math.nan for g in groups]


def _model(network: str) -> CNN:
    # The weights of a layer before BN need no bias of their own.
    return CNN(network, BatchNorm, "hidden", use_bias=False)


@functools.cache
def _create_program(network: str, shape: Sequence[int]):
    @functools.partial(jax.jit, compiler_options=compiler_options(0))
    def create(key, rate):
        return create_train_state(
            lambda key: _model(network).init(key, jnp.zeros(shape), train=False),
            create_optimizer("momentum", rate),
            key,
        )

    return create


@functools.cache
def _sweep(network: str, batch_size: int, num_steps: int) -> Sweep:
    def apply_fn(variables: Mapping[str, Any], image: Array, *, train: bool):
        logits, new = _model(network).apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    def advance(state, rate, examples):
        step = make_train_step(apply_fn, create_optimizer("momentum", rate))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    return Sweep(advance, steps_per_dispatch=num_steps, compiler_options=compiler_options(1))


@functools.cache
def _forward(network: str):
    """Pre-activations of the hidden layers, each layer normalized by all the images given."""

    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def forward(params, image):
        mutable = ["batch_stats", "intermediates"]
        model = _model(network)
        new = model.apply({"params": params}, image, train=True, mutable=mutable)[1]
        sown = new["intermediates"]
        return [sown[f"pre_activation_{number}"][0] for number in range(1, len(sown))]

    return forward
