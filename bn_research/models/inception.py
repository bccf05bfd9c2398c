"""BN-Inception: the network of Ioffe & Szegedy (2015), figure 5.

    stem          7×7 of stride 2 → 64, max-pooling, 1×1 → 64, 3×3 → 192, max-pooling
    inception_*   ten modules, the table MODULES of `inception_modules`
    head          mean over all positions, dense layer

In a module four branches see the same input, and their outputs are concatenated: 1×1; 1×1 → 3×3;
1×1 → 3×3 → 3×3; 3×3 pooling → 1×1. The modules 3c and 4e halve height and width: the last layer of
every branch has stride 2, the first branch is missing, and pooling passes all channels through. The
paper prints 576, 576 and 1024 as the widths of 4c, 4d and 4e, whose branches as printed add up to
608, 608 and 1056; here they are what they add up to. With 1000 classes, BN and a stem that is not
separable there are 11,285,224 parameters.

For small images there is a stem that halves height and width once instead of three times, 3×3 → 64
and max-pooling, and a choice of modules: `Inception(10, stem="small", modules=("3a", "3c", "4a"))`.

Padding is "SAME" throughout; an average at the border is over the pixels there are.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from bn_research.layers.conv import Implementation, conv2d
from bn_research.layers.dropout import check_rate, dropout, never_drops
from bn_research.layers.local_response import local_response_normalization
from bn_research.layers.max_pool import max_pool
from bn_research.models.inception_modules import MODULES, Widths, scaled
from bn_research.models.masked_norm import masked_norm

SMALLEST = 32  # allowed height and width, with the defaults

Stem = Literal["imagenet", "small"]
STEM_HALVINGS: dict[Stem, int] = {"imagenet": 3, "small": 1}  # of height and width


class ConvBlock(nn.Module):
    """Convolution → norm → activation; without norm the convolution has a bias.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      norm: a factory of normalization layers, called with `name`, or None.
      activation: of the output.
      kernel_init: initializer of kernels.
      stride: of the convolution.
      dtype: of the computation and of the result.
      depth_multiplier: None, or a separable convolution: every input channel has this many filters
        of its own, and a 1×1 convolution mixes them.
      implementation: of all but depthwise convolutions, see `bn_research.layers.conv.conv2d`.
    """

    features: int
    kernel_size: int
    norm: Callable[..., nn.Module] | None
    activation: Callable[[Array], Array]
    kernel_init: Callable[..., Any]
    stride: int = 1
    dtype: Any = None
    depth_multiplier: int | None = None
    implementation: Implementation = "xla"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Convolves, normalizes and activates x."""
        options: dict[str, Any] = dict(kernel_init=self.kernel_init, dtype=self.dtype)
        size, strides = (self.kernel_size,) * 2, (self.stride,) * 2
        if self.depth_multiplier is not None:
            channels = x.shape[-1]
            x = nn.Conv(
                self.depth_multiplier * channels,
                size,
                strides,
                feature_group_count=channels,
                use_bias=False,
                name="depthwise",
                **options,
            )(x)
            size, strides = (1, 1), (1, 1)
        options |= dict(use_bias=self.norm is None, name="conv")
        if self.implementation != "xla":
            options["conv_general_dilated"] = functools.partial(_convolve, self.implementation)
        x = nn.Conv(self.features, size, strides, **options)(x)
        if self.norm is not None:
            # A norm layer without dtype promotes to that of its float32 parameters. Rounding here
            # gives the bits that it would give with dtype, and its statistics stay float32.
            x = self.norm(name="batch_norm")(x).astype(x.dtype)
        return self.activation(x)


class InceptionModule(nn.Module):
    """Four branches on the same input, concatenated along channels.

    Attributes:
      widths: numbers of channels.
      block: `ConvBlock` with everything but features, kernel_size, stride and name.
    """

    widths: Widths
    block: Callable[..., ConvBlock]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """Concatenated branches, in the order of figure 5."""
        widths, block = self.widths, self.block
        branches = []
        if widths.conv_1x1:
            branches.append(block(widths.conv_1x1, 1, name="conv_1x1")(x))
        y = block(widths.reduce_3x3, 1, name="reduce_3x3")(x)
        branches.append(block(widths.conv_3x3, 3, stride=widths.stride, name="conv_3x3")(y))
        y = block(widths.reduce_double_3x3, 1, name="reduce_double_3x3")(x)
        y = block(widths.double_3x3, 3, name="double_3x3_1")(y)
        branches.append(block(widths.double_3x3, 3, stride=widths.stride, name="double_3x3_2")(y))
        y = _max_pool(x, widths.stride) if widths.pool == "max" else _avg_pool(x)
        if widths.projection:
            y = block(widths.projection, 1, name="projection")(y)
        branches.append(y)
        return jnp.concatenate(branches, axis=-1)


class Inception(nn.Module):
    """BN-Inception, or with norm=None the same network without BN.

    The paper's networks: Inception and BN-Baseline have dropout and local response normalization,
    BN-x5 and BN-x30 have neither, BN-x5-Sigmoid has `activation=jax.nn.sigmoid` as well. Their
    first convolution is separable with a depth multiplier of 8.

    Attributes:
      num_classes: units of the head.
      norm: a factory of normalization layers, called with `name` and `use_running_average`, for
        example `functools.partial(BatchNorm, epsilon=1e-3)`. None is no normalization;
        convolutions then have biases.
      width: multiplies every number of channels; they are rounded (half to even) and at least 1.
      dropout: rate on the pooled features before the head, in training; a traced one serves many
        rates with one program, and is not checked.
      local_response_norm: GoogLeNet's two layers in the stem (Szegedy et al., 2014).
      separable_stem: make the first convolution separable.
      activation: after every convolution.
      modules: names of the modules there are, out of MODULES and in their order; None is all ten.
        Each has the widths of its row, whatever it sees as input.
      stem: "imagenet", or "small" for images of few pixels: the first convolution is 3×3 of
        stride 1, and after its pooling, and the first local response normalization, come the
        modules.
      implementation: of convolutions, see `bn_research.layers.conv.conv2d`. "auto" makes a scanned
        training step several times faster on a CPU.
      kernel_init: initializer of every kernel. He's keeps the signal where there is no BN: at
        initialization logits vary by 0.06 between images, with LeCun's by 0.0007 (width 1/4).
      dtype: of the computation, such as bfloat16; None promotes the dtypes of images and
        parameters. Parameters, norm statistics, the pooled features and the logits are float32.
      last_norm: the factory of the last module's layers; None is norm. With
        `functools.partial(BatchNorm, axis=(1, 2, 3))` its BN is per activation, as in the last
        hidden layers of some networks of the paper's ensemble (section 4.2.3), and the images'
        size is fixed.
    """

    num_classes: int = 1000
    norm: Callable[..., nn.Module] | None = None
    width: float = 1.0
    dropout: float | Float[Array, ""] = 0.0
    local_response_norm: bool = False
    separable_stem: bool = False
    activation: Callable[[Array], Array] = jax.nn.relu
    kernel_init: Callable[..., Any] = nn.initializers.he_normal()
    dtype: Any = None
    modules: tuple[str, ...] | None = None
    stem: Stem = "imagenet"
    implementation: Implementation = "xla"
    last_norm: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        keys: Key[Array, "batch"] | None = None,
        where: Bool[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of x.

        Args:
          x: floating-point images of any size from n×n up, where n = 2^halvings is such that what
            is halved has two pixels at least: 3 halvings in the stem, or 1 in the small one, and 1
            each in 3c and 4e. With the defaults n is 32.
          train: normalize by the batch and drop out.
          keys: a PRNG key for each example, for dropout in training; see
            `bn_research.layers.dropout`.
          where: False marks examples that are padding, which norm layers are given as `mask`.

        Raises:
          ValueError: images of a bad shape or dtype, a bad width, stem or rate of dropout, dropout
            without keys, or modules that are unknown, repeated, out of order or none.
        """
        if self.stem not in STEM_HALVINGS:
            raise ValueError(f"stem={self.stem!r} is unknown: allowed are 'imagenet' and 'small'")
        modules = _chosen(self.modules)
        strided = sum(widths.stride == 2 for widths in modules)
        _check_images(x, STEM_HALVINGS[self.stem] + strided)
        check_rate("dropout", self.dropout)
        if not 0 < self.width < float("inf"):
            raise ValueError(f"width={self.width!r} is not allowed: it must be positive and finite")
        if train and keys is None and not never_drops(self.dropout):
            raise ValueError(f"dropout={self.dropout!r} needs keys in training: one an example")

        def block(
            features: int, kernel_size: int, norm: Any = self.norm, **options: Any
        ) -> ConvBlock:
            return ConvBlock(
                scaled(features, self.width),
                kernel_size,
                masked_norm(norm and functools.partial(norm, use_running_average=not train), where),
                self.activation,
                self.kernel_init,
                dtype=self.dtype,
                implementation=self.implementation,
                **options,
            )

        multiplier = scaled(8, self.width) if self.separable_stem else None
        if self.stem == "imagenet":
            x = block(64, 7, stride=2, depth_multiplier=multiplier, name="stem_7x7")(x)
        else:
            x = block(64, 3, depth_multiplier=multiplier, name="stem_3x3")(x)
        x = _max_pool(x, 2)
        if self.local_response_norm:
            x = local_response_normalization(x)
        if self.stem == "imagenet":
            x = block(64, 1, name="stem_reduce_3x3")(x)
            x = block(192, 3, name="stem_3x3")(x)
            if self.local_response_norm:
                x = local_response_normalization(x)
            x = _max_pool(x, 2)
        last = functools.partial(block, norm=self.last_norm or self.norm)
        for widths in modules:
            made_of = last if widths is modules[-1] else block
            x = InceptionModule(widths, made_of, name=f"inception_{widths.name}")(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        if train and keys is not None:
            x = dropout(x, keys, rate=self.dropout)
        return nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")(x)


def _convolve(
    implementation: Implementation, x: Array, kernel: Array, strides: Any, padding: Any, **_: Any
) -> Array:
    """Stands in for `jax.lax.conv_general_dilated`."""
    return conv2d(x, kernel, strides=strides, implementation=implementation)


def _max_pool(x: Array, stride: int) -> Array:
    return max_pool(x, (3, 3), (stride, stride), "SAME")


def _avg_pool(x: Array) -> Array:
    """Mean over 3×3 pixels of stride 1, at the border over those of them that exist."""

    def total(v: Array) -> Array:
        return nn.pool(v, 0.0, jax.lax.add, (3, 3), (1, 1), "SAME")

    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    count = total(jnp.ones((1, *x.shape[1:3], 1), wide.dtype))
    return (total(wide) / count).astype(x.dtype)


def _chosen(names: tuple[str, ...] | None) -> tuple[Widths, ...]:
    """Rows of MODULES; ValueError unless names are some of them, in order."""
    if names is None:
        return MODULES
    chosen = tuple(widths for widths in MODULES if widths.name in names)
    if not names or tuple(names) != tuple(widths.name for widths in chosen):
        known = ", ".join(widths.name for widths in MODULES)
        raise ValueError(
            f"modules={names!r} is not allowed: it must hold names out of {known}, in this order, "
            "each once and at least one"
        )
    return chosen


def _check_images(x: Array, halvings: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}: allowed is (batch, height, width, channels)")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: scale images to floating point")
    least = 2**halvings
    if min(x.shape[1:3]) < least:
        raise ValueError(
            f"x has images of {x.shape[1]}×{x.shape[2]}: allowed are {least}×{least} and up, as "
            f"height and width are halved {halvings} times (2^{halvings} = {least})"
        )
