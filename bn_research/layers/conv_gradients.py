r"""Convolution whose gradients XLA on a CPU runs as fast as the convolution itself.

With T(x, k, g) = Σ g·(x ∗ k), the convolution and its gradients in image and kernel are the
derivatives of T in g, x and k. Each is linear in the two others, and its own derivatives are the
other two: one primitive does for all, to any order, forwards and backwards.

XLA on a CPU hands a convolution to a library only if images are (batch, height, width, channels)
and kernels (height, width, in, out), and the gradients that JAX derives have them permuted. A
program without loops is put right by a pass of the compiler; in the body of a loop, as a scanned
training step is, they run one multiplication at a time, up to 300 times slower. So axes are
permuted here. For the kernel's gradient that is done for a few examples at a time: fused with
what comes before, permuting a whole batch takes longer than the convolution.

Under `vmap`, members with kernels of their own are multiplied by image patches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

_EXAMPLES = 8  # whose axes are permuted at a time


class Geometry(NamedTuple):
    """Of a convolution; everything down and across."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]

    @property
    def output(self) -> tuple[int, int]:
        """⌈image/stride⌉."""
        down, across = (-(-n // s) for n, s in zip(self.image, self.strides, strict=True))
        return down, across

    @property
    def pads(self) -> list[tuple[int, int]]:
        """Zeros before and after."""
        return jax.lax.padtype_to_pads(self.image, self.kernel, self.strides, "SAME")

    @property
    def dilated(self) -> list[int]:
        """The output's size when its elements stand a stride apart."""
        return [(n - 1) * s + 1 for n, s in zip(self.output, self.strides, strict=True)]


def _convolve(x: Array, kernel: Array, **options: Any) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


def _output(x: Array, kernel: Array, geometry: Geometry) -> Array:
    return _convolve(x, kernel, window_strides=geometry.strides, padding=geometry.pads)


def _image(g: Array, kernel: Array, geometry: Geometry) -> Array:
    """Gradient in the image: g, a stride apart, convolved with the kernel turned around."""
    padding = [
        (k - 1 - low, n - out + low)
        for n, k, out, (low, _) in zip(
            geometry.image, geometry.kernel, geometry.dilated, geometry.pads, strict=True
        )
    ]
    turned = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    return _convolve(
        g, turned, window_strides=(1, 1), padding=padding, lhs_dilation=geometry.strides
    )


def _kernel(x: Array, g: Array, geometry: Geometry) -> Array:
    """Gradient in the kernel: the sum of those of a few examples at a time."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def of(start: Array | int, size: int) -> Array:
        some_x, some_g = (jax.lax.dynamic_slice_in_dim(v, start, size) for v in (x, g))
        return _kernel_at_once(some_x, some_g, geometry).astype(wide)

    first = len(x) % _EXAMPLES or min(len(x), _EXAMPLES)
    total = of(0, first)
    if first < len(x):
        starts = jnp.arange(first, len(x), _EXAMPLES)
        total, _ = jax.lax.scan(lambda t, start: (t + of(start, _EXAMPLES), None), total, starts)
    return total.astype(x.dtype)


def _kernel_at_once(x: Array, g: Array, geometry: Geometry) -> Array:
    """Channels of x convolved with those of g, summed over examples."""
    padding = []
    for axis, (n, k, out, (low, _)) in enumerate(
        zip(geometry.image, geometry.kernel, geometry.dilated, geometry.pads, strict=True), 1
    ):
        high = k - 1 + out - n - low
        x = jax.lax.slice_in_dim(x, 0, n + min(high, 0), axis=axis)
        padding.append((low, max(high, 0)))
    found = _convolve(
        jnp.transpose(x, (3, 1, 2, 0)),
        jnp.transpose(g, (1, 2, 0, 3)),
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=geometry.strides,
    )
    return jnp.transpose(found, (1, 2, 0, 3))


_PRODUCTS = {"output": _output, "image": _image, "kernel": _kernel}


@functools.partial(jax.jit, static_argnames=("of", "geometry"))
def _product(a: Array, b: Array, *, of: str, geometry: Geometry) -> Array:
    return _PRODUCTS[of](a, b, geometry)


def by_patches(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    geometry: Geometry,
) -> Float[Array, "batch out_height out_width out_channels"]:
    """The convolution as the product of every output's image patch with the kernel."""
    padded = jnp.pad(x, [(0, 0), *geometry.pads, (0, 0)])
    rows, columns = (
        [slice(i, n - k + i + 1, stride) for i in range(k)]
        for n, k, stride in zip(padded.shape[1:3], geometry.kernel, geometry.strides, strict=True)
    )
    patches = [padded[:, row, column] for row in rows for column in columns]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def convolve(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    geometry: Geometry,
) -> Float[Array, "batch out_height out_width out_channels"]:
    """The convolution, with the gradients above."""
    return _primitive.bind(x, kernel, of="output", geometry=geometry)


def _shape(a: Any, b: Any, *, of: str, geometry: Geometry) -> Any:
    shapes = {
        "output": (a.shape[0], *geometry.output, b.shape[3]),
        "image": (a.shape[0], *geometry.image, b.shape[2]),
        "kernel": (*geometry.kernel, a.shape[3], b.shape[3]),
    }
    return a.update(shape=shapes[of])


def _transposed(
    cotangent: Array, a: Any, b: Any, *, operand: int, of: str, geometry: Geometry
) -> Array:
    """The product that is the transpose of `of` in one operand, given the other."""
    other = b if operand == 0 else a
    kind, *pair = {
        ("output", 0): ("image", cotangent, other),
        ("output", 1): ("kernel", other, cotangent),
        ("image", 0): ("output", cotangent, other),
        ("image", 1): ("kernel", cotangent, other),
        ("kernel", 0): ("image", other, cotangent),
        ("kernel", 1): ("output", other, cotangent),
    }[of, operand]
    return _primitive.bind(*pair, of=kind, geometry=geometry)


def _batched(operands: Any, axes: Any, *, of: str, geometry: Geometry) -> tuple[Array, int]:
    a, b = operands
    if of != "kernel" and axes[1] is None:  # one kernel for all: they are more examples
        a = jnp.moveaxis(a, axes[0], 0)
        found = _primitive.bind(a.reshape(-1, *a.shape[2:]), b, of=of, geometry=geometry)
        return found.reshape(*a.shape[:2], *found.shape[1:]), 0
    member = functools.partial(_product_by_patches, of=of, geometry=geometry)
    return jax.vmap(member, axes)(a, b), 0


def _product_by_patches(a: Array, b: Array, *, of: str, geometry: Geometry) -> Array:
    if of == "output":
        return by_patches(a, b, geometry)
    if of == "image":
        image = jax.ShapeDtypeStruct((len(a), *geometry.image, b.shape[2]), a.dtype)
        (found,) = jax.linear_transpose(lambda x: by_patches(x, b, geometry), image)(a)
        return found
    kernel = jax.ShapeDtypeStruct((*geometry.kernel, a.shape[3], b.shape[3]), a.dtype)
    (found,) = jax.linear_transpose(lambda k: by_patches(a, k, geometry), kernel)(b)
    return found


_primitive = Primitive("conv2d")
_primitive.def_impl(_product)
_primitive.def_abstract_eval(_shape)
mlir.register_lowering(_primitive, mlir.lower_fun(_product, multiple_results=False))
ad.defbilinear(_primitive, *(functools.partial(_transposed, operand=i) for i in (0, 1)))
batching.primitive_batchers[_primitive] = _batched
