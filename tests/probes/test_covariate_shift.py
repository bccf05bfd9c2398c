"""Tests of bn_research.probes.covariate_shift: closed forms, numpy in float64, differences."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_research.layers.linen import BatchNorm as LinenBatchNorm
from bn_research.layers.nnx import BatchNorm as NnxBatchNorm
from bn_research.normalization.batch_norm import batch_norm
from bn_research.probes.angular_updates import angular_update
from bn_research.probes.covariate_shift import (
    distribution_drift,
    gradient_noise,
    gradient_shift,
    layers_of,
    percentile_distance,
    percentiles,
)
from bn_research.probes.curvature import hessian_top_eigenvalues
from bn_research.probes.one_device import on_one_device
from bn_research.probes.scale_invariance import audit
from bn_research.probes.step_direction import loss_along_step

LEVELS = (15, 50, 85)

# --- of the distribution ---


@pytest.mark.parametrize("shape", [(37, 4), (6, 3, 5, 4)])
def test_percentiles_are_those_of_numpy(shape):
    """Over examples and positions, inside jit."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * [1, 10, 1e-20, 1e4]
    found = jax.jit(percentiles)(jnp.float32(x))
    expected = np.percentile(np.float64(np.float32(x)).reshape(-1, 4), LEVELS, axis=0)
    assert found.shape == (3, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_percentiles_of_other_levels_and_dtypes():
    x = np.random.default_rng(0).standard_normal((20, 3))
    with jax.enable_x64(True):
        found = percentiles(jnp.asarray(x), levels=(0, 2.5, 100))
        np.testing.assert_allclose(found, np.percentile(x, (0, 2.5, 100), axis=0), rtol=1e-12)
    half = jnp.asarray(x, jnp.bfloat16)
    expected = np.percentile(np.float64(half), LEVELS, axis=0)
    np.testing.assert_allclose(percentiles(half), expected, rtol=1e-5)  # not rounded to bfloat16
    assert np.isnan(percentiles(jnp.asarray(x).at[3, 1].set(jnp.nan))[:, 1]).all()


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((3, 2), int), {}, "x has dtype int"),
        (np.ones(3), {}, r"x has shape \(3,\)"),
        (np.ones((0, 3)), {}, r"x has shape \(0, 3\)"),
        (np.ones((3, 2)), dict(levels=()), "levels"),
        (np.ones((3, 2)), dict(levels=(-1, 50)), r"levels=\(-1, 50\)"),
        (np.ones((3, 2)), dict(levels=(50, 101)), "levels"),
        (np.ones((3, 2)), dict(levels=(50, 15)), "ascending"),
        (np.ones((3, 2)), dict(levels=(50, math.nan)), "levels"),
    ],
)
def test_percentiles_of_what_is_not_allowed(x, options, message):
    with pytest.raises(ValueError, match=message):
        percentiles(x, **options)


def wandering(times=5, units=3, seed=0):
    """Percentiles that move about, float64."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.standard_normal((times, 3, units)), axis=1)


def test_nothing_moves():
    p = np.repeat(wandering(times=1), 4, axis=0)
    drift = distribution_drift(p)
    assert drift.movement.shape == (3, 3)
    for field in drift:
        assert not np.any(field)


def test_drift_by_its_definition():
    """Written out for every unit and interval."""
    p = wandering()
    drift = distribution_drift(p)

    def distance(a, b):
        width = ((a[2] - a[0]) + (b[2] - b[0])) / 2
        return sum(abs(b[level] - a[level]) for level in range(3)) / 3 / width

    for unit in range(3):
        u = p[:, :, unit]
        steps = [distance(u[t], u[t + 1]) for t in range(4)]
        np.testing.assert_allclose(drift.movement[:, unit], steps, rtol=1e-12)
        assert drift.path[unit] == pytest.approx(sum(steps), rel=1e-12)
        assert drift.net[unit] == pytest.approx(distance(u[0], u[-1]), rel=1e-12)
    assert not drift.constant.any()


def test_a_shift_by_one_range_per_time_is_one_per_time():
    base = np.array([[-2.0], [0.5], [3.0]])
    p = np.stack([base + 5.0 * time for time in range(6)]).astype(np.float32)
    drift = distribution_drift(p)
    np.testing.assert_allclose(drift.movement, 1, rtol=1e-7)
    assert drift.path[0] == pytest.approx(5) and drift.net[0] == pytest.approx(5)


def test_there_and_back_has_a_path_and_no_displacement():
    p = wandering(times=2)
    drift = distribution_drift(np.stack([p[0], p[1], p[0]]))
    np.testing.assert_allclose(drift.path, 2 * percentile_distance(p[0], p[1]))
    assert not drift.net.any()


@pytest.mark.parametrize("slope", [1e-15, 3.0, 1e15, -2.0])
def test_an_affine_map_of_the_unit_changes_nothing(slope):
    p = wandering()
    mapped = slope * (p if slope > 0 else p[:, ::-1]) + slope * np.array([0.0, -7.0, 40.0])
    for found, expected in zip(distribution_drift(mapped), distribution_drift(p), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_width_alone_counts_two_thirds_at_most():
    narrow = np.array([[-1.0], [0.0], [1.0]])
    assert percentile_distance(narrow, 1e9 * narrow)[0] == pytest.approx(2 / 3)
    assert percentile_distance(narrow, 3 * narrow)[0] == pytest.approx(4 / 3 / 4)


@pytest.mark.filterwarnings("error")
def test_units_without_width_are_marked_and_never_nan():
    """One that stays, one that moves, one that is born, one that lives; one that overflows."""
    p = np.zeros((3, 3, 5))
    p[:, :, 1] = np.arange(3.0)[:, None]
    p[1:, :, 2] = p[:, :, 3] = p[:, :, 4] = [-1, 0, 1]
    p[2, :, 4] = np.inf
    drift = distribution_drift(p)
    np.testing.assert_array_equal(drift.constant, [True, True, True, False, True])
    np.testing.assert_allclose(drift.path, [0, np.inf, 2 / 3, 0, np.nan])
    np.testing.assert_allclose(drift.net, [0, np.inf, 2 / 3, 0, np.nan])


def test_noise_floor_of_halves():
    """Two samples of one distribution are apart by what the law of quantiles says."""
    x = np.random.default_rng(0).standard_normal((2, 400, 300)).astype(np.float32)
    halves = [np.asarray(percentiles(half)) for half in x]
    floor = percentile_distance(*halves)
    z = 1.0364333894937898  # of the 85th percentile
    variance = {15: 0.1275, 50: 0.25, 85: 0.1275}
    density = {15: math.exp(-z * z / 2), 50: 1.0, 85: math.exp(-z * z / 2)}
    stds = [math.sqrt(2 * math.pi * variance[q] / 400) / density[q] for q in LEVELS]
    expected = np.mean(stds) * math.sqrt(2) * math.sqrt(2 / math.pi) / (2 * z)
    assert floor.shape == (300,)
    assert floor.mean() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (wandering(times=1), "2 times or more"),
        (wandering()[0], r"shape \(3, 3\)"),
        (wandering()[:, :1], "2 levels or more"),
        (wandering()[:, ::-1], "must ascend"),
        (np.zeros((3, 3, 2), int), "has dtype int"),
    ],
)
def test_drift_of_what_is_not_allowed(p, message):
    with pytest.raises(ValueError, match=message):
        distribution_drift(p)


def test_distance_of_two_shapes():
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(3, 2\)"):
        percentile_distance(wandering()[0], wandering(units=2)[0])


# --- of the gradient ---


def relations(g, other):
    """What GradientShift says, of two lists of arrays."""
    g, other = (np.concatenate([np.float64(x).ravel() for x in xs]) for xs in (g, other))
    norm, absolute = np.linalg.norm(g), np.linalg.norm(g - other)
    return absolute / norm, absolute, g @ other / norm / np.linalg.norm(other), norm


def assert_shift(found, expected, **tolerance):
    """Expected: for each layer what `relations` gives."""
    for field, values in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(field, values, **tolerance)


def linear(seed=0):
    """A deep linear network of three layers before and after a step, float64, with its data."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 3), "b": (3, 5), "c": (5, 2)}
    old = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    new = {name: w + 0.3 * rng.standard_normal(w.shape) for name, w in old.items()}
    x, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 2))

    def loss(params):
        error = x @ params["a"] @ params["b"] @ params["c"] - y
        return jnp.sum(error**2) / 12

    return loss, old, new, x, y


def test_deep_linear_network_in_closed_form():
    loss, old, new, x, y = linear()
    (a, b, c), (a_new, b_new, _) = old.values(), new.values()

    def b_gradient(a):
        return (x @ a).T @ (x @ a @ b @ c - y) @ c.T / 6

    def c_gradient(a, b):
        return (x @ a @ b).T @ (x @ a @ b @ c - y) / 6

    g_a = x.T @ (x @ a @ b @ c - y) @ c.T @ b.T / 6
    expected = [
        relations([g_a], [g_a]),  # nothing below
        relations([b_gradient(a)], [b_gradient(a_new)]),
        relations([c_gradient(a, b)], [c_gradient(a_new, b_new)]),
    ]
    with jax.enable_x64(True):
        layers = ["['a']", "['b']", "['c']"]
        found = gradient_shift(loss, old, new, layers)
        assert_shift(found, expected, rtol=1e-11)
        assert found.relative[0] == 0 and found.absolute[0] == 0
        jitted = jax.jit(lambda old, new: gradient_shift(loss, old, new, layers))(old, new)
        for one, other in zip(jitted, found, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12)


def normalized(seed=0, dtype=np.float64):
    """Two hidden layers with BN, sigmoid and a softmax: params before and after, and losses."""
    rng = np.random.default_rng(seed)

    def block(fan_in, units):
        return (
            {"kernel": rng.standard_normal((fan_in, units)), "bias": rng.standard_normal(units)},
            {"scale": 1 + 0.3 * rng.standard_normal(units), "bias": rng.standard_normal(units)},
        )

    old: dict = {}
    old["dense1"], old["norm1"] = block(4, 3)
    old["dense2"], old["norm2"] = block(3, 3)
    old["dense3"], _ = block(3, 3)
    old = jax.tree.map(dtype, old)
    new = jax.tree.map(lambda w: dtype(w + 0.2 * rng.standard_normal(w.shape)), old)
    x, labels = dtype(rng.standard_normal((2, 8, 4))), rng.integers(0, 3, (2, 8))

    def loss_of(batch):
        def loss(params):
            h = x[batch]
            for i in (1, 2):
                h = h @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
                h = batch_norm(h, *(params[f"norm{i}"][name] for name in ("scale", "bias")))[0]
                h = jax.nn.sigmoid(h)
            logits = h @ params["dense3"]["kernel"] + params["dense3"]["bias"]
            return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(8), labels[batch]])

        return loss

    def loss_in_numpy(params):
        h = x[0]
        for i in (1, 2):
            h = h @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"]
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
            h = h * params[f"norm{i}"]["scale"] + params[f"norm{i}"]["bias"]
            h = 1 / (1 + np.exp(-h))
        logits = h @ params["dense3"]["kernel"] + params["dense3"]["bias"]
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -np.mean(log_p[np.arange(8), labels[0]])

    return old, new, loss_of(0), loss_of(1), loss_in_numpy


MEMBERS = [("dense1", "norm1"), ("dense2", "norm2"), ("dense3",)]
LAYERS = [tuple(f"['{name}']" for name in names) for names in MEMBERS]


def mixed(old, new, layer):
    """Layers below the given one after the step, all others before it."""
    below = [name for names in MEMBERS[:layer] for name in names]
    return {name: (new if name in below else old)[name] for name in old}


def test_network_with_bn_by_finite_differences():
    """In numpy: BN by batch statistics of the mixed parameters, its scale and bias in the layer."""
    old, new, loss, _, loss_in_numpy = normalized()

    def gradient(params, names):
        parts = []
        for name in names:
            for leaf in params[name]:
                slope = np.zeros(params[name][leaf].size)
                for j in range(slope.size):
                    values = []
                    for step in (1e-5, -1e-5):
                        moved = params[name][leaf].copy()
                        moved.flat[j] += step
                        at = {**params, name: {**params[name], leaf: moved}}
                        values.append(loss_in_numpy(at))
                    slope[j] = (values[0] - values[1]) / 2e-5
                parts.append(slope)
        return parts

    expected = [
        relations(gradient(old, names), gradient(mixed(old, new, i), names))
        for i, names in enumerate(MEMBERS)
    ]
    with jax.enable_x64(True):
        found = jax.jit(lambda old, new: gradient_shift(loss, old, new, LAYERS))(old, new)
    assert_shift(found, expected, rtol=1e-7, atol=1e-9)
    assert np.all(np.asarray(found.relative)[1:] > 0.05)  # there is something to be wrong about


def test_network_with_bn_by_gradients_of_params_mixed_by_hand():
    """In float32; paths of leaves instead of prefixes, in another order than the tree's."""
    old, new, loss, _, _ = normalized(seed=1, dtype=np.float32)
    gradient = jax.jit(jax.grad(loss))
    whole = gradient(old)
    expected = []
    for i, names in enumerate(MEMBERS):
        other = gradient(mixed(old, new, i))
        expected.append(
            relations(*(jax.tree.leaves([g[name] for name in names]) for g in (whole, other)))
        )
    layers = [
        [f"['{name}']['{leaf}']" for name in names for leaf in old[name]] for names in MEMBERS
    ]
    found = jax.jit(lambda old, new: gradient_shift(loss, old, new, layers))(old, new)
    assert found.relative.dtype == jnp.float32 and found.relative.shape == (3,)
    assert_shift(found, expected, rtol=2e-5, atol=1e-6)

    # Layers below that stay shift nothing, whatever the layer itself and those above do.
    top = {**new, "dense1": old["dense1"], "norm1": old["norm1"]}
    still = jax.jit(lambda old, new: gradient_shift(loss, old, new, layers))(old, top)
    np.testing.assert_array_equal([still.absolute[0], still.relative[0]], 0)
    np.testing.assert_allclose([still.absolute[1], still.relative[1]], 0, atol=1e-7)
    np.testing.assert_allclose(still.cosine[:2], 1, rtol=1e-6)
    assert still.absolute[2] > 0


def test_norm_of_a_layer_moves_with_it():
    """BN's scale alone: it shifts the layers above and not its own."""
    old, new, loss, _, _ = normalized(dtype=np.float32)
    moved = {**old, "norm2": new["norm2"]}
    found = gradient_shift(loss, old, moved, LAYERS)
    np.testing.assert_allclose(found.absolute[:2], 0, atol=1e-7)
    assert found.relative[2] > 0.01


def test_noise_is_the_distance_between_gradients_of_two_batches():
    old, _, loss, other, _ = normalized()
    with jax.enable_x64(True):
        a, b = (jax.jit(jax.grad(each))(old) for each in (loss, other))
        expected = [
            relations(*(jax.tree.leaves([g[name] for name in names]) for g in (a, b)))
            for names in MEMBERS
        ]
        found = jax.jit(lambda old: gradient_noise(loss, other, old, LAYERS))(old)
        same = jax.jit(lambda old: gradient_noise(loss, loss, old, LAYERS))(old)
    assert_shift(found, expected, rtol=1e-11)
    np.testing.assert_array_equal(same.relative, 0)
    np.testing.assert_allclose(same.cosine, 1, rtol=1e-12)


def test_noise_has_twice_the_variance_of_a_batch():
    """Gradients ⟨x⟩ of batches of 5 examples, x of unit variance in 3 dimensions; by vmap."""
    x = jax.random.normal(jax.random.key(0), (4000, 2, 5, 3))

    def noise(x):
        losses = [lambda w, batch=batch: jnp.mean(batch @ w) for batch in x]
        return gradient_noise(*losses, jnp.zeros(3), [""]).absolute

    assert jnp.mean(jax.vmap(noise)(x) ** 2) == pytest.approx(2 * 3 / 5, rel=0.05)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20])
def test_gradients_of_any_size(size):
    """Squares of them leave float32."""
    g, other = np.float32([3, 4]) * np.float32(size), np.float32([4, 3]) * np.float32(size)
    found = gradient_noise(lambda w: jnp.vdot(g, w), lambda w: jnp.vdot(other, w), g, [""])
    np.testing.assert_allclose(found.norm, 5 * size, rtol=1e-6)
    np.testing.assert_allclose(found.absolute, math.sqrt(2) * size, rtol=1e-6)
    np.testing.assert_allclose(found.relative, math.sqrt(2) / 5, rtol=1e-6)
    np.testing.assert_allclose(found.cosine, 24 / 25, rtol=1e-6)


@pytest.mark.parametrize(
    ("g", "other", "relative", "cosine"),
    [
        (0.0, 0.0, 0.0, 1.0),
        (0.0, 2.0, math.inf, 0.0),
        (2.0, 0.0, 1.0, 0.0),
        (2.0, -2.0, 2.0, -1.0),
        (1e-30, 1.0, 1e30, 1.0),
        (1.0, math.nan, math.nan, math.nan),
    ],
)
def test_gradients_of_zero(g, other, relative, cosine):
    found = gradient_noise(lambda w: g * w, lambda w: other * w, jnp.ones(()), [""])
    np.testing.assert_allclose(found.relative, relative, rtol=1e-6)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-6)


ONES = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "b": jnp.ones(3)}
BOTH = ["['a']", "['b']"]


@pytest.mark.parametrize(
    ("params", "new_params", "layers", "message"),
    [
        (ONES, ONES, [], "layers is empty"),
        (ONES, ONES, [*BOTH, ()], "empty layer"),
        (ONES, ONES, [*BOTH, "['c']"], r"names \"\['c'\]\".*none of \['a'\]\['bias'\]"),
        (ONES, ONES, [*BOTH, "['a']['ker"], "holds none"),  # a path, not a string, has a prefix
        (ONES, ONES, [*BOTH, "['a']['bias']"], r"layers 0 and 2 both hold \['a'\]\['bias'\]"),
        (ONES, ONES, ["['a']['kernel']", "['b']"], r"hold no \['a'\]\['bias'\]"),
        (ONES, {"a": ONES["a"]}, BOTH, "new_params has leaves"),
        (ONES, {**ONES, "b": jnp.ones(4)}, BOTH, r"new_params\['b'\] is float32\[4\]"),
        (ONES, {**ONES, "b": jnp.ones(3, jnp.bfloat16)}, BOTH, "bfloat16"),
        ({**ONES, "b": jnp.ones(3, int)}, ONES, BOTH, r"params\['b'\] has dtype int"),
    ],
)
def test_layers_and_params_that_are_not_allowed(params, new_params, layers, message):
    with pytest.raises(ValueError, match=message):
        gradient_shift(lambda params: jnp.zeros(()), params, new_params, layers)


# --- layers by use, and on one device ---


class Synced(nn.Module):
    norm: type
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="z_first")(x)
        x = self.norm(use_running_average=False, axis_name=self.axis_name, name="norm")(x)
        return nn.Dense(3, name="a_head")(nn.relu(x))


class SyncedNnx(nnx.Module):
    def __init__(self, norm, axis_name, rngs):
        self.z_first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = norm(8, axis_name=axis_name, rngs=rngs)
        self.a_head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.a_head(nnx.relu(self.norm(self.z_first(x))))


BATCH = jax.random.normal(jax.random.key(5), (16, 5))
ORDER = ["['z_first']", "['norm']", "['a_head']"]


def linen_loss(norm, axis_name):
    model = Synced(norm, axis_name)
    variables = Synced(norm, None).init(jax.random.key(0), BATCH)

    def loss(params):
        out, _ = model.apply({**variables, "params": params}, BATCH, mutable=["batch_stats"])
        return jnp.mean(out**2)

    return loss, variables["params"]


def nnx_loss(norm, axis_name):
    graph, params, rest = nnx.split(SyncedNnx(norm, axis_name, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params):
        return jnp.mean(nnx.merge(graph, params, rest, copy=True)(BATCH) ** 2)

    return loss, params


@pytest.mark.parametrize(
    ("make", "norm"),
    [(linen_loss, LinenBatchNorm), (nnx_loss, NnxBatchNorm)],
)
def test_every_probe_of_a_loss_takes_a_model_with_an_axis(make, norm):
    """On one device, with the numbers of the model without an axis; and all layers by use."""
    synced, params = make(norm, "batch")
    alone, _ = make(norm, None)
    loss = on_one_device(synced, "batch")
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(alone)(params))
    step = jax.tree.map(jnp.subtract, stepped, params)
    assert layers_of(loss, params) == layers_of(alone, params) == ORDER
    key = jax.random.key(1)
    probes = {
        "shift": lambda loss: gradient_shift(loss, params, stepped).relative,
        "given": lambda loss: gradient_shift(loss, params, stepped, ORDER).relative,
        "noise": lambda loss: gradient_noise(loss, loss, params).norm,
        "surface": lambda loss: loss_along_step(loss, params, step).loss,
        "top": lambda loss: (
            hessian_top_eigenvalues(loss, params, num_iterations=4, key=key).largest
        ),
        "audit": lambda loss: [row.radial_share for row in audit(loss, params).values()],
    }
    values = {}
    for name, probe in probes.items():
        values[name] = np.asarray(probe(loss))
        np.testing.assert_allclose(values[name], probe(alone), rtol=2e-3, atol=1e-5, err_msg=name)
        with pytest.raises(ValueError, match=r"^loss_fn names the axis 'batch', which") as error:
            probe(synced)
        told = str(error.value)
        assert "\n" not in told and "on_one_device(loss_fn, 'batch')" in told
    np.testing.assert_array_equal(values["shift"], values["given"])
    kernels = [f"{p}['kernel']" + (".value" if make is nnx_loss else "") for p in ORDER[::2]]
    angles = angular_update(params, None, stepped, groups=kernels).angle
    assert np.all((angles > 0) & (angles < 1))
    assert audit(loss, params)[kernels[0]].kind == "invariant"


def test_layers_come_in_the_order_of_use_whatever_comes_before():
    """A cast of all leaves is no use of them; inside jit, scan and checkpoint they are found."""
    params = {name: {"w": jnp.eye(3) + i} for i, name in enumerate("dcab")}
    params["unused"] = jnp.ones(2)

    @jax.jit
    def loss(params):
        cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        x = jnp.ones((2, 3), jnp.bfloat16)
        for name in "bdac":
            x = jax.checkpoint(lambda x, w: jnp.tanh(x @ w.T))(x, cast[name]["w"])
        return x.sum().astype(jnp.float32)

    assert layers_of(loss, params) == ["['b']", "['d']", "['a']", "['c']", "['unused']"]
    assert layers_of(lambda w: jnp.sum(w**2), jnp.ones(3)) == [""]
