"""ONNX's operator BatchNormalization (opset 15), as onnx's own reference evaluates it.

The cases are those of onnx/backend/test/case/node/batchnorm.py (test_batchnorm_example,
test_batchnorm_epsilon, test_batchnorm_example_training_mode, test_batchnorm_epsilon_training_mode),
at every rank that layers of one to three space axes meet. ONNX's feature axis is 1 and its momentum
is ours: running = momentum·old + (1 − momentum)·batch, with the biased variance.
"""

import functools

import jax
import numpy as np
import pytest
from conformance import steps

from bn_research.normalization import BatchStats, normalize

helper = pytest.importorskip("onnx.helper")
reference = pytest.importorskip("onnx.reference")

SHAPES = [(9, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)]
INPUTS = ("x", "scale", "bias", "mean", "var")


@functools.cache
def operator(training, dtype="float32", **attributes):
    """The node as a model; arrays (x, scale, bias, mean, var) -> list of outputs."""
    names = ("y", "running_mean", "running_var") if training else ("y",)
    # Optional attributes may be left out; training_mode=0 is such a default.
    if training:
        attributes["training_mode"] = 1
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("BatchNormalization", INPUTS, names, **attributes)
    inputs, outputs = (
        [helper.make_tensor_value_info(name, kind, None) for name in group]
        for group in (INPUTS, names)
    )
    graph = helper.make_graph([node], "batch_norm", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    evaluator = reference.ReferenceEvaluator(model)
    return lambda *arrays: evaluator.run(None, dict(zip(INPUTS, arrays, strict=True)))


def arguments(shape, dtype=np.float32, shift=0.0):
    """Random input, scale, bias and running statistics; features differ in mean and spread."""
    rng = np.random.default_rng(len(shape))
    features = [shape[1]] + [1] * (len(shape) - 2)
    spread, centre = rng.uniform(0.5, 3, features), rng.normal(size=features)
    x = rng.standard_normal(shape) * spread + centre + shift
    scale, bias, mean = rng.standard_normal((3, shape[1]))
    return [v.astype(dtype) for v in (x, scale, bias, mean, rng.uniform(0.1, 2, shape[1]))]


def inference(x, scale, bias, mean, var, epsilon=1e-5):
    y, *_ = steps.inference(x, scale, bias, (mean, var), axis=1, epsilon=epsilon)
    return y


def training(x, scale, bias, mean, var, momentum=0.9, epsilon=1e-5):
    """The operator's order of arguments and of results."""
    options = dict(axis=1, momentum=momentum, epsilon=epsilon)
    y, *_, stats = steps.training(x, scale, bias, BatchStats(mean, var), **options)
    return y, *stats


@pytest.mark.parametrize("shape", SHAPES)
def test_inference(shape):
    """Follows test_batchnorm_example of onnx."""
    values = arguments(shape)
    (expected,) = operator(False)(*values)
    np.testing.assert_allclose(inference(*values), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_training(shape):
    """Follows test_batchnorm_example_training_mode of onnx; its default momentum is 0.9."""
    values = arguments(shape)
    expected = operator(True)(*values)
    for own, onnx_value in zip(training(*values), expected, strict=True):
        assert own.shape == onnx_value.shape and own.dtype == onnx_value.dtype
        np.testing.assert_allclose(own, onnx_value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_is_the_share_of_the_old_value(momentum):
    """The attribute momentum: 0 takes the batch's statistics, 1 keeps the running ones."""
    values = arguments(SHAPES[2])
    expected = operator(True, momentum=momentum)(*values)[1:]
    stats = training(*values, momentum)[1:]
    for own, onnx_value in zip(stats, expected, strict=True):
        np.testing.assert_allclose(own, onnx_value, rtol=1e-5, atol=1e-6)
    if momentum == 1:
        np.testing.assert_array_equal(stats, values[3:])


def test_epsilon():
    """Follows test_batchnorm_epsilon and test_batchnorm_epsilon_training_mode of onnx."""
    values = arguments(SHAPES[2])
    (expected,) = operator(False, epsilon=0.01)(*values)
    np.testing.assert_allclose(inference(*values, 0.01), expected, rtol=1e-5, atol=1e-6)
    expected, *_ = operator(True, epsilon=0.01)(*values)
    np.testing.assert_allclose(training(*values, 0.9, 0.01)[0], expected, rtol=1e-5, atol=2e-6)


def test_steps_in_a_row():
    """The operator's running outputs fed back as its inputs, over five batches."""
    own = theirs = arguments(SHAPES[1])[3:]
    for seed in range(5):
        x, scale, bias, *_ = arguments(SHAPES[1], shift=seed)
        _, *own = training(x, scale, bias, *own)
        _, *theirs = operator(True)(x, scale, bias, *theirs)
    for a, b in zip(own, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_float64():
    """To the last digits of double precision; the operator's attributes are float32 numbers."""
    values = arguments(SHAPES[2], np.float64)
    momentum, epsilon = map(float, np.float32([0.9, 1e-5]))
    with jax.enable_x64(True):
        evaluated, trained = inference(*values, epsilon), training(*values, momentum, epsilon)
    expected = [*operator(False, "float64")(*values), *operator(True, "float64")(*values)]
    for own, onnx_value in zip((evaluated, *trained), expected, strict=True):
        assert own.dtype == np.float64
        np.testing.assert_allclose(own, onnx_value, rtol=1e-12, atol=1e-13)


def test_half_precision():
    """The operator squares in the input's precision; ours reduces in float32."""
    values = arguments(SHAPES[2], np.float16)
    (evaluated,) = operator(False, "float16")(*values)
    own = inference(*values)
    assert own.dtype == evaluated.dtype == np.float16
    np.testing.assert_allclose(own, evaluated, rtol=1e-2, atol=1e-2)

    x = np.repeat(np.float16([-300, 300]), 64)[:, None]  # float16 ends at 65504
    one, zero = np.ones(1), np.zeros(1)
    with np.errstate(over="ignore"):
        theirs = operator(True, "float16")(x, *np.float16([one, zero, zero, one]))
    np.testing.assert_array_equal(theirs[0], np.zeros_like(x))
    y, mean, var = training(x, *np.float16([one, zero]), *np.float32([zero, one]), 0.0)
    np.testing.assert_allclose(y, np.sign(x), rtol=1e-3)
    np.testing.assert_allclose([mean, var], [[0], [9e4]], rtol=1e-6)


def test_large_mean():
    """The exact variance in both; at 1e4 standard deviations the operator's rounds the mean away.

    Its x − mean is off by what float32 cannot hold of the mean, 1e-3 of a standard deviation.
    """
    values = arguments((512, 3), shift=1e4)
    double = [v.astype(np.float64) for v in values]
    exact = operator(True, "float64")(*double)
    theirs, own = operator(True)(*values), training(*values)
    np.testing.assert_allclose(own[1], exact[1], rtol=1e-6)
    np.testing.assert_allclose(own[2], exact[2], rtol=1e-5)
    assert np.abs(own[0] - exact[0]).max() < 2e-5
    assert np.abs(theirs[0] - exact[0]).max() > 1e-4


def test_bad_shapes():
    """A scale of the wrong length is refused by ours, and broadcast or refused by numpy there."""
    x, scale, bias, mean, var = arguments(SHAPES[2])
    with pytest.raises(ValueError, match=r"scale has shape \(2,\): it must be \(3,\)"):
        normalize(x, mean, var, scale[:2], bias, feature_axes=1)
    with pytest.raises(ValueError, match=r"var has shape \(1,\): it must be \(3,\)"):
        normalize(x, mean, var[:1], scale, bias, feature_axes=1)
    (y,) = operator(False)(x, scale, bias, mean, var[:1])
    assert y.shape == x.shape
