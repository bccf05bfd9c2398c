"""The ten modules of BN-Inception: the table of figure 5 of Ioffe & Szegedy (2015)."""

from typing import Literal, NamedTuple


class Widths(NamedTuple):
    """Numbers of channels of one Inception module, in the columns of figure 5."""

    name: str
    conv_1x1: int  # 0: without this branch
    reduce_3x3: int
    conv_3x3: int
    reduce_double_3x3: int
    double_3x3: int
    pool: Literal["avg", "max"]
    projection: int  # 0: pooling passes all channels through
    stride: int = 1


MODULES = (
    Widths("3a", 64, 64, 64, 64, 96, "avg", 32),
    Widths("3b", 64, 64, 96, 64, 96, "avg", 64),
    Widths("3c", 0, 128, 160, 64, 96, "max", 0, stride=2),
    Widths("4a", 224, 64, 96, 96, 128, "avg", 128),
    Widths("4b", 192, 96, 128, 96, 128, "avg", 128),
    Widths("4c", 160, 128, 160, 128, 160, "avg", 128),
    Widths("4d", 96, 128, 192, 160, 192, "avg", 128),
    Widths("4e", 0, 128, 192, 192, 256, "max", 0, stride=2),
    Widths("5a", 352, 192, 320, 160, 224, "avg", 128),
    Widths("5b", 352, 192, 320, 192, 224, "max", 128),
)


def scaled(features: int, width: float) -> int:
    """A number of channels times width, rounded (half to even) and at least 1."""
    return max(1, round(features * width))
