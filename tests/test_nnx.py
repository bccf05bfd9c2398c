"""`nnx.BatchNorm` against `flax.nnx.BatchNorm`, and where Flax is wrong against numpy."""

import functools
import inspect
import warnings
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from bn_research.layers import linen
from bn_research.layers.nnx import BatchNorm, freeze_batch_norm

LAYERS = BatchNorm, nnx.BatchNorm


def data(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2 + 1


@nnx.jit
def forward(layer, *args, **kwargs):
    return layer(*args, **kwargs)


def build(layer, features=3, **options):
    return layer(features, rngs=nnx.Rngs(0), **options)


class Net(nnx.Module):
    """Two layers between which the stream of keys moves on."""

    def __init__(self, layer, **options):
        """Draws the weights."""
        self.rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 5, use_bias=False, rngs=self.rngs)
        self.blocks = nnx.List([layer(5, rngs=self.rngs, **options) for _ in range(2)])
        self.head = nnx.Linear(5, 5, rngs=self.rngs)

    def __call__(self, x):
        """Dense → BN → tanh → BN → dense."""
        x = jnp.tanh(self.blocks[0](self.dense(x)))
        return self.head(self.blocks[1](x))


def two_to_three(key, shape, dtype):
    """An initializer that uses its key."""
    return 2 + jax.random.uniform(key, shape, dtype)


CONFIGS = [
    dict(),
    dict(momentum=0.5, epsilon=1e-3, use_scale=False, axis=1),
    dict(use_bias=False, use_scale=False, use_fast_variance=False, axis=(-1,)),
    dict(
        scale_init=two_to_three,
        bias_init=nnx.initializers.constant(-1.0),
        scale_metadata=dict(tag="γ"),
        bias_metadata=dict(tag="β"),
    ),
    dict(param_dtype=jnp.bfloat16),
    dict(dtype=jnp.bfloat16),
]


def signature(model):
    """Path, type, metadata, shape and dtype of each variable."""
    return {
        path: (type(leaf), leaf.get_metadata(), leaf[...].shape, leaf[...].dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }


def arrays(tree):
    """Leaves, random keys as their data."""
    return [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(tree)
    ]


def stats_of(layer):
    return np.asarray(layer.mean[...]), np.asarray(layer.var[...])


def test_constructor_is_that_of_flax():
    """Names, order, kinds and defaults; then our own."""

    def default(p):  # read-only dicts are equal to themselves alone
        return dict(p.default) if isinstance(p.default, MappingProxyType) else p.default

    own, flax = (
        [(p.name, p.kind, default(p)) for p in inspect.signature(c.__init__).parameters.values()]
        for c in LAYERS
    )
    assert own[: len(flax)] == flax
    assert own[len(flax) :] == [("group_size", inspect.Parameter.KEYWORD_ONLY, None)]
    assert BatchNorm.__name__ == "BatchNorm"


@pytest.mark.parametrize("options", CONFIGS)
def test_state_and_attributes_are_those_of_flax(options):
    own, flax = (Net(layer, **options) for layer in LAYERS)
    assert signature(own) == signature(flax)
    assert any(path[-1] == "mean" for path in signature(own))
    for ours, theirs in zip(arrays(nnx.state(own)), arrays(nnx.state(flax)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, value in vars(flax.blocks[0]).items():
        if not (name.startswith("_") or isinstance(value, nnx.Variable)):
            assert getattr(own.blocks[0], name) == value


@nnx.jit
def train_step(net, x, g):
    """Outputs, and gradients in the parameters and x; the net's statistics move on."""

    def loss(net, x):
        y = net(x)
        return jnp.sum(jnp.square(y) * g), y

    (_, y), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(net, x)
    return y, grads


@pytest.mark.parametrize("options", CONFIGS)
def test_numbers_are_those_of_flax(options):
    """A state of Flax's restores into ours; outputs, gradients and statistics agree over steps."""
    tolerance = 5e-2 if jnp.bfloat16 in options.values() else 1e-5
    x, g = data((6, 5, 4)), data((6, 5, 5), 1)
    own, flax = (Net(layer, **options) for layer in LAYERS)
    train_step(flax, data((6, 5, 4), 2), g)
    nnx.update(own, nnx.state(flax))
    before, results = signature(own), []
    for net in (own, flax):
        for _ in range(2):
            y, grads = train_step(net, x, g)
        net.eval()
        results.append((y, grads, nnx.state(net), forward(net, x)))
    assert signature(own) == before
    for ours, theirs in zip(*map(arrays, results), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(leaf, np.float32) for leaf in (ours, theirs))
        atol = tolerance * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def test_split_and_merge_with_the_state_of_flax():
    own, flax = (build(layer) for layer in LAYERS)
    forward(flax, data((8, 3)))
    merged = nnx.merge(nnx.split(own)[0], nnx.state(flax))
    assert type(merged) is BatchNorm
    np.testing.assert_array_equal(stats_of(merged), stats_of(flax))


def test_update_by_hand():
    """0.99·0 + 0.01·μ and 0.99·1 + 0.01·σ², biased; once per call."""
    x, layer = data((16, 3)), build(BatchNorm)
    forward(layer, x)
    x = x.astype(np.float64)
    np.testing.assert_allclose(layer.mean[...], 0.01 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * x.var(0), rtol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_ways_to_choose_the_statistics(layer):
    """`train`, `eval`, `set_attributes`, `nnx.view` and the call, which goes first."""
    x = data((8, 3))
    net = build(layer)
    running = x / np.sqrt(1 + 1e-5)
    batch = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

    def uses(expected, net, *args, **kwargs):
        before = np.copy(stats_of(net))
        np.testing.assert_allclose(net(x, *args, **kwargs), expected, rtol=1e-4, atol=1e-5)
        assert np.array_equal(stats_of(net), before) == (expected is running)
        net.mean[...], net.var[...] = jnp.zeros(3), jnp.ones(3)

    uses(batch, net)
    uses(running, net, True)
    net.eval()
    uses(running, net)
    uses(batch, net, use_running_average=False)
    net.train()
    uses(batch, net)
    net.set_attributes(use_running_average=True)
    uses(running, net)
    uses(batch, nnx.view(net, use_running_average=False))
    uses(running, net)
    uses(batch, build(layer, use_running_average=None), False)
    with pytest.raises(ValueError, match="use_running_average"):
        build(layer, use_running_average=None)(x)


def test_mask():
    """Statistics of flax with a mask; its unmasked outputs; NaN in masked places does no harm."""
    x, mask = data((8, 4)), np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)[:, None]
    own, flax = (build(layer, 4) for layer in LAYERS)
    theirs = forward(flax, x, mask=mask)
    ours = forward(own, np.where(mask, x, np.nan), mask=mask)
    np.testing.assert_allclose(stats_of(own), stats_of(flax), rtol=1e-5)
    np.testing.assert_allclose(ours[mask[:, 0]], theirs[mask[:, 0]], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours[~mask[:, 0]], np.zeros((2, 4)))


@pytest.mark.parametrize(
    ("x_dtype", "options"),
    [
        ("bfloat16", dict()),
        ("bfloat16", dict(param_dtype=jnp.bfloat16)),
        ("bfloat16", dict(use_bias=False, use_scale=False)),
        ("float32", dict(dtype=jnp.bfloat16)),
        ("float32", dict(dtype=jnp.float16)),
        ("bfloat16", dict(promote_dtype=lambda args, dtype: args)),
        ("bfloat16", dict(promote_dtype=lambda args, dtype: args, param_dtype=jnp.bfloat16)),
        ("bfloat16", dict(promote_dtype=lambda args, dtype: args, use_bias=False)),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_dtypes_are_those_of_flax(x_dtype, options, train):
    """Of the result; and statistics stay in float32."""
    x = jnp.asarray(data((4, 3)), x_dtype)
    own, flax = (build(layer, use_running_average=not train, **options) for layer in LAYERS)
    y = own(x)
    assert y.dtype == flax(x).dtype
    assert own.mean[...].dtype == own.var[...].dtype == jnp.float32


def test_nothing_is_cast_before_it_is_subtracted():
    """In bfloat16 100.6 and 100.3 are both 100.5; Flax's gives 0 where (x − μ)/σ is 3."""
    x = np.full((1, 3), 100.6, np.float32)
    results = []
    for layer in LAYERS:
        layer = build(layer, use_running_average=True, dtype=jnp.bfloat16, epsilon=0.0)
        layer.mean[...], layer.var[...] = jnp.full(3, 100.3), jnp.full(3, 0.01)
        results.append(forward(layer, x))
    assert results[0].dtype == results[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(results[0], np.float32), np.full((1, 3), 3.0))
    np.testing.assert_array_equal(np.asarray(results[1], np.float32), np.zeros((1, 3)))


def test_statistics_of_the_batch_are_not_rounded_to_the_dtype_of_the_result():
    """bfloat16 has eight bits: the mean of Flax's is off in the third digit."""
    x = (100 + 0.1 * np.random.default_rng(3).standard_normal((512, 3))).astype(np.float32)
    own, flax = (build(layer, dtype=jnp.bfloat16, momentum=0.0) for layer in LAYERS)
    forward(own, x), forward(flax, x)
    truth = x.astype(np.float64)
    np.testing.assert_allclose(own.mean[...], truth.mean(0), rtol=1e-6)
    np.testing.assert_allclose(own.var[...], truth.var(0), rtol=1e-5)
    assert np.all(np.abs(flax.var[...] - truth.var(0)) > 0.1 * truth.var(0))


def test_state_is_a_scan_carry_with_float64_input():
    """Without the warning with which flax casts its float64 statistics back."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        x = np.random.default_rng(1).standard_normal((3, 8, 2))
        graphdef, state = nnx.split(build(BatchNorm, 2, momentum=0.5))

        def step(state, x):
            layer = nnx.merge(graphdef, state)
            y = layer(x)
            return nnx.state(layer), y

        state, y = jax.lax.scan(step, state, x)
        layer = nnx.merge(graphdef, state)
        assert y.dtype == jnp.float64 and layer.var[...].dtype == jnp.float32
        expected = 1 / 8 + x.var(1).T @ [1 / 8, 1 / 4, 1 / 2]
        np.testing.assert_allclose(layer.var[...], expected, rtol=1e-5)


def test_right_at_a_mean_of_ten_thousand():
    """Where flax's one-pass variance has lost every digit: E[x²] and E[x]² are steps of 8."""
    x = (1e4 + np.random.default_rng(2).standard_normal((4096, 2))).astype(np.float32)
    truth = x.astype(np.float64)
    own, flax = (build(layer, 2, momentum=0.0) for layer in LAYERS)
    y, _ = forward(own, x), forward(flax, x)
    np.testing.assert_allclose(own.var[...], truth.var(0), rtol=1e-5)
    expected = (truth - truth.mean(0)) / np.sqrt(truth.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(flax.var[...] - truth.var(0)) > 0.5 * truth.var(0))


def on_devices(kind, devices):
    """Maps a function of arrays over the leading axis of its arguments, named "batch"."""
    if kind == "vmap":
        return lambda fn: jax.jit(jax.vmap(fn, axis_name="batch"))
    mesh, spec = Mesh(np.array(jax.devices()[:devices]), ("batch",)), PartitionSpec("batch")

    def spread(fn):
        def local(*args):
            return jax.tree.map(lambda leaf: leaf[None], fn(*(a[0] for a in args)))

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))

    return spread


def grouped_step(**options):
    """Per device: outputs, gradient of Σ g·y² in x, and the statistics after a step."""
    graphdef, state = nnx.split(build(BatchNorm, momentum=0.5, **options))

    def run(x, g):
        def loss(x):
            layer = nnx.merge(graphdef, state, copy=True)
            y = layer(x)
            return jnp.sum(g * jnp.square(y)), (y, layer.mean[...], layer.var[...])

        (_, (y, *stats)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx, *stats

    return run


@pytest.mark.parametrize("group_size", [None, 2, 8])
def test_groups_do_not_depend_on_the_number_of_devices(group_size):
    """Outputs against numpy; all else as on one device; statistics are those of all groups."""
    x = data((16, 3)) + np.arange(16, dtype=np.float32)[:, None]
    g = data((16, 3), 1)
    one = jax.jit(grouped_step(group_size=group_size))(x, g)
    groups = x.astype(np.float64).reshape(-1, group_size or 16, 3)
    mean, var = (reduce(groups, 1, keepdims=True) for reduce in (np.mean, np.var))
    expected = (groups - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(one[0], expected.reshape(16, 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[2], 0.5 * mean.mean(0)[0], rtol=1e-5)
    np.testing.assert_allclose(one[3], 0.5 + 0.5 * var.mean(0)[0], rtol=1e-5)
    for kind, devices in (("vmap", 2), ("shard_map", 8)):
        step = grouped_step(group_size=group_size, axis_name="batch")
        split = [a.reshape(devices, -1, 3) for a in (x, g)]
        y, dx, *stats = on_devices(kind, devices)(step)(*split)
        np.testing.assert_allclose(np.reshape(y, x.shape), one[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.reshape(dx, x.shape), one[1], rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(stats, one[2:], strict=True):
            np.testing.assert_allclose(np.mean(ours, 0), theirs, rtol=1e-5)


def test_groups_of_devices():
    """Devices 0, 3 and 1, 2 share; Flax's layer cannot do that under vmap, so against numpy."""
    x = data((4, 4, 3)) + np.arange(4, dtype=np.float32)[:, None, None]
    pairs = [[0, 3], [1, 2]]
    step = grouped_step(axis_name="batch", axis_index_groups=pairs)
    y, _, mean, _ = jax.jit(jax.vmap(step, axis_name="batch"))(x, x)
    for pair in pairs:
        group = x[pair].astype(np.float64)
        expected = (group - group.mean((0, 1))) / np.sqrt(group.var((0, 1)) + 1e-5)
        np.testing.assert_allclose(y[np.array(pair)], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean[np.array(pair)], [0.5 * group.mean((0, 1))] * 2, rtol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_equal_to_the_linen_layer(train):
    options = dict(momentum=0.9, epsilon=1e-3, group_size=4, use_running_average=not train)
    x, mask = data((8, 2, 3)), np.arange(16).reshape(8, 2, 1) % 3 > 0
    own, other = build(BatchNorm, **options), linen.BatchNorm(**options)
    own.scale[...], own.bias[...] = jnp.array([1.0, -2, 3]), jnp.array([0.0, 1, 2])
    own.mean[...] = jnp.array([0.5, 1, 1.5])
    variables = {
        "params": {"scale": own.scale[...], "bias": own.bias[...]},
        "batch_stats": {"mean": own.mean[...], "var": own.var[...]},
    }
    apply = functools.partial(other.apply, mutable=["batch_stats"])
    y, new = jax.jit(apply)(variables, x, mask=mask)
    np.testing.assert_array_equal(forward(own, x, mask=mask), y)
    np.testing.assert_array_equal(own.mean[...], new["batch_stats"]["mean"])
    np.testing.assert_array_equal(own.var[...], new["batch_stats"]["var"])


def test_freeze():
    """One layer of two, in training: running statistics, left alone; no gradient of its own."""
    x, g = data((6, 5, 4)), data((6, 5, 5), 1)
    net, frozen = Net(BatchNorm), Net(BatchNorm)
    train_step(net, x, g)
    nnx.update(frozen, nnx.state(net))
    freeze_batch_norm(frozen, lambda path: path == ("blocks", 0))
    frozen.train()
    before = stats_of(frozen.blocks[0]), stats_of(frozen.blocks[1])
    y, (grads, dx) = train_step(frozen, x, g)
    np.testing.assert_array_equal(stats_of(frozen.blocks[0]), before[0])
    assert not np.array_equal(stats_of(frozen.blocks[1]), before[1])
    for name in ("scale", "bias"):
        assert not np.any(grads["blocks"][0][name][...])
        assert np.all(grads["blocks"][1][name][...])
    assert np.any(grads["dense"]["kernel"][...]) and np.any(dx)
    # The same net with the frozen layer told to use its running statistics in the ordinary way.
    net.blocks[0].use_running_average = True
    expected, (other, expected_dx) = train_step(net, x, g)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-6)
    assert np.all(other["blocks"][0]["scale"][...])
    # The call does not thaw it; this does.
    layer = frozen.blocks[0]
    np.testing.assert_array_equal(layer(g, False), layer(g, True))
    frozen.set_attributes(BatchNorm, frozen=False)
    train_step(frozen, x, g)
    assert not np.array_equal(stats_of(layer), before[0])


def test_freeze_adds_up_and_leaves_the_state_as_it_is():
    net = Net(BatchNorm)
    before = signature(net)
    freeze_batch_norm(net, lambda path: path[-1] == 1)
    assert [layer.frozen for layer in net.blocks] == [False, True]
    freeze_batch_norm(net, lambda path: path[-1] == 0)
    freeze_batch_norm(net, lambda path: False)
    assert [layer.frozen for layer in net.blocks] == [True, True]
    assert signature(net) == before
    assert [layer.frozen for layer in nnx.merge(*nnx.split(net)).blocks] == [True, True]
    alone = build(BatchNorm)
    freeze_batch_norm(alone, lambda path: path == ())
    assert alone.frozen


def test_freeze_refuses_the_layer_of_flax():
    net = Net(BatchNorm)
    net.blocks[1] = build(nnx.BatchNorm, 5)
    freeze_batch_norm(net, lambda path: path == ("dense",))
    with pytest.raises(ValueError, match=r"^predicate is true of \('blocks', 1\), a flax.nnx.B.*$"):
        freeze_batch_norm(net, lambda path: True)
    assert not net.blocks[0].frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=1.7), r"momentum=1.7 is not allowed: it must lie in \[0, 1\]"),
        (dict(momentum=-0.1), "momentum=-0.1 is not allowed"),
        (dict(epsilon=-1.0), "epsilon=-1.0 is not allowed"),
        (dict(axis=-5), "=-5 is out of range for an array of rank 2: allowed are -2 to 1"),
        (dict(axis=(1, -1)), r"=\(1, -1\) names an axis twice"),
        (dict(axis=(0, 1)), r"axis=\(0, 1\) is not allowed: num_features is the length of one"),
        (dict(axis=0), r"num_features=3 does not match x of shape \(4, 3\): its axis 0 must be"),
        (dict(axis=0, use_bias=False, use_scale=False), "num_features=3 does not match x"),
        (dict(dtype=jnp.int32), "Dtype must be inexact"),
    ],
)
@pytest.mark.parametrize("evaluate", [False, True])
def test_bad_arguments(options, message, evaluate):
    layer = build(BatchNorm, use_running_average=evaluate, **options)
    with pytest.raises(ValueError, match=message) as error:
        layer(data((4, 3)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "x", "mask", "message"),
    [
        (dict(), np.ones((4, 3), np.int32), None, "x has dtype int32"),
        (dict(), data((4, 3)), np.ones((5, 1), bool), r"where has shape \(5, 1\)"),
        (dict(group_size=3), data((4, 3)), None, "group_size=3 does not divide the batch of 4"),
        (dict(axis_index_groups=[[0]]), data((4, 3)), None, "needs axis_name"),
    ],
)
def test_bad_calls(options, x, mask, message):
    layer = build(BatchNorm, **options)
    with pytest.raises(ValueError, match=message) as error:
        layer(x, mask=mask)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(stats_of(layer), [np.zeros(3), np.ones(3)])


def test_group_size_is_not_looked_at_in_evaluation():
    x = data((3, 2))
    y = forward(build(BatchNorm, 2, use_running_average=True, group_size=2), x)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
