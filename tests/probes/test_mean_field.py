"""Mean-field theory of BN: closed forms against explicit matrices, samples and known values."""

import math

import numpy as np
import pytest

from bn_research.probes.mean_field import (
    LIMIT,
    growth,
    relu_covariance,
    residual_gradient,
    residual_variances,
    spread,
)


def spheres(batch, count, seed=0):
    """BN of Gaussian batches: vectors of mean 0 and mean square 1, [count, batch]."""
    y = np.random.default_rng(seed).standard_normal((count, batch))
    y -= y.mean(axis=1, keepdims=True)
    return y / y.std(axis=1, keepdims=True)


@pytest.mark.parametrize("batch", [4, 5, 8, 31])
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_growth_is_the_traces_of_explicit_matrices(activation, batch):
    """E[1/σ²]·E[tr(ΠDCD)]/(B − 1) with matrices, within 5 standard errors."""
    y = spheres(batch, 20_000)
    centred = np.eye(batch) - 1 / batch
    projector = centred - y[:, :, None] * y[:, None, :] / batch
    slope = (y > 0) * 1.0 if activation == "relu" else np.ones_like(y)
    # tr(ΠDCD) = Σ_ij Π_ij D_j C_ji D_i
    traces = np.einsum("nij,nj,ji,ni->n", projector, slope, centred, slope, optimize=True)
    factor = batch / (spread(activation, batch) * (batch - 3) * (batch - 1))
    error = factor * traces.std() / math.sqrt(len(traces))
    assert abs(growth(activation, batch) - factor * traces.mean()) < 5 * error + 1e-12


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_spread_is_that_of_the_sphere(activation):
    y = spheres(6, 400_000)
    x = np.maximum(y, 0) if activation == "relu" else y
    samples = np.mean(x**2, axis=1) - x[:, 0] * x[:, 1]
    error = samples.std() / math.sqrt(len(samples))
    assert abs(spread(activation, 6) - samples.mean()) < 5 * error


def test_relu_covariance_of_equal_independent_and_opposite_units():
    found = [relu_covariance(rho) for rho in (1, 0, -1)]
    np.testing.assert_allclose(found, [1 / 2, 1 / (2 * math.pi), 0], atol=1e-15)


def test_growth_of_linear_networks_and_in_the_limit():
    assert growth("linear", 8) == 6 / 5 and growth("linear", 4) == 2
    assert growth("relu", 10**6) == pytest.approx(math.pi / (math.pi - 1), rel=2e-6)
    assert pytest.approx(1.46694, abs=1e-5) == LIMIT


def test_growth_of_relu_is_what_others_found_by_monte_carlo():
    listed = {8: 1.79, 16: 1.594, 32: 1.519, 64: 1.489, 128: 1.474}
    for batch, value in listed.items():
        assert growth("relu", batch) == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize(("activation", "batch"), [("relu", 3), ("linear", 2), ("tanh", 8)])
def test_growth_that_is_not_defined(activation, batch):
    with pytest.raises(ValueError, match="is not allowed"):
        growth(activation, batch)


def test_residual_laws_by_hand():
    found = residual_variances(3)
    assert found["BN"].tolist() == [1, 2, 3, 4] and found["none"].tolist() == [1, 2, 4, 8]
    share = 1 - 1 / math.pi
    expected = [2 * (1 + 1 / (1 + share)), 1 + 1 / (1 + share), 1]
    np.testing.assert_allclose(residual_gradient(2), expected)
    powers = np.log(residual_gradient(4000)[0] / residual_gradient(2000)[0]) / np.log(2)
    assert powers == pytest.approx(LIMIT, abs=1e-3)
