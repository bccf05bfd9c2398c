"""A split whole in host memory, and the scale of its pixels."""

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bn_research.data.datasets import data_source
from bn_research.data.errors import DataError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_CHUNK = 4096  # examples read, or images summed, at once: bounds the memory beside the result

SCALES = ("standardized", "unit", "bytes")
"""What `scale_images` can do."""


class Examples(NamedTuple):
    """One split, whole, in host memory."""

    image: np.ndarray  # uint8 [num_examples, height, width, channels]
    label: np.ndarray  # int32 [num_examples]


def load_examples(
    builder: "tfds.core.DatasetBuilder", split: str, *, limit: int | None = None
) -> Examples:
    """Read a split, in the order of its records.

    Args:
      builder: from `datasets.prepare`.
      split: "train", "test", or a slice such as "train[:80%]".
      limit: how many examples at most, from the first; None reads all.

    Raises:
      DataError: there is no such split, or its records are damaged.
      ValueError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; allowed: None or an integer of at least 1")
    import tensorflow_datasets as tfds

    from bn_research.data.quiet import quiet

    # Raw bytes need no decoder, and reading them ourselves is four times faster than tfds, which
    # handles each example and each feature in Python: 1 s against 4 s for 70,000 images.
    feature = builder.info.features["image"]
    fast = isinstance(feature, tfds.features.Tensor) and feature.np_dtype == np.uint8
    source = data_source(builder, split, serialized=fast)
    parse = _parse_serialized if fast else _parse_decoded
    count = len(source) if limit is None else min(limit, len(source))
    image = np.empty((count, *feature.shape), np.uint8)
    label = np.empty(count, np.int32)
    try:
        # tfds recommends OpenCV, on stderr, to whoever decodes a PNG without it.
        with contextlib.nullcontext() if fast else quiet():
            for start in range(0, count, _CHUNK):
                part = slice(start, min(start + _CHUNK, count))
                records = source.__getitems__(  # type: ignore[attr-defined]
                    list(range(part.start, part.stop))
                )
                parse(records, image[part], label[part])
    except Exception as error:  # array_record and protobuf each raise their own
        raise DataError(
            f"{builder.data_dir} is damaged ({type(error).__name__}: {error}); move it away or "
            "give another --config.data_dir=DIR"
        ) from error
    return Examples(image, label)


def _parse_serialized(records: list[bytes], image: np.ndarray, label: np.ndarray) -> None:
    """Fill `image` and `label` from serialized `tf.train.Example`s with raw image bytes."""
    from tensorflow_datasets.proto import tf_example_pb2

    pixels = []
    for i, record in enumerate(records):
        feature = tf_example_pb2.Example.FromString(record).features.feature
        pixels.append(feature["image"].bytes_list.value[0])
        label[i] = feature["label"].int64_list.value[0]
    image[...] = np.frombuffer(b"".join(pixels), np.uint8).reshape(image.shape)


def _parse_decoded(records: list[dict], image: np.ndarray, label: np.ndarray) -> None:
    """Fill `image` and `label` from examples that tfds has decoded."""
    for i, record in enumerate(records):
        image[i] = record["image"]
        label[i] = record["label"]


def scale_images(
    images: np.ndarray,
    method: str,
    *,
    reference: np.ndarray,
    full_scale: int | None = None,
) -> np.ndarray:
    r"""Return pixels as float32, on one of three scales.

    - "standardized": $(x - \mu) / \sigma$ with the mean and standard deviation of all pixels of
      `reference`, two scalars computed in float64, so that $E[x] = 0$ and $E[x^2] = 1$ there;
    - "unit": $x$ / `full_scale`, from 0 to 1;
    - "bytes": $255\, x$ / `full_scale`, from 0 to 255: $x$ itself for 8-bit images.

    Args:
      images: [num_examples, height, width, channels].
      method: "standardized", "unit" or "bytes".
      reference: the training images, whichever images are scaled; used by "standardized".
      full_scale: the largest value a pixel can take, `datasets.FULL_SCALE[name]`; needed by
        "unit" and "bytes", since the images at hand need not reach it.

    Raises:
      ValueError: another method; no `full_scale`; a `reference` that is constant or empty.
    """
    if method not in SCALES:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(SCALES)}")
    if method == "standardized":
        mean, std = _pixel_moments(reference)
        if not std > 0:
            raise ValueError(
                f"reference has a standard deviation of {std}; 'standardized' needs images that "
                "are not constant"
            )
        scaled = images.astype(np.float32)
        scaled -= np.float32(mean)
        scaled /= np.float32(std)
        return scaled
    if full_scale is None or not full_scale > 0:
        raise ValueError(
            f"full_scale is {full_scale}; {method!r} needs a positive number, such as "
            "FULL_SCALE['digits']"
        )
    scaled = images.astype(np.float32)
    scaled *= np.float32((1 if method == "unit" else 255) / full_scale)
    return scaled


def _pixel_moments(images: np.ndarray) -> tuple[float, float]:
    """Mean and (biased) standard deviation of all pixels, float64; NaN where there are none."""
    if images.size == 0:
        return float("nan"), float("nan")
    mean = float(images.mean(dtype=np.float64))
    # In chunks: np.std would hold all deviations in float64, eight times the memory of uint8.
    m2 = sum(
        float(np.square(images[start : start + _CHUNK] - mean).sum())
        for start in range(0, len(images), _CHUNK)
    )
    return mean, (m2 / images.size) ** 0.5
