"""Residual networks: He et al., 2015 (arXiv 1512.03385), and pre-activation, 2016 (1603.05027).

    stem     3×3 ("cifar"), or 7×7 of stride 2 and 3×3 max-pooling of stride 2 ("imagenet")
    stages   blocks of two 3×3 convolutions, or 1×1, 3×3, 1×1 (bottleneck); each stage has twice the
             channels of the one before and halves height and width
    head     mean over all positions, dense layer

A block adds its branch to its input, which a 1×1 convolution projects where the shape changes
(option B). With preactivation the projection sees what the branch's first convolution sees, and the
first norm is that of the first block.

Padding is "SAME" by default: at stride 2 an even height or width is padded at its far end alone.
PyTorch's networks pad both ends, `padding="torch"`: weights that were trained with the one are
silently wrong with the other. Sizes and numbers of parameters are the same.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bn_research.layers.max_pool import max_pool
from bn_research.models.masked_norm import masked_norm

Stem = Literal["cifar", "imagenet"]
STEMS = ("cifar", "imagenet")
Padding = Literal["SAME", "torch"]
PADDINGS = ("SAME", "torch")
_EXPANSION = 4  # of a bottleneck's channels at its end


class ResNetBlock(nn.Module):
    """activation(x + branch(x)), or with preactivation x + branch(x).

    Attributes:
      features: of the 3×3 convolutions.
      stride: of the first 3×3 convolution.
      bottleneck: 1×1, 3×3, 1×1 with four times the features at the end.
      preactivation: norm and activation before each convolution, not after.
      conv: a factory of convolutions.
      norm: a factory of normalization layers, called with `name`, or None.
      activation: between layers.
      zero_init_scale: start with a branch of zeros, see `ResNet`.
    """

    features: int
    stride: int
    bottleneck: bool
    preactivation: bool
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module] | None
    activation: Callable[[Array], Array]
    zero_init_scale: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width in_channels"]
    ) -> Float[Array, "batch out_height out_width out_channels"]:
        """The block's output."""
        sizes = (1, 3, 1) if self.bottleneck else (3, 3)
        strides = (1, self.stride, 1) if self.bottleneck else (self.stride, 1)
        outputs = self.features * (_EXPANSION if self.bottleneck else 1)
        projects = self.stride != 1 or x.shape[-1] != outputs
        shortcut = y = x
        for number, (size, stride) in enumerate(zip(sizes, strides, strict=True), start=1):
            last = number == len(sizes)
            norm_options: dict[str, Any] = dict(name=f"norm{number}")
            conv_options: dict[str, Any] = dict(name=f"conv{number}")
            if self.zero_init_scale and last:
                # Before a ReLU and a convolution, a scale of zero would pass no gradient, ever.
                if self.preactivation:
                    conv_options["kernel_init"] = nn.initializers.zeros
                else:
                    norm_options["scale_init"] = nn.initializers.zeros
            features = outputs if last else self.features
            conv = self.conv(features, (size, size), (stride, stride), **conv_options)
            if self.preactivation:
                y = self.activation(normalized(self.norm, y, **norm_options))
                if number == 1 and projects:
                    shortcut = y
                y = conv(y)
            else:
                y = normalized(self.norm, conv(y), **norm_options)
                y = y if last else self.activation(y)
        if projects:
            both = (self.stride, self.stride)
            shortcut = self.conv(outputs, (1, 1), both, name="shortcut_conv")(shortcut)
            if not self.preactivation:
                shortcut = normalized(self.norm, shortcut, name="shortcut_norm")
        y = shortcut + y
        return y if self.preactivation else self.activation(y)


class ResNet(nn.Module):
    """A residual network; ResNet-20 for CIFAR by default.

    ResNet-18 and ResNet-50 for ImageNet are `ResNet((2, 2, 2, 2), 1000, 64, stem="imagenet")` and
    `ResNet((3, 4, 6, 3), 1000, 64, bottleneck=True, stem="imagenet")`. A bottleneck's stride is on
    its 3×3 convolution.

    Attributes:
      stage_sizes: number of blocks of each stage.
      num_classes: units of the head.
      width: channels of the first stage.
      norm: a factory of normalization layers, called with `name` and `use_running_average`, for
        example `functools.partial(BatchNorm, epsilon=1e-5)`. None is no normalization;
        convolutions then have biases.
      bottleneck: see `ResNetBlock`.
      preactivation: likewise; a last norm and activation come before the mean.
      stem: "cifar" or "imagenet".
      zero_init_scale: start with branches of zeros, and blocks that pass their (projected) input
        on. The last norm of a branch has a scale of zero (Goyal et al., 2017, arXiv 1706.02677);
        with preactivation, where a convolution comes last, its kernel is zero instead.
      activation: between layers.
      kernel_init: initializer of every kernel.
      dtype: of the computation; None promotes the dtypes of images and parameters. Parameters, norm
        statistics, the pooled features and the logits are float32.
      padding: "SAME", or "torch", (k − 1)/2 at both ends of a window of k. Takes the weights of
        PyTorch's networks, torchvision's among them, with the numbers that they have there.
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    num_classes: int = 10
    width: int = 16
    norm: Callable[..., nn.Module] | None = None
    bottleneck: bool = False
    preactivation: bool = False
    stem: Stem = "cifar"
    zero_init_scale: bool = False
    activation: Callable[[Array], Array] = jax.nn.relu
    kernel_init: Callable[..., Any] = nn.initializers.he_normal()
    dtype: Any = None
    padding: Padding = "SAME"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        train: bool,
        where: Bool[Array, "batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of x.

        Args:
          x: images.
          train: normalize by the batch.
          where: False marks examples that are padding, which norm layers are given as `mask`.

        Raises:
          ValueError: images of a bad shape or dtype, or a bad field.
        """
        self._check(x)
        norm = masked_norm(
            self.norm and functools.partial(self.norm, use_running_average=not train), where
        )
        unpadded = functools.partial(
            nn.Conv, use_bias=norm is None, kernel_init=self.kernel_init, dtype=self.dtype
        )

        def padding(size: int) -> Any:
            return "SAME" if self.padding == "SAME" else [(size // 2, size // 2)] * 2

        def conv(features: int, window: Any, strides: Any = 1, **options: Any) -> nn.Conv:
            return unpadded(features, window, strides, padding=padding(window[0]), **options)

        if self.stem == "cifar":
            x = conv(self.width, (3, 3), name="stem_conv")(x)
        else:
            x = conv(self.width, (7, 7), (2, 2), name="stem_conv")(x)
        if not self.preactivation:
            x = self.activation(normalized(norm, x, name="stem_norm"))
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), padding(3))
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = ResNetBlock(
                    self.width * 2**stage,
                    2 if stage and not block else 1,
                    self.bottleneck,
                    self.preactivation,
                    conv,
                    norm,
                    self.activation,
                    self.zero_init_scale,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        if self.preactivation:
            x = self.activation(normalized(norm, x, name="final_norm"))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.num_classes, kernel_init=self.kernel_init, name="head")(x)

    def _check(self, x: Array) -> None:
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}: allowed is (batch, height, width, channels)")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x has dtype {x.dtype}: scale images to floating point")
        if not self.stage_sizes or min(self.stage_sizes) < 1:
            raise ValueError(
                f"stage_sizes={self.stage_sizes!r} is not allowed: give the number of blocks of "
                "each stage, at least one"
            )
        if self.width < 1:
            raise ValueError(f"width={self.width!r} is not allowed: it must be at least 1")
        if self.stem not in STEMS:
            raise ValueError(f"stem={self.stem!r} is unknown: allowed are {', '.join(STEMS)}")
        if self.padding not in PADDINGS:
            raise ValueError(
                f"padding={self.padding!r} is unknown: allowed are {', '.join(PADDINGS)}"
            )
        if self.zero_init_scale and self.norm is None:
            raise ValueError("zero_init_scale=True needs norm: a factory of normalization layers")


def normalized(
    norm: Callable[..., nn.Module] | None, x: Float[Array, "..."], *, name: str, **options: Any
) -> Float[Array, "..."]:
    """X through a norm layer made by norm, in the dtype of x; x itself without one."""
    # A norm layer without dtype promotes to that of its float32 parameters.
    return x if norm is None else norm(name=name, **options)(x).astype(x.dtype)
