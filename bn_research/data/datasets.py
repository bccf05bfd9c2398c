"""The data sets by name: where each comes from, and what to do where it cannot be had."""

import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bn_research.data.errors import DataError

if TYPE_CHECKING:  # tfds takes half a second to import: only what opens a set pays for it
    import tensorflow_datasets as tfds

DATASETS: dict[str, str] = {
    "digits": "1,797 8x8 gray digits of scikit-learn, 898 train and 899 test; embedded",
    "mnist": "70,000 28x28 gray digits; idx files in manual_dir, or a network",
    "fashion_mnist": "70,000 28x28 gray images of clothes; Debian's package or a network",
    "cifar10": "60,000 32x32 color images, 50,000 train and 10,000 test; a network",
    "imagenet2012": "1,331,167 photographs, 1,281,167 train and 50,000 validation; your own copy",
}

FULL_SCALE: dict[str, int] = {name: 16 if name == "digits" else 255 for name in DATASETS}
"""The largest value a pixel can take, a property of the format and not of the images at hand."""

EVALUATION_SPLIT: dict[str, str] = {
    name: "validation" if name == "imagenet2012" else "test" for name in DATASETS
}
"""The split with labels that results are published on."""

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts the four idx files."""

PROBE_SECONDS = 10.0  # until a host that does not answer counts as "no network"
DOWNLOAD_SECONDS = 1800.0  # until a download that hangs is given up; CIFAR-10 has 170 MB

_EXTRA = "pip install 'bn_research[tfds-build]' on a machine with a network"
_MANUAL_DIR = (
    "give --config.manual_dir=DIR with its four idx files (train-images-idx3-ubyte.gz, ...)"
)
_REMEDY = {
    "mnist": f"{_MANUAL_DIR}, or {_EXTRA}",
    "fashion_mnist": f"apt install dataset-fashion-mnist, or {_MANUAL_DIR}, or {_EXTRA}",
    "cifar10": f"{_EXTRA}, or give --config.data_dir=DIR where it is prepared as array_record",
    "imagenet2012": (
        "give --config.data_dir=DIR where it is prepared as array_record, by `tfds build "
        "imagenet2012 --file_format=array_record --manual_dir=TARS --data_dir=DIR` with TensorFlow "
        "and ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in TARS"
    ),
}


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
) -> "tfds.core.DatasetBuilder":
    """Return the builder of a data set that lies on disk, built first where it does not.

    - `digits` are built from scikit-learn.
    - `mnist` and `fashion_mnist` are built from the idx files in `manual_dir`, which for
      `fashion_mnist` is `FASHION_MNIST_DIR` where that exists. The files are read and checked on
      every call, and a build belongs to the very files it was made from: another `manual_dir`
      with other files gets a build of its own.
    - Otherwise the set is tfds's own: read if it is prepared in `data_dir`, else downloaded,
      which needs TensorFlow and a network. `imagenet2012` cannot be downloaded.

    Args:
      name: a key of `DATASETS`.
      data_dir: tfds's folder of all data sets; None or "" is its default, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      manual_dir: a folder of the four idx files, gzipped or not, for `mnist` and
        `fashion_mnist`; None or "" for none.

    Raises:
      DataError: the name is unknown, or the set cannot be had; one line with the way out.
    """
    if name not in DATASETS:
        raise DataError(f"dataset is {name!r}; allowed: {', '.join(DATASETS)}")
    root = os.path.expanduser(data_dir) if data_dir else None
    if manual_dir and name not in ("mnist", "fashion_mnist"):
        raise DataError(
            f"manual_dir is {os.fspath(manual_dir)!r}, and {name} is not made of idx files: leave "
            "it empty"
        )
    if not manual_dir and name == "fashion_mnist" and FASHION_MNIST_DIR.is_dir():
        manual_dir = FASHION_MNIST_DIR

    from bn_research.data import builders

    if name == "digits":
        return builders.build(builders.Digits, data_dir=root)
    if manual_dir:
        cls = builders.MnistIdx if name == "mnist" else builders.FashionMnistIdx
        return builders.build(cls, data_dir=root, config=cls.config_of(manual_dir))
    return _prepare_tfds_own(name, root)


def data_source(
    builder: "tfds.core.DatasetBuilder", split: str, *, serialized: bool = False
) -> Sequence[Any]:
    """Give random access to a split: `source[i]`, `source.__getitems__([i, ...])`, `len(source)`.

    Args:
      builder: from `prepare`.
      split: "train", "test", or a slice such as "train[:80%]" in tfds's language.
      serialized: gives each example as the bytes of a `tf.train.Example`; otherwise as a dict
        of "image", uint8 [height, width, channels], and "label", int.

    Raises:
      DataError: the builder has no such split.
    """
    import tensorflow_datasets as tfds

    method = tfds.decode.DeserializeMethod
    try:
        return builder.as_data_source(
            split,
            deserialize_method=(method.RAW_BYTES if serialized else method.DESERIALIZE_AND_DECODE),
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"split is {split!r}; {builder.name} has {', '.join(builder.info.splits)}, and their "
            "slices such as 'train[:80%]'"
        ) from error


def _prepare_tfds_own(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    import tensorflow_datasets as tfds

    from bn_research.data.builders import open_builder

    make = functools.partial(tfds.builder, name)
    builder = open_builder(make, name, data_dir=data_dir)
    if not builder.info.initialized:
        _download(name, builder)
        builder = open_builder(make, name, data_dir=data_dir)
    if not builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access():
        raise DataError(
            f"{name} in {builder.data_dir} is stored as {builder.info.file_format.value}, which "
            "has no random access; give another --config.data_dir=DIR, or prepare it again with "
            "file_format='array_record'"
        )
    return builder


def _download(name: str, builder: "tfds.core.DatasetBuilder") -> None:
    """Let tfds download and prepare a set; DataError where that cannot be or does not work."""
    cannot = f"{name} is not in {builder.data_dir_root}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        raise DataError(f"{cannot}, and it cannot be downloaded; {_REMEDY[name]}")
    if not _has_tensorflow():
        raise DataError(f"{cannot}, and tfds needs TensorFlow to build it; {_REMEDY[name]}")
    url = next(iter(builder.url_infos))
    # tfds itself tries ten times, which takes minutes where there is no network at all.
    if failure := _unreachable(url):
        raise DataError(f"{cannot}, and {url} cannot be reached ({failure}); {_REMEDY[name]}")
    if failure := _download_in_child(name, builder):
        raise DataError(f"{cannot}, and tfds could not build it ({failure}); {_REMEDY[name]}")


def _has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def _unreachable(url: str) -> str | None:
    """Say why `url` gives no answer within PROBE_SECONDS, or None where it does."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an answer, if not a kind one: whether the download works tfds will find
    except OSError as error:
        return str(error)
    return None


def _download_in_child(name: str, builder: "tfds.core.DatasetBuilder") -> str | None:
    """Run tfds's download in a process of its own; its last words where it fails, else None.

    A process can be ended when it hangs, which a call cannot; and TensorFlow would take the
    accelerator's memory away from JAX in this one.
    """
    code = (
        # Where this runs in a shell's background the child would be born deaf to it.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys, tensorflow_datasets as tfds; "
        "tfds.builder(sys.argv[1], data_dir=sys.argv[2])"
        ".download_and_prepare(download_dir=sys.argv[3], file_format='array_record')"
    )
    with tempfile.TemporaryDirectory() as downloads:
        child = subprocess.Popen(
            [sys.executable, "-c", code, name, os.fspath(builder.data_dir_root), downloads],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            _, said = child.communicate(timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            said = f"no end after {DOWNLOAD_SECONDS:.0f} s"
            child.send_signal(signal.SIGINT)  # tfds then removes what it has half built
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=PROBE_SECONDS)  # its download threads may hold it up
        finally:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return None
    with contextlib.suppress(OSError):  # rmdir removes it only if it is empty
        builder.data_path.parent.rmdir()
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {child.returncode}"
