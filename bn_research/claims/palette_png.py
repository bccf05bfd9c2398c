"""Figures as PNG files of a palette, a third as large as those of true colour."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import matplotlib.figure

_COLORS = 256  # a PNG's palette holds no more
_EXACT = 128  # of them, the most frequent: paper, lines, bands and whatever else is flat


def encode(fig: matplotlib.figure.Figure, *, dpi: int) -> bytes:
    """A figure on white as a PNG, whose bytes depend on its content alone.

    Up to 256 colours are kept as they are. Of more, the most frequent 128 are, and each of the
    others, mostly edges of lines and letters, becomes the nearest one of the palette. There is no
    dithering, which would speckle flat areas.
    """
    from PIL import Image  # not needed by whoever asks an experiment for help

    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=dpi, facecolor="white")
    image = Image.open(drawn).convert("RGB")
    # As one number a pixel, which sorts far faster than three.
    packed = np.asarray(image).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    found, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colors = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=-1).astype(np.uint8)
    palette = _palette(colors, counts)
    paletted = Image.fromarray(_nearest(palette, colors)[inverse.reshape(packed.shape)])
    paletted.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    paletted.save(buffer, "PNG", optimize=True, dpi=(dpi, dpi))
    return buffer.getvalue()


def _palette(colors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """At most 256 colours [n, 3] for those [m, 3], of which there are so many pixels each [m]."""
    from PIL import Image

    if len(colors) <= _COLORS:
        return colors
    order = np.argsort(-counts, kind="stable")
    rest = Image.fromarray(colors[order[_EXACT:]][None]).quantize(
        _COLORS - _EXACT,
        # Median cut would lose a colour that is rare and like no other, as of a marker.
        method=Image.Quantize.MAXCOVERAGE,
        kmeans=1,
        dither=Image.Dither.NONE,
    )
    others = np.unique(np.asarray(rest.convert("RGB"))[0], axis=0)
    return np.concatenate([colors[order[:_EXACT]], others])


def _nearest(palette: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Index into the palette for each colour. Pillow's own search looks at six of eight bits."""
    from scipy.spatial import KDTree

    return KDTree(palette.astype(float)).query(colors.astype(float))[1].astype(np.uint8)
