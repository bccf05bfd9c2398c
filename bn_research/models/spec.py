"""Networks as a line of text: "c64 P c128 P c256 c256 P f512 f512 f10".

    c64     convolution, 64 channels, 3×3        c64k5   the same with 5×5
    P       2×2 max-pooling of stride 2          f512    dense layer, 512 units

Weight layers are numbered from 1; the last is the head, whose outputs are the logits.
"""

import re
from typing import NamedTuple

_EXAMPLE = '"c64 P c128 P c256 c256 P f512 f512 f10"'


class Conv(NamedTuple):
    """A convolution."""

    features: int
    kernel: int


class Dense(NamedTuple):
    """A dense layer."""

    features: int


class Pool(NamedTuple):
    """2×2 max-pooling of stride 2."""


def parse_spec(spec: str) -> tuple[Conv | Dense | Pool, ...]:
    """Layers of a network, first to last.

    Raises:
      ValueError: a token that is none of the above, a convolution or pooling after a dense layer,
        or a network that does not end in a dense layer.
    """
    layers: list[Conv | Dense | Pool] = []
    for token in spec.split():
        match = re.fullmatch(r"(c)([1-9]\d*)(?:k([1-9]\d*))?|(f)([1-9]\d*)|P", token, re.ASCII)
        if match is None:
            raise ValueError(
                f"network {spec!r}: {token!r} is not a layer; allowed are cN (convolution with N "
                f"channels, 3×3), cNkS (S×S), P (2×2 max-pooling), fN (dense), as in {_EXAMPLE}"
            )
        if layers and isinstance(layers[-1], Dense) and not match[4]:
            raise ValueError(
                f"network {spec!r}: {token!r} follows a dense layer; convolutions and pooling come "
                f"before the first fN, as in {_EXAMPLE}"
            )
        if match[1]:
            layers.append(Conv(int(match[2]), int(match[3] or 3)))
        else:
            layers.append(Dense(int(match[5])) if match[4] else Pool())
    if not layers or not isinstance(layers[-1], Dense):
        raise ValueError(
            f"network {spec!r} does not end in a dense layer: the last layer gives the logits, as "
            f"in {_EXAMPLE}"
        )
    return tuple(layers)


def num_logits(spec: str) -> int:
    """Units of the head."""
    head = parse_spec(spec)[-1]
    assert isinstance(head, Dense)  # parse_spec sees to it
    return head.features


def num_weight_layers(spec: str) -> int:
    """Convolutions and dense layers, the head included."""
    return sum(not isinstance(layer, Pool) for layer in parse_spec(spec))
