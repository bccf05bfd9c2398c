"""Folded linear maps against the map and the transform in float64, and against PyTorch's fusion."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.normalization import BatchStats, normalize
from bn_research.normalization.folding import check_folding, fold_after, fold_before

CHANNELS, OUTPUTS = 4, 6
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def linear(x, kernel, bias=None, **options):
    """Flax's `Dense` (rank 2) or `Conv`."""
    rank = kernel.ndim - 2
    if rank == 0:
        y = x @ kernel
    else:
        options = dict(window_strides=(1,) * rank, padding="VALID") | options
        layout = LAYOUTS[rank]
        y = jax.lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)
    return y if bias is None else y + bias


def closed_form(x, stats, scale, offset, epsilon):
    """γ·(x − μ)/√(σ² + ε) + β in float64."""
    mean, var = (np.asarray(v, np.float64) for v in stats)
    x_hat = (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon)
    return x_hat * (1 if scale is None else scale) + (0 if offset is None else offset)


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def statistics(features, dtype=np.float32):
    """Variances from 1e-30 to 1e4, means of the size of the standard deviation."""
    var = np.geomspace(1e-30, 1e4, features)
    return BatchStats((numbers(features, 10) * np.sqrt(var)).astype(dtype), var.astype(dtype))


MAPS = {
    "dense": ((CHANNELS, OUTPUTS), dict()),
    "conv": ((3, 2, CHANNELS, OUTPUTS), dict()),
    "1d": ((3, CHANNELS, OUTPUTS), dict()),
    "3d": ((2, 1, 2, CHANNELS, OUTPUTS), dict()),
    "strided": ((3, 3, CHANNELS, OUTPUTS), dict(window_strides=(2, 3))),
    "dilated": ((2, 2, CHANNELS, OUTPUTS), dict(rhs_dilation=(2, 3))),
    "grouped": ((2, 2, CHANNELS // 2, OUTPUTS), dict(feature_group_count=2)),
    "depthwise": ((2, 2, 1, 2 * CHANNELS), dict(feature_group_count=CHANNELS)),
}


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(linear, **MAPS[name][1]))


def case(name, dtype):
    """Kernel, bias and samples of a map."""
    shape, _ = MAPS[name]
    spatial = (7, 6, 4)[: len(shape) - 2]
    x = numbers((3, *spatial, CHANNELS), 1)
    return tuple(v.astype(dtype) for v in (numbers(shape, 2), numbers(shape[-1], 3), x))


def assert_close(got, expected, tolerance):
    error = np.max(np.abs(np.asarray(got, np.float64) - expected), initial=0)
    assert error <= tolerance * np.max(np.abs(expected)), error / np.max(np.abs(expected))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_folded_map_equals_map_and_transform(name, dtype, tolerance):
    """Feature by feature for `fold_after`: the variances span 34 powers of ten."""
    with jax.enable_x64(dtype == "float64"):
        kernel, bias, x = case(name, dtype)
        groups = MAPS[name][1].get("feature_group_count", 1)
        run = compiled(name)
        outputs = kernel.shape[-1]
        scale, offset = (numbers(outputs, seed).astype(dtype) for seed in (4, 5))
        stats = statistics(outputs, dtype)
        new_kernel, new_bias = fold_after(kernel, bias, stats, scale, offset)
        assert new_kernel.dtype == new_bias.dtype == dtype and new_kernel.shape == kernel.shape
        got = run(x, new_kernel, new_bias)
        expected = closed_form(run(x, kernel, bias), stats, scale, offset, 1e-5)
        for feature in range(outputs):
            assert_close(got[..., feature], expected[..., feature], tolerance)

        scale, offset = (numbers(CHANNELS, seed).astype(dtype) for seed in (6, 7))
        stats = statistics(CHANNELS, dtype)
        x = (stats.mean + np.sqrt(stats.var) * x).astype(dtype)
        new_kernel, new_bias = fold_before(
            kernel, bias, stats, scale, offset, feature_group_count=groups
        )
        assert new_kernel.dtype == new_bias.dtype == dtype and new_kernel.shape == kernel.shape
        normalized = closed_form(x, stats, scale, offset, 1e-5).astype(dtype)
        expected = np.asarray(run(normalized, kernel, bias), np.float64)
        assert_close(run(x, new_kernel, new_bias), expected, tolerance)


@pytest.mark.parametrize("channels", [(4, 4), (4, 6), (5, 1)])
@pytest.mark.parametrize("window", [(3,), (3, 2), (2, 1, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", 1])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_transposed_convolution_with_either_layout(transpose_kernel, padding, window, channels):
    """Flax's own, in float64; equal channels too, where the two layouts have one shape."""
    inputs, outputs = channels
    layer = nn.ConvTranspose(
        outputs,
        window,
        strides=(2, 1, 3)[: len(window)],
        padding=padding,
        kernel_dilation=1 if padding == "CIRCULAR" else (1, 2, 1)[: len(window)],
        transpose_kernel=transpose_kernel,
    )
    with jax.enable_x64(True):
        x = numbers((2, *(5, 4, 3)[: len(window)], inputs), 1)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        kernel, bias = (numbers(shapes[name].shape, 2) for name in ("kernel", "bias"))
        apply = jax.jit(
            lambda kernel, bias: layer.apply({"params": dict(kernel=kernel, bias=bias)}, x)
        )
        stats = statistics(outputs, float)
        scale, offset = numbers(outputs, 4), numbers(outputs, 5)
        expected = closed_form(apply(kernel, bias), stats, scale, offset, 1e-5)
        folded = fold_after(kernel, bias, stats, scale, offset, transpose_kernel=transpose_kernel)
        error = np.abs(apply(*folded) - expected).max(axis=tuple(range(len(window) + 1)))
        assert np.all(error <= 1e-12 * np.abs(expected).max(axis=tuple(range(len(window) + 1))))


@pytest.mark.parametrize("absent", ["scale", "offset", "bias", "all"])
def test_what_is_none_is_one_or_zero(absent):
    kernel, bias, x = case("dense", np.float32)
    for fold, features in ((fold_after, OUTPUTS), (fold_before, CHANNELS)):
        stats = BatchStats(numbers(features, 8).astype("f"), np.ones(features, np.float32))
        given = dict(bias=bias, scale=numbers(features, 4), offset=numbers(features, 5))
        given = {k: None if absent in (k, "all") else v.astype("f") for k, v in given.items()}
        bn = dict(stats=stats, scale=given["scale"], offset=given["offset"], epsilon=0.3)
        new_kernel, new_bias = fold(kernel, given["bias"], **bn)
        assert new_bias.dtype == np.float32
        if fold is fold_after:
            expected = closed_form(linear(x, kernel, given["bias"]), **bn)
        else:
            expected = linear(closed_form(x, **bn), kernel.astype(np.float64), given["bias"])
        assert_close(x @ new_kernel + new_bias, np.asarray(expected, np.float64), 1e-5)


def test_zero_padding_is_right_after_and_wrong_at_the_borders_before():
    kernel, bias, x = case("conv", np.float32)
    same = jax.jit(functools.partial(linear, padding="SAME"))

    stats, offset = statistics(OUTPUTS), numbers(OUTPUTS, 5).astype(np.float32)
    expected = closed_form(same(x, kernel, bias), stats, None, offset, 1e-5)
    assert_close(same(x, *fold_after(kernel, bias, stats, None, offset)), expected, 1e-5)

    stats = BatchStats(np.full(CHANNELS, 2, np.float32), np.ones(CHANNELS, np.float32))
    normalized = closed_form(x, stats, None, None, 1e-5).astype(np.float32)
    expected = np.asarray(same(normalized, kernel, bias), np.float64)
    got = same(x, *fold_before(kernel, bias, stats))
    inner = (slice(None), slice(1, -1), slice(0, -1))  # a window of 3 by 2 looks 1 back, 1 ahead
    assert_close(got[inner], expected[inner], 1e-5)
    error = np.abs(got - expected)
    for border in (error[:, 0], error[:, -1], error[:, :, -1]):
        assert border.min(axis=(0, 1)).max() > 1


@pytest.mark.parametrize("fold", [fold_after, fold_before])
def test_half_precision_rounds_once(fold):
    """Computed in float32: the result is the float64 one, rounded to the kernel's dtype."""
    features = OUTPUTS if fold is fold_after else CHANNELS
    kernel, bias, _ = case("dense", jnp.bfloat16)
    stats = statistics(features)
    wide = fold(kernel.astype(np.float32), bias.astype(np.float32), stats)
    for bias_dtype in (jnp.bfloat16, jnp.float32):
        new_kernel, new_bias = fold(kernel, bias.astype(bias_dtype), stats)
        assert (new_kernel.dtype, new_bias.dtype) == (jnp.bfloat16, bias_dtype)
        np.testing.assert_array_equal(new_kernel, wide[0].astype(jnp.bfloat16))
        np.testing.assert_array_equal(new_bias, wide[1].astype(bias_dtype))
    assert fold(kernel, None, stats)[1].dtype == jnp.bfloat16
    exact = 1 / np.sqrt(stats.var.astype(np.float64) + 1e-5)
    exact = exact if fold is fold_after else exact[:, None]
    np.testing.assert_allclose(wide[0], kernel.astype(np.float64) * exact, rtol=1e-6)


def test_tiny_variances_without_epsilon():
    kernel, bias, _ = case("conv", np.float32)
    stats = statistics(OUTPUTS)
    mean, std = stats.mean.astype(np.float64), np.sqrt(stats.var.astype(np.float64))
    new_kernel, new_bias = fold_after(kernel, bias, stats, epsilon=0.0)
    np.testing.assert_allclose(new_kernel, kernel / std, rtol=1e-6)
    np.testing.assert_allclose(new_bias, (bias - mean) / std, rtol=1e-6)

    stats = statistics(CHANNELS)
    mean, std = stats.mean.astype(np.float64), np.sqrt(stats.var.astype(np.float64))
    new_kernel, new_bias = fold_before(kernel, bias, stats, epsilon=0.0)
    np.testing.assert_allclose(new_kernel, kernel / std[:, None], rtol=1e-6)
    expected = bias - np.einsum("hwio,i->o", kernel.astype(np.float64), mean / std)
    np.testing.assert_allclose(new_bias, expected, rtol=1e-5)


def test_no_spread_and_no_epsilon_leaves_the_offset():
    kernel, bias, x = case("dense", np.float32)
    offset = numbers(OUTPUTS, 5).astype(np.float32)
    stats = BatchStats(np.ones(OUTPUTS, np.float32), np.zeros(OUTPUTS, np.float32))
    new_kernel, new_bias = fold_after(kernel, bias, stats, None, offset, epsilon=0.0)
    np.testing.assert_array_equal(new_kernel, np.zeros(kernel.shape))
    np.testing.assert_array_equal(new_bias, offset)

    offset = numbers(CHANNELS, 5).astype(np.float32)
    stats = BatchStats(np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32))
    new_kernel, new_bias = fold_before(kernel, bias, stats, None, offset, epsilon=0.0)
    np.testing.assert_array_equal(new_kernel, np.zeros(kernel.shape))
    np.testing.assert_allclose(new_bias, bias + offset @ kernel, rtol=1e-5)


@pytest.mark.parametrize("fold", [fold_after, fold_before])
def test_a_traced_call_equals_an_eager_one(fold):
    kernel, bias, _ = case("dense", np.float32)
    features = OUTPUTS if fold is fold_after else CHANNELS
    stats = statistics(features)
    traced = jax.jit(fold)(kernel, bias, stats, epsilon=0.1)
    for got, expected in zip(traced, fold(kernel, bias, stats, epsilon=0.1), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_digits_lost_by_folding_before_at_large_means(ratio):
    """As the docstring says: about 4e-7 of the ratio; the original keeps its digits."""
    x = (numbers((256, 64), 1) + ratio * np.sign(numbers(64, 2))).astype(np.float32)
    stats, kernel = BatchStats(x.mean(0), x.var(0)), numbers((64, 8), 3).astype(np.float32)
    exact = closed_form(x, stats, None, None, 1e-5) @ kernel.astype(np.float64)
    assert_close(normalize(x, *stats) @ kernel, exact, 1e-6)
    new_kernel, new_bias = fold_before(kernel, None, stats)
    error = check_folding(lambda x: exact, lambda x: x @ new_kernel + new_bias, x, tolerance=1.0)
    assert 4e-8 * ratio < error < 1e-6 * ratio


@pytest.mark.parametrize("name", ["conv", "grouped", "strided"])
def test_against_pytorch(name):
    torch = pytest.importorskip("torch")
    fusion = pytest.importorskip("torch.nn.utils.fusion")
    kernel, bias, x = case(name, np.float64)
    options = MAPS[name][1]
    groups, stride = options.get("feature_group_count", 1), options.get("window_strides", 1)
    conv = torch.nn.Conv2d(
        CHANNELS, OUTPUTS, kernel.shape[:2], stride, groups=groups, dtype=torch.float64
    ).eval()
    bn = torch.nn.BatchNorm2d(OUTPUTS, eps=1e-3, dtype=torch.float64).eval()
    stats = statistics(OUTPUTS, float)
    scale, offset = numbers(OUTPUTS, 4), numbers(OUTPUTS, 5)
    with torch.no_grad():
        values = (kernel.transpose(3, 2, 0, 1), bias, scale, offset, *stats)
        tensors = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(torch.tensor(value))
        fused = fusion.fuse_conv_bn_eval(conv, bn)
        theirs = fused(torch.tensor(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    with jax.enable_x64(True):
        new_kernel, new_bias = fold_after(kernel, bias, stats, scale, offset, epsilon=1e-3)
        np.testing.assert_allclose(
            new_kernel, fused.weight.detach().numpy().transpose(2, 3, 1, 0), rtol=1e-12
        )
        np.testing.assert_allclose(new_bias, fused.bias.detach().numpy(), rtol=1e-12)
        assert_close(compiled(name)(x, new_kernel, new_bias), theirs, 1e-12)


def test_check_folding():
    kernel, bias, x = case("conv", np.float32)
    stats = BatchStats(*(np.full(CHANNELS, v, np.float32) for v in (2, 4)))
    folded = fold_before(kernel, bias, stats)

    def compare(padding, **options):
        return check_folding(
            lambda x: linear(normalize(x, *stats), kernel, bias, padding=padding),
            lambda x: linear(x, *folded, padding=padding),
            x,
            **options,
        )

    error = compare("VALID")
    assert isinstance(error, float) and 0 < error < 1e-5
    with pytest.raises(ValueError, match=r"relative error of \d.*e-07: allowed is tolerance=1e-09"):
        compare("VALID", tolerance=1e-9)
    with pytest.raises(ValueError, match=r"relative error of 0\.\d+: allowed is tolerance=1e-05"):
        compare("SAME")


@pytest.mark.parametrize(
    ("original", "folded", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.5, -4.0], 0.125),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-9], np.inf),
        ([1.0, 2.0], [1.0, np.nan], np.nan),
        ([1.0, np.nan], [1.0, np.nan], np.nan),
        ([1.0, np.inf], [1.0, np.inf], np.nan),
    ],
)
def test_error_of_check_folding(original, folded, error):
    functions = (lambda x: np.array(original), lambda x: np.array(folded))
    if error <= 1:
        assert check_folding(*functions, None, tolerance=1.0) == error
    else:
        with pytest.raises(ValueError, match=f"relative error of {error}: allowed is"):
            check_folding(*functions, None, tolerance=1.0)


def test_check_folding_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"folded_fn gives shape \(3,\).*original_fn, \(2, 3\)"):
        check_folding(lambda x: np.ones((2, 3)), lambda x: np.ones(3), None)


@pytest.mark.parametrize("window", [(), (3,), (3, 2)])
def test_where_jax_casts_nothing_by_itself(window, strict_arrays):
    """Strict settings change no number: of a kernel in bfloat16 too, by statistics in float32."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((*window, 2, 6)), jnp.bfloat16)
    stats = BatchStats(jnp.ones(6), jnp.full(6, 2.0))
    before = BatchStats(jnp.ones(4), jnp.full(4, 2.0))

    def fold():
        after = fold_after(kernel, None, stats, jnp.ones(6), jnp.ones(6))
        return after, fold_before(kernel, None, before, feature_group_count=2)

    strict = fold()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.tree.map(np.testing.assert_array_equal, strict, fold())
