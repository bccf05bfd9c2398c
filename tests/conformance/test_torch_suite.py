"""PyTorch's tests of its batch norm, asked of ours, with its own layers as the oracle.

The cases are those of module_inputs_torch_nn_BatchNorm1d, 2d and 3d in PyTorch's
torch/testing/_internal/common_modules.py, and of the test_batchnorm_* functions of test/test_nn.py.
PyTorch's feature axis is 1, its momentum is one minus ours, its running variance the unbiased one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.steps import fresh, inference, training

from bn_research.normalization import (
    BatchStats,
    batch_norm,
    cumulative_momentum,
    normalize,
    update_batch_stats,
)

torch = pytest.importorskip("torch")

LAYERS = {
    2: torch.nn.BatchNorm1d,
    3: torch.nn.BatchNorm1d,
    4: torch.nn.BatchNorm2d,
    5: torch.nn.BatchNorm3d,
}
DEFAULTS = dict(eps=1e-5, momentum=0.1, affine=True, track_running_stats=True)
CASES = [  # as PyTorch describes them
    pytest.param((4, 10), {}, id="1d affine"),
    pytest.param((4, 5, 3), {}, id="1d 3d_input"),
    pytest.param((4, 10), dict(eps=1e-3, momentum=None), id="1d affine_simple_average"),
    pytest.param((4, 10), dict(eps=1e-3, momentum=0.3, affine=False), id="1d not_affine"),
    pytest.param((4, 10), dict(track_running_stats=False), id="1d not_tracking_stats"),
    pytest.param((4, 10), dict(bias=False), id="1d affine_not_bias"),
    pytest.param((2, 3, 6, 6), dict(eps=1e-3, momentum=0.8), id="2d momentum"),
    pytest.param((2, 3, 6, 6), dict(eps=1e-3, momentum=None), id="2d simple_average"),
    pytest.param((2, 3, 6, 6), dict(momentum=0.8, affine=False), id="2d not_affine"),
    pytest.param((2, 3, 4, 4, 4), dict(eps=1e-3, momentum=0.7), id="3d momentum"),
    pytest.param((2, 3, 4, 4, 4), dict(track_running_stats=False), id="3d not_tracking_stats"),
]
RUNS = [pytest.param(*case.values, "float32", id=case.id) for case in CASES]
RUNS += [pytest.param(*case.values, "float64", id=f"{case.id}, float64") for case in CASES[1::4]]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def peer(shape, dtype="float32", bias=True, **options):
    """PyTorch's layer for inputs of this shape, with a random weight and bias."""
    layer = LAYERS[len(shape)](shape[1], **options).to(getattr(torch, dtype))
    if not bias:
        layer.register_parameter("bias", None)
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.tensor(normal(shape[1], seed)))
    return layer


def normal(shape, seed, dtype="float32", shift=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * 1.5 + shift).astype(dtype)


def array(tensor):
    """A copy: PyTorch's later updates in place must not reach it."""
    return None if tensor is None else tensor.detach().numpy().copy()


@jax.jit
def forward(x, scale=None, bias=None, epsilon=1e-5):
    return batch_norm(x, scale, bias, feature_axes=1, epsilon=epsilon)


def theirs(layer, x, g):
    """As `training` and `inference`, from PyTorch's layer in its present mode."""
    layer.zero_grad()
    x = torch.tensor(x, requires_grad=True)
    y = layer(x)
    (y * torch.tensor(g)).sum().backward()
    grads = (None if p is None else p.grad for p in (layer.weight, layer.bias))
    return [array(v) for v in (y, x.grad, *grads)]


def close(own, peer, tolerance):
    """Pairwise, relative to the largest entry of each; None goes with None."""
    for a, b in zip(own, peer, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            atol = tolerance * max(1, np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(("shape", "options", "dtype"), RUNS)
def test_layers_over_four_batches(shape, options, dtype):
    """Follows torch.nn.BatchNorm1d, 2d and 3d of common_modules.py: forwards, backwards, buffers.

    Three batches in training mode, with the buffers after each, then one in evaluation mode, where
    a layer without buffers normalizes by the batch.
    """
    layer = peer(shape, dtype, **options)
    settings = DEFAULTS | options
    scale, bias = (array(p) for p in (layer.weight, layer.bias))
    stats = None
    with jax.enable_x64(dtype == "float64"):
        if settings["track_running_stats"]:
            stats = fresh(shape[1], dtype)
        for step in range(4):
            layer.train(step < 3)
            x, g = normal(shape, 10 + step, dtype, shift=step), normal(shape, 20 + step, dtype)
            if settings["momentum"] is None:
                momentum = cumulative_momentum(step)
            else:
                momentum = 1 - settings["momentum"]
            expected = theirs(layer, x, g)
            given, options = (x, scale, bias, stats, g), dict(axis=1, epsilon=settings["eps"])
            if layer.training or stats is None:
                *own, stats = training(*given, momentum=momentum, unbiased=True, **options)
            else:
                own = inference(*given, **options)
            close(own, expected, TOLERANCE[dtype])
            if stats is not None:
                buffers = [array(layer.running_mean), array(layer.running_var)]
                close(stats, buffers, TOLERANCE[dtype])


def test_buffers_do_not_change_in_evaluation_or_untracked():
    """Follows test_batchnorm_buffer_update_when_stats_are_not_tracked.

    There a flag keeps the buffers, here momentum=1 does, to the bit.
    """
    layer, x = peer((32, 4)), normal((32, 4), 0)
    layer.track_running_stats = False
    before = [array(v) for v in (layer.running_mean, layer.running_var)]
    layer(torch.tensor(x))
    np.testing.assert_array_equal(array(layer.running_mean), before[0])
    stats = update_batch_stats(BatchStats(*before), forward(x)[1], momentum=1.0, unbiased=True)
    for own, old in zip(stats, before, strict=True):
        np.testing.assert_array_equal(own, old)


@pytest.mark.parametrize("shape", [(1, 10), (1, 10, 1)])
def test_one_value_per_channel(shape):
    """Follows test_batchnorm_raises_error_if_less_than_one_value_per_channel.

    PyTorch refuses. Ours logs it and gives bias, so that a masked or padded batch that happens to
    hold one example does not end a run; there is no unbiased variance of one value, and the running
    one stays.
    """
    x, bias = normal(shape, 0), normal(10, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        peer(shape)(torch.tensor(x))
    y, moments = forward(x, None, bias)
    np.testing.assert_array_equal(y, bias.reshape(shape))
    stats = update_batch_stats(fresh(10), moments, momentum=0.0, unbiased=True)
    np.testing.assert_array_equal(stats.mean, x.reshape(10))
    np.testing.assert_array_equal(stats.var, np.ones(10))
    # In evaluation one example is as good as many, in both.
    layer = peer(shape).eval()
    own = normalize(x, np.zeros(10), np.ones(10), *map(array, layer.parameters()), feature_axes=1)
    np.testing.assert_allclose(own, array(layer(torch.tensor(x))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 9), (0, 5, 2, 2), (0, 5, 2, 2, 2)])
def test_zero_batch(shape):
    """Follows the cases zero_batch of common_modules.py: empty output, statistics as they were."""
    layer, x = peer(shape, affine=False), np.zeros(shape, np.float32)
    assert layer(torch.tensor(x)).shape == shape
    np.testing.assert_array_equal(array(layer.running_var), np.ones(5))
    y, moments = forward(x)
    assert y.shape == shape
    stats = BatchStats(normal(5, 0), normal(5, 1) ** 2)
    new = update_batch_stats(stats, moments, momentum=0.9, unbiased=True)
    np.testing.assert_array_equal(new, stats)


@pytest.mark.parametrize("wrong", ["mean", "var", "scale", "bias"])
@pytest.mark.parametrize("size", [9, 11])
def test_wrong_sizes(wrong, size):
    """Follows test_batchnorm_raises_error_if_running_mean_is_not_same_size_as_input.

    And its twins for the running variance, the weight and the bias.
    """
    x, values = normal((2, 10), 0), {name: np.ones(10, np.float32) for name in ("mean", "var")}
    values[wrong] = np.ones(size, np.float32)
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    with pytest.raises(RuntimeError, match="should contain 10 elements"):
        torch.nn.functional.batch_norm(
            torch.tensor(x),
            tensors["mean"],
            tensors["var"],
            weight=tensors.get("scale"),
            bias=tensors.get("bias"),
        )
    with pytest.raises(ValueError, match=rf"{wrong} has shape \({size},\): it must be \(10,\)"):
        normalize(x, **values)
    if wrong in ("scale", "bias"):
        with pytest.raises(ValueError, match=rf"{wrong} has shape \({size},\)"):
            batch_norm(x, **{wrong: values[wrong]})


@pytest.mark.parametrize("shape", [(2, 10), (2, 10, 5, 5), (2, 10, 4, 4, 4)])
def test_epsilon_must_not_be_negative(shape):
    """Follows module_error_inputs_torch_nn_BatchNorm1d_2d_3d; ours allows 0, with no NaN in it."""
    x = normal(shape, 0)
    for epsilon in (-1.0, 0.0):
        with pytest.raises(ValueError, match="eps must be positive"):
            peer(shape, eps=epsilon)(torch.tensor(x))
    with pytest.raises(ValueError, match="epsilon=-1.0 is not allowed: it must be ≥ 0"):
        batch_norm(x, feature_axes=1, epsilon=-1.0)
    x[:, 3] = 7.0
    y, _ = forward(x, epsilon=0.0)
    np.testing.assert_array_equal(y[:, 3], np.zeros_like(x[:, 3]))
    axes = (0, *range(2, len(shape)))
    np.testing.assert_allclose(np.var(y, axes), np.arange(10) != 3, atol=1e-5)


def test_momentum_out_of_range():
    """PyTorch takes any number, and a running variance can turn negative; ours refuses."""
    x = normal((4, 10), 0)
    layer = peer((4, 10), momentum=3.0)
    layer(torch.tensor(x * 0.01))
    assert np.all(array(layer.running_var) < 0)
    with pytest.raises(ValueError, match=r"momentum=-2.0 is not allowed: it must lie in \[0, 1\]"):
        update_batch_stats(fresh(10), forward(x)[1], momentum=1 - 3.0, unbiased=True)


@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1)])
def test_order_of_axes_and_mixed_dtypes(shape):
    """Follows test_batchnorm_nhwc_cpu: features second or last, and bfloat16 with a float32 weight.

    PyTorch's output has the dtype of the input, ours that of the promotion unless told.
    """
    layer, x, g = peer(shape), normal(shape, 0), normal(shape, 1)
    y, *grads = theirs(layer, x, g)
    scale, bias = map(array, layer.parameters())

    @jax.jit
    def last(x, g):
        def loss(x, scale, bias):
            y, _ = batch_norm(x, scale, bias)
            return jnp.sum(g * y), y

        (_, y), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        half, _ = batch_norm(x.astype(jnp.bfloat16), scale, bias, dtype=jnp.bfloat16)
        wide, _ = batch_norm(x.astype(jnp.bfloat16), scale, bias)
        return y, grads, half, wide

    own, (dx, *own_grads), half, wide = last(np.moveaxis(x, 1, -1), np.moveaxis(g, 1, -1))
    own, dx = (np.moveaxis(v, -1, 1) for v in (own, dx))
    close([own, dx, *own_grads], [y, *grads], 2e-5)

    bf16 = layer(torch.tensor(x).bfloat16())
    assert bf16.dtype == torch.bfloat16 and half.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    half = np.moveaxis(np.asarray(half, np.float32), -1, 1)
    np.testing.assert_allclose(half, array(bf16.float()), rtol=0.02, atol=0.02)


def test_transposed_input():
    """Follows test_batchnorm_non_contig_cpu: a view, in evaluation mode."""
    x = np.transpose(np.arange(6, dtype=np.float32).reshape(1, 3, 2, 1), (0, 2, 1, 3))
    layer = peer(x.shape).eval()
    expected = array(layer(torch.tensor(x)))
    own = normalize(x, np.zeros(2), np.ones(2), *map(array, layer.parameters()), feature_axes=1)
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_statistics():
    """Follows test_batchnorm_raises_error_if_running_var_or_running_mean_have_forward_grad.

    PyTorch refuses to differentiate in its buffers. Here new statistics carry the gradient of the
    batch's, 1/n and 2(x − μ)/n of each element, unless it is cut.
    """
    stats = fresh(3)

    def new_stats(x, stop_gradient):
        new = update_batch_stats(stats, forward(x)[1], stop_gradient=stop_gradient)
        return sum(jnp.sum(v) for v in new)

    x = normal((8, 3), 0)
    gradient = jax.jit(jax.grad(new_stats), static_argnums=1)
    np.testing.assert_array_equal(gradient(x, True), np.zeros((8, 3)))
    expected = torch.tensor(x, requires_grad=True)
    (0.01 * (expected.mean(0) + expected.var(0, unbiased=False)).sum()).backward()
    np.testing.assert_allclose(gradient(x, False), expected.grad, rtol=1e-4, atol=1e-7)


def test_large_mean():
    """At 1e4 standard deviations the variance is exact in both, the output in ours alone.

    PyTorch on a CPU multiplies out x·a + b, which rounds to 1e-3 of a standard deviation there.
    """
    x = normal((256, 3), 0, shift=1.5e4)
    exact = peer(x.shape, "float64", affine=False)
    y64 = array(exact(torch.tensor(x.astype(np.float64))))
    layer = peer(x.shape, affine=False)
    y, moments = forward(x)
    stats = update_batch_stats(fresh(3), moments, momentum=0.9, unbiased=True)
    assert np.abs(array(layer(torch.tensor(x))) - y64).max() > 1e-4
    assert np.abs(y - y64).max() < 2e-5
    np.testing.assert_allclose(stats.var, array(exact.running_var), rtol=1e-5)
