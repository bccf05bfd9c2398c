r"""Regression, and trainings on images: raw, centred, scaled and whitened.

With μ and Σ = V·diag(λ)·Vᵀ the mean and the biased covariance of the pixels over the training set,
d of them, and with ε̄ = ε·tr(Σ)/d,

    raw       x
    centred   x − μ
    scaled    (x_i − μ_i)/√(Σ_ii + ε̄)
    pca       diag(λ + ε̄)^(−1/2)·Vᵀ(x − μ)
    zca       V·diag(λ + ε̄)^(−1/2)·Vᵀ(x − μ)

so "scaled" is "zca" with the covariances between pixels left out. Whitening leaves the training set
eigenvalues λ/(λ + ε̄): 1 for ε = 0. Directions in which the training set does not vary, such as
pixels that are the same in all its images, come out as 0, in test images too: nothing was learnt
about them, and their scale would be arbitrary. ε bounds what the nearly constant ones are
multiplied by; with ε = 0 a pixel that one of n images lights comes out as √n there.

Sources: Y. LeCun, L. Bottou, G. Orr & K.-R. Müller, "Efficient BackProp", 1998, section 4.3;
A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009, appendix A (ZCA).
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bn_research.lab.arms import Arm, Trainer
from bn_research.lab.fields import at_most
from bn_research.lab.images import Images, check_network, images_of
from bn_research.lab.runner import Runner
from bn_research.lab.workdir import Ledger
from bn_research.normalization.whitening import batch_covariance, covariance, merge_covariance
from bn_research.training.cores import use_cpu_cores
from bn_research.training.step import Batch
from experiments.whitening import Config
from experiments.whitening.regression import TRANSFORMS, check_name, hessian, measure_regression
from experiments.whitening.verdicts import PLACES, Records, choose, other

_CHUNK = 8192  # images turned into float64 at once: bounds the memory beside the result


def prepare(config: Config) -> Images:
    """The images; each core becomes a device, for the sweeps."""
    use_cpu_cores()
    images = images_of(config, scale="unit", limit=config.examples)
    check_network(config.network, images, config.dataset)
    at_most(config, len(images.train.label), "the training set", "batch_size")
    return images


def measure(config: Config, images: Images, path: Path) -> Records:
    """Regression for each seed, then each kind of images: its spectrum, its trainings."""
    kinds = {name: (name, config.epsilon) for name in TRANSFORMS}
    kinds |= {other(epsilon): ("zca", epsilon) for epsilon in config.other_epsilons}
    arms = len(kinds) * len(PLACES)
    total = arms * (len(config.rates) + config.seeds) * config.num_steps
    pixels = np.asarray(images.train.image), np.asarray(images.test.image)
    spectra, trained = {}, []
    ledger = Ledger(path / "metrics.jsonl")
    with Runner(path, ledger, total_steps=total, strategy="devices") as runner:
        regressions = [
            runner.get(f"regression seed={seed}", measure_regression, seed, config)
            for seed in range(config.seeds)
        ]
        for name, (transform, epsilon) in kinds.items():
            train, test = transform_inputs(*pixels, transform, epsilon=epsilon)
            spectra[name] = runner.get(f"second moment {name}", second_moment, train)
            transformed = images._replace(
                train=Batch(jnp.asarray(train), images.train.label),
                test=Batch(jnp.asarray(test), images.test.label),
            )
            each = config.steps_per_dispatch
            trainer = Trainer(transformed, runner, steps_per_dispatch=each, tag=name)
            trained += [{**record, "inputs": name} for record in _train(config, trainer)]
    return Records(regressions, spectra, trained)


def _train(config: Config, trainer: Trainer) -> list[dict[str, Any]]:
    """Records of all placements on one kind of inputs, each at its best rate."""
    arms = {
        (placement, rate): Arm(
            config.network,
            placement,
            initializer="he",
            use_bias=True,
            batch_size=config.batch_size,
            learning_rate=rate,
            num_steps=config.num_steps,
        )
        for placement, rate in itertools.product(PLACES, config.rates)
    }
    trials = trainer.tune([(arm, config.seeds) for arm in arms.values()])
    runs = []
    for placement in PLACES:
        best = choose(config, [trial for trial in trials if trial["placement"] == placement])
        runs += [(arms[placement, best], seed) for seed in range(config.seeds)]
    return trainer.train(runs)


class InputTransform(NamedTuple):
    """An affine map of flattened images, y = matrix·(x − mean)."""

    mean: np.ndarray  # shape=(d,), dtype=float64
    matrix: np.ndarray  # shape=(d, d), or (d,) for the diagonal of one; dtype=float64


def transform_inputs(
    train_images: Float[np.ndarray, "n *image"],
    test_images: Float[np.ndarray, "m *image"],
    name: str,
    *,
    epsilon: float,
) -> tuple[Float[np.ndarray, "n *image"], Float[np.ndarray, "m *image"]]:
    """Both sets as the named transform has them, fitted to the training set alone.

    Images are float32 in the shapes given. "pca" has its components in place of pixels, by falling
    variance, so that the same network takes them. "raw" and "centred" do without ε.
    """
    fitted = fit_transform(train_images, name, epsilon=epsilon)
    return apply_transform(train_images, fitted), apply_transform(test_images, fitted)


def fit_transform(
    images: Float[np.ndarray, "n *image"], name: str, *, epsilon: float
) -> InputTransform:
    """The named transform for these images, of floating-point pixels from 0 to 1; in float64."""
    check_name(name)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images have dtype {images.dtype}: they must be floating point")
    mean, sigma = _moments(images)
    if name in ("raw", "centred"):
        return InputTransform(mean if name == "centred" else 0 * mean, np.ones_like(mean))
    added = epsilon * np.trace(sigma) / len(sigma)
    if name == "scaled":
        variances = np.diag(sigma)  # exactly 0 for constants: their moments are about themselves
        return InputTransform(mean, _inverse_roots(variances, variances > 0, added))
    values, vectors = np.linalg.eigh(sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    # An eigenvector's sign is free: its largest entry is made positive, on every machine.
    largest = np.argmax(np.abs(vectors), axis=0)
    vectors = vectors * np.sign(vectors[largest, np.arange(len(values))])
    cutoff = len(values) * np.finfo(values.dtype).eps * values[0]
    matrix = _inverse_roots(values, values > cutoff, added)[:, None] * vectors.T
    return InputTransform(mean, matrix if name == "pca" else vectors @ matrix)


def apply_transform(
    images: Float[np.ndarray, "n *image"], fitted: InputTransform
) -> Float[np.ndarray, "n *image"]:
    """The images transformed: computed in float64, float32 in the shape given."""
    result = np.empty(images.shape, np.float32)
    flat = result.reshape(len(images), -1)  # a view
    start = 0
    for chunk in _chunks(images):
        chunk = chunk - fitted.mean
        chunk = chunk * fitted.matrix if fitted.matrix.ndim == 1 else chunk @ fitted.matrix.T
        flat[start : start + len(chunk)] = chunk
        start += len(chunk)
    return result


def second_moment(images: Float[np.ndarray, "n *image"]) -> dict[str, float]:
    """Eigenvalues of E[x̃·x̃ᵀ], x̃ = (x, 1): the Hessian of a linear unit with a bias.

    "condition_number" is "largest" over "smallest", the smallest above zero to the rounding of
    float32 inputs; "rank" counts those. Gradient descent never moves along the others.
    """
    mean, sigma = _moments(images)
    values = np.linalg.eigvalsh(hessian(sigma, mean))
    # Rounding to float32 is noise of relative size 2^-24, and its square adds to the eigenvalues.
    values = values[values > np.finfo(np.float32).eps ** 2 * len(values) * values[-1]]
    largest, smallest = float(values[-1]), float(values[0])
    return {
        "condition_number": largest / smallest,
        "largest": largest,
        "smallest": smallest,
        "rank": len(values),
    }


def _moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and biased covariance [d, d] of flattened images, in float64."""
    with jax.enable_x64(True):
        parts = (batch_covariance(jnp.asarray(chunk)) for chunk in _chunks(images))
        moments = functools.reduce(merge_covariance, parts)
        return np.asarray(moments.mean), np.asarray(covariance(moments))


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    flat = images.reshape(len(images), -1)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK].astype(np.float64)


def _inverse_roots(values: np.ndarray, varies: np.ndarray, added: float) -> np.ndarray:
    """1/√(values + added), and 0 where nothing varies."""
    return np.where(varies, 1 / np.sqrt(np.where(varies, values + added, 1)), 0)
