"""Evaluation of a whole set as one program: against sums over the examples, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bn_research.training.evaluation import make_evaluation, place_batches
from bn_research.training.metrics import cross_entropy_metrics
from bn_research.training.step import Batch

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((37, 5)).astype(np.float32)
LABELS = RNG.integers(0, 3, 37)
WEIGHTS = RNG.standard_normal((5, 3)).astype(np.float32)


def eval_step(batch, weights, factor):
    return cross_entropy_metrics(factor * batch.image @ weights, batch.label, batch.where)


def evaluated(batch_size, devices, where=None, factor=1.0):
    examples = Batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), where)
    placed = place_batches(examples, batch_size=batch_size, devices=jax.devices()[:devices])
    return make_evaluation(eval_step, placed.mesh)(placed.batches, WEIGHTS, jnp.float32(factor))


def by_hand(rows, factor=1.0):
    logits = factor * IMAGES[rows].astype(np.float64) @ WEIGHTS
    losses = -log_softmax(logits, axis=1)[np.arange(len(logits)), LABELS[rows]]
    return losses.mean(), np.mean(logits.argmax(1) == LABELS[rows])


@pytest.mark.parametrize(("batch_size", "devices"), [(4, 1), (4, 2), (4, 3), (37, 1), (100, 2)])
def test_equals_the_mean_over_examples(batch_size, devices):
    """37 examples fill no number of batches; padding counts for nothing."""
    assert jax.device_count() >= devices
    found = evaluated(batch_size, devices, factor=0.5)
    loss, accuracy = by_hand(np.arange(37), factor=0.5)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["accuracy"] == accuracy and found["count"] == 37


def test_does_not_depend_on_the_devices_to_the_last_bit():
    assert evaluated(4, 1) == evaluated(4, 2) == evaluated(4, 8)


def test_masked_examples_are_left_out():
    where = np.arange(37) % 3 > 0
    found = evaluated(4, 2, where=jnp.asarray(where))
    loss, accuracy = by_hand(np.flatnonzero(where))
    assert found["count"] == where.sum()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy)


def test_arguments_compile_nothing_anew():
    placed = place_batches(Batch(jnp.asarray(IMAGES), jnp.asarray(LABELS)), batch_size=8)
    traced = []

    def step(batch, weights, factor):
        traced.append(factor)
        return eval_step(batch, weights, factor)

    evaluation = make_evaluation(step, placed.mesh)
    losses = [evaluation(placed.batches, WEIGHTS, jnp.float32(f))["loss"] for f in (1.0, 2.0)]
    assert len(traced) == 1 and losses[0] != losses[1]


def test_errors():
    empty = Batch(jnp.zeros((0, 5)), jnp.zeros(0, int))
    for examples, size in ((empty, 4), (Batch(jnp.asarray(IMAGES), jnp.asarray(LABELS)), 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            place_batches(examples, batch_size=size)
    with pytest.raises(ValueError, match="every example is masked"):
        evaluated(4, 1, where=jnp.zeros(37, bool))
