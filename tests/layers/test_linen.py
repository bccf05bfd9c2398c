"""`linen.BatchNorm` against `flax.linen.BatchNorm`, and where Flax is wrong against numpy."""

import dataclasses
import functools
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_layers import data, linen_step, population_by_hand, stats_by_hand, two_layers_by_hand
from devices import spread
from flax import nnx
from flax.core import freeze
from flax.core.scope import DenyList

from bn_research.layers.linen import (
    MOMENTS,
    BatchNorm,
    merge_batch_moments,
    population_batch_stats,
    update_from_batch_moments,
)
from bn_research.normalization import Moments


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


def test_initializing_leaves_the_statistics_alone():
    """Nor does it need the axis of devices, nor a batch that groups divide."""
    layer = BatchNorm(axis_name="batch", group_size=4, use_running_average=False)
    variables = layer.init(jax.random.key(0), data((3, 2)))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], [0, 0])
    np.testing.assert_array_equal(variables["batch_stats"]["var"], [1, 1])
    assert set(variables) == {"params", "batch_stats"}


def gathering(model, *args):
    """(variables, x) -> the moments that the model leaves."""
    options = dict(mutable=[MOMENTS, "batch_stats"])
    return jax.jit(lambda v, x: model.apply(v, x, *args, **options)[1].get(MOMENTS, {}))


@pytest.mark.parametrize("method", ["algorithm2", "merged"])
def test_population_batch_stats(method):
    """Both layers of a net against numpy: each batch is normalized by its own statistics."""
    net = Net(BatchNorm, dict(momentum=0.9))
    batches = [data((8, 4), seed) for seed in (3, 4, 5)]
    variables = net.init(jax.random.key(1), batches[0], True)
    stats = population_batch_stats(gathering(net, True), variables, batches, method=method)
    assert signature(stats) == signature(dict(variables["batch_stats"]))
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    first = [batch @ kernel for batch in batches]
    second = [np.tanh((h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)) for h in first]
    for name, hidden in (("BatchNorm_0", first), ("BatchNorm_1", second)):
        expected = population_by_hand(hidden, method)
        np.testing.assert_allclose(stats[name]["mean"], expected["mean"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats[name]["var"], expected["var"], rtol=1e-4)


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
    np.testing.assert_array_equal(new[MOMENTS]["BatchNorm_1"]["moments"].count, np.zeros(5))
    kept = update_from_batch_moments(variables["batch_stats"], new[MOMENTS])
    jax.tree.map(np.testing.assert_array_equal, kept["BatchNorm_1"], stats)


def close(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    check = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-6)
    jax.tree.map(check, found, expected)


@pytest.mark.parametrize(
    ("mutable", "collections"),
    [
        (True, {"params", "batch_stats"}),
        (DenyList("params"), {"batch_stats"}),
        (["batch_stats"], {"batch_stats"}),
        (MOMENTS, {MOMENTS}),
        ([MOMENTS, "batch_stats"], {MOMENTS, "batch_stats"}),
        ((MOMENTS,), {MOMENTS}),
        ({MOMENTS, "batch_stats"}, {MOMENTS, "batch_stats"}),
    ],
)
def test_moments_are_left_where_they_are_asked_for_by_name(mutable, collections):
    """Nor does `init` leave any, and a carry of all variables keeps its structure."""
    net, x = Net(BatchNorm), data((8, 3))
    variables = net.init(jax.random.key(0), x, True)
    assert set(variables) == {"params", "batch_stats"}
    _, new = jax.jit(lambda x: net.apply(variables, x, True, mutable=mutable))(x)
    assert set(new) == collections
    asked = net.init(jax.random.key(0), x, True, mutable=["params", "batch_stats", MOMENTS])
    assert set(asked) == {"params", "batch_stats"}


def test_all_variables_are_a_scan_carry():
    net, x = Net(BatchNorm), data((3, 8, 3))
    variables = net.init(jax.random.key(0), x[0], True)

    def step(variables, x):
        y, variables = net.apply(variables, x, True, mutable=True)
        return variables, y

    variables, _ = jax.jit(lambda v, x: jax.lax.scan(step, v, x))(variables, x)
    hidden = x @ np.asarray(variables["params"]["Dense_0"]["kernel"])
    mean = 0.01 * (hidden.mean(1).T @ [0.99**2, 0.99, 1])
    np.testing.assert_allclose(variables["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4)


@pytest.mark.parametrize("layer", [BatchNorm, nn.BatchNorm])
def test_bridge_to_nnx_gains_no_attribute(layer):
    x = data((8, 3))
    net = nnx.bridge.ToNNX(Net(layer), rngs=nnx.Rngs(0)).lazy_init(x, True)
    before = set(vars(net))
    net(x, True, mutable=True)
    assert set(vars(net)) == before and "batch_moments" not in before
    assert np.any(net.BatchNorm_0["mean"][...])


@pytest.mark.parametrize("synced", [None, "vmap", "shard_map"])
def test_a_loss_on_new_statistics_trains_the_input(synced):
    """As in DeepInversion: x is found whose statistics are those of a layer, as by Flax's."""
    x, target = data((16, 3)), np.float32([1, -2, 0.5])

    def run(layer):
        layer = layer(use_running_average=False, axis_name="batch" if synced else None)
        variables = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), x)

        def statistics(x):
            return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

        step = spread(synced, statistics, 2) if synced else statistics

        def loss(x):
            new = step(x.reshape(2, 8, 3) if synced else x)
            distance = (new["mean"] - 0.01 * target) ** 2 + (new["var"] - 0.99 - 0.01) ** 2
            return 1e4 * jnp.sum(distance) / (2 if synced else 1)

        return jax.jit(jax.value_and_grad(loss))

    step, theirs = run(BatchNorm), run(nn.BatchNorm)
    x64, epsilon = x.astype(np.float64), 1e-6
    for found, expected in zip(step(x), theirs(x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)

    def by_hand(x):
        return np.sum((x.mean(0) - target) ** 2 + (x.var(0) - 1) ** 2)

    for place in ((0, 0), (7, 1), (15, 2)):
        move = np.zeros_like(x64)
        move[place] = epsilon
        slope = (by_hand(x64 + move) - by_hand(x64 - move)) / (2 * epsilon)
        np.testing.assert_allclose(step(x)[1][place], slope, rtol=1e-3, atol=1e-4)
    for _ in range(60):
        x = x - 2 * step(x)[1]
    np.testing.assert_allclose(np.mean(x, 0), target, atol=0.02)
    np.testing.assert_allclose(np.var(x, 0), 1, atol=0.02)


@pytest.mark.parametrize("layer", [BatchNorm, nn.BatchNorm])
def test_statistics_in_param_dtype_stay_in_it(layer):
    options = dict(param_dtype=jnp.bfloat16, force_float32_reductions=False)
    x = jnp.asarray(data((64, 3)), jnp.bfloat16)
    _, stats = linen_step(layer, x, momentum=0.5, **options)
    initial = layer(use_running_average=False, **options).init(jax.random.key(0), x)
    assert signature(stats) == signature(initial["batch_stats"])
    assert stats["mean"].dtype == jnp.bfloat16
    expected = stats_by_hand([np.asarray(x, np.float64)], 0.5)
    np.testing.assert_allclose(np.float32(stats["mean"]), expected["mean"], rtol=0.02)


class Twins(nn.Module):
    """One layer for two inputs."""

    @nn.compact
    def __call__(self, *inputs):
        """Each by itself."""
        layer = BatchNorm(use_running_average=False, momentum=0.8)
        return [layer(x) for x in inputs]


def test_calls_of_one_pass_are_merged():
    inputs = data((8, 2, 3)), data((5, 3), 1) + 4, data((1, 7, 3), 2) - 9
    variables = Twins().init(jax.random.key(0), *inputs)
    _, new = Twins().apply(variables, *inputs, mutable=[MOMENTS])
    stats = update_from_batch_moments(variables["batch_stats"], new[MOMENTS])
    close(stats["BatchNorm_0"], stats_by_hand(inputs, 0.8))
    np.testing.assert_array_equal(new[MOMENTS]["BatchNorm_0"]["moments"].count, [28] * 3)


class Cell(nn.Module):
    """What `nn.scan` runs over layers, or over time."""

    @nn.compact
    def __call__(self, carry, x):
        """A layer of BN, of what is carried or of what comes in."""
        y = BatchNorm(use_running_average=False, momentum=0.9)(carry if x is None else x)
        return y, y


def stacked(kind, axes, axis=0):
    """Two layers by `nn.scan`, one after the other, or by `nn.vmap`, side by side."""
    axes = dict.fromkeys(axes, axis)
    if kind == "vmap":
        layer = nn.vmap(BatchNorm, variable_axes=axes, split_rngs={"params": True})
        return layer(use_running_average=False, momentum=0.9, name="layers")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Cell, variable_axes=axes, split_rngs={"params": True}, length=2)
            return scan(name="layers")(x, None)[0]

    return Model()


LIFTED = ("params", "batch_stats", MOMENTS)


@pytest.mark.parametrize(("kind", "axis"), [("scan", 0), ("scan", 1), ("vmap", 0), ("vmap", 1)])
@pytest.mark.parametrize("use", ["accumulate", "population"])
def test_layers_inside_of_a_transformation(kind, axis, use):
    """With the collection lifted along any axis each has its own statistics."""
    model = stacked(kind, LIFTED, axis)
    parts = [data((8, 3)) + 3, data((8, 3), 1)]
    inputs = [np.stack([p, 2 * p + 1]) if kind == "vmap" else p for p in parts]
    variables = jax.jit(model.init)(jax.random.key(0), inputs[0])
    gather = gathering(model)
    if use == "accumulate":
        merged = merge_batch_moments(*(gather(variables, x) for x in inputs))
        found = update_from_batch_moments(variables["batch_stats"], merged)
    else:
        found = population_batch_stats(gather, variables, inputs)
    assert signature(found) == signature(dict(variables["batch_stats"]))
    layers = found["layers"]["BatchNorm_0"] if kind == "scan" else found
    close(layers, two_layers_by_hand(kind, axis, use, parts))


@pytest.mark.parametrize("kind", ["scan", "vmap"])
def test_layers_whose_moments_are_not_lifted_are_named(kind):
    """With the axes to add, word for word."""
    model, x = stacked(kind, LIFTED[:2]), data((2, 8, 3))
    variables = model.init(jax.random.key(0), x)
    gather = gathering(model)
    name = "layers/BatchNorm_0" if kind == "scan" else ""
    message = f"moments lacks '{name}'.*variable_axes={{'batch_moments': 0}}"
    with pytest.raises(ValueError, match=message):
        update_from_batch_moments(variables["batch_stats"], gather(variables, x))
    with pytest.raises(ValueError, match=message):
        population_batch_stats(gather, variables, [x])
    # Both docstrings show what to write.
    for function in (update_from_batch_moments, population_batch_stats):
        code = re.search(r"variable_axes=(\{.*?\})", function.__doc__).group(1)
        assert eval(code, {"MOMENTS": MOMENTS}) == dict.fromkeys(LIFTED, 0)


def test_recurrence_that_shares_a_layer():
    """`variable_carry` shares statistics over time: the moments of all steps are merged."""
    xs = data((4, 8, 3)) + np.arange(4, dtype=np.float32)[:, None, None]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, xs):
            scan = nn.scan(
                Cell,
                variable_broadcast="params",
                variable_carry="batch_stats",
                variable_axes={MOMENTS: 0},
                split_rngs={"params": False},
            )
            return scan(name="cell")(xs[0], xs)[1]

    one = Cell().init(jax.random.key(0), xs[0], xs[0])
    variables = {name: {"cell": tree} for name, tree in one.items()}
    _, new = Model().apply(variables, xs, mutable=[MOMENTS, "batch_stats"])
    stats = update_from_batch_moments(variables["batch_stats"], new[MOMENTS])
    close(stats["cell"]["BatchNorm_0"], stats_by_hand(xs, 0.9))


class Hybrid(nn.Module):
    """Takes its mode from whether the statistics may change; layers of unequal momentum."""

    @nn.compact
    def __call__(self, x):
        """BN → BN of the same, one frozen."""
        train = self.is_mutable_collection("batch_stats")
        outputs = [
            BatchNorm(use_running_average=not train, momentum=momentum, name=f"at_{momentum}")(x)
            for momentum in (0.5, 0.9)
        ]
        frozen = BatchNorm(use_running_average=not train, frozen=True, name="frozen")(x)
        return [*outputs, frozen]


@pytest.mark.parametrize("frozen_dict", [False, True])
def test_recipe_of_accumulation(frozen_dict):
    """Each layer by its own momentum, in a model that looks at `mutable`; given, by that."""
    x, parts = data((32, 3)), data((32, 3)).reshape(4, 8, 3)
    variables = Hybrid().init(jax.random.key(0), x)
    given = freeze(variables["batch_stats"]) if frozen_dict else variables["batch_stats"]
    variables["batch_stats"]["frozen"]["mean"] += 7

    @jax.jit
    def run(parts):
        def gather(x):
            (y, _, _), new = Hybrid().apply(variables, x, mutable=[MOMENTS, "batch_stats"])
            return new[MOMENTS], y

        def step(total, part):
            moments, y = gather(part)
            return merge_batch_moments(total, moments), y

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gather, parts[0])[0])
        return jax.lax.scan(step, zeros, parts)

    merged, y = run(parts)
    part = parts[3].astype(np.float64)
    np.testing.assert_allclose(y[3], (part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5), atol=1e-5)
    kept = {"mean": np.full(3, 7.0), "var": np.ones(3)}
    given = freeze(variables["batch_stats"]) if frozen_dict else variables["batch_stats"]
    for momentum in (None, 0.25):
        found = update_from_batch_moments(given, merged, momentum=momentum)
        expected = {f"at_{own}": stats_by_hand([x], momentum or own) for own in (0.5, 0.9)}
        expected |= {"frozen": kept}
        close(found, freeze(expected) if frozen_dict else expected)


def test_population_statistics_of_frozen_layers():
    """A tree like `batch_stats`, with which evaluation runs."""
    x = [data((8, 3), seed) for seed in (0, 1)]
    variables = Hybrid().init(jax.random.key(0), x[0])
    variables["batch_stats"]["frozen"] = {"mean": jnp.full(3, 7.0), "var": jnp.full(3, 2.0)}
    stats = population_batch_stats(gathering(Hybrid()), variables, x)
    assert signature(stats) == signature(variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, stats["frozen"], variables["batch_stats"]["frozen"])
    mean = np.concatenate(x).mean(0)
    np.testing.assert_allclose(stats["at_0.5"]["mean"], mean, rtol=1e-5)
    *_, frozen = Hybrid().apply({**variables, "batch_stats": stats}, x[0])
    np.testing.assert_allclose(frozen, (x[0] - 7) / np.sqrt(2 + 1e-5), rtol=1e-5)


def test_found_where_flax_is_looked_for():
    """`capture_intermediates` by class, and a tree of calls that has nothing but Flax's."""
    x, found = data((8, 3)), []
    for layer in (BatchNorm, nn.BatchNorm):
        net = Net(layer)
        variables = net.init(jax.random.key(0), x, True)
        _, new = net.apply(
            variables,
            x,
            True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, nn.BatchNorm),
        )
        found.append(new["intermediates"])
    close(*found, tolerance=1e-4)
    assert set(found[0]) == {"BatchNorm_0", "BatchNorm_1"}


# The three ways in which models say it.
MODEL = """
from functools import partial
from typing import Any

import flax.linen as nn

class Model(nn.Module):
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        return [norm()(x), self.norm(use_running_average=False)(x), nn.BatchNorm(False)(x)]
"""


def test_put_into_code_that_names_flax(monkeypatch):
    """`nn.BatchNorm = BatchNorm` before the model's code is imported reaches all three."""
    x, used = data((8, 3)), []
    monkeypatch.setattr(nn, "BatchNorm", BatchNorm)
    namespace = {"__name__": "model"}
    exec(MODEL, namespace)

    def spy(call, args, kwargs, context):
        used.append(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(spy):
        namespace["Model"]().init(jax.random.key(0), x)
    assert used[1:] == [BatchNorm] * 3


@pytest.mark.parametrize("value", [False, True, None])
def test_subclass_with_fields_of_its_own(value):
    """`frozen: bool` and `group_size: int = 0`, as models have them."""

    class Mine(BatchNorm):
        group_size: int = 0
        frozen: bool = False

    x = data((8, 3))
    _, stats = linen_step(Mine, x, frozen=value)
    kept = {"mean": np.zeros(3), "var": np.ones(3)}
    close(stats, kept if value else stats_by_hand([x], 0.99))


def test_initialized_with_one_example_without_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(sys.modules["bn_research.normalization.batch_norm"], "_warned", set())
    net, x = Net(BatchNorm), data((1, 3))
    variables = net.init(jax.random.key(0), x, True)
    assert not caplog.records
    net.apply(variables, x, True, mutable=["batch_stats"])
    jax.effects_barrier()
    assert "1 value" in caplog.text and __file__ in caplog.text
