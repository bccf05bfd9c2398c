"""Tests of bn_research.probes.signal: against closed forms, numpy in float64 and jax.grad."""

import dataclasses
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_research.layers.linen import BatchNorm
from bn_research.layers.nnx import BatchNorm as NnxBatchNorm
from bn_research.models.cnn import CNN
from bn_research.models.mlp import MLP
from bn_research.models.resnet import ResNet
from bn_research.probes.signal import (
    LayerSignal,
    Signal,
    linen_layers,
    log10_rms,
    nnx_layers,
    probe_linen,
    probe_nnx,
    probe_signal,
)
from bn_research.probes.signal.jacobian import singular_values

rng = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    return jnp.asarray(values * scale, jnp.float32)


def layers_only(*layers):
    """A network whose pre-activations are given; the batch is one example an entry."""

    def forward(params, batch):
        named = {f"layer{i}": layer + 0 * batch[0, 0] for i, layer in enumerate(layers)}
        return sum(jnp.sum(h, axis=tuple(range(1, h.ndim))) for h in named.values()), named

    return forward


def probe_layers(*layers):
    return probe_signal(layers_only(*layers), {}, jnp.ones((len(layers[0]), 1)), jacobians=False)


def mlp(weights, x, activation=jax.nn.relu, deltas=None):
    layers, h = {}, x
    for number, w in enumerate(weights):
        h = (h if number == 0 else activation(h)) @ w
        h = h if deltas is None else h + deltas[number]
        layers[f"dense{number + 1}"] = h
    return h, layers


def weights_of(sizes, gain, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return [
        jax.random.normal(key, (m, n)) * (gain / m) ** 0.5
        for key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


def init(model, batch, **options):
    return jax.jit(functools.partial(model.init, **options))(jax.random.key(0), batch)


# --- log10_rms ---


@pytest.mark.parametrize("scale", [1e-35, 1e-18, 1e-11, 1.0, 1e15, 1e30])
def test_equals_float64_at_every_scale(scale):
    x = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32) * np.float32(scale)
    expected = 0.5 * np.log10(np.mean(np.square(x.astype(np.float64))))
    tolerance = 2e-6 * (1 + abs(expected))
    assert float(log10_rms(jnp.asarray(x))) == pytest.approx(expected, abs=tolerance)


def test_zeros_nan_and_half_precision():
    assert float(log10_rms(jnp.zeros(5))) == -np.inf
    assert np.isnan(float(log10_rms(jnp.array([1.0, np.nan]))))
    assert log10_rms(jnp.full(4, 1e-3, jnp.bfloat16)).dtype == jnp.float32


# --- what it says of one layer ---


def test_moments_equal_float64():
    inputs = [
        (normal(32, 3, 3, 7) + offset) * scale
        for scale in (1e-30, 1e-20, 1.0, 1e20)
        for offset in (0.0, 1.0, 1e4)
    ]
    for h, layer in zip(inputs, probe_layers(*inputs).values(), strict=True):
        exact = np.asarray(h, np.float64)
        assert layer.mean == pytest.approx(exact.mean(), rel=1e-6, abs=1e-6 * exact.std())
        assert layer.std == pytest.approx(exact.std(), rel=1e-5)
        mean, var = exact.mean(axis=(0, 1, 2)), exact.var(axis=(0, 1, 2))
        assert layer.conditioning == pytest.approx(np.sum(mean**2) / np.sum(var), rel=1e-4)
        assert layer.log10_rms == pytest.approx(0.5 * np.log10(np.mean(exact**2)), abs=1e-4)


def test_soft_rank_of_constructed_matrices():
    left, _ = np.linalg.qr(rng.standard_normal((12, 6)))
    right, _ = np.linalg.qr(rng.standard_normal((40, 6)))
    singular = np.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    expected = np.sum(singular**2) ** 2 / np.sum(singular**4)
    h = jnp.asarray(left * singular @ right.T, jnp.float32)
    flat = probe_layers(h, h * 1e-20, h * 1e20, h.reshape(12, 5, 8))
    for layer in [*flat.values(), *probe_layers(h.T).values()]:
        assert layer.soft_rank == pytest.approx(expected, rel=1e-4) and layer.max_rank == 12


def test_soft_rank_from_one_to_the_batch():
    alike, orthogonal = jnp.ones((8, 20)) * 1e-12, jnp.eye(8, 20)
    signal = probe_layers(alike, orthogonal, jnp.zeros((8, 20)))
    assert [layer.soft_rank for layer in signal.values()] == pytest.approx([1, 8, 0], abs=1e-5)


def test_dead_features_must_be_so_at_every_position_of_every_example():
    h = np.full((4, 3, 8), -1.0, np.float32)
    h[2, 1, 0] = 0.1  # alive by one position of one example
    h[:, :, 1] = 0.0
    h[0, :, 2] = 5.0
    layer = probe_layers(jnp.asarray(h))["layer0"]
    assert layer.dead_fraction == pytest.approx(6 / 8)


def test_constants_and_values_that_are_not_finite():
    signal = probe_layers(jnp.full((4, 3), 2.0), jnp.zeros((4, 3)), jnp.full((4, 3), jnp.nan))
    two, zero, nan = signal.values()
    assert (two.std, two.conditioning, two.mean) == (0, math.inf, 2)
    assert (zero.std, zero.conditioning, zero.log10_rms) == (0, 0, -math.inf)
    assert math.isnan(nan.std) and math.isnan(nan.log10_rms)
    assert signal.verdict.startswith("not finite from layer 3 (layer2) on")


def test_half_precision_is_measured_in_float32():
    h = (normal(64, 50) * 1e-3).astype(jnp.bfloat16)
    exact = np.asarray(h, np.float64)
    assert probe_layers(h)["layer0"].std == pytest.approx(exact.std(), rel=1e-5)


# --- gradients ---


def test_gradients_equal_jax_grad_by_an_explicit_perturbation():
    weights, x = weights_of([5, 7, 6, 3], 2.0), normal(8, 5)
    deltas = [jnp.zeros((8, n)) for n in (7, 6, 3)]

    def loss(output):
        return jnp.mean(jax.nn.logsumexp(output, axis=1) - output[:, 0])

    signal = probe_signal(jax.jit(mlp), weights, x, loss_fn=loss, jacobians=False)
    grad = jax.jit(jax.grad(lambda deltas: loss(mlp(weights, x, deltas=deltas)[0])))
    expected = grad(deltas)
    assert signal.loss == pytest.approx(float(loss(mlp(weights, x)[0])), rel=1e-5)
    for layer, gradient in zip(signal.values(), expected, strict=True):
        gradient = np.asarray(gradient, np.float64)
        assert layer.gradient_std == pytest.approx(gradient.std(), rel=1e-5)
        rms = np.sqrt(np.mean(gradient**2))
        assert layer.log10_gradient_rms == pytest.approx(np.log10(rms), abs=1e-5)
        norm = np.log10(np.linalg.norm(gradient))
        assert layer.log10_gradient_norm == pytest.approx(norm, abs=1e-5)
        silent = np.mean(np.all(gradient == 0, axis=0))
        assert layer.silent_fraction == pytest.approx(silent)


def test_the_default_loss_is_a_random_functional():
    def forward(params, x):
        h = x * params
        return h, {"a": h}

    signal = probe_signal(forward, 2.0, normal(2000, 30))
    assert signal["a"].gradient_std == pytest.approx(1 / 2000, rel=0.02)
    other = probe_signal(forward, 2.0, normal(2000, 30), key=jax.random.key(1))
    assert other.loss != signal.loss


def test_tiny_gradients_are_measured():
    weights = [normal(6, 6, scale=s) for s in (1.0, 1e-15, 1e-14)]
    signal = probe_signal(mlp, weights, normal(8, 6))
    deltas = [jnp.zeros((8, 6))] * 3
    large = [weights[0], weights[1] * 1e15, weights[2] * 1e14]
    z = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (8, 6))
    loss = jax.jit(lambda d: jnp.sum(mlp(large, normal(8, 6), deltas=d)[0] * z) / 8)
    gradient = jax.grad(loss)(deltas)
    expected = np.asarray(gradient[0], np.float64).std() * 1e-29
    assert signal["dense1"].gradient_std == pytest.approx(expected, rel=1e-4)
    assert signal["dense2"].jacobian.largest == pytest.approx(
        1e-15 * probe_signal(mlp, large, normal(8, 6))["dense2"].jacobian.largest, rel=1e-4
    )


def test_an_unused_layer_has_no_gradient():
    def forward(params, x):
        h = x @ params
        return h, {"unused": jnp.sin(x), "used": h, "computed anew": x @ params}

    signal = probe_signal(forward, normal(4, 4), normal(6, 4))
    assert signal["computed anew"].gradient_std is None
    assert signal["unused"].gradient_std is None and signal["unused"].log10_gradient_norm is None
    assert signal["used"].gradient_std > 0 and signal["used"].jacobian is None
    (line,) = [line for line in signal.table().splitlines() if line.startswith("unused")]
    assert line.split()[-2:] == ["–", "–"]


# --- Jacobians ---


@pytest.mark.parametrize(("batch", "sizes"), [(4, (9, 8, 12)), (4, (9, 12, 8))])
def test_small_jacobians_equal_numpy(batch, sizes):
    weights = weights_of(sizes, 1.0)
    signal = probe_signal(
        functools.partial(mlp, activation=lambda h: h), weights, normal(batch, sizes[0])
    )
    values = np.linalg.svd(np.asarray(weights[1], np.float64), compute_uv=False)
    expected = (values[-1], np.sqrt(np.mean(values**2)), values[0])
    assert signal["dense1"].jacobian is None
    assert signal["dense2"].jacobian == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sizes", [(9, 30, 40, 30), (9, 40, 30, 40)])
def test_large_jacobians_equal_numpy(sizes):
    """Of 30 distinct singular values, each of a batch of 20: 30 iterations find them all."""
    weights = weights_of(sizes, 1.0)
    linear = functools.partial(mlp, activation=lambda h: h)
    signal = probe_signal(linear, weights, normal(20, sizes[0]), iterations=32)
    for name, w in (("dense2", weights[1]), ("dense3", weights[2])):
        values = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
        found = signal[name].jacobian
        assert found.largest == pytest.approx(values[0], rel=1e-4)
        assert found.smallest == pytest.approx(values[-1], rel=2e-2)
        assert found.rms == pytest.approx(np.sqrt(np.mean(values**2)), rel=0.1)


def test_few_iterations_bound_the_range_from_inside():
    weights = weights_of((9, 40, 40), 1.0)
    linear = functools.partial(mlp, activation=lambda h: h)
    found = probe_signal(linear, weights, normal(20, 9))["dense2"].jacobian
    values = np.linalg.svd(np.asarray(weights[1], np.float64), compute_uv=False)
    assert values[-1] <= found.smallest < found.rms < found.largest <= values[0] * (1 + 1e-5)
    assert found.largest == pytest.approx(values[0], rel=0.02)


def multiplied(matrix, iterations):
    work = singular_values(matrix.shape[1], matrix.shape[0], iterations, np.random.default_rng(0))
    vector, turned = next(work), False
    while True:
        try:
            vector = work.send((matrix.T if turned else matrix) @ vector)
        except StopIteration as done:
            return done.value
        turned = not turned


def test_singular_values_of_matrices_that_end_early():
    identity = multiplied(np.eye(50, 40) * 1e-20, 12)
    assert identity == pytest.approx((1e-20, 1e-20, 1e-20), rel=1e-6, abs=0)
    assert multiplied(np.zeros((30, 20)), 12) == (0, 0, 0)
    dead = np.diag(np.repeat([0.0, 2.0], 20))  # as behind a ReLU
    found = multiplied(dead, 12)
    assert found.smallest == pytest.approx(0, abs=1e-6) and found.largest == pytest.approx(2)
    spread = multiplied(np.diag(np.logspace(0, -3, 60)), 60)  # lost without reorthogonalization
    assert (spread.smallest, spread.largest) == pytest.approx((1e-3, 1), rel=1e-3)
    assert math.isnan(multiplied(np.full((30, 20), np.nan), 12).largest)


def test_jacobians_can_be_left_out():
    weights = weights_of([5, 7, 6], 2.0)
    signal = probe_signal(mlp, weights, normal(8, 5), jacobians=False)
    assert all(layer.jacobian is None for layer in signal.values())


def test_the_jacobian_of_bn_covers_the_whole_batch():
    """BN lets neither a shift nor (ε = 0) a change of scale through: two zeros a feature."""

    def forward(params, x):
        h = x * params
        y = (h - h.mean(0)) / jnp.std(h, axis=0)
        return y, {"h": h, "y": y}

    signal = probe_signal(forward, 1.0, normal(10, 3))
    std = np.asarray(normal(10, 3), np.float64).std(axis=0)
    found = signal["y"].jacobian
    assert found.largest == pytest.approx(1 / std.min(), rel=1e-4)
    assert found.smallest == pytest.approx(0, abs=1e-5)
    assert found.rms == pytest.approx(np.sqrt(np.mean(1 / std**2) * 8 / 10), rel=1e-4)


# --- whole networks ---


def test_a_cnn_of_tiny_weights_loses_its_signal():
    def tiny(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1e-3, 1e-3)

    model = CNN(spec="c8 P c8 c8 P c8 f16 f16 f10", kernel_init=tiny, use_bias=False)
    images = normal(8, 8, 8, 3)
    variables = init(model, images, train=True)
    signal = probe_linen(model, variables, images, train=True, jacobians=False)
    _, state = model.apply(variables, images, train=True, mutable=["intermediates"])
    sown = [
        np.asarray(state["intermediates"][f"pre_activation_{i}"][0], np.float64).std()
        for i in range(1, 8)
    ]
    assert [layer.std for layer in signal.values()] == pytest.approx(sown, rel=1e-4)
    lost = int(np.argmax(np.array(sown) < 1e-4)) + 1
    assert f"signal lost from layer {lost} (conv{lost}) on: std " in signal.verdict
    assert f"{sown[-1]:.1g} at the last; add BN before the softmax" in signal.verdict
    factor = float(signal.verdict.split("rescale the weights by ")[1].split("×")[0])
    assert factor == pytest.approx(1 / signal.forward_growth, rel=0.05)
    assert factor == pytest.approx((sown[0] / sown[-1]) ** (1 / 6), rel=0.5)
    assert "gradient vanishes" in signal.verdict


def test_bn_on_the_last_layer_brings_a_lost_signal_back():
    def tiny(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1e-3, 1e-3)

    images = normal(8, 10)
    for epsilon, lost in ((0.0, False), (1e-5, True)):
        norm = functools.partial(BatchNorm, epsilon=epsilon)
        model = MLP("f16 f16 f10", norm, "last", kernel_init=tiny)
        variables = init(model, images, train=True)
        signal = probe_linen(model, variables, images, train=True, jacobians=False)
        assert ("signal lost" in signal.verdict) is lost, signal.verdict


def test_a_he_initialized_mlp_is_healthy():
    signal = probe_signal(
        mlp, weights_of([64, 64, 64, 64, 10], 2.0), normal(32, 64), jacobians=False
    )
    assert signal.verdict.startswith("healthy: forward ×"), signal.verdict
    assert signal.forward_growth == pytest.approx(1, abs=0.2)
    assert signal.backward_growth == pytest.approx(1, abs=0.2)


def test_gradients_explode_in_a_deep_mlp_with_bn():
    """π/(π − 1) per layer for the squared norm, 1.474 at a batch of 128."""

    def forward(weights, x):
        layers, h = {}, x
        for number, w in enumerate(weights):
            h = h @ w
            layers[str(number)] = h
            h = jax.nn.relu((h - h.mean(0)) / jnp.sqrt(h.var(0)))
        return h, layers

    signal = probe_signal(forward, weights_of([500] * 21, 1.0), normal(128, 500), jacobians=False)
    assert signal.backward_growth**2 == pytest.approx(1.474, rel=0.1)
    assert signal.forward_growth == pytest.approx(1, abs=0.02)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.remat(nn.Dense)(6, name="first")(x)
        x = nn.relu(BatchNorm(use_running_average=not train, name="norm")(x))
        shared = nn.Dense(6, name="shared")
        return nn.Dense(3, name="head")(nn.relu(shared(nn.relu(shared(x)))))


def test_a_linen_model_with_bn_remat_and_a_module_called_twice():
    model, x = Twice(), normal(8, 5)
    variables = init(model, x, train=True)
    signal = probe_linen(model, variables, x, train=True)
    assert list(signal) == ["first", "shared", "shared#2", "head"]

    def by_hand(params, x, deltas):
        def dense(name, h):
            return h @ params[name]["kernel"] + params[name]["bias"]

        first = dense("first", x) + deltas[0]
        h = (first - first.mean(0)) / jnp.sqrt(first.var(0) + 1e-5)
        second = dense("shared", jax.nn.relu(h)) + deltas[1]
        third = dense("shared", jax.nn.relu(second)) + deltas[2]
        head = dense("head", jax.nn.relu(third)) + deltas[3]
        return head, (first, second, third, head)

    zeros = [jnp.zeros((8, n)) for n in (6, 6, 6, 3)]
    z = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (8, 3))
    _, layers = by_hand(variables["params"], x, zeros)
    by_hand = jax.jit(by_hand)
    gradients = jax.grad(lambda d: jnp.sum(by_hand(variables["params"], x, d)[0] * z) / 8)(zeros)
    jacobian = jax.jacfwd(lambda d: by_hand(variables["params"], x, [d, *zeros[1:]])[1][1])(
        zeros[0]
    )
    values = np.linalg.svd(np.asarray(jacobian, np.float64).reshape(48, 48), compute_uv=False)
    for layer, h, gradient in zip(signal.values(), layers, gradients, strict=True):
        assert layer.std == pytest.approx(float(h.std()), rel=1e-4)
        assert layer.gradient_std == pytest.approx(float(gradient.std()), rel=1e-4)
    assert signal["shared"].jacobian.largest == pytest.approx(values[0], rel=1e-4)
    evaluated = probe_linen(model, variables, x, train=False, jacobians=False)
    assert evaluated["shared"].std != pytest.approx(signal["shared"].std, rel=1e-3)


def test_a_resnet():
    model = ResNet((1, 1), width=4, norm=BatchNorm)
    images = normal(4, 8, 8, 3)
    signal = probe_linen(model, init(model, images, train=True), images, train=True, iterations=3)
    assert list(signal) == [
        "stem_conv",
        "stage1_block1/conv1",
        "stage1_block1/conv2",
        "stage2_block1/conv1",
        "stage2_block1/conv2",
        "stage2_block1/shortcut_conv",
        "head",
    ]
    assert [name for name, layer in signal.items() if layer.jacobian is None] == [
        "stem_conv",
        "stage2_block1/shortcut_conv",  # beside the convolution before it, not after
    ]
    assert all(layer.gradient_std > 0 for layer in signal.values())


def test_a_layer_alone_is_a_model():
    model, x = nn.Dense(3), normal(8, 5)
    signal = probe_linen(model, init(model, x), x)
    assert list(signal) == ["Dense"] and signal.verdict.startswith("healthy: forward ×–")


class Positions(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(1.0), (4, 6))
        return nn.Dense(3, name="head")(x)


def test_tokens_and_a_model_that_owns_a_matrix_of_its_own():
    tokens = jnp.arange(32).reshape(8, 4) % 11
    model = Positions()
    assert list(probe_linen(model, init(model, tokens), tokens)) == ["embed", "head"]


# --- the verdict ---


def layer_like(name, **changes):
    healthy = LayerSignal(
        name=name,
        shape=(16, 10),
        log10_rms=0.0,
        mean=0.0,
        std=1.0,
        dead_fraction=0.0,
        silent_fraction=0.0,
        conditioning=0.1,
        soft_rank=8.0,
        max_rank=10,
        gradient_std=1.0,
        log10_gradient_rms=0.0,
        jacobian=None,
    )
    return dataclasses.replace(healthy, **changes)


def verdict_of(*changes, **output):
    layers = [layer_like(f"l{i}", **change) for i, change in enumerate(changes, start=1)]
    return Signal(layers, loss=1.0, **output).verdict


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{}, {}, {}], "healthy: forward ×1, backward ×1 per layer"),
        (
            [{"std": 2e-2}, {"std": 2e-4}, {"std": 2e-6}, {"std": 2e-8}],
            "signal lost from layer 3 (l3) on: std 2e-06, 2e-08 at the last; add BN before the "
            "softmax with epsilon far below 4e-16 or rescale the weights by 100× per layer",
        ),
        ([{"std": 1e-6}] * 2, "scale the input or the first weights up by 1e+06×"),
        ([{"std": 0.0}] * 2, "look for weights of zeros"),
        ([{"std": 1e-6}, {}], "healthy"),
        (
            [{"std": 1e2}, {"std": 1e4}, {"std": 1e6}],
            "signal explodes from layer 3 (l3) on: std 1e+06; add BN or rescale the weights by "
            "0.01× per layer",
        ),
        (
            [{"log10_gradient_rms": 4.0}, {"log10_gradient_rms": 2.0}, {}],
            "gradient grows ×100 per layer towards the input: 1e+04 over 2 layers; use residual",
        ),
        (
            [{"log10_gradient_rms": -4.0}, {"log10_gradient_rms": -2.0}, {}],
            "gradient vanishes ×0.01 per layer towards the input: 1e-04 over 2 layers",
        ),
        ([{"log10_gradient_rms": -math.inf}, {}], "gradient lost: 0 at layer 1 (l1)"),
        ([{}, {"log10_gradient_rms": -math.inf}], "gradient 0 from the last layer, 2 (l2)"),
        ([{"log10_gradient_rms": math.nan}, {}], "gradient not finite at layer 1 (l1)"),
        ([{"log10_gradient_rms": None}], "no gradient: the output"),
        ([{"log10_gradient_rms": None}, {}, {}], "healthy"),
        (
            [{"dead_fraction": 0.6, "silent_fraction": 0.7}, {}],
            "60% of the units of layer 1 (l1) are dead on this batch",
        ),
        ([{"dead_fraction": 0.6, "silent_fraction": 0.1}, {}], "healthy"),
        ([{}, {"dead_fraction": 0.6, "silent_fraction": 0.7}], "healthy"),
        ([{}, {"conditioning": 350.0}], "the mean dominates at layer 2 (l2): mean²/var 350"),
        (
            [{}, {"soft_rank": 1.2}, {"soft_rank": 1.1}],
            "all examples look alike from layer 2 (l2) on: soft rank 1.20 of 10",
        ),
        ([{"soft_rank": 1.2}, {}], "healthy"),
        ([{}, {}, {"soft_rank": 1.1}], "healthy"),
        ([{}, {"soft_rank": 1.2, "max_rank": 3}, {"soft_rank": 1.2, "max_rank": 3}], "healthy"),
    ],
)
def test_verdicts(changes, expected):
    verdict = verdict_of(*changes)
    assert expected in verdict and len(verdict.splitlines()) == 1


def test_an_output_that_recovers_is_not_lost():
    lost = [{"std": 1e-6, "soft_rank": 1.1}] * 2
    assert verdict_of(*lost, output_std=1.0, output_soft_rank=5.0).startswith("healthy")
    assert len(verdict_of(*lost, output_std=1e-5, output_soft_rank=1.1).splitlines()) == 2


def test_growth_is_that_of_a_geometric_sequence_and_of_steps_that_take_turns():
    sizes = [3.0 * 0.8**i for i in range(8)]
    layers = [layer_like(str(i), std=s, log10_gradient_rms=math.log10(s)) for i, s in
              enumerate(sizes)]  # fmt: skip
    signal = Signal(layers, loss=1.0)
    assert signal.forward_growth == pytest.approx(0.8)
    assert signal.backward_growth == pytest.approx(1 / 0.8)
    turns = [layer_like(str(i), std=[1.0, 2.0][i % 2]) for i in range(9)]
    assert Signal(turns, loss=1.0).forward_growth == pytest.approx(1.0, abs=0.02)


# --- what it gives out ---


def test_table_dict_and_figure(tmp_path):
    signal = probe_signal(mlp, weights_of([5, 7, 6, 3], 2.0), normal(8, 5))
    assert repr(signal) == signal.table()
    lines = signal.table().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", "dense1", "dense2", "dense3"]
    assert signal.table().endswith(signal.verdict) and "8×7" in lines[1]
    as_dict = json.loads(json.dumps(signal.as_dict(), allow_nan=False))
    assert as_dict["layers"][1]["jacobian"]["largest"] == signal["dense2"].jacobian.largest
    assert as_dict["layers"][0]["shape"] == [8, 7] and as_dict["verdict"] == signal.verdict
    assert as_dict["backward_growth"] == signal.backward_growth
    figure = signal.figure(tmp_path / "signal.png")
    assert figure.path.read_bytes().startswith(b"\x89PNG") and "3 layers" in figure.alt


def test_what_is_not_finite_can_be_written_and_drawn(tmp_path):
    def forward(params, x):
        return x[:, 0], {"nan": x * jnp.nan, "zero": x * 0, "inf": x / 0}

    signal = probe_signal(forward, {}, normal(8, 5))
    json.dumps(signal.as_dict(), allow_nan=False)
    assert signal.figure(tmp_path / "signal.png").path.exists() and signal.table()
    many = Signal([layer_like(str(i)) for i in range(60)], loss=1.0)
    assert many.figure(tmp_path / "many.png").path.exists()


# --- bad input ---


def fails(message, call, *args, **options):
    with pytest.raises(ValueError) as error:
        call(*args, **options)
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_bad_batches():
    weights, x = weights_of([5, 7, 3], 2.0), normal(8, 5)
    fails("batch holds 1 values that are not finite", probe_signal, mlp, weights,
          x.at[0, 0].set(jnp.nan))  # fmt: skip
    fails("batch of shape (0, 5) is empty", probe_signal, mlp, weights, x[:0])
    fails("batch of no arrays is empty", probe_signal, mlp, weights, [])
    fails("all must have one first axis", probe_signal, mlp, weights, [x, x[:3]])
    fails("forward does not take a batch of shape (8, 4): ", probe_signal, mlp, weights, x[:, :4])
    fails("iterations=0", probe_signal, mlp, weights, x, iterations=0)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda output: output, "loss_fn returns float32 of shape (8, 3)"),
        (lambda output: jnp.argmax(output), "loss_fn returns int32 of shape ()"),
        (lambda output: (output.sum(), 1.0), "loss_fn returns 2 arrays"),
        (lambda output: output @ jnp.ones(7), "loss_fn does not take forward's output: "),
        (
            lambda output: jax.lax.while_loop(lambda y: y < 3, lambda y: y + 1, output.sum()),
            "cannot be differentiated: ",
        ),
    ],
)
def test_bad_losses(loss_fn, message):
    weights = weights_of([5, 7, 3], 2.0)
    fails(message, probe_signal, mlp, weights, normal(8, 5), loss_fn=loss_fn)


def test_an_output_of_integers_needs_a_loss():
    fails("give loss_fn", probe_signal, lambda p, x: (jnp.argmax(x, 1), {"x": x * 2}), {},
          normal(8, 5))  # fmt: skip


def test_bad_linen_models():
    model, x = Twice(), normal(8, 5)
    variables = init(model, x, train=True)
    fails(
        "batch of shape (8, 4) does not fit variables: params['first']['kernel'] has shape (5, 6) "
        "and would need (4, 6); give a batch like the one",
        probe_linen, model, variables, x[:, :4], train=True,
    )  # fmt: skip
    fails("variables has no 'params'", probe_linen, model, {"batch_stats": {}}, x, train=True)
    fails("not finite", probe_linen, model, variables, x / 0, train=True)
    fails("missing 1 required positional argument", probe_linen, model, variables, x)
    fails("mutable is not allowed", probe_linen, model, variables, x, mutable=True)
    norm = BatchNorm(use_running_average=False)
    fails("BatchNorm has no layer to probe", probe_linen, norm, init(norm, x), x)


# --- layers that a lifted transform computes ---


class Body(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(self.features, name="dense")(x)), None


class Scanned(nn.Module):
    depth: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.features, name="stem")(x)
        scan = nn.scan(
            Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        return nn.Dense(3, name="head")(scan(self.features, name="body")(x, None)[0])


class Unrolled(nn.Module):
    depth: int
    features: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.features, name="stem")(x)
        for i in range(self.depth):
            x, _ = Body(self.features, name=f"body{i}")(x, None)
        return nn.Dense(3, name="head")(x)


def same_signal(found, expected):
    """The numbers of two probes, layer by layer, whatever the names."""
    assert len(found) == len(expected)
    for a, b in zip(found.values(), expected.values(), strict=True):
        numbers = ("mean", "std", "dead_fraction", "soft_rank", "gradient_std", "log10_rms")
        for name in numbers:
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4, abs=1e-6), name
        assert (a.jacobian is None) == (b.jacobian is None) and a.shape == b.shape
        if a.jacobian is not None:
            assert a.jacobian == pytest.approx(b.jacobian, rel=1e-3, abs=1e-5)
    healthy = [probe.verdict.startswith("healthy") for probe in (found, expected)]
    assert healthy[0] == healthy[1]


@pytest.mark.parametrize(("depth", "features"), [(1, 5), (3, 5), (4, 8)])
def test_a_scanned_model_has_the_verdict_of_the_unrolled_one(depth, features):
    x = normal(7, 5)
    model = Scanned(depth, features)
    variables = init(model, x)
    params = dict(variables["params"])
    stacked = params.pop("body")
    for i in range(depth):
        params[f"body{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    found = probe_linen(model, variables, x)
    assert list(found)[1:-1] == ["body/dense", *(f"body/dense#{i}" for i in range(2, depth + 1))]
    same_signal(found, probe_linen(Unrolled(depth, features), {"params": params}, x))


class Heads(nn.Module):
    """`members` dense layers on one input, by nn.vmap or one by one, weighted by number."""

    members: int
    mapped: bool

    @nn.compact
    def __call__(self, x):
        if self.mapped:
            dense = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=self.members,
                out_axes=1,
            )
            h = jnp.tanh(dense(4, name="heads")(x))
            return jnp.einsum("bmf,m->bf", h, jnp.arange(1.0, self.members + 1))
        heads = [nn.Dense(4, name=f"head{i}") for i in range(self.members)]
        return sum((i + 1) * jnp.tanh(head(x)) for i, head in enumerate(heads))


@pytest.mark.parametrize("members", [2, 3, 7])
def test_stacked_layers_are_taken_apart(members):
    """Also as many as there are examples."""
    x = normal(7, 5)
    variables = init(Heads(members, True), x)
    stacked = variables["params"]["heads"]
    params = {f"head{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(members)}
    found = probe_linen(Heads(members, True), variables, x)
    assert list(found) == [f"heads[{i}]" for i in range(members)]
    same_signal(found, probe_linen(Heads(members, False), {"params": params}, x))


class OverTime(nn.Module):
    """One dense layer at every position: by nn.vmap over an axis, or on the whole array."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense
        if self.axis is not None:
            dense = nn.vmap(
                dense,
                variable_axes={"params": None},
                split_rngs={"params": False},
                in_axes=self.axis,
                out_axes=self.axis,
            )
        return dense(4, name="dense")(x)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_layer_that_is_mapped_over_examples_or_positions(axis):
    x = normal(7, 6, 5)
    variables = init(OverTime(None), x)
    same_signal(
        probe_linen(OverTime(axis), variables, x), probe_linen(OverTime(None), variables, x)
    )
    square = normal(6, 6, 5)
    fails("give a batch of another size", probe_linen, OverTime(1), variables, square)


class Recurrent(nn.Module):
    rolled: bool

    @nn.compact
    def __call__(self, x):
        cell = nn.SimpleCell(6, name="cell")
        if self.rolled:
            return nn.Dense(3, name="head")(nn.RNN(cell)(x)[:, -1])
        carry = jnp.zeros((len(x), 6))
        for t in range(x.shape[1]):
            carry, _ = cell(carry, x[:, t])
        return nn.Dense(3, name="head")(carry)


@pytest.mark.parametrize("length", [1, 4])
def test_an_rnn_has_the_verdict_of_its_turns(length):
    x = normal(7, length, 5)
    variables = init(Recurrent(True), x)
    found = probe_linen(Recurrent(True), variables, x)
    assert {"cell/i", "cell/h", "head"} <= set(found) and len(found) == 2 * length + 1
    same_signal(found, probe_linen(Recurrent(False), variables, x))


class Normalized(nn.Module):
    weights: str

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(6, name="dense")
        if self.weights == "weight norm":
            x = nn.WeightNorm(dense, name="norm")(x)
        elif self.weights == "spectral norm":
            x = nn.SpectralNorm(dense, name="norm")(x, update_stats=False)
        else:
            x = dense(x)
        return nn.Dense(3, name="head")(nn.relu(x))


@pytest.mark.parametrize("weights", ["weight norm", "spectral norm"])
def test_normalized_weights_are_those_of_a_plain_layer(weights):
    x = normal(8, 5)
    model = Normalized(weights)
    variables = model.init(jax.random.key(0), x)
    params = dict(variables["params"])
    kernel = np.asarray(params["dense"]["kernel"], np.float64)
    if weights == "weight norm":
        effective = kernel / np.linalg.norm(kernel, axis=0)  # its scale starts as 1
    else:
        stats = variables["batch_stats"]["norm"]
        effective = kernel / np.asarray(stats["dense/kernel/sigma"], np.float64)
    plain = {
        "dense": {**params["dense"], "kernel": jnp.asarray(effective, jnp.float32)},
        "head": params["head"],
    }
    found = probe_linen(model, variables, x)
    assert list(found) == ["dense", "head"] and found.left_out == ()
    expected = probe_linen(Normalized("none"), {"params": plain}, x)
    assert found["dense"].std == pytest.approx(expected["dense"].std, rel=1e-3)
    same_signal(found, expected)


def test_a_jitted_module_that_was_called_before():
    model, x = nn.jit(nn.Dense)(3), normal(8, 5)
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x, mutable=[])  # its trace is kept, and has no marks
    for _ in range(2):
        signal = probe_linen(model, variables, x)
        assert len(signal) == 1 and signal.left_out == ()


class Hidden(nn.Module):
    """A layer in a branch, in a loop without end, or one that returns its kernel alone."""

    where: str

    @nn.compact
    def __call__(self, x):
        if self.where == "cell":
            return nn.RNN(nn.OptimizedLSTMCell(4, name="cell"))(x[:, None])[:, 0]
        dense = nn.Dense(5, name="dense")
        if self.where == "branch":
            x = nn.cond(x.sum() > 0, lambda m, x: dense(x), lambda m, x: x, self, x)
        elif self.where == "loop":
            if self.is_initializing():
                dense(x)
            x = nn.while_loop(
                lambda m, x: jnp.sum(x) > 1e9, lambda m, x: dense(x), self, x,
                broadcast_variables="params",
            )  # fmt: skip
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize(
    ("where", "name"), [("branch", "dense"), ("loop", "dense"), ("cell", "cell/hi")]
)
def test_a_layer_that_cannot_be_seen_is_named(where, name):
    model, x = Hidden(where), normal(8, 5)
    fails(name, probe_linen, model, model.init(jax.random.key(0), x), x)


class Idle(nn.Module):
    @nn.compact
    def __call__(self, x, auxiliary):
        weights = self.param("weights", nn.initializers.normal(1.0), (5, 5))
        x = nn.Dense(4, name="first")(x @ weights)
        extra = nn.Dense(2, name="extra")
        return (nn.Dense(3, name="head")(x), extra(x)) if auxiliary else nn.Dense(3, name="head")(x)


def test_kernels_that_no_layer_stands_for_are_named():
    model, x = Idle(), normal(8, 5)
    variables = init(model, x, auxiliary=True)
    signal = probe_linen(model, variables, x, auxiliary=False)
    assert signal.left_out == ("weights (beside layers)", "extra (not called)")
    assert signal.verdict.splitlines()[-1] == f"not looked at: {', '.join(signal.left_out)}"
    both = probe_linen(model, variables, x, auxiliary=True)
    assert "extra" in both and both.left_out == ("weights (beside layers)",)


# --- branches that start at zero ---


class Residual(nn.Module):
    """Blocks x + γ·dense(relu(dense(x))), γ from zero or one, on the input itself or behind a stem.

    kernel: the last kernel is zero and there is no γ. skip: whether x is added.
    """

    gamma: float = 0.0
    stem: bool = True
    kernel: bool = False
    skip: bool = True
    head: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x) if self.stem else x
        for i in range(2):
            y = nn.relu(nn.Dense(8, name=f"in{i}")(x))
            zeros = {"kernel_init": nn.initializers.zeros} if self.kernel else {}
            y = nn.Dense(8, name=f"out{i}", **zeros)(y)
            if not self.kernel:
                y = y * self.param(f"gamma{i}", nn.initializers.constant(self.gamma), (8,))
            x = x + y if self.skip else y
        return nn.Dense(3, name="head")(x) if self.head else {"features": x}


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("kernel", [True, False])
def test_a_branch_that_starts_at_zero_is_no_fault(stem, head, kernel):
    model, x = Residual(stem=stem, head=head, kernel=kernel), normal(16, 8)
    signal = probe_linen(model, init(model, x), x, jacobians=False)
    first, second = signal.verdict.splitlines()
    assert first.startswith("healthy") and second.startswith("by design: layers ")
    zero = {"in0", "in1", "out0", "out1"}
    assert {name for name, layer in signal.items() if layer.starts_at_zero} == zero
    # The gradient of what it is a branch of, from the closed form: the blocks pass x on.
    if stem and head:
        z = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (16, 3))
        w = np.asarray(init(model, x)["params"]["head"]["kernel"], np.float64)
        exact = np.asarray(z, np.float64) @ w.T / 16
        assert signal["stem"].gradient_std == pytest.approx(exact.std(), rel=1e-4)
        norms = np.linalg.norm(exact), np.linalg.norm(np.asarray(z, np.float64) / 16)
        if not kernel:  # stem and head alone have a gradient, five layers apart
            growth = (norms[0] / norms[1]) ** (1 / 5)
            assert signal.backward_growth == pytest.approx(growth, rel=1e-4)


@pytest.mark.parametrize("norm", [BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("preactivation", [False, True])
def test_a_resnet_of_zero_initialized_branches_is_healthy(norm, preactivation):
    images = normal(8, 8, 8, 3)
    model = ResNet((1, 1), 10, 8, norm, zero_init_scale=True, preactivation=preactivation)
    signal = probe_linen(model, init(model, images, train=True), images, train=True,
                         jacobians=False)  # fmt: skip
    assert signal.verdict.startswith("healthy"), signal.verdict
    assert [name for name, layer in signal.items() if layer.starts_at_zero] == [
        f"stage{stage}_block1/conv{i}" for stage in (1, 2) for i in (1, 2)
    ]
    assert "stage1_block1/conv1" in signal.verdict.splitlines()[1]


@pytest.mark.parametrize("kernel", [True, False])
def test_without_another_path_the_gradient_is_lost(kernel):
    model, x = Residual(skip=False, kernel=kernel), normal(16, 8)
    signal = probe_linen(model, init(model, x), x, jacobians=False)
    last = 4 if kernel else 5
    assert f"gradient lost: 0 at layer {last} (" in signal.verdict
    assert "by design" not in signal.verdict


def test_every_path_of_zeros_is_lost():
    def forward(params, x):
        h = x @ params["w"]
        a, b = h @ params["a"], h @ params["b"]
        out = (params["gamma"] * a + params["gamma"] * b) @ params["w"]
        return out, {"h": h, "a": a, "b": b, "out": out}

    params = {
        "w": normal(6, 6),
        "a": normal(6, 6) * 2,
        "b": normal(6, 6) * 3,
        "gamma": jnp.zeros(6),
    }
    verdict = probe_signal(forward, params, normal(8, 6), jacobians=False).verdict
    assert "gradient lost: 0 at layer 3 (b)" in verdict and "by design" not in verdict


def test_a_dead_branch_is_not_one_that_starts_at_zero():
    def forward(params, x):
        h = x @ params["w"]
        a = jax.nn.relu(h) @ params["w"] - 1e3
        out = h + jax.nn.relu(a) @ params["w"]
        stopped = jax.lax.stop_gradient(h @ params["w"])
        return out + stopped, {"h": h, "a": a, "out": out}

    signal = probe_signal(forward, {"w": normal(6, 6)}, normal(8, 6), jacobians=False)
    assert signal["a"].bypassed and not signal["a"].starts_at_zero
    assert "gradient 0 at layer 2 (a), in a branch" in signal.verdict
    assert "100% of the units of layer 2 (a) are dead" in signal.verdict


# --- an axis of devices, and nnx ---


class Synced(nn.Module):
    norm: type
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        h = nn.Dense(8, name="first")(x)
        h = self.norm(use_running_average=not train, axis_name=self.axis_name, name="norm")(h)
        return nn.Dense(3, name="head")(nn.relu(h))


class SyncedNnx(nnx.Module):
    def __init__(self, norm, axis_name, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = norm(8, axis_name=axis_name, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("norm", [nn.BatchNorm, BatchNorm])
def test_synced_statistics_on_one_device_are_those_of_the_batch(norm):
    x = normal(16, 5)
    model, alone = Synced(norm, "batch"), Synced(norm, None)
    variables = init(model, x, train=True)
    found = probe_linen(model, variables, x, train=True, axis_name="batch")
    same_signal(found, probe_linen(alone, variables, x, train=True))
    fails("give axis_name='batch'", probe_linen, model, variables, x, train=True)
    layers = linen_layers(model, variables, x, train=True, axis_name="batch")
    exact = np.asarray(x, np.float64) @ np.asarray(variables["params"]["first"]["kernel"])
    np.testing.assert_allclose(layers["first"], exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, NnxBatchNorm])
def test_an_nnx_model_has_the_verdict_of_its_linen_twin(norm):
    x = normal(16, 5)
    model = SyncedNnx(norm, None, nnx.Rngs(0))
    params = {
        name: {leaf: getattr(getattr(model, name), leaf)[...] for leaf in leaves}
        for name, leaves in {
            "first": ("kernel", "bias"), "norm": ("scale", "bias"), "head": ("kernel", "bias"),
        }.items()
    }  # fmt: skip
    twin = Synced(nn.BatchNorm, None)
    variables = {**init(twin, x, train=True), "params": params}
    expected = probe_linen(twin, variables, x, train=True)
    found = probe_nnx(model, x)
    assert list(found) == ["first", "head"] and not np.any(model.norm.mean[...])
    same_signal(found, expected)
    synced = SyncedNnx(norm, "batch", nnx.Rngs(0))
    same_signal(probe_nnx(synced, x, axis_name="batch"), expected)
    fails("give axis_name='batch'", probe_nnx, synced, x)
    assert nnx_layers(model, x)["first"].shape == (16, 8)
    fails("one of linen takes probe_linen", probe_nnx, twin, x)
    fails("one of nnx takes probe_nnx", probe_linen, model, {"params": {}}, x)
