"""Batches of Gaussian samples, and the pre-activations of a trained CNN, against the law."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bn_research.lab import settings
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.layers.linen import BatchNorm
from bn_research.models.cnn import CNN
from bn_research.probes import batch_noise_sampling as sampling
from bn_research.probes.batch_noise import StatisticsNoise, noise_law, variance_law
from bn_research.training.compiler import compiler_options
from bn_research.training.cores import use_cpu_cores
from bn_research.training.loop import History, run_steps
from bn_research.training.optimizers import create_optimizer
from bn_research.training.state import TrainState
from bn_research.training.step import Batch, make_train_step
from experiments.batch_noise import Config
from experiments.batch_noise.verdicts import REACH, Records, shown_size

BIN_WIDTH = 0.5  # of x̃, in the curves
_BINS = np.arange(-3, 3 + BIN_WIDTH, BIN_WIDTH)  # their centres
_LEAST_IN_BIN = 20  # values that a median is taken of
_ELEMENTS = 2**22  # of Gaussian samples at once


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweep."""
    use_cpu_cores()
    images = images_of(config, scale="standardized")
    check_network(config.law_network, images, config.dataset)
    whole = len(images.train.label)
    count = min(config.law_images, whole)
    at_most(config, count // 2, f"half of {count} images, so that batches differ", "law_sizes")
    at_most(config, count, "the images measured", "law_examples")
    at_most(config, whole, f"the training images of {config.dataset}", "law_batch_size")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """For each seed the noise of Gaussian samples, and that in the layers of its network.

    "gaussian" is of `gaussian_variances`; the layers of "features" are of `measure_layer`.
    """

    def record(training: settings.Training, state: TrainState, history: History) -> dict[str, Any]:
        runner.describe(f"noise of features seed={training.seed}")
        return {
            "seed": training.seed,
            "loss": float(np.mean(history.loss[-max(1, config.law_steps // 10) :])),
            "diverged": history.diverged,
            "layers": _measure_layers(config, images, state, training.seed),
        }

    setting = Trained(config.law_network, config.law_batch_size, config.law_rate)
    shape = (1, *images.train.image.shape[1:])
    ledger, steps = Ledger(path / "metrics.jsonl"), config.seeds * config.law_steps
    with Runner(path, ledger, total_steps=steps, strategy="devices") as runner:
        gaussian = [
            runner.get(f"noise of Gaussian samples seed={seed}", gaussian_variances, config, seed)
            for seed in range(config.seeds)
        ]
        features = settings.train(
            runner,
            [settings.Training(setting, seed, config.law_steps) for seed in range(config.seeds)],
            lambda setting: programs(setting, shape, config.law_steps_per_dispatch),
            images.train,
            record=record,
            name=lambda t: f"noise of features seed={t.seed}",
            describe=lambda t: "network of the noise",
        )
    return {"gaussian": gaussian, "features": features}


def gaussian_variances(config: Config, seed: int) -> dict[str, Any]:
    """Variance of x̂ at each of `law_points`, over batches of Gaussian samples, by size."""
    rng = np.random.default_rng([seed, 0])
    x = np.array(config.law_points, np.float64)[:, None]
    variances = {}
    for m in config.law_sizes:
        normalized, together = [], max(1, _ELEMENTS // m)
        for start in range(0, config.law_samples, together):
            others = rng.standard_normal((min(together, config.law_samples - start), m - 1))
            mean = (others.sum(axis=1) + x) / m
            square = (np.square(others).sum(axis=1) + x**2) / m
            normalized.append((x - mean) / np.sqrt(square - mean**2))
        variances[str(m)] = np.var(np.concatenate(normalized, axis=1), axis=1, ddof=1).tolist()
    return {"seed": seed, "variances": variances}


def _measure_layers(config: Config, images: Images, state: TrainState, seed: int):
    count = min(config.law_images, len(images.train.label))
    params = jax.device_get(state.params)  # off its lane's device: one program for all of them
    sown = _forward(config.law_network)(params, images.train.image[:count])
    layers = []
    for number, features in enumerate(sown, start=1):
        population = sampling.describe_population(np.asarray(features))
        kind = "conv" if population.num_positions > 1 else "dense"
        found = measure_layer(config, population, np.random.default_rng([seed, number]))
        layers.append({"layer": f"{kind}{number}", "kind": kind, **found})
    return layers


def measure_layer(
    config: Config, population: sampling.Population, rng: np.random.Generator
) -> dict[str, Any]:
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
    count, draws = population.num_examples, dict[str, Any](num_batches=config.law_batches, rng=rng)
    sizes, curve = {}, {}
    for m in config.law_sizes:
        infinite = (count - 1) / (count - m)  # noise of an infinite set, over that of ours
        moments = sampling.conditional_moments(population, chosen, m, **draws)
        noise = sampling.measured_noise(population, m, **draws)
        predicted = sampling.predicted_noise(population, m)
        var, law = moments.var * infinite, variance_law(x, predicted) * infinite
        independent = noise_law(x, m * population.num_positions, **shape).var
        ratio = (var / law)[near]
        sizes[str(m)] = {
            "ratio": np.median(ratio),
            "deviation": np.median(np.abs(ratio - 1)),
            "gaussian": np.median(np.abs((var / noise_law(x, m).var)[near] - 1)),
            "per value": np.median((var / independent)[near]),
            "effective": _effective(population, m, noise, predicted),
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


def _effective(population: sampling.Population, m: int, *noises: StatisticsNoise):
    """Examples that an image is worth: by the noise that was measured, and the predicted one."""
    measured, theory = (sampling.effective_batch_size(population, m, noise) for noise in noises)
    return {
        name: {
            "measured": np.nanmedian(own) / m,
            "predicted": np.nanmedian(law) / m,
            "error": np.nanmedian(np.abs(own / law - 1)),
            "least": np.nanmin(law) / m,
            "most": np.nanmax(law) / m,
        }
        for name, own, law in zip(("mean", "var"), measured, theory, strict=True)
    }


def _binned(x: np.ndarray, values: np.ndarray) -> list[float]:
    bins = np.round((x - _BINS[0]) / BIN_WIDTH)
    groups = [values[bins == number] for number in range(len(_BINS))]
    return [float(np.median(g)) if len(g) >= _LEAST_IN_BIN else math.nan for g in groups]


class Trained(settings.Setting, traced="rate"):
    """The network whose features are measured."""

    network: str
    batch_size: int
    rate: float


def _model(network: str) -> CNN:
    return CNN(network, BatchNorm, "hidden", use_bias=False)  # BN has its own


def _optimizer(setting: Trained) -> optax.GradientTransformation:
    return create_optimizer("momentum", setting.rate)


@settings.per_structure
def programs(setting: Trained, shape: tuple[int, ...], num_steps: int) -> settings.Programs:
    """Of one dispatch of momentum SGD."""
    model, batch_size = _model(setting.network), setting.batch_size

    def apply_fn(variables: Mapping[str, Any], image: Array, *, train: bool):
        logits, new = model.apply(variables, image, train=train, mutable=["batch_stats"])
        return logits, new["batch_stats"]

    def advance(state: TrainState, setting: Trained, examples: Batch):
        step = make_train_step(apply_fn, _optimizer(setting))
        return run_steps(step, state, examples, batch_size=batch_size, num_steps=num_steps)

    create = settings.creator(
        lambda key, _: model.init(key, jnp.zeros(shape), train=False), _optimizer
    )
    return settings.Programs(create, settings.sweep(advance, steps_per_dispatch=num_steps))


@functools.cache
def _forward(network: str):
    """Pre-activations of the hidden layers, each layer normalized by all the images given."""

    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def forward(params, image):
        mutable = ["batch_stats", "intermediates"]
        given = {"params": params}
        sown = _model(network).apply(given, image, train=True, mutable=mutable)[1]["intermediates"]
        return [sown[f"pre_activation_{number}"][0] for number in range(1, len(sown))]

    return forward
