"""`StochasticBatchNorm` against BatchNorm where they are the same, and against numpy and scipy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.linen import MOMENTS, BatchNorm, population_batch_stats
from bn_research.layers.stochastic_norm import (
    GroupStatistics,
    StochasticBatchNorm,
    add_noise,
    draw_groups,
    group_statistics,
    noise_power,
    normalize_by_groups,
)

EPSILON = 1e-2  # large enough to be seen where it is forgotten
KEY = jax.random.key(0)
noisy = functools.partial(StochasticBatchNorm, epsilon=EPSILON)


def data(shape, seed=0):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (2 * noise + np.arange(shape[-1])).astype(np.float32)


def numpy_groups(x, group_size, population=None):
    """x̃, and a and s of every group, in float64; the population is the batch unless given."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    mean, var = population or (x.mean(axes), x.var(axes))
    sigma = np.sqrt(var + EPSILON)
    groups = x.reshape(-1, group_size, *x.shape[1:])
    inner = tuple(range(1, x.ndim))
    a = (groups.mean(inner) - mean) / sigma
    return (x - mean) / sigma, a, np.sqrt(groups.var(inner) + EPSILON) / sigma


def apply_groups(x_tilde, a, s):
    rows = x_tilde.reshape(len(a), -1, a.shape[-1])
    return ((rows - a[:, None]) / s[:, None]).reshape(x_tilde.shape)


def variables_of(features, seed=1):
    rng = np.random.default_rng(seed)
    scale, bias = rng.standard_normal((2, features)).astype(np.float32)
    mean, var = rng.standard_normal((2, features)).astype(np.float32)
    return {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var**2 + 1},
    }


@functools.partial(jax.jit, static_argnames=("layer", "mutable"))
def apply(layer, variables, x, key=KEY, *, mutable=("batch_stats", MOMENTS)):
    rngs = {"noise": key}
    return layer.apply(variables, x, use_running_average=False, rngs=rngs, mutable=list(mutable))


@pytest.mark.parametrize("shape", [(32, 3), (16, 2, 3, 4)])
def test_variables_moments_and_inference_are_those_of_batch_norm(shape):
    x, variables = data(shape), variables_of(shape[-1])
    own = noisy(noise="measured", group_size=4, momentum=0.7)
    batch_norm = BatchNorm(epsilon=EPSILON, momentum=0.7)
    created = [n.init(KEY, x, use_running_average=len(shape) > 2) for n in (own, batch_norm)]
    jax.tree.map(np.testing.assert_array_equal, *created)
    found, expected = (n.apply(variables, x, use_running_average=True) for n in (own, batch_norm))
    np.testing.assert_array_equal(found, expected)
    _, new = apply(own, variables, x)
    _, expected = apply(batch_norm, variables, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), new, expected)


def test_moments_alone_leave_the_running_average():
    x, variables = data((32, 3)), variables_of(3)
    layer = StochasticBatchNorm(noise="borrowed", group_size=4)
    assert set(apply(layer, variables, x, mutable=(MOMENTS,))[1]) == {MOMENTS}
    stats = population_batch_stats(
        lambda variables, x: apply(layer, variables, x)[1][MOMENTS], variables, [x, x + 1]
    )
    np.testing.assert_allclose(stats["mean"], x.mean(0) + 0.5, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], x.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(32, 3), (16, 2, 3, 4)])
@pytest.mark.parametrize("group_size", [2, 8])
def test_by_its_own_groups_it_is_batch_norm_by_groups(shape, group_size):
    x, variables = data(shape), variables_of(shape[-1])
    expected, _ = apply(BatchNorm(epsilon=EPSILON, group_size=group_size), variables, x)
    unit = {**variables, "params": {"scale": jnp.ones(shape[-1]), "bias": jnp.zeros(shape[-1])}}
    x_tilde, _ = apply(noisy(), unit, x)
    floor = EPSILON / (x.var(tuple(range(x.ndim - 1))) + EPSILON)
    found = normalize_by_groups(x_tilde, group_statistics(x_tilde, group_size, floor=floor))
    scale, bias = variables["params"].values()
    np.testing.assert_allclose(found * scale + bias, expected, atol=2e-5)


@pytest.mark.parametrize("shape", [(32, 3), (16, 2, 3, 4)])
@pytest.mark.parametrize("population", ["batch", "running"])
def test_borrowed_statistics_are_those_of_the_next_group(population, shape):
    x, variables = data(shape), variables_of(shape[-1])
    layer = noisy(noise="borrowed", group_size=4, population=population, momentum=0.5)
    y, new = apply(layer, variables, x)
    used = None
    if population == "running":
        used = tuple(np.asarray(new["batch_stats"][leaf], np.float64) for leaf in ("mean", "var"))
        blend = variables["batch_stats"]["mean"] / 2 + x.mean(tuple(range(x.ndim - 1))) / 2
        np.testing.assert_allclose(used[0], blend, rtol=1e-5)
    x_tilde, a, s = numpy_groups(x, 4, used)
    scale, bias = variables["params"].values()
    expected = apply_groups(x_tilde, np.roll(a, -1, 0), np.roll(s, -1, 0)) * scale + bias
    np.testing.assert_allclose(y, expected, atol=5e-5)


def test_the_law_that_is_drawn_has_the_moments_of_the_groups():
    _, a, s = numpy_groups(data((64, 3)), 8)
    groups = GroupStatistics(jnp.float32(a), jnp.float32(s))
    draw = jax.jit(jax.vmap(lambda key: draw_groups(key, groups)))
    drawn = draw(jax.random.split(KEY, 2500))  # of 8 groups each
    mean, log_std = (np.asarray(v, np.float64).reshape(-1, 3) for v in drawn)
    log_std = np.log(log_std)
    error = 5 / np.sqrt(2500 * 8)  # standard errors, in deviations of a draw
    law, log_law = a.std(0, ddof=1), np.log(s).std(0, ddof=1)
    assert np.all(np.abs(mean.mean(0)) < error * law)
    assert np.all(np.abs(log_std.mean(0) - np.log(s).mean(0)) < error * log_law)
    np.testing.assert_allclose(mean.std(0), law, rtol=error)
    np.testing.assert_allclose(log_std.std(0), log_law, rtol=error)
    assert np.all(np.abs(np.corrcoef(np.hstack([mean, log_std]).T) - np.eye(6)) < error)
    assert len(np.unique(np.asarray(drawn.mean[0]))) == 8 * 3


def test_additive_noise_has_the_power_of_the_groups_and_no_structure():
    x = data((512, 2, 4))
    x_tilde, a, s = numpy_groups(x, 4)
    power = np.mean((apply_groups(x_tilde, a, s) - x_tilde) ** 2, axis=(0, 1))
    groups = GroupStatistics(jnp.float32(a), jnp.float32(s))
    np.testing.assert_allclose(noise_power(jnp.float32(x_tilde), groups), power, rtol=1e-4)
    variables = {"params": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}}
    variables |= {"batch_stats": variables_of(4)["batch_stats"]}
    layer = noisy(noise="additive", group_size=4)
    noise = np.asarray(apply(layer, variables, x)[0] - x_tilde, np.float64)
    np.testing.assert_allclose(noise.var((0, 1)), power, rtol=5 * np.sqrt(2 / 1024))
    # Of a mean of 8 elements that shared their noise the variance would be 8 times as large.
    np.testing.assert_allclose(
        noise.reshape(128, 8, 4).mean(1).var(0) * 8, power, rtol=5 * np.sqrt(2 / 128)
    )
    for feature in range(4):
        size = np.abs(noise[..., feature]).ravel()
        assert abs(np.corrcoef(size, np.abs(x_tilde[..., feature]).ravel())[0, 1]) < 5 / 32


@pytest.mark.parametrize("population", ["batch", "running"])
def test_measured_noise_is_shared_by_a_group_in_each_feature(population):
    x = data((32, 3))
    variables = variables_of(3)
    layer = noisy(noise="measured", group_size=8, population=population)
    y, _ = apply(layer, variables, x)
    again, _ = apply(layer, variables, x, jax.random.key(1))
    assert np.abs(np.asarray(y - again)).min() > 1e-6
    for group in range(4):
        rows = slice(8 * group, 8 * group + 8)
        for feature in range(3):
            fit = np.polyfit(x[rows, feature], y[rows, feature], 1)  # affine within a group
            np.testing.assert_allclose(
                np.polyval(fit, x[rows, feature]), y[rows, feature], atol=1e-4
            )


def test_without_noise_values_and_gradients_are_those_of_batch_norm():
    x, g, variables = data((16, 2, 3)), data((16, 2, 3), 5), variables_of(3)

    def loss(layer, params, x):
        y, _ = apply(layer, {**variables, "params": params}, x)
        return jnp.sum(g * y)

    layers = noisy(), BatchNorm(epsilon=EPSILON)
    found, expected = (
        jax.grad(loss, (1, 2))(layer, variables["params"], jnp.array(x)) for layer in layers
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize("noise", ["measured", "borrowed", "additive"])
@pytest.mark.parametrize("population", ["batch", "running"])
def test_gradient_is_that_of_differences_with_the_noise_held_fixed(noise, population):
    """a, s and the additive noise are read off the values; so are r and d of the population."""
    with jax.enable_x64(True):
        x = data((8, 2)).astype(np.float64)
        g, variables = np.random.default_rng(3).standard_normal((8, 2)), variables_of(2)
        layer = noisy(noise=noise, group_size=4, population=population)

        def loss(x):
            y, new = apply(layer, variables, x)
            return jnp.sum(g * y), (y, new["batch_stats"])

        gradient, (y, stats) = jax.grad(loss, has_aux=True)(jnp.array(x))
        gradient, y = np.asarray(gradient), np.asarray(y)
    scale, bias = (np.float64(v) for v in variables["params"].values())
    x_hat = (y - bias) / scale
    r, d = 1.0, 0.0
    if population == "running":
        sigma = np.sqrt(np.float64(stats["var"]) + EPSILON)
        r = np.sqrt(x.var(0) + EPSILON) / sigma
        d = (x.mean(0) - np.float64(stats["mean"])) / sigma

    def x_tilde(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) * r + d

    if noise == "additive":
        fixed = x_hat - x_tilde(x)

        def value(x):
            return np.sum(g * scale * (x_tilde(x) + fixed))
    else:
        rows, hats = x_tilde(x).reshape(2, 4, 2), x_hat.reshape(2, 4, 2)
        s = (rows[:, 0] - rows[:, 1]) / (hats[:, 0] - hats[:, 1])
        a = rows[:, 0] - s * hats[:, 0]
        assert np.all(np.abs(s - 1) > 1e-4)

        def value(x):
            return np.sum(g * scale * apply_groups(x_tilde(x), a, s))

    differences = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[place] = 1e-6
        differences[place] = (value(x + step) - value(x - step)) / 2e-6
    # The running statistics are float32.
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-5)


def test_layers_of_a_network_draw_apart():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            layers = [
                StochasticBatchNorm(noise="measured", group_size=4, name=name)
                for name in ("first", "second")
            ]
            return [layer(x, use_running_average=not train) for layer in layers]

    x = data((16, 3))
    net = Net()
    variables = net.init(KEY, x, train=False)
    (first, second), _ = net.apply(
        variables, x, train=True, mutable=["batch_stats"], rngs={"noise": KEY}
    )
    assert np.abs(np.asarray(first - second)).min() > 1e-6
    again, _ = net.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"noise": KEY})
    np.testing.assert_array_equal(first, again[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise="gaussian"), "noise='gaussian' is unknown: allowed are none, measured"),
        (dict(population="all"), "population='all' is unknown: allowed are batch, running"),
        (dict(epsilon=0.0), "epsilon=0.0 is not allowed"),
        (dict(momentum=1.5), "momentum=1.5 is not allowed"),
        (dict(noise="measured", group_size=16), "group_size=16 is not allowed.*16 examples"),
        (dict(noise="borrowed", group_size=5), "group_size=5 is not allowed"),
        (dict(noise="additive"), "group_size=16 is not allowed"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        apply(StochasticBatchNorm(**options), variables_of(3), data((16, 3)))


def test_a_constant_feature_stays_finite():
    x_tilde = jnp.zeros((8, 2))
    for noise in ("measured", "borrowed", "additive"):
        y = add_noise(x_tilde, KEY, noise=noise, group_size=2, floor=jnp.ones(2))
        np.testing.assert_array_equal(y, 0)
