"""Weight decay as a rate that grows: against explicit training on a sphere."""

import numpy as np
import pytest

from bn_research.training.exponential_rates import exponential_rates


def test_exponential_rates_of_plain_sgd():
    """α = 1 − ηλ at every step, so that η̃_t = η/(1 − ηλ)^(2t + 1)."""
    found = exponential_rates([0.1] * 5, 0.5, 0.0)
    np.testing.assert_allclose(found, 0.1 / 0.95 ** (2 * np.arange(5) + 1), rtol=1e-14)


def test_exponential_rates_follow_decay_on_a_sphere():
    """θ̃ = P·θ on an explicit invariant loss, ⟨c, θ/‖θ‖⟩, momentum and rates that change."""
    rng = np.random.default_rng(0)
    c, theta = rng.standard_normal((2, 5))
    rates, decay, momentum = 0.05 * (1 + 0.2 * rng.random(60)), 0.01, 0.8

    def gradient(w):
        unit = w / np.linalg.norm(w)
        return (c - unit * (c @ unit)) / np.linalg.norm(w)

    def directions(rates, decay):
        w, v, found = theta, 0, []
        for rate in rates:
            v = momentum * v + gradient(w) + decay * w
            w = w - rate * v
            found.append(w / np.linalg.norm(w))
        return np.array(found)

    grown = exponential_rates(rates, decay, momentum)
    np.testing.assert_allclose(directions(grown, 0.0), directions(rates, decay), atol=1e-12)
    assert np.abs(directions(rates, 0.0) - directions(rates, decay)).max() > 1e-4


def test_a_decay_too_large_to_stand_for():
    with pytest.raises(ValueError, match=r"at most \(1 − √momentum\)² = 0.00263"):
        exponential_rates([0.1], 0.1, 0.9)
