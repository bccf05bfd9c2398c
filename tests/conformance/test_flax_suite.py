"""Flax's tests of its batch norm, asked of ours: re-expressed, and Flax's own files.

The first part follows tests/linen/linen_test.py, tests/linen/linen_transforms_test.py and
tests/nnx/nn/normalization_test.py, with Flax's layers beside ours in both modes of
use_fast_variance. The second runs when the environment variable BN_RESEARCH_FLAX_SOURCE names a
checkout of Flax: every test there whose code names BatchNorm, with ours in its place.
"""

import inspect
import json
import os
import pathlib
import subprocess
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bn_research.layers import linen
from bn_research.layers import nnx as own_nnx

KEY = jax.random.key(0)


def linen_step(layer, x, mask=None, **options):
    """A training step from initial variables: output and running statistics."""
    layer = layer(use_running_average=False, **options)
    variables = layer.init(KEY, x, mask=mask)
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


def nnx_step(layer, x, mask=None, **options):
    layer = layer(x.shape[options.get("axis", -1)], rngs=nnx.Rngs(0), **options)
    return layer(x, mask=mask), layer.mean[...], layer.var[...]


each_library = pytest.mark.parametrize(
    ("step", "flax", "own"),
    [
        pytest.param(linen_step, nn.BatchNorm, linen.BatchNorm, id="linen"),
        pytest.param(nnx_step, nnx.BatchNorm, own_nnx.BatchNorm, id="nnx"),
    ],
)


def all_three(step, flax, own, x, mask=None, **options):
    """Results of ours, of Flax's in one pass and of Flax's in two, by one compilation."""

    @jax.jit
    def run(x, mask):
        return (
            step(own, x, mask, **options),
            step(flax, x, mask, use_fast_variance=True, **options),
            step(flax, x, mask, use_fast_variance=False, **options),
        )

    return run(x, mask)


def normal(shape, seed=0, shift=0.0):
    x = np.random.default_rng(seed).standard_normal(shape) + shift
    return x.astype(np.float32)


def close(own, flax, tolerance):
    for a, b in zip(own, flax, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@each_library
@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm(step, flax, own, masked):
    """Follows test_batch_norm of linen_test.py: NaN under the mask, mean 0 and variance 1 outside.

    Under the mask ours gives bias; Flax normalizes what lies there, and NaN comes out.
    """
    x, mask = normal((4, 3, 2)), None
    where = np.ones(x.shape, bool)
    if masked:
        mask = np.random.default_rng(1).random((4, 3, 1)) < 0.5
        where = np.broadcast_to(mask, x.shape)
        x = np.where(where, x, np.float32(np.nan))
    ours, *flaxes = all_three(step, flax, own, x, mask, momentum=0.9)
    y, mean, var = ours
    axes = (0, 1)
    np.testing.assert_allclose(np.mean(y, axes, where=where), np.zeros(2), atol=1e-6)
    np.testing.assert_allclose(np.var(y, axes, where=where), np.ones(2), rtol=1e-4)
    x64 = x.astype(np.float64)
    np.testing.assert_allclose(mean, 0.1 * np.mean(x64, axes, where=where), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(var, 0.9 + 0.1 * np.var(x64, axes, where=where), rtol=1e-5)
    np.testing.assert_array_equal(y[~where], np.zeros((~where).sum()))
    for flax_y, *stats in flaxes:
        close([y[where], mean, var], [flax_y[where], *stats], 1e-5)
        assert np.all(np.isnan(flax_y[~where]))


@each_library
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.uint8, jnp.bool_])
@pytest.mark.parametrize("options", [{}, dict(use_scale=False, use_bias=False)])
def test_complex_and_integer_input(step, flax, own, dtype, options):
    """Follows test_batch_norm_complex of linen_test.py: complex mean, real variance.

    Integers and bool are float32. flax.nnx casts a complex mean to its float32 running mean, which
    JAX is about to refuse: it keeps the real part, ours all of it.
    """
    x = normal((4, 3, 2)) * 10
    if dtype == jnp.complex64:
        x = x + 1j * normal((4, 3, 2), 1)
    x = (x > 0 if dtype == jnp.bool_ else x if dtype != jnp.uint8 else np.abs(x)).astype(dtype)
    options = dict(options, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = list(step(flax, x, **options))
    ours = step(own, x, **options)
    x = np.asarray(x, np.complex128)
    mean, var = x.mean((0, 1)), (np.abs(x - x.mean((0, 1))) ** 2).mean((0, 1))
    truth = (x - mean) / np.sqrt(var + 1e-5), 0.1 * mean, 0.9 + 0.1 * var
    if step is nnx_step and dtype == jnp.complex64:
        np.testing.assert_allclose(theirs[1], ours[1].real, atol=1e-5)
        theirs[1] = ours[1]
    for found, flax_found, expected in zip(ours, theirs, truth, strict=True):
        assert found.dtype == flax_found.dtype
        np.testing.assert_allclose(found, flax_found, atol=1e-5)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_complex_scale(train):
    """Of real x: result and gradients of Flax's layer."""
    x, g = normal((8, 3)), normal((8, 3), 1)
    stats = {"mean": normal(3), "var": normal(3) ** 2 + 1}
    params = {"scale": (normal(3) + 1j * normal(3, 1)).astype(np.complex64), "bias": normal(3)}

    def run(layer):
        layer = layer(use_running_average=not train)

        def loss(params, x):
            variables = {"params": params, "batch_stats": stats}
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(g * jnp.abs(y) ** 2), (y, new["batch_stats"])

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    ours, theirs = run(linen.BatchNorm), run(nn.BatchNorm)
    for found, expected in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.BatchNorm, linen.BatchNorm])
def test_multi_init(layer):
    """Follows test_batch_norm_multi_init: one layer called twice, initialized without its axis.

    The second call must not normalize by what the first left in the running statistics. The
    variables then serve any batch size under the axis.
    """

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = layer(name="norm", use_running_average=False, axis_name="batch")
            x = norm(x)
            return x, norm(x)

    (first, second), variables = jax.jit(Twice().init_with_output)(KEY, normal((2, 4), 1))
    np.testing.assert_allclose(first, second, rtol=5e-3)
    np.testing.assert_array_equal(variables["batch_stats"]["norm"]["mean"], np.zeros(4))

    def apply(x):
        return Twice().apply(variables, x, mutable=["batch_stats"])

    x = normal((3, 5, 4), 2, shift=2.0)
    (first, _), new = jax.jit(jax.vmap(apply, axis_name="batch"))(x)
    flat = x.reshape(15, 4).astype(np.float64)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)
    # Two updates: the batch's mean, then that of what is normalized already, 0.
    mean = new["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, np.tile(0.99 * 0.01 * flat.mean(0), (3, 1)), rtol=1e-4)


@pytest.mark.parametrize("layer", [nn.BatchNorm, linen.BatchNorm])
def test_vmap(layer):
    """Follows test_vmap_batchnorm of linen_transforms_test.py: nn.vmap, the axis named."""

    class DenseNorm(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            return layer(axis_name=self.axis_name, use_running_average=False)(x)

    mapped = nn.vmap(
        DenseNorm,
        in_axes=(0,),
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="batch",
    )(axis_name="batch")
    x = normal((5, 4, 4), shift=1.0)

    @jax.jit
    def run(x):
        variables = DenseNorm().init(KEY, x[0])
        flat, flat_new = DenseNorm().apply(variables, x.reshape(-1, 4), mutable=["batch_stats"])
        y, new = mapped.apply(variables, x, mutable=["batch_stats"])
        return (flat.reshape(y.shape), flat_new), (y, new)

    flat, mapped_result = run(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *(flat, mapped_result))


@each_library
def test_axis_index_groups(step, flax, own):
    """Pairs of devices share statistics under pmap, alike in both; under vmap in ours alone."""
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    options = dict(axis_name="i", axis_index_groups=groups, momentum=0.9)
    x = normal((8, 3, 2), shift=1.0) * np.arange(1, 9, dtype=np.float32)[:, None, None]

    def run(layer, **more):
        return lambda x: step(layer, x, **options, **more)

    ours = jax.pmap(run(own), axis_name="i")(x)
    for fast in (True, False):
        close(ours, jax.pmap(run(flax, use_fast_variance=fast), axis_name="i")(x), 1e-4)
    close(jax.jit(jax.vmap(run(own), axis_name="i"))(x), ours, 1e-5)
    with pytest.raises(NotImplementedError, match="axis_index_groups"):
        jax.vmap(run(flax), axis_name="i")(x)


@each_library
def test_masks_over_devices(step, flax, own):
    """Devices with unequal numbers of unmasked examples: ours weighs elements, Flax devices."""
    x = normal((8, 6, 2)) + np.arange(8, dtype=np.float32)[:, None, None]
    mask = np.arange(6) <= np.arange(8)[:, None] % 6

    def run(layer):
        step_of = jax.pmap(
            lambda x, m: step(layer, x, m[:, None], axis_name="i", momentum=0.0), axis_name="i"
        )
        return step_of(x, mask)

    kept = x[mask].astype(np.float64)
    _, mean, var = run(own)
    np.testing.assert_allclose(mean, np.tile(kept.mean(0), (8, 1)), rtol=1e-5)
    np.testing.assert_allclose(var, np.tile(kept.var(0), (8, 1)), rtol=1e-5)
    _, flax_mean, _ = run(flax)
    unweighed = np.mean([x[i][mask[i]].mean(0) for i in range(8)], 0)
    np.testing.assert_allclose(flax_mean, np.tile(unweighed, (8, 1)), rtol=1e-4)
    assert np.abs(unweighed - kept.mean(0)).max() > 0.1


@each_library
def test_large_mean(step, flax, own):
    """Follows use_fast_variance=False of test_layer_norm and test_instance_norm in linen_test.py.

    There x + 1e4 is said to blow up the fast variance, and does. Ours needs no choice, and keeps
    digits of x − mean that the slow one rounds away.
    """
    x = normal((256, 2), shift=1e4)
    x64 = x.astype(np.float64)
    exact = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
    ours, fast, slow = all_three(step, flax, own, x, momentum=0.0)
    error = [np.abs(y - exact).max() for y, *_ in (ours, fast, slow)]
    assert error[0] < 2e-5 < error[2] < 2e-3 and error[1] > 0.1, error
    np.testing.assert_allclose(ours[2], x64.var(0), rtol=1e-5)
    assert np.any(np.abs(fast[2] / x64.var(0) - 1) > 0.1)


@each_library
def test_constant_input(step, flax, own):
    """Ours gives bias to the bit, whatever the constant; Flax's may call rounding a variance."""
    x = np.tile(np.float32([0.1, 1234.567, -3e4, 0.0]), (64, 1))
    ours, fast, slow = all_three(step, flax, own, x, momentum=0.0)
    jax.tree.map(np.testing.assert_array_equal, ours, (np.zeros((64, 4)), x[0], np.zeros(4)))
    assert np.any(fast[2] > 1e-4) or np.any(fast[0] != 0) or np.any(slow[0] != 0)
    ours = jax.jit(lambda x: step(own, x, epsilon=0.0))(x)
    np.testing.assert_array_equal(ours[0], np.zeros((64, 4)))
    flax_y, *_ = jax.jit(lambda x: step(flax, x, epsilon=0.0))(x)
    assert np.any(np.isnan(flax_y))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_linen_and_nnx_are_one(dtype, param_dtype, masked):
    """Follows test_nnx_linen_batchnorm_equivalence of normalization_test.py.

    Its mask of shape (5,) leaves features out altogether. Both of ours are the same bits, without
    the promote_dtype that Flax's test needs for that, and near Flax's in either mode where Flax has
    a number: without a valid element its mean and variance are NaN, and ours stay as they were.
    """
    x, mask = normal((10, 5)), np.array([1, 0, 1, 0, 1], bool) if masked else None
    kept = np.ones(5, bool) if mask is None else mask
    options = dict(dtype=dtype, param_dtype=param_dtype)

    @jax.jit
    def run(x):
        return (
            linen_step(linen.BatchNorm, x, mask, **options),
            nnx_step(own_nnx.BatchNorm, x, mask, **options),
            linen_step(nn.BatchNorm, x, mask, **options),
            linen_step(nn.BatchNorm, x, mask, use_fast_variance=False, **options),
        )

    ours, own_other, *flaxes = run(x)
    jax.tree.map(np.testing.assert_array_equal, ours, own_other)
    assert ours[0].dtype == own_other[0].dtype == dtype
    np.testing.assert_array_equal(ours[1][~kept], np.zeros((~kept).sum()))
    np.testing.assert_array_equal(ours[2][~kept], np.ones((~kept).sum()))
    for flax in flaxes:
        tolerance = 1e-5 if dtype == param_dtype == jnp.float32 else 2e-3
        close([v[..., kept] for v in ours], [v[..., kept] for v in flax], tolerance)
        assert np.all(np.isnan(flax[1][~kept]))


# Flax's own files. This module runs itself: as a program it is pytest for one checkout.


class Recorder:
    """Pytest plugin: only tests that name BatchNorm, and how each of them ends."""

    def __init__(self):
        self.outcomes = {}

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if "BatchNorm" in inspect.getsource(item.function)]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.outcomes[report.nodeid] = [report.outcome, report.longreprtext]


def main(which, destination, *tests):
    """Runs tests with "flax"'s layers or with ours, and writes down how they end."""
    if which == "own":
        nn.BatchNorm = nn.normalization.BatchNorm = linen.BatchNorm
        nnx.BatchNorm = nnx.nn.normalization.BatchNorm = own_nnx.BatchNorm
    recorder = Recorder()
    # Neither Flax's settings nor ours, but every warning is an error, as in Flax's.
    options = ["-q", "--tb=short", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider"]
    options += ["-W", "error", "-W", "ignore::pytest.PytestWarning"]
    options += ["--import-mode=importlib", "--continue-on-collection-errors"]
    pytest.main([*options, *tests], plugins=[recorder])
    pathlib.Path(destination).write_text(json.dumps(recorder.outcomes))


def outcomes(source, which, destination, tests):
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, which, str(destination), *tests]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert destination.exists(), run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads(destination.read_text())


@pytest.mark.skipif(
    "BN_RESEARCH_FLAX_SOURCE" not in os.environ,
    reason="BN_RESEARCH_FLAX_SOURCE names no checkout of Flax",
)
def test_flax_own_files(tmp_path):
    """Ours passes what Flax's passes, complex numbers and all, with every warning an error."""
    source = pathlib.Path(os.environ["BN_RESEARCH_FLAX_SOURCE"])
    files = [
        str(path.relative_to(source))
        for path in sorted((source / "tests").rglob("*_test.py"))
        if "BatchNorm" in path.read_text()
    ]
    own = outcomes(source, "own", tmp_path / "own.json", files)
    assert sum(outcome == "passed" for outcome, _ in own.values()) >= 100
    failed = {name: text for name, (outcome, text) in own.items() if outcome == "failed"}
    new = list(failed)
    if new:  # unless Flax's own layer fails them too, beside other versions of JAX or Flax
        flax = outcomes(source, "flax", tmp_path / "flax.json", new)
        new = [name for name in new if flax[name][0] == "passed"]
    assert not new, "\n".join(f"{name}\n{failed[name]}" for name in new)


if __name__ == "__main__":
    main(*sys.argv[1:])
