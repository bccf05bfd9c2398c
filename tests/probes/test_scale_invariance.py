"""Tests of the audit of scale invariance on functions whose answer is known in closed form."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from bn_research.layers.linen import BatchNorm
from bn_research.models import inception
from bn_research.models.cnn import CNN
from bn_research.models.inception import Inception
from bn_research.models.mlp import MLP
from bn_research.models.resnet import ResNet
from bn_research.normalization import batch_norm
from bn_research.probes.scale_invariance import audit

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (64, 6))
LABELS = jax.random.randint(jax.random.key(2), (64,), 0, 3)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(100 + seed), shape)


def bn(z):
    """Batch normalization in plain jnp, ε = 0."""
    z = z - z.mean(0)
    return z / jnp.sqrt((z**2).mean(0))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def invariant(found):
    return {path for path, row in found.items() if row.scale_invariant}


# --- plain jnp ---


def network(params, *, bias="none", hidden=bn):
    """Dense, bias (before BN, or inside: before a ReLU and BN), BN, ReLU, head."""
    z = X @ params["w"]
    if bias != "none":
        z = z + params["b"]
    if bias == "inside":
        z = jax.nn.relu(z)
    return cross_entropy(jax.nn.relu(hidden(z)) @ params["head"])


PARAMS = {"w": normal(6, 8), "b": normal(8, seed=1), "head": normal(8, 3, seed=2)}
W, B, HEAD = "['w']", "['b']", "['head']"


def test_a_bias_right_before_bn_has_no_effect():
    found = audit(functools.partial(network, bias="before"), PARAMS)
    assert invariant(found) == {W, B} and found.groups == ()
    assert found[W].kind == "invariant" and found[B].kind == "no effect"
    assert found.decay_sets_only_the_rate == (W,)


@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-6])
def test_a_bias_inside_makes_them_invariant_only_together(scale):
    """Of whatever size the bias is: one of zeros, which no factor changes, too."""
    params = {**PARAMS, "b": scale * PARAMS["b"]}
    found = audit(functools.partial(network, bias="inside"), params)
    if scale != 1e-6:  # then it is too small beside the weights for the kernel to tell
        assert invariant(found) == set()
        assert found.groups == ((B, W),)
    assert not found[B].scale_invariant and not found[HEAD].scale_invariant


def test_without_bn_nothing_is_invariant():
    found = audit(functools.partial(network, hidden=lambda z: z), PARAMS)
    assert HEAD in found and invariant(found) == {B}  # b is not used at all
    assert found[B].kind == "no effect" and found[B].gradient_norm == 0
    assert found.groups == () and found.decay_sets_only_the_rate == ()


def test_rows_are_numpys():
    found = audit(functools.partial(network, bias="inside"), PARAMS)
    loss, grads = jax.value_and_grad(functools.partial(network, bias="inside"))(PARAMS)
    assert list(found) == [B, HEAD, W] and len(found) == 3
    assert found.loss == pytest.approx(float(loss))
    for key, path in {"w": W, "b": B, "head": HEAD}.items():
        w, g = (np.float64(tree[key]).ravel() for tree in (PARAMS, grads))
        row = found[path]
        assert row.norm == pytest.approx(np.linalg.norm(w), rel=1e-5)
        assert row.gradient_norm == pytest.approx(np.linalg.norm(g), rel=1e-5)
        share = w @ g / np.linalg.norm(w) / np.linalg.norm(g)
        assert row.radial_share == pytest.approx(share, rel=1e-3, abs=1e-5)
        assert row.effective_learning_rate(0.1) == pytest.approx(0.1 / (w @ w), rel=1e-5)
        assert row.size == w.size


def test_a_tied_weight():
    """Invariant under two BN layers; not where it is also used without one, as in a decoder."""
    params = {"w": normal(6, 6), "head": normal(6, 3, seed=3)}

    def encode(params):
        h = jax.nn.relu(bn(X @ params["w"]))
        return jax.nn.relu(bn(h @ params["w"]))

    found = audit(lambda params: cross_entropy(encode(params) @ params["head"]), params)
    assert invariant(found) == {W}
    decoder = audit(lambda p: jnp.mean((encode(p) @ p["w"].T - X) ** 2), {"w": params["w"]})
    assert not decoder[W].scale_invariant


def test_a_penalty_in_the_loss_is_seen():
    found = audit(lambda p: network(p) + 0.01 * jnp.sum(p["w"] ** 2), PARAMS)
    assert not found[W].scale_invariant


def test_scale_and_bias_of_one_bn_in_front_of_the_next():
    params = {"gamma": normal(8) + 2, "beta": normal(8, seed=1), "w": normal(8, 5, seed=2)}
    params["head"] = normal(5, 3, seed=4)
    first = bn(X @ normal(6, 8, seed=5))

    def loss(p):
        h = jax.nn.relu(p["gamma"] * first + p["beta"])
        return cross_entropy(jax.nn.relu(bn(h @ p["w"])) @ p["head"])

    found = audit(loss, params)
    assert invariant(found) == {W}
    assert found.groups == (("['beta']", "['gamma']"),)


def test_everything_that_is_written_to_a_stream():
    params = {name: normal(6, 6, seed=i) for i, name in enumerate("abc")}
    params["head"] = normal(6, 3, seed=7)

    def loss(p):
        stream = X @ p["a"]
        for name in "bc":
            stream = stream + jax.nn.relu(bn(stream)) @ p[name]
        return cross_entropy(jax.nn.relu(bn(stream)) @ p["head"])

    found = audit(loss, params)
    assert found.groups == (("['a']", "['b']", "['c']"),) and invariant(found) == set()


# --- homogeneity ---


@pytest.mark.parametrize(("power", "sign"), [(1, 1), (2, 1), (3, -1), (-1, 1)])
def test_degree(power, sign):
    found = audit(
        lambda w: sign * jnp.linalg.norm(w) ** power, jnp.array([1.0, -2.0]), scales=(0.5, 2, 3)
    )
    assert list(found) == [""] and found[""].degree == pytest.approx(power, rel=1e-5)
    assert found[""].kind == "homogeneous" and not found[""].scale_invariant


def test_degrees_of_a_product():
    params = {"u": normal(3), "v": normal(3, seed=1)}
    found = audit(lambda p: jnp.sum(p["u"] ** 2) * jnp.sum(p["v"] ** 2) ** 2 + 0.0, params)
    assert [found[key].degree for key in found] == pytest.approx([2, 4], rel=1e-4)


def test_what_is_not_homogeneous_has_no_degree():
    found = audit(lambda w: jnp.sum(w**2) + 1, normal(3))
    assert math.isnan(found[""].degree)
    assert audit(lambda w: jnp.sum(w / jnp.linalg.norm(w)) + 3, normal(3))[""].degree == 0


def test_a_step_that_no_gradient_sees():
    def loss(p):
        norm = jnp.linalg.norm(p["w"])
        return jnp.floor(4 * norm) + jnp.sum(p["v"] * p["w"] / norm) ** 2

    found = audit(loss, {"w": normal(3), "v": normal(3, seed=1)})
    assert abs(found[W].radial_share) < 1e-5 and found[W].kind == "none"


def test_a_loss_that_is_zero_everywhere():
    assert audit(lambda w: 0 * jnp.sum(w), normal(3))[""].kind == "no effect"


# --- numbers of every kind ---


def test_a_loss_fitted_to_rounding():
    """Cross-entropy of 1e-5, whose last digits change when nothing does."""
    w = normal(6, 3)
    params = {"w": w, "b": normal(3, seed=1)}
    top = jnp.sort(10 * bn(X @ w), axis=-1)
    y = jnp.argmax(bn(X @ w), axis=-1)
    margin = top[:, -1] - top[:, -2]
    sure = (margin > 10) & (margin < 15)

    def loss(p):
        logits = 10 * bn(X @ p["w"] + p["b"])
        log_sum = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))  # as many write it, with rounding
        found = log_sum - jnp.take_along_axis(logits, y[:, None], axis=-1)[:, 0]
        return jnp.sum(jnp.where(sure, found, 0)) / jnp.sum(sure)

    assert jnp.sum(sure) >= 5 and 0 < abs(loss(params)) < 1e-4
    scales = [
        a
        for a in np.linspace(0.5, 2, 40)
        if abs(loss({**params, "w": a * w}) / loss(params) - 1) > 1e-4
    ]
    assert scales  # at these, a test of this loss alone would call it not invariant
    assert audit(loss, params, scales=scales[:3])[W].kind == "invariant"


def test_tiny_weights():
    """Gradients near 1e24 and weights of 1e-25: squares leave the range of float32."""
    params = {**PARAMS, "w": 1e-25 * PARAMS["w"]}

    def loss(p):
        h = batch_norm(1e10 * X @ p["w"], epsilon=0.0)[0]
        return cross_entropy(jax.nn.relu(h) @ p["head"])

    found = audit(loss, params)
    assert found[W].kind == "invariant" and not found[HEAD].scale_invariant
    usual = audit(network, PARAMS)[W]
    assert found[W].norm == pytest.approx(1e-25 * usual.norm, rel=1e-5)
    assert found[W].gradient_norm == pytest.approx(1e25 * usual.gradient_norm, rel=1e-4)


def test_bfloat16_with_a_tolerance_of_its_own():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    found = audit(
        lambda p: network(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), p)),
        params,
        tolerance=1e-3,
    )
    assert found[W].scale_invariant and not found[HEAD].scale_invariant


def test_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), PARAMS)
        found = audit(functools.partial(network, bias="inside"), params, tolerance=1e-10)
        assert found.groups == ((B, W),) and found[W].deviation > 1e-4


def test_epsilon_shows_as_a_deviation():
    def hidden(z, epsilon):
        z = z - z.mean(0)
        return z / jnp.sqrt((z**2).mean(0) + epsilon)

    small, large = (
        audit(functools.partial(network, hidden=functools.partial(hidden, epsilon=e)), PARAMS)[W]
        for e in (1e-5, 0.1)
    )
    assert small.scale_invariant and not large.scale_invariant
    assert small.deviation < 1e-4 < large.deviation


def test_nested_trees_and_numbers():
    params = {"a": [normal(3), (2.0, np.float32(1.5))], "none": None, "empty": jnp.zeros((0, 3))}

    def loss(p):
        return jnp.sum(p["a"][0] ** 2) * p["a"][1][0] + p["a"][1][1] ** 2

    found = audit(loss, params)
    assert set(found) == {"['a'][0]", "['a'][1][0]", "['a'][1][1]", "['empty']"}
    assert found["['empty']"].kind == "no effect"
    assert found["['empty']"].effective_learning_rate(1.0) == math.inf


# --- models of the project ---


def loss_of(model, size, channels=1, examples=24):
    x = jax.random.normal(KEY, (examples, size, size, channels))
    y = jnp.arange(examples) % 3
    variables = model.init(KEY, x, train=False)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, variables["params"]


NORM = functools.partial(BatchNorm, epsilon=1e-6)


def test_mlp():
    found = audit(*loss_of(MLP("f8 f8 f3", NORM, "hidden"), 4))
    kernels = {f"['dense{i}']['kernel']" for i in (1, 2)}
    assert set(found.decay_sets_only_the_rate) == kernels
    assert invariant(found) - kernels == {f"['dense{i}']['bias']" for i in (1, 2)}
    assert not found["['dense3']['kernel']"].scale_invariant
    assert found.groups == (("['batch_norm1']['bias']", "['batch_norm1']['scale']"),)


def test_bn_on_the_last_layer_alone():
    """A kernel and all biases from its layer on; the last bias is subtracted."""
    norm = functools.partial(BatchNorm, epsilon=0.0)
    found = audit(*loss_of(CNN("c3 f6 f3", norm, "last"), 4))
    assert found["['dense3']['kernel']"].kind == "invariant"
    assert found["['dense3']['bias']"].kind == "no effect"
    first, second = ("['conv1']['bias']", "['conv1']['kernel']"), "['dense2']['bias']"
    assert set(found.groups) == {(*first, second), (second, "['dense2']['kernel']")}


@pytest.mark.parametrize("preactivation", [False, True])
def test_resnet(preactivation):
    model = ResNet((1,), 3, 4, NORM, preactivation=preactivation)
    found = audit(*loss_of(model, 4))
    stem, first, last = (
        f"{layer}['kernel']"
        for layer in ("['stem_conv']", "['stage1_block1']['conv1']", "['stage1_block1']['conv2']")
    )
    assert found[first].kind == "invariant" and not found["['head']['kernel']"].scale_invariant
    if preactivation:
        assert (last, stem) in found.groups and not invariant(found) & {last, stem}
    else:
        assert found[last].scale_invariant and found[stem].scale_invariant


def test_inception(monkeypatch):
    """The stem and the first module: the whole network takes XLA minutes to compile."""
    monkeypatch.setattr(inception, "MODULES", inception.MODULES[:1])
    found = audit(*loss_of(Inception(3, NORM, width=1 / 16), 32, examples=8))
    kernels = {path for path in found if path.endswith("['kernel']")}
    assert len(kernels) == 11 and invariant(found) == kernels - {"['head']['kernel']"}


# --- limits that suit the loss ---


class Network(nn.Module):
    """Convolutions or dense layers with a norm after each, and a head."""

    norm: type
    features: tuple[int, ...]
    convolutions: bool
    dtype: Any = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train):
        for i, features in enumerate(self.features):
            layer = (
                nn.Conv(features, (3, 3), use_bias=False, dtype=self.dtype, name=f"hidden{i}")
                if self.convolutions
                else nn.Dense(features, use_bias=False, dtype=self.dtype, name=f"hidden{i}")
            )
            norm = self.norm(use_running_average=not train, epsilon=self.epsilon, dtype=self.dtype)
            x = nn.relu(norm(layer(x)))
        x = x.mean((1, 2)) if self.convolutions else x
        return nn.Dense(10, dtype=self.dtype, name="head")(x).astype(jnp.float32)


def audited(model, shape, *, scale=1.0, fitted=0):
    x = jax.random.normal(jax.random.key(1), shape) * scale
    y = jax.random.randint(jax.random.key(2), (shape[0],), 0, 10)
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), x)

    def loss(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = variables["params"]
    optimizer = optax.adam(0.01)
    state = optimizer.init(params)
    for _ in range(fitted):
        params, state = jax.jit(descend, static_argnums=(0, 1))(loss, optimizer, params, state)
    return audit(loss, params)


def descend(loss, optimizer, params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(
    ("convolutions", "features", "shape"),
    [(True, (8,), (128, 16, 16, 3)), (True, (8, 16), (32, 8, 8, 3)), (False, (32, 32), (64, 20))],
)
def test_kernels_before_bn_and_they_alone(norm, dtype, convolutions, features, shape):
    """At the default limits, in float32 and bfloat16."""
    found = audited(Network(norm, features, convolutions, dtype), shape)
    kernels = {f"['hidden{i}']['kernel']" for i in range(len(features))}
    assert invariant(found) == kernels, found
    for path, row in found.items():
        decided = row.deviation <= found.tolerance and row.pooled_share <= row.pooled_limit
        assert decided == (path in kernels)
    assert all(found[path].kind == "invariant" for path in kernels)


def test_a_share_above_the_deviation_s_limit_that_epsilon_explains():
    """ε/σ² = 1e-4: a loss that it moves by 1e-5, and a share of some 1e-4 that decides nothing."""
    found = audited(Network(BatchNorm, (8,), True), (256, 16, 16, 3), scale=0.3)
    row = found["['hidden0']['kernel']"]
    assert row.deviation < 1e-4 < row.pooled_share < row.pooled_limit and row.kind == "invariant"
    exact = audited(Network(BatchNorm, (8,), True, epsilon=0.0), (256, 16, 16, 3), scale=0.3)
    assert exact["['hidden0']['kernel']"].pooled_share < 1e-5
    large = audited(Network(BatchNorm, (8,), True, epsilon=0.1), (256, 16, 16, 3), scale=0.3)
    assert not large["['hidden0']['kernel']"].scale_invariant


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_network_that_is_fitted(dtype):
    found = audited(Network(nn.BatchNorm, (8, 8), True, dtype), (16, 8, 8, 3), fitted=100)
    assert found.loss < 0.05
    assert invariant(found) == {f"['hidden{i}']['kernel']" for i in range(2)}, found


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_nothing_is_invariant_by_rounding(dtype):
    """Layer norm in the place of BN, which divides each example, and no norm at all."""

    class Identity(nn.Module):
        use_running_average: bool
        epsilon: float
        dtype: Any

        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(x.dtype)

    found = audited(Network(Identity, (32, 32), False, dtype), (64, 20))
    assert invariant(found) == set(), found


@pytest.mark.parametrize("size", [100, 1000, 20000])
def test_a_leaf_that_hardly_moves_the_loss_is_not_invariant(size):
    """Its gradient points along it as any two directions do, by 1/√size."""
    slope = normal(size, seed=3) / size**0.5
    params = {**PARAMS, "small": 1e-7 * normal(size, seed=4)}
    row = audit(lambda p: network(p) + p["small"] @ slope, params)["['small']"]
    assert row.deviation < 1e-6 and row.kind == "none"
    assert row.pooled_limit == 2e-3 < row.pooled_share < 4 / size**0.5


def test_the_number_that_decides_is_shown_with_a_limit_of_its_own():
    found = audited(Network(nn.BatchNorm, (8, 16), True, jnp.bfloat16), (32, 8, 8, 3))
    table = found.table()
    lines = {line.split()[0]: line for line in table.splitlines()}
    for path, row in found.items():
        assert f"{row.pooled_share:.1e}" in lines[path]
        own = row.pooled_limit > found.pooled_limit
        assert own == (f"(≤ {row.pooled_limit:.0e})" in lines[path])
    assert any(row.pooled_limit > found.pooled_limit for row in found.values())
    assert "invariant: deviation ≤ " in table and f"≤ {found.pooled_limit:.0e}" in table


def test_a_tolerance_that_is_given_is_the_limit_of_both():
    found = audit(network, PARAMS, tolerance=1e-9)
    assert (found.tolerance, found.pooled_limit) == (1e-9, 1e-9)
    assert not found[W].scale_invariant  # rounding alone is more


# --- what is shown ---


def test_table_and_figure(tmp_path):
    found = audit(functools.partial(network, bias="inside"), {**PARAMS, "b": 0 * PARAMS["b"]})
    table = found.table(0.1)
    assert all(path in table for path in (W, B, HEAD))
    assert "invariant only together: ['b'], ['w']" in table
    assert "weight decay only sets the learning rate of: none" in table
    assert f"{found[W].effective_learning_rate(0.1):.3g}" in table and repr(found)
    figure = found.figure(tmp_path / "audit.png", 0.1)
    pixels = np.asarray(Image.open(figure.path).convert("L"))
    assert pixels.std() > 5 and "1 not invariant" in figure.alt


# --- bad input ---


def while_loop(p):
    return jax.lax.while_loop(lambda v: v < 9, lambda v: v + 1, jnp.sum(p["b"])) + jnp.sum(p["a"])


A = {"a": jnp.ones(2), "b": jnp.ones(2)}


@pytest.mark.parametrize(
    ("loss", "params", "message"),
    [
        (jnp.sum, {}, "params has no leaves"),
        (jnp.sum, {"w": jnp.arange(3)}, r"params\['w'\] has dtype int32"),
        (jnp.sum, {"w": 1}, r"params\['w'\] has dtype int32"),
        (jnp.sum, {"w": jnp.ones(2, bool)}, r"params\['w'\] has dtype bool"),
        (jnp.sum, {"w": jnp.ones(2, complex)}, r"params\['w'\] has dtype complex64"),
        (jnp.sum, {"w": "text"}, r"params\['w'\] is a str"),
        (jnp.sum, {"w": jnp.array([1.0, jnp.nan])}, r"params\['w'\] holds values that are not"),
        (lambda p: p["a"], A, r"loss_fn returns an array of shape \(2,\)"),
        (lambda p: (p["a"][0], p["b"][0]), A, "loss_fn returns 2 arrays"),
        (lambda p: jnp.int32(3), A, "loss_fn returns dtype int32"),
        (lambda p: jnp.log(-jnp.sum(p["a"])), A, r"loss_fn\(params\) is nan"),
        (
            lambda p: jnp.sum(jnp.sqrt(p["b"] - 1)) + p["a"][0],
            A,
            r"differentiable at params\['b'\]",
        ),
        (while_loop, A, r"cannot be differentiated in params\['b'\]"),
        (lambda p: jnp.sum(jnp.exp(60 * p["b"])), A, r"inf when params\['b'\] is scaled by 2"),
    ],
)
def test_bad_losses_and_params(loss, params, message):
    with pytest.raises(ValueError, match=message):
        audit(loss, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scales=()), "scales="),
        (dict(scales=(1.0,)), "scales="),
        (dict(scales=(0.0, 2.0)), "scales="),
        (dict(scales=(-2.0,)), "scales="),
        (dict(scales=(math.nan,)), "scales="),
        (dict(tolerance=0.0), "tolerance=0.0"),
        (dict(tolerance=1.0), "tolerance=1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        audit(lambda w: jnp.sum(w**2), jnp.ones(2), **options)
