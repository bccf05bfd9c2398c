"""Tests of the groups that slopes propose, on null spaces written by hand."""

import numpy as np
import pytest

from bn_research.probes.scale_invariance.groups import smallest_groups


def slopes(*vectors, points=12, noise=0.0, sizes=1.0, seed=0):
    """Random slopes at right angles to every vector."""
    rng = np.random.default_rng(seed)
    vectors = np.array(vectors, float)
    found = rng.standard_normal((points, vectors.shape[1])) * sizes
    if len(vectors):
        found -= found @ vectors.T @ np.linalg.pinv(vectors @ vectors.T) @ vectors
    return found * (1 + noise * rng.standard_normal(found.shape))


def test_nothing_in_common():
    assert smallest_groups(np.random.default_rng(0).standard_normal((8, 5))) == []


@pytest.mark.parametrize("leaves", [0, 1])
def test_too_few_leaves(leaves):
    assert smallest_groups(np.ones((3, leaves))) == []


def test_groups_apart():
    found = smallest_groups(slopes([1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]))
    assert found == [(0, 1), (2, 4, 5)]


def test_groups_that_overlap_are_taken_apart():
    """BN on the last layer: a kernel with all biases from its layer on; no sum of two of them."""
    vectors = ([1, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0])
    assert smallest_groups(slopes(*vectors)) == [(0, 1, 3, 5), (2, 3, 5), (4, 5)]


@pytest.mark.parametrize("vector", [[1, 1, -1, 0], [1, 2, 0, 0]])
def test_other_exponents_are_no_group(vector):
    """Rescaling, a·w against w/a, is a symmetry and not a common factor."""
    assert smallest_groups(slopes(vector)) == []


@pytest.mark.parametrize("noise", [1e-7, 1e-4])
def test_noise_and_slopes_of_unlike_size(noise):
    points = slopes([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], noise=noise, points=9, seed=3)
    points = points * np.logspace(-4, 4, 9)[:, None]  # losses of points differ
    assert smallest_groups(points) == [(0, 1, 2), (3, 4)]


def test_many_leaves():
    vectors = np.kron(np.eye(40), [1, 1, 1])
    found = smallest_groups(slopes(*vectors, points=150, noise=1e-6))
    assert found == [(i, i + 1, i + 2) for i in range(0, 120, 3)]
