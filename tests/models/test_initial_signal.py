"""The signal of a badly initialized CNN: theory by hand and as published, and no underflow."""

import math

import numpy as np
import pytest

from bn_research.models.initial_signal import measured_log10_std, predicted_log10_std
from experiments.init_sensitivity import NETWORKS


@pytest.mark.parametrize(
    ("network", "standardized"),
    list(zip(NETWORKS, (-11.2, -11.8, -12.1, -13.0, -14.2), strict=True)),
)
def test_theory_gives_the_published_table(network, standardized):
    """The claims' table, measured on CIFAR-10's shape with unit variance and a = 0.001."""
    last = predicted_log10_std(network, 1e-3, 1.0, (32, 32, 3))[-1]
    assert last == pytest.approx(standardized, abs=0.3)


def test_theory_by_hand():
    """σ₁ = a√(9·E/3), σ₂ = σ₁·a√(2.5·9·4/6) after pooling, σ₃ = σ₂·a√(4·4·8/6)."""
    found = 10 ** np.array(predicted_log10_std("c4 P c8 f10", 0.1, 2.0, (8, 8, 1)))
    first = 0.1 * math.sqrt(9 * 2.0 / 3)
    second = first * 0.1 * math.sqrt(2.5 * 36 / 6)
    third = second * 0.1 * math.sqrt(4 * 4 * 8 / 6)
    np.testing.assert_allclose(found, [first, second, third], rtol=1e-12)


def test_signal_is_measured_down_to_1e_18():
    """A tenth of the width of the weights at seven layers: seven decades less, no underflow."""
    images = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype(np.float32)
    usual, tiny = (np.array(measured_log10_std(NETWORKS[4], a, images, 0)) for a in (1e-3, 1e-4))
    assert usual[-1] - tiny[-1] == pytest.approx(7, abs=1e-3)
    tiniest = np.array(measured_log10_std(NETWORKS[4], 10**-3.6, images * 1e-1, 0))
    assert tiniest[-1] < -18 and np.isfinite(tiniest).all()
