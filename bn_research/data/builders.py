"""The tfds builders of the sets that can be had without a network and without TensorFlow.

They are read, like tfds's own sets, by `as_data_source`, and have the same keys, "image" and
"label". They differ in three ways, each for a reason:

- records are `array_record`, the format with random access;
- the image is a `Tensor` feature of raw bytes: tfds can write its `Image` feature (PNG) only with
  TensorFlow or a PNG encoder at hand, and decodes it several times more slowly;
- records keep the order of the source, so that "the first 1,000" means what it says.

None is in tfds's registry: `tfds.builder("fashion_mnist")` still means tfds's own, and our names
on disk (`fashion_mnist_idx`, ...) differ from tfds's, so both can share a data_dir.
"""

import abc
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bn_research.data.errors import DataError
from bn_research.data.idx import read_idx_set
from bn_research.data.quiet import quiet

_DIGIT_NAMES = tuple("0123456789")


class _ImageBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):  # type: ignore[call-arg]
    """Gray images and their class, kept in the order of their source."""

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION: str
    IMAGE_SHAPE: tuple[int, int, int]  # height, width, channels
    CLASS_NAMES: tuple[str, ...]

    def __init__(self, **kwargs: Any) -> None:
        """Take `data_dir`, `config` and `version`, as `tfds.core.DatasetBuilder`."""
        kwargs.setdefault("file_format", tfds.core.FileFormat.ARRAY_RECORD)
        with quiet():  # a configuration that is not in BUILDER_CONFIGS draws a warning, even when
            super().__init__(**kwargs)  # a worker process unpickles the builder

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=self.IMAGE_SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(names=self.CLASS_NAMES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _generate_examples(
        self, image: np.ndarray, label: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        image = image.reshape(-1, *self.IMAGE_SHAPE)
        for key in range(len(image)):
            yield key, {"image": image[key], "label": int(label[key])}


class Digits(_ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """scikit-learn's 1,797 handwritten digits: uint8 [8, 8, 1], pixel values 0 to 16.

    The images come with scikit-learn, so the set needs neither files nor a network. The split is
    that of scikit-learn's published example "Recognizing hand-written digits",
    `train_test_split(test_size=0.5, shuffle=False)`: the first 898 images train, the last 899
    test, in the order of `sklearn.datasets.load_digits`.

    Reference: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (the
    1,797 images are its test set).
    """

    name = "sklearn_digits"
    DESCRIPTION = "1,797 real 8x8 images of handwritten digits, pixel values 0 to 16."
    IMAGE_SHAPE = (8, 8, 1)
    CLASS_NAMES = _DIGIT_NAMES
    NUM_TRAIN = 898

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        from sklearn.datasets import load_digits  # a second to import, and only to build

        digits = load_digits()
        image, label = digits.images.astype(np.uint8), digits.target
        return {
            "train": self._generate_examples(image[: self.NUM_TRAIN], label[: self.NUM_TRAIN]),
            "test": self._generate_examples(image[self.NUM_TRAIN :], label[self.NUM_TRAIN :]),
        }


@dataclasses.dataclass(eq=False, kw_only=True)
class IdxConfig(tfds.core.BuilderConfig):
    """Which idx files: `name` is their fingerprint, so each set of files has its own folder."""

    manual_dir: str


class _IdxBuilder(_ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A set published as four idx files, read from the `manual_dir` of its configuration."""

    IMAGE_SHAPE = (28, 28, 1)

    @classmethod
    def config_of(cls, manual_dir: str | os.PathLike[str]) -> IdxConfig:
        """Read and check the files; DataError where one is missing or bad (see `idx`)."""
        fingerprint = read_idx_set(manual_dir).fingerprint
        return IdxConfig(name=f"sha256_{fingerprint}", manual_dir=os.fspath(manual_dir))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        source = read_idx_set(self.builder_config.manual_dir)
        if f"sha256_{source.fingerprint}" != self.builder_config.name:
            raise DataError(
                f"the idx files in {self.builder_config.manual_dir} changed while they were read; "
                "start again"
            )
        return {
            "train": self._generate_examples(*source.train),
            "test": self._generate_examples(*source.test),
        }


class MnistIdx(_IdxBuilder, skip_registration=True):  # type: ignore[call-arg]
    """MNIST from idx files: uint8 [28, 28, 1], 0 to 255; 60,000 train, 10,000 test as published.

    Reference: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """

    name = "mnist_idx"
    DESCRIPTION = "MNIST, built from its four idx files."
    CLASS_NAMES = _DIGIT_NAMES


class FashionMnistIdx(_IdxBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Fashion-MNIST from idx files: uint8 [28, 28, 1], 0 to 255; 60,000 train, 10,000 test.

    Reference: Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
    Machine Learning Algorithms", arXiv:1708.07747, 2017.
    """

    name = "fashion_mnist_idx"
    DESCRIPTION = "Fashion-MNIST, built from its four idx files."
    CLASS_NAMES = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )


def build(
    cls: type[tfds.core.DatasetBuilder], *, data_dir: str | None = None, config: Any = None
) -> tfds.core.DatasetBuilder:
    """Return a finished builder: open what lies on disk, or write it first, without a word.

    tfds writes into a folder `incomplete.*` beside the final one and renames it when all is
    written, so a build that was killed is never taken for a finished one. Two processes may build
    at once: the rename of the slower fails, and both then read what the faster has written.

    Args:
      cls: the builder's class, one of this module's.
      data_dir: tfds's folder of all data sets; None is its default, `TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      config: the builder's configuration, where its class wants one.

    Raises:
      DataError: `data_dir` cannot be written, or the builder's folder in it exists and is not a
        finished build.
    """
    builder = open_builder(cls, cls.name, data_dir=data_dir, config=config)
    if builder.info.initialized:
        return builder
    failure = None
    try:
        # The "downloads" folder that tfds makes would stay empty: keep it out of data_dir.
        with quiet(), tempfile.TemporaryDirectory() as downloads:
            builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        failure = error
    # A builder learns what is on disk when it is made, and another process may have written it.
    builder = open_builder(cls, cls.name, data_dir=data_dir, config=config)
    if builder.info.initialized:
        return builder
    if failure is not None:
        raise DataError(
            f"{cls.name} cannot be built in {builder.data_dir} ({failure}); give "
            "--config.data_dir=DIR, a folder that can be written and has room"
        ) from failure
    raise DataError(_unfinished(cls.name, builder.data_dir, "it has no dataset_info.json"))


def open_builder(
    make: Callable[..., tfds.core.DatasetBuilder],
    name: str,
    *,
    data_dir: str | None,
    **options: Any,
) -> tfds.core.DatasetBuilder:
    """Call `make(data_dir=data_dir, **options)`; see that what it finds on disk is whole.

    Raises:
      DataError: the set's description on disk is damaged, or one of its files is missing.
    """
    try:
        with quiet():
            builder = make(data_dir=data_dir, **options)
    except Exception as error:  # whatever a damaged json file makes tfds and protobuf raise
        folder = f"folder {name} of data_dir {data_dir or tfds.core.constants.DATA_DIR}"
        raise DataError(_unfinished(name, folder, error)) from error
    for split in builder.info.splits.values():
        for path in split.filepaths:
            if not path.exists():
                raise DataError(_unfinished(name, builder.data_dir, f"{path.name} is missing"))
    return builder


def _unfinished(name: str, folder: str, why: object) -> str:
    return (
        f"{folder} exists and is not a finished build of {name} ({why}); move it away or give "
        "another --config.data_dir=DIR"
    )
