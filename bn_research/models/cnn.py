"""Plain convolutional networks, described by a spec, with BN and dropout where asked."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Key

from bn_research.layers.conv import Conv as ConvLayer
from bn_research.layers.dropout import check_rate, dropout, never_drops
from bn_research.layers.max_pool import max_pool
from bn_research.models.masked_norm import masked_norm
from bn_research.models.spec import Conv, Dense, Pool, parse_spec

NormPlacement = Literal["none", "last", "hidden", "all"] | int
PLACEMENTS = ("none", "last", "hidden", "all")
DropoutPlacement = Literal["before", "after", "last"]
DROPOUT_PLACEMENTS = ("before", "after", "last")

# The Notes do not give their seven layers; of the five candidates this one has seven weight layers
# of widths that were usual then.
DEFAULT_SPEC = "c64 P c128 P c256 c256 P f512 f512 f10"


class CNN(nn.Module):
    """A convolutional network: weights → BN (where placed) → activation, and pooling between.

    The pre-activation of weight layer l, before its BN, is sown as
    `intermediates/pre_activation_l`; BN's output replaces it on the way to the activation or, on
    the head, to the softmax. Dropout drops elements, in convolution layers too: neighbouring pixels
    of a channel apart from each other.

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
      dropout: rate, in training; a traced one serves many rates with one program, and is not
        checked.
      dropout_placement: "before" the BN of every hidden layer, on the pre-activation that is sown
        whole (without BN, before the activation, which for a ReLU is the same as after it); "after"
        the activation of every hidden layer, before any pooling; or after the activation of the
        "last" hidden layer alone. Never on the head.
    """

    spec: str = DEFAULT_SPEC
    norm: Callable[..., nn.Module] | None = None
    placement: NormPlacement = "none"
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    head_init: Callable[..., Any] | None = None
    use_bias: bool = True
    activation: Callable[[Array], Array] = jax.nn.relu
    dropout: float | Float[Array, ""] = 0.0
    dropout_placement: DropoutPlacement = "after"

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
          x: images.
          train: normalize by the batch and drop out.
          keys: a PRNG key for each example, for dropout in training; each layer folds its number
            into them. See `bn_research.layers.dropout`.
          where: False marks examples that are padding, which norm layers are given as `mask`.

        Raises:
          ValueError: a bad spec, placement or rate of dropout, placement without norm, dropout in
            training without keys, or images too small to pool.
        """
        layers = parse_spec(self.spec)
        names = _names(layers)
        count = len(names)
        check_placement(self.placement, self.norm, count)
        self._check_dropout(train, keys)
        norm = masked_norm(self.norm, where)
        number = 0

        def drop(x: Array, *placements: str) -> Array:
            if not train or keys is None or self.dropout_placement not in placements:
                return x
            keys_of_layer = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return dropout(x, keys_of_layer, rate=self.dropout)

        for layer in layers:
            if isinstance(layer, Pool):
                if min(x.shape[1:3]) < 2:
                    raise ValueError(
                        f"network {self.spec!r} pools images that are only {x.shape[1]}×"
                        f"{x.shape[2]} by then: remove a P or use larger images"
                    )
                x = max_pool(x, (2, 2), (2, 2))
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
            if number < count:
                x = drop(x, "before")
            part = "last" if number == count else "hidden"
            placed = self.placement in ("all", part, number)
            if norm is not None and placed:
                x = norm(name=f"batch_norm{number}", use_running_average=not train)(x)
            if number < count:
                x = self.activation(x)
                x = drop(x, "after", *(["last"] if number == count - 1 else []))
        return x

    def _check_dropout(self, train: bool, keys: Array | None) -> None:
        if self.dropout_placement not in DROPOUT_PLACEMENTS:
            raise ValueError(
                f"dropout_placement={self.dropout_placement!r} is unknown: allowed are "
                f"{', '.join(DROPOUT_PLACEMENTS)}"
            )
        check_rate("dropout", self.dropout)
        if train and keys is None and not never_drops(self.dropout):
            raise ValueError(f"dropout={self.dropout!r} needs keys in training: one an example")


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
