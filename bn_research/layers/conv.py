"""`Conv` for flax.linen: `flax.linen.Conv`, fast in a scanned training step on a CPU too."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from bn_research.layers.conv_gradients import Geometry, by_patches, convolve

Implementation = Literal["auto", "explicit", "patches", "xla"]


def conv2d(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "kernel_height kernel_width in_channels out_channels"],
    *,
    strides: Sequence[int] = (1, 1),
    implementation: Implementation = "auto",
) -> Float[Array, "batch out_height out_width out_channels"]:
    """Convolution (cross-correlation) with zero padding "SAME": out_height = ⌈height/stride⌉.

    Args:
      x: images, channels last.
      kernel: weights, in Flax's layout.
      strides: down and across.
      implementation: "xla", the gradients derived by JAX; "explicit", XLA's convolution with the
        gradients of `bn_research.layers.conv_gradients`; "patches", a product with every output's
        image patch; or "auto": explicit on a CPU, else XLA's.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in ("auto", "explicit", "patches", "xla"):
        raise ValueError(
            f"implementation={implementation!r} is unknown: allowed are auto, explicit, patches, "
            "xla"
        )
    x, kernel = promote_dtype(x, kernel)
    if implementation == "auto":
        # Where the types of arrays tell how they are sharded, JAX alone knows what follows.
        alike = jax.typeof(x).update(shape=kernel.shape) == jax.typeof(kernel)
        implementation = "explicit" if alike and jax.default_backend() == "cpu" else "xla"
    if implementation == "xla":
        return jax.lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    (height, width), (down, across) = kernel.shape[:2], strides
    geometry = Geometry((x.shape[1], x.shape[2]), (height, width), (down, across))
    return (convolve if implementation == "explicit" else by_patches)(x, kernel, geometry)


class Conv(nn.Module):
    """`flax.linen.Conv` of stride 1 and padding "SAME": same parameters, same values.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      use_bias: add a bias.
      kernel_init: initializer of kernel.
      bias_init: initializer of bias.
      param_dtype: of kernel and bias.
      implementation: see `conv2d`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    use_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros
    param_dtype: Any = jnp.float32
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch height width out_channels"]:
        """Convolves x."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        y = conv2d(x, kernel, implementation=self.implementation)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            y = y + bias.reshape(1, 1, 1, -1)
        return y
