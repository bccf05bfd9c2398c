"""Both layers under JAX's and Flax's transformations, against batch norm spelled out in float64.

What is compared is a loss of the output and of the new running statistics, so that the gradient
that they carry is seen, too. Devices are the first axis of x; the reference has no devices.
"""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_layers import APIS, KEY, linen_step
from devices import spread
from flax import nnx
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx

DEVICES, FEATURES, MOMENTUM = 2, 3, 0.9
PARAMS = {"scale": np.float32([1.5, -2, 0.5]), "bias": np.float32([0.1, 0.2, -3])}
STATS = {"mean": np.float32([0.5, 1, -1]), "var": np.float32([1, 2, 3])}
WEIGHT = np.random.default_rng(9).standard_normal((2, FEATURES)).astype(np.float32)


def data(shape, seed=0):
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (2 * noise + 1 + np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1))).astype(
        np.float32
    )


LAYERS = {name: functools.partial(api.own, momentum=MOMENTUM) for name, api in APIS.items()}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def loss_of(y, stats, g):
    """Of one device; nothing in it is symmetric in the examples or linear in y."""
    on_stats = jnp.sum(WEIGHT[0] * stats["mean"] ** 2 + WEIGHT[1] * stats["var"] ** 2)
    return jnp.sum(g * y**3) + 7 * on_stats


def spelled_out(params, stats, x, where=None, epsilon=1e-5):
    """Batch norm of all axes but the last, as anyone would write it."""
    axes = tuple(range(x.ndim - 1))
    where = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    mean = jnp.mean(x, axes, where=where)
    var = jnp.mean((x - mean) ** 2, axes, where=where)
    y = (x - mean) / jnp.sqrt(var + epsilon) * params["scale"] + params["bias"]
    new = (MOMENTUM * stats[k] + (1 - MOMENTUM) * v for k, v in (("mean", mean), ("var", var)))
    return jnp.where(where, y, params["bias"]), dict(zip(("mean", "var"), new, strict=True))


def reference(loss, *args, **options):
    """Value and gradient in float64."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), args)
        found = jax.jit(jax.value_and_grad(loss, tuple(range(len(args)))))(*args)
        return jax.tree.map(np.asarray, found)


def close(found, expected, tolerance=1e-4):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = np.abs(theirs).max() + 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * size)


def vmapped(f):
    return jax.vmap(f, (None, None, 0, 0), axis_name="b")


def in_scan(f):
    def run(params, stats, x, g):
        def step(total, xg):
            return total + vmapped(f)(params, stats, *xg), None

        return jax.lax.scan(step, jnp.zeros(DEVICES), (x[None], g[None]))[0]

    return run


def in_cond(f):
    def run(*args):
        return jax.lax.cond(args[2][0, 0, 0] < 99, vmapped(f), lambda *_: jnp.zeros(DEVICES), *args)

    return run


def in_shard_map(f, axes=("d",), check_vma=True):
    """The devices are those of a mesh; with two axes the second one is vmap's."""
    mesh, P = Mesh(np.array(jax.devices()[:DEVICES]), ("d",)), PartitionSpec

    def local(params, stats, x, g):
        if len(axes) == 1:
            return f(params, stats, x[0], g[0])[None]
        parts = [v[0].reshape(2, -1, v.shape[-1]) for v in (x, g)]
        inner = jax.vmap(f, (None, None, 0, 0), axis_name="b")
        return jnp.sum(inner(params, stats, *parts))[None]

    specs = (P(), P(), P("d"), P("d"))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma)


# The axis over which a layer shares, and the function of all devices.
WRAPPERS = {
    "vmap": ("b", vmapped),
    "jit of vmap": ("b", lambda f: jax.jit(vmapped(f))),
    "checkpoint of vmap": ("b", lambda f: jax.checkpoint(vmapped(f))),
    "scan of vmap": ("b", in_scan),
    "cond of vmap": ("b", in_cond),
    "vmap of jit": ("b", lambda f: vmapped(jax.jit(f))),
    "pmap": ("b", lambda f: jax.pmap(f, "b", in_axes=(None, None, 0, 0))),
    "shard_map": ("d", in_shard_map),
    # JAX cannot sum over a vmapped axis with check_vma.
    "shard_map of vmap": (
        ("d", "b"),
        functools.partial(in_shard_map, axes=("d", "b"), check_vma=False),
    ),
}


@functools.cache
def truth_over_devices(copies, masked):
    """Value and gradient of the loss, when so many devices share one batch."""
    x, g, where = devices_batch(masked)

    def loss(params, stats, x):
        rows = None if where is None else where.reshape(-1, 1)
        y, new = spelled_out(params, stats, x.reshape(-1, FEATURES), rows)
        return loss_of(y, new, g.reshape(y.shape)) + (copies - 1) * loss_of(y, new, 0)

    return reference(loss, PARAMS, STATS, x)


def devices_batch(masked):
    x, g = data((DEVICES, 4, FEATURES)), data((DEVICES, 4, FEATURES), 1)
    return x, g, np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool)[..., None] if masked else None


@each_layer
@pytest.mark.parametrize(
    ("wrapper", "masked"), [*((name, False) for name in WRAPPERS), ("jit of vmap", True)]
)
def test_gradient_outside_of_a_transformation(layer, wrapper, masked):
    """Reverse mode in every argument, and forward mode along a direction, outside of it."""
    x, g, where = devices_batch(masked)
    axis_name, wrap = WRAPPERS[wrapper]

    def one(params, stats, x, g):
        mask = ~jnp.isnan(x[:, :1]) if masked else None
        y, new = layer(x, mask, params, stats, axis_name=axis_name)
        return loss_of(y, new, g)

    def total(params, stats, x):
        return jnp.sum(wrap(one)(params, stats, x, g))

    @jax.jit
    def run(args, direction):
        return jax.value_and_grad(total, (0, 1, 2))(*args), jax.jvp(total, args, direction)[1]

    value, expected = truth_over_devices(4 if wrapper == "shard_map of vmap" else 2, masked)
    given = x if where is None else np.where(where, x, np.float32(np.nan))
    direction = jax.tree.map(lambda leaf: data(leaf.shape, 5), (PARAMS, STATS, x))
    found, slope = run((PARAMS, STATS, given), direction)
    close(found, (value, expected))
    pairs = zip(*map(jax.tree.leaves, (expected, direction)), strict=True)
    products = [np.sum(a * b) for a, b in pairs]
    np.testing.assert_allclose(slope, sum(products), atol=1e-4 * np.abs(products).max())


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit])
def test_flax_transformation_of_nn_vmap(wrap):
    """`nn.remat` and `nn.jit` of `nn.vmap`; the gradient is taken outside."""
    x, g, _ = devices_batch(False)
    options = dict(axis_name="b", use_running_average=False, momentum=MOMENTUM)
    axes = {"params": None, "batch_stats": None}
    layer = wrap(nn.vmap(linen.BatchNorm, variable_axes=axes, axis_name="b"))(**options)

    def total(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return loss_of(y, new["batch_stats"], g) + loss_of(0 * y, new["batch_stats"], g)

    found = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(PARAMS, STATS, x)
    close(found, truth_over_devices(2, False))


@pytest.mark.parametrize("wrap", [nnx.jit, nnx.remat, lambda f: f])
def test_nnx_grad_of_nnx_vmap(wrap):
    """`nnx.grad` of a transformation of `nnx.vmap`; the layer is one of all devices."""
    x, g, _ = devices_batch(False)
    layer = own_nnx.BatchNorm(FEATURES, axis_name="b", momentum=MOMENTUM, rngs=nnx.Rngs(0))
    for name, value in {**PARAMS, **STATS}.items():
        getattr(layer, name).set_value(jnp.asarray(value))
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: None})

    @wrap
    @functools.partial(nnx.vmap, in_axes=(axes, 0), axis_name="b")
    def forward(layer, x):
        return layer(x)

    def total(layer, x):
        y = forward(layer, x)
        return jnp.sum(g * y**3)

    found, dx = nnx.jit(nnx.grad(total, argnums=(0, 1)))(layer, x)

    def truth(params, x):
        y, _ = spelled_out(params, STATS, x.reshape(-1, FEATURES))
        return jnp.sum(g.reshape(y.shape) * y**3)

    _, expected = reference(truth, PARAMS, x)
    close(({name: found[name][...] for name in PARAMS}, dx), expected)
    flat = x.reshape(-1, FEATURES).astype(np.float64)
    new = MOMENTUM * STATS["mean"] + (1 - MOMENTUM) * flat.mean(0)
    np.testing.assert_allclose(layer.mean[...], new, rtol=1e-5)


@each_layer
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("masked", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)])
def test_strict_promotion(strict_arrays, layer, train, masked, dtype):
    """Values, statistics and gradients, in training and inference."""
    x, mask = data((4, 2, FEATURES)), np.array([[1, 0]], bool)[..., None] if masked else None
    x = x.astype(dtype)
    kept = jax.tree.map(lambda leaf: leaf.astype(dtype), STATS)  # exact in bfloat16

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, new = layer(x, mask, params, kept, train=train)
            return jnp.sum(y * y), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    gradient, (y, new) = run(PARAMS, x)
    assert y.dtype == jnp.float32 and gradient[1].dtype == dtype
    x = np.asarray(x, np.float64)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        truth, stats = spelled_out(PARAMS, STATS, x, mask)
    if not train:
        scaled = (x - STATS["mean"]) / np.sqrt(STATS["var"] + 1e-5) * PARAMS["scale"]
        truth = np.where(True if mask is None else mask, scaled, 0) + PARAMS["bias"]
        stats = STATS
    close((y, new["mean"], new["var"]), (truth, stats["mean"], stats["var"]))
    np.testing.assert_allclose(gradient[0]["bias"], 2 * np.sum(truth, (0, 1)), rtol=1e-3)


def test_strict_promotion_of_frozen_layers(strict_arrays):
    x = data((4, FEATURES)).astype(jnp.bfloat16)
    y, new = LAYERS["linen"](x, None, PARAMS, STATS, frozen=True)
    layer = own_nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.State({**PARAMS, **STATS}))
    layer.frozen = True
    centred = np.asarray(x, np.float64) - STATS["mean"]
    expected = centred / np.sqrt(STATS["var"] + 1e-5) * PARAMS["scale"] + PARAMS["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new, STATS)


@each_layer
@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
@pytest.mark.parametrize("masked", [False, True])
def test_explicitly_sharded_features_and_examples(layer, spec, masked):
    """The shardings of output, gradient and statistics follow from those that are given."""
    x, g = data((8, 4)), data((8, 4), 1)
    mask = np.arange(8)[:, None] % 3 > 0 if masked else None
    params = {"scale": np.float32([1, 2, 3, -4]), "bias": np.zeros(4, np.float32)}
    stats = {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def put(tree, spec):
            return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

        def loss(params, stats, x):
            y, new = layer(x, mask, params, stats)
            return jnp.sum(put_inside(g, y) * y), (y, new)

        def put_inside(value, like):
            return jax.sharding.reshard(value, jax.typeof(like).sharding.spec)

        features = spec[1:]
        args = put(params, features), put(stats, features), put(x, spec)
        run = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
        (_, (y, new)), gradient = run(*args)
        assert {leaf.sharding.spec for leaf in (y, gradient[1])} == {PartitionSpec(*spec)}
        assert {leaf.sharding.spec for leaf in new.values()} == {PartitionSpec(*features)}

    def truth(params, x):
        y, new = spelled_out(params, stats, x, mask)
        return jnp.sum(g * y)

    _, expected = reference(truth, params, x)
    close(gradient, expected)
    _, expected = spelled_out(params, stats, x.astype(np.float64), mask)
    close(new, expected)


@each_layer
@pytest.mark.parametrize("dims", [(), (2,)])
def test_exported_with_a_symbolic_batch(layer, dims):
    """One program of a training step for every size of batch, gradient included."""

    def loss(params, stats, x):
        y, new = layer(x, None, params, stats)
        return jnp.sum(y**3), (y, new)

    size = export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((*size, *dims, FEATURES), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
    program = export.export(step)(PARAMS, STATS, shape)
    for batch in (3, 40):
        x = data((batch, *dims, FEATURES), batch)
        (value, (y, new)), gradient = program.call(PARAMS, STATS, x)

        def truth(params, x):
            return jnp.sum(spelled_out(params, STATS, x)[0] ** 3)

        close((value, gradient), reference(truth, PARAMS, x))
        close((y, new), spelled_out(PARAMS, STATS, x.astype(np.float64)))


CALLER = linen_step.__code__.co_filename
ONE = np.ones((2, 1, FEATURES), np.float32)  # two devices or steps, one value of each feature


@pytest.fixture
def told(caplog, monkeypatch):
    """What the log is told of a single value while something runs, as if for the first time."""

    def run_and_read(run):
        monkeypatch.setattr(sys.modules["bn_research.normalization.batch_norm"], "_warned", set())
        caplog.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        found = [r.getMessage() for r in caplog.records if r.name == "bn_research"]
        assert all("1 value(s) per feature" in line and CALLER in line for line in found)
        return found

    return run_and_read


@each_layer
@pytest.mark.parametrize(
    "program",
    [
        lambda f: f(ONE[0]),
        lambda f: jax.jit(f)(ONE[0]),
        lambda f: jax.grad(lambda x: f(x).sum())(ONE[0]),
        lambda f: jax.jit(jax.grad(lambda x: f(x).sum()))(ONE[0]),
        lambda f: jax.grad(jax.checkpoint(lambda x: f(x).sum()))(ONE[0]),
        lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0, ONE),
        lambda f: jax.vmap(f)(ONE),
        lambda f: jax.pmap(f)(ONE),
        lambda f: spread("shard_map", f, 2)(ONE),
    ],
)
def test_a_single_value_is_told_where_numbers_are_computed(layer, program, told):
    """Once, with the line that called; however often the program runs."""

    def f(x):
        return layer(x, None, PARAMS, STATS)[0]

    run = functools.partial(program, f)
    assert len(told(lambda: [run(), run()])) == 1


@each_layer
def test_a_single_value_is_no_matter_where_nothing_is_computed(layer, told):
    """Nor does a mask count, which is data, nor inference, nor devices that have two together."""

    def f(x, **options):
        return layer(x, params=PARAMS, stats=STATS, **options)[0]

    x = ONE[0]
    for quiet in (
        lambda: jax.eval_shape(f, x) and None,
        lambda: jax.make_jaxpr(f)(x) and None,
        lambda: jax.jit(f).lower(x).compile() and None,
        lambda: f(np.ones((4, FEATURES)), mask=np.arange(4)[:, None] < 1),
        lambda: f(x, train=False),
        lambda: jax.vmap(functools.partial(f, axis_name="b"), axis_name="b")(ONE),
        lambda: linen.BatchNorm(use_running_average=False).init(KEY, x),
        lambda: linen.BatchNorm(use_running_average=False).tabulate(KEY, x) and None,
        lambda: (
            nnx.eval_shape(
                lambda layer, x: layer(x), own_nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)), x
            )
            and None
        ),
    ):
        assert not told(quiet)


@each_layer
def test_gradient_of_complex_input(layer):
    """By complex128; what JAX calls the gradient of a real loss."""
    x = (data((6, FEATURES)) + 1j * data((6, FEATURES), 1)).astype(np.complex64)
    g = data((6, FEATURES), 2) - 1j * data((6, FEATURES), 3)

    def loss(y, new):
        return jnp.sum(jnp.abs(g * y - 1) ** 2) + jnp.sum(jnp.abs(new["mean"]) ** 2 + new["var"])

    def spelled(x):
        mean = jnp.mean(x, 0)
        var = jnp.mean(jnp.abs(x - mean) ** 2, 0)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * PARAMS["scale"] + PARAMS["bias"]
        stats = {"mean": 0.9 * STATS["mean"] + 0.1 * mean, "var": 0.9 * STATS["var"] + 0.1 * var}
        return loss(y, stats)

    found = jax.jit(jax.value_and_grad(lambda x: loss(*layer(x, None, PARAMS, STATS))))(x)
    with jax.enable_x64(True):
        expected = jax.value_and_grad(spelled)(jnp.asarray(x, jnp.complex128))
    close(found, expected)
