"""Metrics as masked sums, against numpy and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from bn_research.training.metrics import Metrics, cross_entropy_metrics

LOGITS = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32) * 5
LABELS = np.array([0, 3, 1, 2, 2, 0, 1, 3, 3], np.int32)


def expected(keep):
    loss = -log_softmax(LOGITS.astype(np.float64), 1)[np.arange(9), LABELS]
    correct = LOGITS.argmax(1) == LABELS
    return loss[keep].sum(), correct[keep].sum(), keep.sum()


@pytest.mark.parametrize("keep", [np.ones(9, bool), np.arange(9) < 5, np.zeros(9, bool)])
def test_sums_over_unmasked_examples(keep):
    """NaN logits of masked examples reach no sum."""
    dirty = np.where(keep[:, None], LOGITS, np.nan)
    metrics = metrics_of(dirty, LABELS, keep)
    np.testing.assert_allclose(metrics, expected(keep), rtol=1e-6)


def metrics_of(*args):
    return cross_entropy_metrics(*map(jnp.asarray, args))


def test_without_a_mask():
    metrics = metrics_of(LOGITS, LABELS)
    assert isinstance(metrics, Metrics)
    assert {leaf.dtype for leaf in metrics} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics, expected(np.ones(9, bool)), rtol=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.asarray(np.repeat(LOGITS, 500, 0), jnp.bfloat16)
    labels = np.repeat(LABELS, 500)
    loss = -log_softmax(np.asarray(logits, np.float64), 1)[np.arange(len(labels)), labels]
    metrics = metrics_of(logits, labels)
    assert metrics.loss.dtype == jnp.float32
    np.testing.assert_allclose(metrics.loss, loss.sum(), rtol=1e-5)


def test_large_logits_stay_finite():
    metrics = metrics_of(np.array([[1e4, 0.0]], np.float32), np.array([1]))
    np.testing.assert_allclose(metrics.loss, 1e4, rtol=1e-6)


@pytest.mark.parametrize("filling", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("label", [0, -1, 99])
def test_masked_examples_have_no_gradient(filling, label):
    """Forwards and backwards, whatever stands in their place."""
    keep = np.arange(9) < 5
    dirty = np.where(keep[:, None], LOGITS, np.float32(filling))
    labels = np.where(keep, LABELS, label)

    def loss(x):
        return metrics_of(x, labels, keep).loss

    gradient = jax.grad(loss)(dirty)
    ones = np.ones_like(dirty)
    slope = jax.jvp(loss, (dirty,), (ones * np.arange(4, dtype=np.float32),))[1]
    np.testing.assert_allclose(slope, np.sum(gradient * np.arange(4)), rtol=1e-5)
    probability = np.exp(log_softmax(LOGITS.astype(np.float64), 1))
    np.testing.assert_allclose(
        gradient, keep[:, None] * (probability - np.eye(4)[LABELS]), rtol=1e-4, atol=1e-6
    )
