"""Augmentation on the host: pure functions of an image and a random generator.

An image is uint8 [height, width, channels] or a `PIL.Image.Image`; what a function gives back may
be either, and `records.as_array` makes an array of it. The factories below chain them into what a
stream takes as `transform`; all of it can be pickled, for worker processes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

from bn_research.data.records import as_array

AnyImage = np.ndarray | Image.Image
Transform = Callable[[AnyImage, np.random.Generator], AnyImage]

_ENHANCERS = (ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Color)
_ATTEMPTS = 10  # to find a crop that fits; then the largest central one is taken


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms one after the other, on one random generator."""

    transforms: tuple[Transform, ...]

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> AnyImage:
        """Apply them in order."""
        for transform in self.transforms:
            image = transform(image, rng)
        return image


def cifar_augmentation(*, padding: int = 4) -> Transform:
    """A shifted window and a flip, the usual recipe of CIFAR (He et al., arXiv:1512.03385)."""
    return Chain((functools.partial(pad_and_crop, padding=padding), random_flip))


def imagenet_augmentation(size: int, *, strength: float = 0.5) -> Transform:
    """GoogLeNet's crops, a flip, and Howard's photometric distortions: [size, size, 3].

    Args:
      size: of a side, in pixels; 224 for BN-Inception.
      strength: of the photometric distortions, see `photometric_distortion`; 0 for none.
    """
    chain: tuple[Transform, ...] = (
        functools.partial(random_resized_crop, size=size),
        random_flip,
    )
    if strength:
        chain += (functools.partial(photometric_distortion, strength=_checked(strength)),)
    return Chain(chain)


def imagenet_evaluation(size: int, *, fraction: float = 0.875) -> Callable[[AnyImage], AnyImage]:
    """The central square, `fraction` of the shorter side, resized to [size, size, 3]."""
    return functools.partial(central_crop, size=size, fraction=fraction)


def pad_and_crop(image: AnyImage, rng: np.random.Generator, *, padding: int) -> np.ndarray:
    """A window of the image's own size, at a uniform place of the image padded with zeros.

    Args:
      image: uint8 [height, width, channels].
      rng: drawn from twice, rows then columns.
      padding: zeros on each side; the shift is uniform over -padding ... padding.
    """
    image = as_array(image)
    height, width = image.shape[:2]
    window = np.zeros_like(image)
    top, left = (int(shift) - padding for shift in rng.integers(2 * padding + 1, size=2))
    rows = slice(max(top, 0), min(top + height, height))
    columns = slice(max(left, 0), min(left + width, width))
    window[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[
        rows, columns
    ]
    return window


def random_flip(image: AnyImage, rng: np.random.Generator) -> AnyImage:
    """The image, or with probability 1/2 its mirror image, left for right."""
    if rng.random() < 0.5:
        return image
    if isinstance(image, np.ndarray):
        return image[:, ::-1]
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def random_resized_crop(
    image: AnyImage,
    rng: np.random.Generator,
    *,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random part of the image, resized to a square.

    Its area is uniform over `area` of the image's, its width over height log-uniform over
    `aspect`, its place uniform; drawn again where it does not fit, and after ten times the
    largest central part with an aspect as close to the image's as allowed.

    Args:
      image: uint8 [height, width, 3], or a JPEG, which is decoded at the smallest of libjpeg's
        scales (1/2, 1/4, 1/8) that leaves the part no smaller than the square.
      rng: drawn from at least twice.
      size: of a side of the square, in pixels.
      area: least and largest share of the image's area.
      aspect: least and largest width over height.

    Reference: Szegedy et al., "Going deeper with convolutions", arXiv:1409.4842, section 6.
    """
    image = _as_pil(image)
    return _resized_part(image, _random_box(image.size, rng, area, aspect), size)


def central_crop(image: AnyImage, *, size: int, fraction: float = 0.875) -> Image.Image:
    """The central square of `fraction` of the shorter side, resized to `size` pixels a side.

    In one resampling; as resizing the shorter side to size / fraction, then cropping, but for
    the rounding.
    """
    image = _as_pil(image)
    side = fraction * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return _resized_part(image, (left, top, left + side, top + side), size)


def photometric_distortion(
    image: AnyImage, rng: np.random.Generator, *, strength: float
) -> Image.Image:
    """Contrast, brightness and color, in random order, each by a factor.

    The factors are uniform over 1 - strength ... 1 + strength; at 1 nothing changes, at 0 the
    image is its mean gray, black, or without color.

    Args:
      image: uint8 [height, width, 3].
      rng: drawn from twice, order then factors.
      strength: 0 to 1; 0.5 is the reference's, less is weaker.

    Reference: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
    Classification", arXiv:1312.5402, section 2.2; without its lighting noise.
    """
    image = _as_pil(image)
    factors = rng.uniform(1 - strength, 1 + strength, size=len(_ENHANCERS))
    for i in rng.permutation(len(_ENHANCERS)):
        image = _ENHANCERS[i](image).enhance(float(factors[i]))
    return image


def _checked(strength: float) -> float:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; allowed: 0 to 1")
    return strength


def _as_pil(image: AnyImage) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _random_box(
    lengths: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, in pixels, of a part of an image of `lengths` width and height."""
    width, height = lengths
    for _ in range(_ATTEMPTS):
        share = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(share * ratio)), round(math.sqrt(share / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, aspect[0]), aspect[1])
    across, down = min(width, height * ratio), min(height, width / ratio)
    return (width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2


def _resized_part(
    image: Image.Image, box: tuple[float, float, float, float], size: int
) -> Image.Image:
    """The part `box` of the image as [size, size] pixels, by an antialiased bilinear filter."""
    width, height = image.size
    if image.format == "JPEG":
        # Decoded at a scale, the part still has at least size pixels a side.
        shrink = min(box[2] - box[0], box[3] - box[1]) / size
        image.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
    if image.mode != "RGB":
        image = image.convert("RGB")
    across, down = image.width / width, image.height / height
    box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
