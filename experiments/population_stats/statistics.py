"""Statistics for inference, their distance to the truth, and the test set by each.

Distance. Of estimated statistics (μ̂, σ̂²) to the truth (μ, σ²) of a layer, mean over its features:

    d² = ((μ̂ − μ)/σ)² + (ln σ̂ − ln σ)²,

σ² standing for variance + ε, what BN divides by; of a network the mean of d² over its layers. The
truth is the network with frozen weights and the whole training set as one batch: each layer
normalized by the full-set statistics of those below it.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from bn_research.lab.images import Images
from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.models.cnn import CNN
from bn_research.models.initializers import kernel_initializer
from bn_research.training.compiler import compiler_options
from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.state import TrainState
from bn_research.training.step import make_eval_step
from experiments.population_stats import Config

EPSILON = 1e-5  # of BN
TRUTH, ALGORITHM2, MERGED = "truth", "Algorithm 2", "merged"
_METHODS: dict[str, Any] = {ALGORITHM2: "algorithm2", MERGED: "merged"}
_EVAL_BATCH = 32
_LEAVES = ("mean", "var")
_POPULATION_DRAW = 1  # tells the random numbers of its batches from others of the seed

Errors = list[Float[np.ndarray, "2 features"]]  # of each layer


def average(momentum: float) -> str:
    """Name of a moving average as training leaves it."""
    return f"average {momentum:g}"


def averages(momentum: float) -> tuple[str, str, str]:
    """And of its controls: without the initial 0 and 1; that with Algorithm 2's n/(n − 1) too."""
    name = average(momentum)
    return name, f"{name}, start removed", f"{name}, start removed, n/(n − 1)"


def counts(most: int) -> list[int]:
    """1, 2, 4, … up to most: numbers of batches whose error is measured at the last step."""
    return [2**i for i in range(most.bit_length())]


def draw_batches(seed: int, examples: int, batch_size: int, count: int) -> Int[np.ndarray, "K m"]:
    """Rows of the batches for population statistics, drawn apart from those of training.

    Independent of each other, each without an example twice: an epoch of batches would hold every
    example, and Algorithm 2's means would be exact where the set happens to be small.
    """
    rng = np.random.default_rng([_POPULATION_DRAW, seed])
    return np.stack([rng.permutation(examples)[:batch_size] for _ in range(count)])


def errors(stats: Any, truth: Any) -> Errors:
    """(μ̂ − μ)/σ and ln σ̂ − ln σ of each feature, layer by layer, the lowest first."""
    found = []
    for layer in sorted(truth, key=lambda name: (len(name), name)):
        (mean, var), (true_mean, true_var) = (
            [np.asarray(tree[layer][leaf], float) for leaf in _LEAVES] for tree in (stats, truth)
        )
        true_var = true_var + EPSILON
        log_ratio = np.log((np.maximum(var, 0) + EPSILON) / true_var) / 2
        found.append(np.stack([(mean - true_mean) / np.sqrt(true_var), log_ratio]))
    return found


def parts(a: Errors, b: Errors | None = None) -> list[list[float]]:
    """Mean over features of a·b, [layers][of means, of ln σ]: of a alone the two parts of d².

    With the errors of two independent estimates it is what both have in common, their bias.
    """
    return [np.mean(x * y, axis=1).tolist() for x, y in zip(a, b or a, strict=True)]


def without_start(stats: Any, momentum: float, steps: int) -> Any:
    """An average without what is left of its initial 0 and 1: (s − βᵗ·s₀)/(1 − βᵗ)."""
    left, start = momentum**steps, {"mean": 0.0, "var": 1.0}
    return {
        layer: {n: (np.asarray(s[n], float) - left * start[n]) / (1 - left) for n in _LEAVES}
        for layer, s in stats.items()
    }


class Measurement:
    """Measures states of one network on one data set."""

    def __init__(self, config: Config, images: Images):
        """Places the test set on the devices."""
        self._config, self._image = config, images.train.image
        self._test = place_batches(images.test, batch_size=_EVAL_BATCH)

    def __call__(
        self, state: TrainState, *, batch_size: int, seed: int, late: bool
    ) -> dict[str, Any]:
        """Parts of d² (as of `parts`), test loss and accuracy, each by kind of statistics.

        The state has the averages of all momenta as batch_stats; batch size and seed are those of
        training. Late, more batches are seen: the record keeps the parts for 1, 2, 4, … of them
        ("counts") and the part of d² that two halves of them have in common ("floor").
        """
        config, chunk = self._config, self._config.population_batches
        drawn = config.most_population_batches if late else chunk
        rows = draw_batches(seed, len(self._image), batch_size, drawn)
        # In chunks, so that one program serves every number of batches.
        chunks = [self._moments(state, rows[i : i + chunk]) for i in range(0, drawn, chunk)]
        moments = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
        whole = self._moments(state, np.arange(len(self._image))[None])
        truth = _population(whole, MERGED, [0])
        kinds = {kind: _population(moments, kind, range(chunk)) for kind in _METHODS}
        kinds |= zip(map(average, config.momenta), state.batch_stats, strict=True)
        evaluation = _evaluation_program(config.network, self._test.mesh)
        scores = {
            kind: evaluation(self._test.batches, state._replace(batch_stats=stats, opt_state=()))
            for kind, stats in {TRUTH: truth, **kinds}.items()
        }
        kinds |= self._controls(state, moments)
        record: dict[str, Any] = {
            "parts": {kind: parts(errors(stats, truth)) for kind, stats in kinds.items()},
            "accuracy": {kind: score["accuracy"] for kind, score in scores.items()},
            "test_loss": {kind: score["loss"] for kind, score in scores.items()},
        }
        if late:
            halves = range(drawn // 2), range(drawn // 2, drawn)
            record |= {"counts": {}, "floor": {}}
            for kind in _METHODS:
                several = [_population(moments, kind, range(n)) for n in counts(drawn)]
                record["counts"][kind] = [parts(errors(s, truth)) for s in several]
                both = (errors(_population(moments, kind, half), truth) for half in halves)
                record["floor"][kind] = parts(*both)
        return record

    def _moments(self, state: TrainState, rows: Int[np.ndarray, "K m"]) -> Any:
        """Moments of each batch of rows, leaves [K, ...]."""
        variables = {"params": state.params, "batch_stats": state.batch_stats[0]}
        found = _moments_program(self._config.network)(variables, self._image, rows)
        return jax.tree.map(np.asarray, found)

    def _controls(self, state: TrainState, moments: Any) -> dict[str, Any]:
        """Averages without their start, and with the factor n/(n − 1) of Algorithm 2."""
        kinds = {}
        for momentum, stats in zip(self._config.momenta, state.batch_stats, strict=True):
            _, start_removed, unbiased = averages(momentum)
            kinds[start_removed] = removed = without_start(stats, momentum, int(state.step))
            kinds[unbiased] = {}
            for layer, s in removed.items():
                n = float(np.max(moments[layer]["moments"].count))
                kinds[unbiased][layer] = {**s, "var": s["var"] * (n / (n - 1))}
        return kinds


def _population(moments: Any, kind: str, batches: Iterable[int]) -> Any:
    """Statistics from those batches of moments, leaves [K, ...]."""
    shapes = {
        layer: {"mean": left["moments"].mean[0], "var": left["moments"].m2[0]}
        for layer, left in moments.items()
    }
    return population_batch_stats(
        lambda _, k: jax.tree.map(lambda leaf: leaf[k], moments),
        {"batch_stats": shapes},
        batches,
        method=_METHODS[kind],
    )


def make_model(network: str) -> CNN:
    """The network of a spec with BN on its hidden layers, He initialization and no biases."""
    norm = functools.partial(BatchNorm, epsilon=EPSILON)
    # As in the paper's networks there is BN before each nonlinearity, and none at the softmax.
    return CNN(network, norm, "hidden", kernel_init=kernel_initializer("he"), use_bias=False)


@functools.cache
def _moments_program(network: str):
    @functools.partial(jax.jit, compiler_options=compiler_options(1))
    def moments(variables, image, rows):
        def of_batch(row):
            mutable = [MOMENTS]
            return make_model(network).apply(variables, image[row], train=True, mutable=mutable)[1]

        return jax.lax.map(of_batch, rows)[MOMENTS]

    return moments


@functools.cache
def _evaluation_program(network: str, mesh: Any):
    def apply_fn(variables, image, *, train):
        return make_model(network).apply(variables, image, train=train), variables["batch_stats"]

    return make_evaluation(
        lambda batch, state: make_eval_step(apply_fn)(state, batch),
        mesh,
        compiler_options=compiler_options(1),
    )
