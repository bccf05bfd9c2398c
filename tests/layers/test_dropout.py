"""`dropout`: its mask by hand, its law, and the same numbers however the batch is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.dropout import dropout

BATCH = 16


def keys(count=BATCH, seed=0, **options):
    return jax.random.split(jax.random.key(seed, **options), count)


def activations(shape=(BATCH, 3, 50), seed=0, dtype=jnp.float32):
    return jnp.asarray(1 + np.random.default_rng(seed).random(shape), dtype)


def test_each_element_is_zero_or_scaled():
    x, rate = activations(), 0.4
    y = np.asarray(jax.jit(functools.partial(dropout, rate=rate))(x, keys()))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.6, rtol=1e-6)
    for mask, key in zip(kept, keys(), strict=True):  # key by key, without vmap
        np.testing.assert_array_equal(mask, jax.random.bernoulli(key, 0.6, (3, 50)))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(dropout(x, keys(), rate=rate) != 0, kept)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_share_and_mean(rate):
    """Of N = 2²⁰ elements; six standard deviations, √(rate·(1 − rate)/N) for the share."""
    x = jnp.ones((64, 2**14))
    y = np.asarray(jax.jit(functools.partial(dropout, rate=rate))(x, keys(64)), np.float64)
    spread = 6 * np.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < spread
    assert abs(y.mean() - 1) < spread / (1 - rate)
    assert len({row.tobytes() for row in y == 0}) == 64  # examples have masks of their own


@pytest.mark.parametrize("devices", [2, 8])
def test_masks_do_not_depend_on_the_number_of_devices(devices):
    x = activations()
    whole = jax.jit(functools.partial(dropout, rate=0.5))(x, keys())
    parts = [v.reshape(devices, BATCH // devices, *v.shape[1:]) for v in (x, keys())]
    assert jax.device_count() >= devices
    spread = jax.pmap(functools.partial(dropout, rate=0.5))(*parts)
    np.testing.assert_array_equal(spread.reshape(x.shape), whole)
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    sharded = jax.jit(functools.partial(dropout, rate=0.5))(*jax.device_put((x, keys()), sharding))
    np.testing.assert_array_equal(sharded, whole)


def test_mask_is_a_function_of_the_key_alone():
    """Whatever the other keys, the other examples and the place in the batch."""
    x, y = activations(), dropout(activations(), keys(), rate=0.5)
    order = np.random.default_rng(1).permutation(BATCH)
    np.testing.assert_array_equal(dropout(x[order], keys()[order], rate=0.5), y[order])
    others = keys(seed=1).at[3].set(keys()[3])
    np.testing.assert_array_equal(dropout(x.at[4:].set(7.0), others, rate=0.5)[3], y[3])


def test_what_is_dropped_reaches_neither_value_nor_gradient():
    x = activations((2, 40))
    run = jax.value_and_grad(lambda x: jnp.sum(dropout(x, keys(2), rate=0.5) ** 2))
    dropped = np.asarray(dropout(x, keys(2), rate=0.5)) == 0
    value, gradient = run(x)
    dirty_value, dirty_gradient = run(jnp.where(dropped, jnp.nan, x))
    assert value == dirty_value and 20 < dropped.sum() < 60
    np.testing.assert_array_equal(gradient, dirty_gradient)
    np.testing.assert_allclose(gradient, np.where(dropped, 0, 8 * x), rtol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_one_program_serves_many_rates(rate):
    """A traced rate, 0 too: exact where 1 − rate is."""
    traces = []

    def run(x, rate):
        traces.append(rate)
        return dropout(x, keys(), rate=rate)

    program = jax.jit(run)
    program(activations(), 0.7)
    found = program(activations(), rate)
    np.testing.assert_array_equal(found, dropout(activations(), keys(), rate=rate))
    assert len(traces) == 1


def test_rate_zero_changes_nothing():
    x = activations().at[0, 0, 0].set(jnp.nan)
    np.testing.assert_array_equal(dropout(x, keys(), rate=0), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept(dtype):
    assert dropout(activations(dtype=dtype), keys(), rate=0.3).dtype == dtype


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(rate=1.0), r"rate=1.0 is not allowed: it must be in \[0, 1\)"),
        (dict(rate=-0.1), "rate=-0.1 is not allowed"),
        (dict(rate=float("nan")), "rate=nan is not allowed"),
        (dict(x=jnp.ones((BATCH, 2), jnp.int32)), "x has dtype int32: allowed are floating"),
        (dict(keys=keys(8)), r"keys has shape \(8,\): one for each example is \(16,\)"),
        (dict(keys=jax.random.key(0)), r"keys has shape \(\)"),
        (dict(keys=jax.random.key_data(keys())), "keys has dtype uint32: allowed are typed keys"),
        (dict(keys=keys(impl="rbg")), "generator rbg, which draws a batch by its first key"),
        (dict(keys=keys(impl="unsafe_rbg"), rate=0.0), "generator unsafe_rbg"),
    ],
)
def test_bad_arguments(kwargs, message):
    kwargs = dict(x=activations(), keys=keys(), rate=0.5) | kwargs
    with pytest.raises(ValueError, match=message):
        dropout(kwargs.pop("x"), kwargs.pop("keys"), **kwargs)
