"""Tests of bn_research.probes.signal."""

import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.probes.signal import log10_rms


@pytest.mark.parametrize("scale", [1e-35, 1e-18, 1e-11, 1.0, 1e15, 1e30])
def test_equals_float64_at_every_scale(scale):
    x = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32) * np.float32(scale)
    expected = 0.5 * np.log10(np.mean(np.square(x.astype(np.float64))))
    tolerance = 2e-6 * (1 + abs(expected))
    assert float(log10_rms(jnp.asarray(x))) == pytest.approx(expected, abs=tolerance)


def test_zeros_nan_and_half_precision():
    assert float(log10_rms(jnp.zeros(5))) == -np.inf
    assert np.isnan(float(log10_rms(jnp.array([1.0, np.nan]))))
    assert log10_rms(jnp.full(4, 1e-3, jnp.bfloat16)).dtype == jnp.float32
