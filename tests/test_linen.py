"""`linen.BatchNorm` against `flax.linen.BatchNorm`, and where Flax is wrong against numpy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.linen import (
    MOMENTS,
    BatchNorm,
    merge_batch_moments,
    population_batch_stats,
    update_from_batch_moments,
)
from bn_research.normalization import Moments


def data(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2 + 1


def signature(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (jax.tree_util.keystr(path), leaf.shape, leaf.dtype), tree
    )


class Net(nn.Module):
    """Two layers with automatic names."""

    layer: type[nn.Module]
    options: dict = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x, train, mask=None):
        """Dense → BN → tanh → BN."""
        x = nn.Dense(5, use_bias=False)(x)
        x = self.layer(use_running_average=not train, **self.options)(x, mask=mask)
        return self.layer(**self.options)(jnp.tanh(x), use_running_average=not train)


CONFIGS = [
    dict(),
    dict(momentum=0.5, epsilon=1e-3, use_scale=False),
    dict(use_bias=False, use_scale=False),
    dict(axis=(1, -1)),
    dict(axis=1),
    dict(scale_init=nn.initializers.constant(2.0), bias_init=nn.initializers.constant(-1.0)),
    dict(param_dtype=jnp.bfloat16, force_float32_reductions=False),
    dict(dtype=jnp.bfloat16),
]


def test_fields_and_defaults_are_those_of_flax():
    """In the same order, so that positional arguments mean the same; then our own."""
    own, flax = (
        [(f.name, f.default) for f in dataclasses.fields(c) if f.name not in ("parent", "name")]
        for c in (BatchNorm, nn.BatchNorm)
    )
    assert own[: len(flax)] == flax
    assert own[len(flax) :] == [("group_size", None), ("frozen", None)]
    assert BatchNorm.__name__ == "BatchNorm"


@pytest.mark.parametrize("options", CONFIGS)
def test_variables_are_those_of_flax(options):
    """Names, automatic ones included, shapes, dtypes and initial values."""
    x, key = data((2, 3, 4)), jax.random.key(0)
    own, flax = (
        jax.jit(Net(layer, options).init, static_argnums=2)(key, x, True)
        for layer in (BatchNorm, nn.BatchNorm)
    )
    assert "BatchNorm_1" in own["batch_stats"]
    assert signature(own) == signature(flax)
    jax.tree.map(np.testing.assert_array_equal, own, flax)


@pytest.mark.parametrize("options", CONFIGS)
def test_numbers_are_those_of_flax(options):
    """Flax's variables restore into ours; outputs, gradients and batch_stats agree over steps.

    Ours keep the dtypes of the statistics; Flax's drift in bfloat16.
    """
    coarse = jnp.bfloat16 in options.values()
    tolerance = 5e-2 if coarse else 1e-5
    x, key = data((6, 3, 4)), jax.random.key(0)
    g = data((6, 3, 5), 1)
    results = []
    variables = jax.jit(Net(nn.BatchNorm, options).init, static_argnums=2)(key, x, True)
    for layer in (BatchNorm, nn.BatchNorm):
        net = Net(layer, options)

        @jax.jit
        def run(variables, x, net=net):
            def loss(params, x):
                y, new = net.apply(
                    {**variables, "params": params}, x, True, mutable=["batch_stats"]
                )
                return jnp.sum(jnp.square(y) * g), (y, new)

            (_, (y, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                variables["params"], x
            )
            evaluated = net.apply({**variables, **new}, x, False)
            return y, new, grads, evaluated

        state = variables
        for _ in range(2):
            result = run(state, x)
            state = {**state, **result[1]}
        results.append(result)
    assert signature(results[0][1]["batch_stats"]) == signature(dict(variables["batch_stats"]))
    for own, flax in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        own, flax = (np.asarray(leaf, np.float32) for leaf in (own, flax))
        atol = tolerance * max(1, np.abs(flax).max())
        np.testing.assert_allclose(own, flax, rtol=0, atol=atol)


def test_mask():
    """Statistics of flax with a mask; its unmasked outputs; NaN in masked places does no harm."""
    x, mask = data((8, 4)), np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)[:, None]
    variables = BatchNorm().init(jax.random.key(0), x, False)
    flax, flax_new = nn.BatchNorm(use_running_average=False).apply(
        variables, x, mask=mask, mutable=["batch_stats"]
    )
    dirty = np.where(mask, x, np.nan)
    own, new = BatchNorm().apply(variables, dirty, False, mask=mask, mutable=["batch_stats"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, flax_new)
    np.testing.assert_allclose(own[mask[:, 0]], flax[mask[:, 0]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(own[~mask[:, 0]], np.zeros((2, 4)))


def test_initializing_leaves_the_statistics_alone():
    """Nor does it need the axis of devices, nor a batch that groups divide."""
    layer = BatchNorm(axis_name="batch", group_size=4, use_running_average=False)
    variables = layer.init(jax.random.key(0), data((3, 2)))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])
    assert set(variables) == {"params", "batch_stats"}


def test_update_by_hand():
    """0.99·0 + 0.01·μ and 0.99·1 + 0.01·σ², biased; once per call."""
    x = data((16, 3))
    variables = BatchNorm().init(jax.random.key(0), x, False)
    _, new = BatchNorm().apply(variables, x, False, mutable=["batch_stats"])
    assert set(new) == {"batch_stats"} and set(new["batch_stats"]) == {"mean", "var"}
    x = x.astype(np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.01 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.99 + 0.01 * x.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("x_dtype", "options", "expected"),
    [
        ("bfloat16", dict(), "float32"),
        ("bfloat16", dict(param_dtype=jnp.bfloat16), "bfloat16"),
        ("bfloat16", dict(use_bias=False, use_scale=False), "bfloat16"),
        ("float32", dict(dtype=jnp.bfloat16), "bfloat16"),
        ("float32", dict(dtype=jnp.float16), "float16"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_dtype_of_the_output(x_dtype, options, expected, evaluate):
    x = jnp.asarray(data((4, 2)), x_dtype)
    layer = BatchNorm(use_running_average=evaluate, **options)
    key, flax = jax.random.key(0), nn.BatchNorm(use_running_average=evaluate, **options)
    y, variables = jax.eval_shape(layer.init_with_output, key, x)
    assert y.dtype == expected
    assert jax.eval_shape(flax.init_with_output, key, x)[0].dtype == expected
    assert variables["batch_stats"]["var"].dtype == jnp.float32


def test_statistics_are_a_scan_carry_with_float64_input():
    """Flax's change dtype there, and the scan fails."""
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((3, 8, 2))
        layer = BatchNorm(use_running_average=False, momentum=0.5)
        variables = layer.init(jax.random.key(0), x[0])

        def step(stats, x):
            y, new = layer.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
            return new["batch_stats"], y

        stats, y = jax.lax.scan(step, variables["batch_stats"], x)
        assert y.dtype == jnp.float64 and stats["var"].dtype == jnp.float32
        expected = 1 / 8 + x.var(1).T @ [1 / 8, 1 / 4, 1 / 2]
        np.testing.assert_allclose(stats["var"], expected, rtol=1e-5)


def test_right_at_a_mean_of_ten_thousand():
    """Where flax's one-pass variance has lost every digit."""
    x = (1e4 + np.random.default_rng(2).standard_normal((4096, 2))).astype(np.float32)
    truth = x.astype(np.float64).var(0)
    layers = BatchNorm(momentum=0.0), nn.BatchNorm(momentum=0.0)
    variables = layers[0].init(jax.random.key(0), x, False)
    own, flax = (
        layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])[1]
        for layer in layers
    )
    np.testing.assert_allclose(own["batch_stats"]["var"], truth, rtol=1e-5)
    assert np.any(np.abs(flax["batch_stats"]["var"] - truth) > 0.1 * truth)


@pytest.mark.parametrize("options", [dict(group_size=2), dict(group_size=4), dict()])
def test_group_size_and_sync(options):
    """Two devices of four examples; groups are normalized each by itself."""
    x = data((2, 4, 3)) + np.arange(2, dtype=np.float32)[:, None, None]
    layer = BatchNorm(use_running_average=False, axis_name="batch", **options)
    variables = BatchNorm(use_running_average=True).init(jax.random.key(0), x[0])

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    y = jax.jit(jax.vmap(apply, axis_name="batch"))(x)
    groups = x.reshape(-1, options.get("group_size", 8), 3).astype(np.float64)
    expected = (groups - groups.mean(1, keepdims=True)) / np.sqrt(
        groups.var(1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(np.reshape(y, expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_group_size_is_not_looked_at_in_evaluation():
    x = data((3, 2))
    layer = BatchNorm(use_running_average=True, group_size=2)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=1.7), r"momentum=1.7 is not allowed: it must lie in \[0, 1\]"),
        (dict(momentum=-0.1), "momentum=-0.1 is not allowed"),
        (dict(epsilon=-1.0), "epsilon=-1.0 is not allowed"),
        (dict(axis=-5), "=-5 is out of range for an array of rank 2: allowed are -2 to 1"),
        (dict(axis=(1, -1)), r"=\(1, -1\) names an axis twice"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_bad_fields(options, message, evaluate):
    with pytest.raises(ValueError, match=message):
        BatchNorm(use_running_average=evaluate, **options).init(jax.random.key(0), data((4, 2)))


def test_integer_input():
    with pytest.raises(ValueError, match="x has dtype int32"):
        BatchNorm().init(jax.random.key(0), jnp.ones((4, 2), jnp.int32), False)


@pytest.mark.parametrize("method", ["algorithm2", "merged"])
def test_population_batch_stats(method):
    """Both layers of a net against numpy: each batch is normalized by its own statistics."""
    net = Net(BatchNorm, dict(momentum=0.9))
    batches = [data((8, 4), seed) for seed in (3, 4, 5)]
    variables = net.init(jax.random.key(1), batches[0], True)

    def apply_fn(variables, batch):
        return net.apply(variables, batch, True, mutable=[MOMENTS, "batch_stats"])[1][MOMENTS]

    stats = population_batch_stats(apply_fn, variables, batches, method=method)
    assert signature(stats) == signature(dict(variables["batch_stats"]))
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    first = [batch @ kernel for batch in batches]
    second = [np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)) for h in first]
    for name, hidden in (("BatchNorm_0", first), ("BatchNorm_1", second)):
        mean = np.mean([h.mean(0) for h in hidden], 0)
        var = np.mean([h.var(0, ddof=1) for h in hidden], 0)
        if method == "merged":
            var = np.concatenate(hidden).var(0, ddof=1)
        np.testing.assert_allclose(stats[name]["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats[name]["var"], var, rtol=1e-4)


def test_accumulated_microbatches_update_as_the_large_batch():
    """The first layer sees the same values either way; all layers are merged, one step each."""
    x, net = data((32, 3)), Net(BatchNorm, dict(momentum=0.9))
    variables = net.init(jax.random.key(0), x, True)
    gather = jax.jit(lambda x: net.apply(variables, x, True, mutable=[MOMENTS])[1][MOMENTS])

    def step(total, part):
        return merge_batch_moments(total, gather(part)), None

    parts = x.reshape(4, 8, 3)
    zeros = jax.tree.map(jnp.zeros_like, gather(parts[0]))
    merged, _ = jax.jit(lambda parts: jax.lax.scan(step, zeros, parts))(parts)
    ours = update_from_batch_moments(variables["batch_stats"], merged, momentum=0.9)
    _, large = net.apply(variables, x, True, mutable=["batch_stats"])
    assert signature(ours) == signature(dict(variables["batch_stats"]))
    for leaf in ("mean", "var"):
        first = (tree["BatchNorm_0"][leaf] for tree in (ours, large["batch_stats"]))
        np.testing.assert_allclose(*first, rtol=1e-6, atol=1e-7)
    layer = [gather(part)["BatchNorm_1"]["moments"] for part in parts]
    mean = np.mean([m.mean for m in layer], 0, dtype=np.float64)
    m2 = sum(np.asarray(m.m2, np.float64) + m.count * (m.mean - mean) ** 2 for m in layer)
    np.testing.assert_allclose(ours["BatchNorm_1"]["mean"], 0.1 * mean, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(ours["BatchNorm_1"]["var"], 0.9 + 0.1 * m2 / 32, rtol=1e-5)


def test_update_from_moments_of_another_model():
    moments = {"BatchNorm_7": {"moments": Moments(*jnp.ones((3, 2)))}}
    stats = {"BatchNorm_0": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
    with pytest.raises(ValueError, match="BatchNorm_7"):
        update_from_batch_moments(stats, moments)


def test_frozen_by_path():
    """The named layer is inference BN, keeps its statistics and has no gradient; others train."""
    x, key = data((8, 3)), jax.random.key(0)
    net = Net(BatchNorm, dict(frozen=lambda path: path[-1] == "BatchNorm_1"))
    variables = net.init(key, x, True)
    stats = {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 2.0)}
    variables["batch_stats"]["BatchNorm_1"] = stats

    def loss(params):
        y, new = net.apply(
            {**variables, "params": params}, x, True, mutable=["batch_stats", MOMENTS]
        )
        return jnp.sum(y**3), (y, new)

    grads, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
    trained = nn.BatchNorm(use_running_average=False)
    hidden, _ = trained.apply(
        {k: v["BatchNorm_0"] for k, v in variables.items()},
        x @ variables["params"]["Dense_0"]["kernel"],
        mutable=["batch_stats"],
    )
    np.testing.assert_allclose(y, (np.tanh(hidden) - 0.5) / np.sqrt(2 + 1e-5), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"]["BatchNorm_1"], stats)
    assert not np.any(grads["BatchNorm_1"]["scale"]) and not np.any(grads["BatchNorm_1"]["bias"])
    assert np.any(grads["BatchNorm_0"]["scale"]) and np.any(grads["Dense_0"]["kernel"])
    assert np.any(new["batch_stats"]["BatchNorm_0"]["mean"])
    assert set(new[MOMENTS]) == {"BatchNorm_0"}
    kept = update_from_batch_moments(variables["batch_stats"], new[MOMENTS])
    jax.tree.map(np.testing.assert_array_equal, kept["BatchNorm_1"], stats)


def test_initialized_with_one_example_without_a_warning(recwarn):
    net, x = Net(BatchNorm), data((1, 3))
    variables = net.init(jax.random.key(0), x, True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="1 value"):
        net.apply(variables, x, True, mutable=["batch_stats"])
