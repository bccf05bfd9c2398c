"""Optimizers against steps computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_research.training.optimizers import create_optimizer, weight_mask

PARAMS = {
    "dense": {"kernel": jnp.array([2.0, -1.0]), "bias": jnp.array([3.0])},
    "bn": {"scale": jnp.array([1.5]), "bias": jnp.array([-0.5])},
}
GRADS = {
    "dense": {"kernel": jnp.array([0.5, 0.25]), "bias": jnp.array([-1.0])},
    "bn": {"scale": jnp.array([0.1]), "bias": jnp.array([0.2])},
}
RATE, DECAY = 0.1, 0.01


def run(optimizer, steps, params=PARAMS):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(name, steps, decayed):
    """The same gradient in each step; `decayed` says which leaves the decay reaches."""

    def one(p, g, decays):
        p, g, velocity, m, v = np.float64(p), np.float64(g), 0.0, 0.0, 0.0
        decay = DECAY * decays
        for t in range(1, steps + 1):
            if name == "adam":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                p = p - RATE * (step + decay * p)
            else:
                velocity = (0.8 if name == "momentum" else 0.0) * velocity + g + decay * p
                p = p - RATE * velocity
        return p

    return jax.tree.map(one, PARAMS, GRADS, decayed)


def everywhere(value):
    return jax.tree.map(lambda _: value, PARAMS)


WEIGHTS = {"dense": {"kernel": True, "bias": False}, "bn": {"scale": False, "bias": False}}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    ("options", "decayed"),
    [
        (dict(), everywhere(False)),
        (dict(weight_decay=DECAY), WEIGHTS),
        (dict(weight_decay=DECAY, decay_scale_and_bias=True), everywhere(True)),
    ],
)
def test_three_steps_by_hand(name, options, decayed):
    """Decay is L2 for sgd and momentum, decoupled for adam; it spares scale and bias."""
    params = run(create_optimizer(name, RATE, momentum=0.8, **options), 3)
    expected = by_hand(name, 3, decayed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_default_momentum():
    """θ − η·(1 + 1.9 + 2.71)·g after three steps with v ← 0.9·v + g."""
    params = run(create_optimizer("momentum", RATE), 3)
    np.testing.assert_allclose(params["bn"]["scale"], [1.5 - RATE * 5.61 * 0.1], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_traced_learning_rate(name):
    """One program for every rate, with the numbers of a static one."""

    @jax.jit
    def traced(rate):
        return run(create_optimizer(name, rate, weight_decay=DECAY), 2)

    for rate in (0.1, 0.7):
        static = run(create_optimizer(name, rate, weight_decay=DECAY), 2)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), traced(rate), static)
    assert traced._cache_size() == 1


def test_weight_mask():
    assert weight_mask(PARAMS) == WEIGHTS
    assert weight_mask({"layers": [jnp.ones(2), {"bias": jnp.ones(1)}]}) == {
        "layers": [True, {"bias": False}]
    }


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("adagrad", 0.1), {}, "optimizer='adagrad' is unknown: allowed are sgd, momentum, adam"),
        (("sgd", -0.1), {}, "learning_rate=-0.1 is not allowed: it must be ≥ 0"),
        (("sgd", float("nan")), {}, "learning_rate=nan is not allowed"),
        (("sgd", 0.1), dict(weight_decay=-1e-4), "weight_decay=-0.0001 is not allowed"),
        (("momentum", 0.1), dict(momentum=1.0), r"momentum=1.0 is not allowed.*\[0, 1\)"),
        (("momentum", 0.1), dict(momentum=-0.1), "momentum=-0.1 is not allowed"),
    ],
)
def test_bad_arguments(args, options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(*args, **options)


def test_a_schedule_is_the_rate_of_each_update():
    """θ moves by −η_t·g with η_t of the number of updates made."""
    optimizer = create_optimizer("sgd", lambda count: 0.5 / (count + 1))
    params = jnp.zeros(())
    state = optimizer.init(params)
    for count in range(3):
        update, state = optimizer.update(jnp.float32(2), state, params)
        np.testing.assert_allclose(update, -2 * 0.5 / (count + 1), rtol=1e-6)
