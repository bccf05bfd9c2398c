"""`nnx.BatchNorm` against `flax.nnx.BatchNorm`, and where Flax is wrong against numpy."""

import inspect
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_layers import data, population_by_hand, stats_by_hand, two_layers_by_hand
from flax import nnx

from bn_research.layers import linen
from bn_research.layers.nnx import (
    BatchMoments,
    BatchNorm,
    freeze_batch_norm,
    gather_batch_moments,
    population_batch_stats,
    update_from_batch_moments,
)

LAYERS = BatchNorm, nnx.BatchNorm


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
    ("options", "x", "mask", "message"),
    [
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


def gathered_model(momenta=(0.9, 0.5)):
    """Two layers of unequal momentum, both of the input."""
    return nnx.List([build(BatchNorm, momentum=momentum) for momentum in momenta])


def by_hand(batches, momentum):
    return tuple(stats_by_hand(batches, momentum).values())


def run_all(model, x):
    return [layer(x) for layer in model]


def by_grad(model, x):
    def loss(model, x):
        return sum(jnp.sum(y**3) for y in run_all(model, x))

    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))(model, x)


def by_split_and_merge(model, x):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        model = nnx.merge(graphdef, state)
        run_all(model, x)
        return nnx.state(model)

    nnx.update(model, run(state, x))


def by_scan(model, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model, x):
        return model, run_all(model, x)

    run(model, x.reshape(2, -1, 3)[:, None])


def by_synced_vmap(model, x):
    model[0].axis_name = model[1].axis_name = "b"
    axes = nnx.StateAxes({...: None})
    nnx.vmap(run_all, in_axes=(axes, 0), axis_name="b")(model, x.reshape(2, -1, 3))


WAYS = [run_all, nnx.remat(run_all), by_grad, nnx.jit(by_grad), by_split_and_merge, by_scan]
WAYS.append(by_synced_vmap)


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_batches_update_once(way):
    """Each layer by its own momentum, from batches of unequal size; against numpy."""
    model, parts = gathered_model(), [data((8, 3)), data((4, 3), 1) + 5]
    before = signature(model)
    gather_batch_moments(model)
    for part in parts:
        (way if way in (run_all, by_split_and_merge) else nnx.jit(way))(model, part)
        np.testing.assert_array_equal(stats_of(model[0]), [np.zeros(3), np.ones(3)])
    counts = [layer.moments.get_value().count for layer in model]
    np.testing.assert_array_equal(counts, np.full((2, 3), 12))
    update_from_batch_moments(model)
    for layer in model:
        np.testing.assert_allclose(stats_of(layer), by_hand(parts, layer.momentum), rtol=1e-5)
    assert signature(model) == before
    model.set_attributes(BatchNorm, axis_name=None)
    run_all(model, parts[0])  # the ordinary update is back
    assert not np.allclose(model[0].mean[...], by_hand(parts, 0.9)[0])


def test_a_whole_step_of_accumulation_in_one_program():
    """Gather, pass and update inside of `nnx.jit`; a momentum for all, which may be traced."""
    model, parts = gathered_model(), data((3, 8, 3))
    freeze_batch_norm(model, lambda path: path == (1,))

    @nnx.jit
    def step(model, parts, momentum):
        gather_batch_moments(model)
        for part in parts:
            run_all(model, part)
        update_from_batch_moments(model, momentum=momentum)

    step(model, parts, 0.25)
    np.testing.assert_allclose(stats_of(model[0]), by_hand(parts, 0.25), rtol=1e-5)
    np.testing.assert_array_equal(stats_of(model[1]), [np.zeros(3), np.ones(3)])


def test_moments_are_state():
    """`nnx.state` reads them, and the key is the layer's attribute."""
    model = gathered_model()
    gather_batch_moments(model)
    run_all(model, data((8, 3)))
    state = nnx.to_flat_state(nnx.state(model, BatchMoments))
    assert [path for path, _ in state] == [(0, "moments"), (1, "moments")]
    for _, leaf in state:
        np.testing.assert_allclose(leaf.get_value().mean, data((8, 3)).mean(0), rtol=1e-5)


def test_moments_of_a_shared_layer_are_merged():
    layer, x = build(BatchNorm, momentum=0.8), data((8, 3))
    model = nnx.List([layer, layer])
    gather_batch_moments(model)
    nnx.jit(lambda model, x: (model[0](x), model[1](2 * x[:5] + 7)))(model, x)
    update_from_batch_moments(model)
    expected = by_hand([x, 2 * x[:5] + 7], 0.8)
    np.testing.assert_allclose(stats_of(layer), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["scan", "vmap"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("use", ["accumulate", "population"])
def test_moments_of_layers_inside_of_a_transformation(kind, axis, use):
    """Of `nnx.scan`, one layer after the other, and of `nnx.vmap`, side by side."""
    parts = [data((8, 3)) + 3, data((8, 3), 1)]

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=axis)
    def make(rngs):
        return BatchNorm(3, momentum=0.9, rngs=rngs)

    layers = make(nnx.Rngs(0))

    @nnx.jit
    def run(layers, x):
        if kind == "vmap":
            pair = jnp.stack([x, 2 * x + 1])
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(axis, 0))(layers, pair)

        @nnx.scan(in_axes=(nnx.Carry, axis), out_axes=nnx.Carry)
        def scan(x, layer):
            return layer(x)

        return scan(x, layers)

    if use == "accumulate":
        gather_batch_moments(layers)
        for part in parts:
            run(layers, part)
        update_from_batch_moments(layers)
    else:
        population_batch_stats(layers, run, parts)
    for leaf, expected in two_layers_by_hand(kind, axis, use, parts).items():
        np.testing.assert_allclose(getattr(layers, leaf)[...], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["algorithm2", "merged"])
def test_population_statistics(method):
    """Against numpy and against the linen layer's; a frozen layer keeps what it has."""
    model, batches = gathered_model(), [data((8, 3)), data((8, 3), 1) + 5]
    freeze_batch_norm(model, lambda path: path == (1,))
    population_batch_stats(model, nnx.jit(run_all), batches, method=method)
    expected = population_by_hand(batches, method)
    np.testing.assert_allclose(stats_of(model[0]), list(expected.values()), rtol=1e-5)
    np.testing.assert_array_equal(stats_of(model[1]), [np.zeros(3), np.ones(3)])
    other = linen.BatchNorm(use_running_average=False)
    variables = other.init(jax.random.key(0), batches[0])
    stats = linen.population_batch_stats(
        lambda v, x: other.apply(v, x, mutable=[linen.MOMENTS])[1][linen.MOMENTS],
        variables,
        batches,
        method=method,
    )
    np.testing.assert_allclose(stats_of(model[0]), (stats["mean"], stats["var"]), rtol=1e-6)


def test_population_statistics_leave_a_model_as_it_was():
    """Whether it was gathering, and however the passes end."""
    model, x = gathered_model(), data((8, 3))
    gather_batch_moments(model)
    run_all(model, x)

    def fail(model, x):
        run_all(model, x)
        raise RuntimeError("out of memory")

    for layers in (model, gathered_model()):
        before = {path for path, _ in nnx.to_flat_state(nnx.state(layers))}
        with pytest.raises(RuntimeError, match="out of memory"):
            population_batch_stats(layers, fail, [x])
        population_batch_stats(layers, run_all, [x])
        assert {path for path, _ in nnx.to_flat_state(nnx.state(layers))} == before
    update_from_batch_moments(model, momentum=0.0)
    np.testing.assert_allclose(stats_of(model[0]), by_hand([x], 0.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("prepare", "call", "message"),
    [
        (lambda m: None, update_from_batch_moments, "^'0' gathers no moments: call gather_b"),
        (lambda m: m.eval(), None, "^'0', '1' saw no batch in training mode: call model.train"),
        (lambda m: m[1].eval(), None, "^'1' saw no batch"),
        (lambda m: m.append(build(nnx.BatchNorm)), None, "^'2' is a flax.nnx.BatchNorm"),
        (lambda m: m.append(build(nnx.BatchNorm)), gather_batch_moments, "^'2' is a flax"),
    ],
)
def test_moments_that_cannot_be_had(prepare, call, message):
    model = gathered_model()
    prepare(model)
    before = [stats_of(layer) for layer in model]
    with pytest.raises(ValueError, match=message):
        if call is None:
            population_batch_stats(model, run_all, [data((8, 3))])
        else:
            call(model)
    np.testing.assert_array_equal(before, [stats_of(layer) for layer in model])


def test_found_where_flax_is_looked_for():
    """`set_attributes` by Flax's class reaches ours."""
    model = gathered_model()
    model.set_attributes(nnx.BatchNorm, use_running_average=True, momentum=0.3)
    assert [(layer.use_running_average, layer.momentum) for layer in model] == [(True, 0.3)] * 2
    assert all(isinstance(layer, nnx.BatchNorm) for layer in model)


def test_subclass_with_attributes_of_its_own():
    """That sets them to false values, or never calls our constructor."""

    class Mine(BatchNorm):
        def __init__(self, features, *, frozen=False, rngs):
            super().__init__(features, rngs=rngs)
            self.frozen, self.group_size = frozen, 0

    class Bare(BatchNorm):
        def __init__(self, features, *, rngs):
            nnx.BatchNorm.__init__(self, features, rngs=rngs)

    x, batch = data((8, 3)), by_hand([data((8, 3))], 0.99)
    for layer, expected in (
        (build(Mine), batch),
        (build(Bare), batch),
        (build(Mine, frozen=True), (np.zeros(3), np.ones(3))),
    ):
        layer(x)
        np.testing.assert_allclose(stats_of(layer), expected, rtol=1e-5)


def test_a_loss_on_new_statistics_trains_the_input():
    """Flax's gradient in linen, since its nnx layer cuts it; for a layer made in the loss."""
    x, target = data((16, 3)), np.float32([1, -2, 0.5])
    graphdef, state = nnx.split(build(BatchNorm, momentum=0.0))

    def loss(x):
        layer = nnx.merge(graphdef, state, copy=True)
        layer(x)
        return jnp.sum((layer.mean[...] - target) ** 2) + jnp.sum(layer.var[...] ** 2)

    exact = x.astype(np.float64)
    mean, var = exact.mean(0), exact.var(0)
    expected = 2 * (mean - target) / 16 + 4 * var * (exact - mean) / 16
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, rtol=1e-4, atol=1e-6)
    # An argument of nnx.grad is a copy, too.
    layer = build(BatchNorm, momentum=0.0)

    def of_argument(x, layer):
        layer(x)
        return jnp.sum((layer.mean[...] - target) ** 2) + jnp.sum(layer.var[...] ** 2)

    gradient = nnx.jit(nnx.grad(of_argument))(x, layer)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5)
