"""Scores of predicted probabilities, against scikit-learn and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from bn_research.probes.predictions import (
    average,
    by_size,
    calibration_error,
    disagreement,
    pooled,
    reliability,
    scores,
    top_error,
)


def predictions(count=200, classes=7, seed=0):
    """Logarithms of probabilities of three networks, and labels that they know a little of."""
    rng = np.random.default_rng(seed)
    label = rng.integers(classes, size=count)
    logits = rng.standard_normal((3, count, classes)) * 2 + 1.5 * np.eye(classes)[label]
    return np.array(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))), label


def test_scores_are_scikit_learns():
    logarithms, label = predictions()
    p = np.exp(np.float64(logarithms)).mean(axis=0)
    found = scores(average(list(logarithms)), label)
    classes = range(7)
    for k, name in ((1, "error"), (2, "error 2"), (5, "error 5")):
        top = metrics.top_k_accuracy_score(label, p, k=k, labels=classes)
        assert found[name] == pytest.approx(1 - top)
    exact = p / p.sum(axis=1, keepdims=True)  # float32 adds up to 1 ± 1e-7
    assert found["nll"] == pytest.approx(metrics.log_loss(label, exact, labels=classes), abs=1e-6)
    squares = [metrics.brier_score_loss(label == c, exact[:, c]) for c in classes]
    assert found["brier"] == pytest.approx(np.sum(squares), abs=1e-6)
    assert found["confidence"] == pytest.approx(np.mean([max(row) for row in p]))


def test_pooled_bins_are_those_of_all_examples_together():
    logarithms, label = predictions(seed=2)
    p = np.exp(np.float64(logarithms))
    whole = reliability(p.reshape(-1, 7), np.tile(label, 3))
    of_each = [reliability(one, label) for one in p]
    for at_least in (0, 40):
        kept = np.array(whole["count"]) >= max(1, at_least)
        assert 1 < kept.sum() < 15
        for found, field in zip(
            pooled(of_each, at_least=at_least), ("confidence", "accuracy"), strict=True
        ):
            np.testing.assert_allclose(found, np.array(whole[field])[kept], rtol=1e-12)


def test_calibration_error_by_a_loop():
    logarithms, label = predictions(seed=1)
    p = np.exp(np.float64(logarithms[0]))
    total = 0.0
    for b in range(15):
        rows = [i for i, row in enumerate(p) if b / 15 < max(row) <= (b + 1) / 15]
        if rows:
            correct = np.mean([p[i].argmax() == label[i] for i in rows])
            total += len(rows) / len(p) * abs(correct - np.mean([max(p[i]) for i in rows]))
    found = scores(p, label)
    assert found["ece"] == pytest.approx(total) and 0.01 < total < 1
    assert sum(found["bins"]["count"]) == len(p)
    # A sure and right one, and three at exactly 2/3 of which one is right.
    p = np.array([[1.0, 0, 0], *[[2 / 3, 1 / 3, 0]] * 3])
    bins = reliability(p, np.array([0, 0, 1, 1]))
    assert bins["count"][14] == 1 and bins["count"][9] == 3
    assert calibration_error(bins) == pytest.approx(0.75 * (2 / 3 - 1 / 3))


def test_a_tie_is_an_error():
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]])
    assert top_error(p, np.array([0, 0]), 1) == 1
    assert top_error(p, np.array([0, 0]), 2) == 0.5


def test_tiny_probabilities_are_averaged_without_loss():
    """exp(−200) is 0 in float32."""
    logarithms = np.float32([[[-200.0, 0.0]], [[-201.0, 0.0]]])
    found = average(list(logarithms))[0, 0]
    assert found == pytest.approx((math.exp(-200) + math.exp(-201)) / 2, rel=1e-6)


def test_sizes_and_disagreement_by_hand():
    logarithms, label = predictions()
    p = np.exp(np.float64(logarithms))

    def error(rows):
        return np.mean(p[rows].mean(axis=0).argmax(axis=1) != label)

    found = by_size(list(logarithms), label)
    expected = [
        np.mean([error([i]) for i in range(3)]),
        np.mean([error([0, 1]), error([0, 2]), error([1, 2])]),
        error([0, 1, 2]),
    ]
    np.testing.assert_allclose(found["error"], expected)
    assert np.all(np.diff(found["nll"]) < 0)  # −log is convex
    classes = p.argmax(axis=2)
    pairs = [np.mean(classes[i] != classes[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert disagreement(list(logarithms)) == pytest.approx(np.mean(pairs))
