"""Plain convolutional networks, described by a spec, with BN where asked."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from bn_research.layers.conv import Conv as ConvLayer
from bn_research.models.spec import Conv, Dense, Pool, parse_spec

NormPlacement = Literal["none", "last", "hidden", "all"] | int
PLACEMENTS = ("none", "last", "hidden", "all")

# The Notes do not give their seven layers; of the five candidates this one has seven weight layers
# of widths that were usual then.
DEFAULT_SPEC = "c64 P c128 P c256 c256 P f512 f512 f10"


class CNN(nn.Module):
    """A convolutional network: weights → BN (where placed) → activation, and pooling between.

    The pre-activation of weight layer l, before its BN, is sown as
    `intermediates/pre_activation_l`; BN's output replaces it on the way to the activation or, on
    the head, to the softmax.

    Attributes:
      spec: the layers, see `bn_research.models.spec`.
      norm: a factory of normalization layers, called with `name` and `use_running_average`, for
        example `functools.partial(BatchNorm, epsilon=1e-5)`.
      placement: BN on no layer ("none"), on the head alone ("last"), on all but the head
        ("hidden"), on all ("all"), or on one weight layer alone, given by its number from 1.
      kernel_init: initializer of every kernel.
      head_init: initializer of the head's kernel; None is kernel_init.
      use_bias: biases in convolution and dense layers (γ and β of BN are its own).
      activation: between weight layers.
    """

    spec: str = DEFAULT_SPEC
    norm: Callable[..., nn.Module] | None = None
    placement: NormPlacement = "none"
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    head_init: Callable[..., Any] | None = None
    use_bias: bool = True
    activation: Callable[[Array], Array] = jax.nn.relu

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch classes"]:
        """Logits of x.

        Raises:
          ValueError: a bad spec or placement, placement without norm, or images too small to pool.
        """
        layers = parse_spec(self.spec)
        names = _names(layers)
        count = len(names)
        check_placement(self.placement, self.norm, count)
        number = 0
        for layer in layers:
            if isinstance(layer, Pool):
                if min(x.shape[1:3]) < 2:
                    raise ValueError(
                        f"network {self.spec!r} pools images that are only {x.shape[1]}×"
                        f"{x.shape[2]} by then: remove a P or use larger images"
                    )
                x = nn.max_pool(x, (2, 2), (2, 2))
                continue
            name = names[number]
            number += 1
            init = self.kernel_init
            if number == count and self.head_init is not None:
                init = self.head_init
            options: dict[str, Any] = dict(use_bias=self.use_bias, kernel_init=init)
            if isinstance(layer, Conv):
                size = (layer.kernel, layer.kernel)
                x = ConvLayer(layer.features, size, name=name, **options)(x)
            else:
                x = x.reshape(x.shape[0], -1)
                x = nn.Dense(layer.features, name=name, **options)(x)
            self.sow("intermediates", f"pre_activation_{number}", x)
            part = "last" if number == count else "hidden"
            placed = self.placement in ("all", part, number)
            if self.norm is not None and placed:
                x = self.norm(name=f"batch_norm{number}", use_running_average=not train)(x)
            if number < count:
                x = self.activation(x)
        return x


def check_placement(
    placement: NormPlacement, norm: Callable[..., nn.Module] | None, count: int
) -> None:
    """ValueError unless placement is known and, when BN is placed, a norm is given.

    Args:
      placement: of BN.
      norm: the factory.
      count: number of weight layers.
    """
    numbers = range(1, count + 1)
    if placement not in PLACEMENTS and (isinstance(placement, bool) or placement not in numbers):
        raise ValueError(
            f"placement={placement!r} is unknown: allowed are {', '.join(PLACEMENTS)}, or the "
            f"number of one weight layer, 1 to {count}"
        )
    if placement != "none" and norm is None:
        raise ValueError(f"placement={placement!r} needs norm: a factory of normalization layers")


def hidden_layers(spec: str) -> list[str]:
    """Names of a CNN's weight layers in its params, first to last, without the head.

    Raises:
      ValueError: a bad spec.
    """
    return _names(parse_spec(spec))[:-1]


def _names(layers: tuple[Conv | Dense | Pool, ...]) -> list[str]:
    """Names of the weight layers, first to last."""
    weighted = [layer for layer in layers if not isinstance(layer, Pool)]
    return [
        f"{'conv' if isinstance(layer, Conv) else 'dense'}{number}"
        for number, layer in enumerate(weighted, start=1)
    ]
