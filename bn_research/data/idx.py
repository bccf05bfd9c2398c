"""The idx format: the four files in which MNIST and Fashion-MNIST are published.

An idx file is a big-endian header, `0 0 TYPE NDIM` and then NDIM 32-bit lengths, followed by the
elements in C order. TYPE 8 is uint8, the only one these sets use.

Reference: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bn_research.data.errors import DataError

_UINT8 = 8
_NUM_CLASSES = 10
_IMAGE_SHAPE = (28, 28)
_REPAIR = "fetch the file again or give another --config.manual_dir=DIR"


class IdxSplit(NamedTuple):
    """One split as its two idx files hold it."""

    image: np.ndarray  # uint8 [num_examples, 28, 28]
    label: np.ndarray  # uint8 [num_examples], each below 10


class IdxSet(NamedTuple):
    """The four files of a set, and what tells them from those of any other set."""

    train: IdxSplit
    test: IdxSplit
    fingerprint: str  # 16 hexadecimal digits; the same for gzipped and plain files


def find_idx(manual_dir: str | os.PathLike[str], name: str) -> Path:
    """Find the idx file `name` in `manual_dir`: `name.gz`, as published, or plain `name`.

    Raises:
      DataError: `manual_dir` is no folder, or holds neither.
    """
    folder = Path(manual_dir).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"manual_dir {folder} is not a folder; give --config.manual_dir=DIR, a folder that "
            "holds the four idx files"
        )
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(
        f"{folder / name}.gz is missing (and so is {name} without .gz); put it there or give "
        "another --config.manual_dir=DIR that holds the four idx files"
    )


def read_idx(path: str | os.PathLike[str], *, ndim: int) -> np.ndarray:
    """Return the array that an idx file of uint8 elements holds; gzipped if its name ends in `.gz`.

    Args:
      path: the file.
      ndim: how many axes it must have: 3 for images, 1 for labels.

    Returns:
      A read-only uint8 array of `ndim` axes.

    Raises:
      DataError: the file cannot be read, is cut, has another magic number or other axes, or
        holds more bytes than its header says.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)  # checks the stream's CRC-32 and length
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut or damaged ({error}); {_REPAIR}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {_REPAIR}") from error

    header = 4 * (1 + ndim)
    magic = bytes((0, 0, _UINT8, ndim))
    if data[:4] != magic[: len(data)]:
        raise DataError(
            f"{path} is not an idx file of uint8 and {ndim} axes: magic number "
            f"0x{data[:4].hex()}, expected 0x{magic.hex()}; {_REPAIR}"
        )
    if len(data) < header:
        raise DataError(
            f"{path} is cut: {len(data)} bytes, its header alone has {header}; {_REPAIR}"
        )
    shape = struct.unpack(f">{ndim}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        wrong = "is cut" if len(data) < expected else "is too long"
        raise DataError(
            f"{path} {wrong}: {len(data)} bytes, its header {shape} says {expected}; {_REPAIR}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _read_split(manual_dir: str | os.PathLike[str], prefix: str) -> IdxSplit:
    image_path = find_idx(manual_dir, f"{prefix}-images-idx3-ubyte")
    label_path = find_idx(manual_dir, f"{prefix}-labels-idx1-ubyte")
    split = IdxSplit(read_idx(image_path, ndim=3), read_idx(label_path, ndim=1))
    if len(split.image) != len(split.label):
        raise DataError(
            f"{image_path} has {len(split.image)} images and {label_path} has {len(split.label)} "
            f"labels; {_REPAIR}"
        )
    if len(split.image) == 0:
        raise DataError(f"{image_path} has no images; {_REPAIR}")
    if split.image.shape[1:] != _IMAGE_SHAPE:
        raise DataError(
            f"{image_path} has images of {split.image.shape[1:]} pixels, expected {_IMAGE_SHAPE}; "
            f"{_REPAIR}"
        )
    if split.label.max() >= _NUM_CLASSES:
        raise DataError(
            f"{label_path} has the label {split.label.max()}, expected 0 to {_NUM_CLASSES - 1}; "
            f"{_REPAIR}"
        )
    return split


def read_idx_set(manual_dir: str | os.PathLike[str]) -> IdxSet:
    """Read and check the four files `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`.

    All bytes are read each time: it costs 0.4 s for 70,000 images, and a cut or exchanged file
    is then found even where an earlier build of the set could be served.

    Raises:
      DataError: a file is missing, cut, of another format, or its number of images is not its
        number of labels.
    """
    train, test = _read_split(manual_dir, "train"), _read_split(manual_dir, "t10k")
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(repr(array.shape).encode())
        digest.update(array.tobytes())
    return IdxSet(train, test, digest.hexdigest()[:16])
