"""`conv2d` and `Conv` against XLA's convolution and `flax.linen.Conv`."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_research.layers.conv import Conv, conv2d

KERNELS = [(1, 1), (3, 3), (5, 5), (2, 2), (4, 4), (1, 4), (7, 3)]


def data(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def close(got, expected, rtol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


def all_equal_xla(x, kernel, wrap=lambda f: f, **options):
    """Of values and gradients in images and kernel; returns the values of "explicit"."""
    results = []
    for implementation in ("explicit", "patches", "xla"):
        conv = functools.partial(conv2d, implementation=implementation, **options)
        y, pull = jax.vjp(wrap(conv), x, kernel)
        results.append((y, *pull(data(y.shape, 2))))
    for explicit, patches, xla in zip(*results, strict=True):
        close(explicit, xla)
        close(patches, xla)
    return results[0][0]


def by_loops(x, kernel):
    """Zero padding of k − 1 in all, the smaller half first, as "SAME"."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    pads = [((k - 1) // 2, k // 2) for k in (height, width)]
    padded = np.pad(x, [(0, 0), *pads, (0, 0)])
    y = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            patch = padded[:, i : i + height, j : j + width]
            y[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel)
    return y


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_all_equal_xla_and_loops(kernel_size):
    """Images may be smaller than the kernel."""
    x, kernel = data((2, 6, 3, 3)), data((*kernel_size, 3, 4), 1)
    close(all_equal_xla(x, kernel, jax.jit), by_loops(x, kernel))


@pytest.mark.parametrize("strides", [(2, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (2, 2), (7, 3)])
@pytest.mark.parametrize("size", [(6, 3), (7, 8)])
def test_strided_equal_xla(kernel_size, strides, size):
    all_equal_xla(data((2, *size, 3)), data((*kernel_size, 3, 4), 1), strides=strides)


@pytest.mark.parametrize("batch", [0, 1, 8, 9, 16, 19])
def test_gradient_in_the_kernel_takes_every_example_once(batch):
    """It is summed over a few at a time."""
    x, kernel, g = data((batch, 5, 4, 3)), data((3, 3, 3, 2), 1), data((batch, 5, 4, 2), 2)

    def gradient(implementation):
        conv = functools.partial(conv2d, implementation=implementation)
        return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](g)[0]

    expected = gradient("xla")
    assert (expected == 0).all() == (batch == 0)
    close(gradient("explicit"), expected)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_derivatives_of_every_order_and_mapped(strides):
    """Forwards over backwards, backwards over backwards, and members under `vmap`."""
    both = data((9, 5, 6, 3)), data((3, 2, 3, 4), 1)
    change = data((9, 5, 6, 3), 2), data((3, 2, 3, 4), 3)
    others = jnp.stack([both[1], change[1]])

    def derivatives(implementation):
        conv = functools.partial(conv2d, strides=strides, implementation=implementation)

        def loss(both):
            return jnp.sum(jnp.sin(conv(*both)))

        gradient = jax.grad(loss)

        def squares(both):
            return sum(jnp.sum(jnp.square(leaf)) for leaf in gradient(both))

        def of_example(kernel, x):
            return loss((x[None], kernel))

        return (
            jax.jvp(loss, (both,), (change,)),
            jax.jvp(gradient, (both,), (change,)),
            jax.grad(squares)(both),
            jax.vmap(conv, (None, 0))(both[0], others),
            jax.vmap(conv, (1, None))(both[0][:, None], both[1]),
            jax.vmap(jax.grad(of_example), (None, 0))(both[1], both[0]),
            jax.vmap(lambda kernel: gradient((both[0], kernel)))(others),
        )

    jax.tree.map(functools.partial(close, rtol=1e-4), derivatives("explicit"), derivatives("xla"))


def test_gradients_in_a_loop_keep_the_axes_that_libraries_take():
    """XLA on a CPU gives no others to a library from the body of a loop."""
    x, kernel = data((16, 6, 6, 3)), data((3, 3, 3, 4), 1)

    def layouts(implementation):
        def step(carry, _):
            loss = lambda both: jnp.sum(conv2d(*both, implementation=implementation) ** 2)  # noqa: E731
            return jax.tree.map(jnp.subtract, carry, jax.grad(loss)(carry)), None

        program = jax.jit(lambda both: jax.lax.scan(step, both, length=2)[0])
        text = program.lower((x, kernel)).compiler_ir("stablehlo")
        return set(re.findall(r"dim_numbers = (\[[^\n]*?\]->\[[^\]]*\])", str(text)))

    usual = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    assert layouts("explicit") == {usual}
    assert layouts("xla") > {usual}


def test_arrays_that_vary_over_devices_in_other_ways():
    """Under `shard_map` with its check, JAX's own convolution is taken where types differ."""
    x, kernel = data((32, 5, 4, 3)), data((3, 3, 3, 2), 1)
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def gradient(kernel, x, vary=False):
        if vary:
            kernel = jax.lax.pcast(kernel, ("batch",), to="varying")
        loss = lambda kernel: jnp.sum(conv2d(x, kernel, implementation="auto") ** 2)  # noqa: E731
        found = jax.grad(loss)(kernel)
        return jax.lax.psum(found, "batch") if vary else found

    expected = jax.grad(lambda k: jnp.sum(conv2d(x, k, implementation="xla") ** 2))(kernel)
    for vary in (False, True):
        mapped = jax.shard_map(
            functools.partial(gradient, vary=vary),
            mesh=mesh,
            in_specs=(spec(), spec("batch")),
            out_specs=spec(),
        )
        close(jax.jit(mapped)(kernel, x), expected)


@pytest.mark.parametrize("implementation", ["auto", "explicit", "patches", "xla"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_module_is_flax_conv(implementation, use_bias):
    """Same parameters with the same initial values, same outputs."""
    x, key = data((2, 5, 5, 3)), jax.random.key(0)
    options = dict(use_bias=use_bias, bias_init=nn.initializers.normal())
    own = Conv(4, (3, 3), implementation=implementation, **options)
    flax = nn.Conv(4, (3, 3), **options)
    y, variables = own.init_with_output(key, x)
    expected, flax_variables = flax.init_with_output(key, x)
    jax.tree.map(np.testing.assert_array_equal, variables, flax_variables)
    assert ("bias" in variables["params"]) == use_bias
    close(y, expected)


@pytest.mark.parametrize("implementation", ["explicit", "patches", "xla"])
@pytest.mark.parametrize(
    ("x_dtype", "param_dtype"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_module_promotes_as_flax_does(implementation, x_dtype, param_dtype):
    x = jnp.asarray(data((1, 4, 4, 2)), x_dtype)
    options = dict(param_dtype=jnp.dtype(param_dtype))
    expected, variables = nn.Conv(3, (3, 3), **options).init_with_output(jax.random.key(0), x)
    y = Conv(3, (3, 3), implementation=implementation, **options).apply(variables, x)
    assert y.dtype == expected.dtype
    close(np.float32(y), np.float32(expected), 2e-2)


def test_auto_is_chosen_by_the_backend(monkeypatch):
    x, kernel = data((1, 4, 4, 2)), data((3, 3, 2, 2))

    def program():
        return str(jax.make_jaxpr(lambda x: conv2d(x, kernel))(x))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "conv_general_dilated" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in program()


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation='fft' is unknown: allowed are auto"):
        conv2d(data((1, 2, 2, 1)), data((1, 1, 1, 1)), implementation="fft")
