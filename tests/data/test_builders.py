"""The idx parser and the tfds builders: right pixels, every bad file named, no half-built set."""

import gzip
import os
import pickle
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bn_research.data import builders
from bn_research.data.errors import DataError
from bn_research.data.idx import read_idx, read_idx_set
from bn_research.data.quiet import quiet

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def idx_bytes(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx_set(folder, *, seed=0, num_train=20, num_test=10, gzipped=True):
    """Four small idx files of random images; returns {file stem: array}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        arrays[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    for stem, array in arrays.items():
        data = idx_bytes(array)
        if gzipped:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / stem).write_bytes(data)
    return arrays


def build_mnist(manual_dir, data_dir):
    config = builders.MnistIdx.config_of(manual_dir)
    return builders.build(builders.MnistIdx, data_dir=str(data_dir), config=config)


def read(builder, split):
    source = builder.as_data_source(split)
    records = source.__getitems__(list(range(len(source))))
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and message
    return message


# --- idx files -------------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [True, False])
def test_idx_set_holds_what_was_written(tmp_path, gzipped):
    arrays = write_idx_set(tmp_path, gzipped=gzipped)
    source = read_idx_set(tmp_path)
    np.testing.assert_array_equal(source.train.image, arrays[IMAGES])
    np.testing.assert_array_equal(source.train.label, arrays[LABELS])
    np.testing.assert_array_equal(source.test.image, arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(source.test.label, arrays["t10k-labels-idx1-ubyte"])


def test_fingerprint_depends_on_the_bytes_alone(tmp_path):
    write_idx_set(tmp_path / "a")
    write_idx_set(tmp_path / "b", gzipped=False)
    other = write_idx_set(tmp_path / "c", gzipped=False)
    other[LABELS][7] = (other[LABELS][7] + 1) % 10
    (tmp_path / "c" / LABELS).write_bytes(idx_bytes(other[LABELS]))
    prints = [read_idx_set(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def cut_gzip(data):
    return gzip.compress(data)[:-9]


def flip_gzip(data):
    packed = bytearray(gzip.compress(data, compresslevel=0))  # stored: the flip is in a pixel
    packed[len(packed) // 2] ^= 1
    return bytes(packed)


@pytest.mark.parametrize(
    ("stem", "spoil", "says"),
    [
        (IMAGES, cut_gzip, "cut or damaged"),
        (IMAGES, flip_gzip, "cut or damaged"),
        (IMAGES, lambda data: data, "cut or damaged"),  # plain bytes under a .gz name
        (IMAGES, lambda data: gzip.compress(data[:-1]), "is cut"),
        (IMAGES, lambda data: gzip.compress(data[:6]), "is cut"),
        (IMAGES, lambda data: gzip.compress(data[:2]), "is cut"),
        (IMAGES, lambda data: b"", "is cut"),
        (IMAGES, lambda data: gzip.compress(data + b"\0"), "is too long"),
        (LABELS, lambda data: gzip.compress(b"\0\0\x0d\x01" + data[4:]), "magic number 0x00000d01"),
        (LABELS, lambda data: gzip.compress(b"\0\0\x08\x03" + data[4:]), "expected 0x00000801"),
        (LABELS, lambda data: gzip.compress(idx_bytes(np.zeros(19, np.uint8))), "19 labels"),
        (LABELS, lambda data: gzip.compress(data[:-1] + b"\x0a"), "the label 10"),
        (IMAGES, lambda data: gzip.compress(idx_bytes(np.zeros((20, 8, 8), np.uint8))), "(8, 8)"),
    ],
)
def test_bad_idx_file_is_one_line_that_names_it(tmp_path, stem, spoil, says):
    manual_dir, data_dir = tmp_path / "manual", tmp_path / "data"
    arrays = write_idx_set(manual_dir)
    path = manual_dir / f"{stem}.gz"
    path.write_bytes(spoil(idx_bytes(arrays[stem])))
    with pytest.raises(DataError) as error:
        build_mnist(manual_dir, data_dir)
    message = one_line(error)
    assert str(path) in message and says in message and "--config.manual_dir=DIR" in message
    assert not data_dir.exists()


def test_missing_idx_file_and_missing_folder(tmp_path):
    write_idx_set(tmp_path / "manual")
    (tmp_path / "manual" / f"{LABELS}.gz").unlink()
    with pytest.raises(DataError) as error:
        read_idx_set(tmp_path / "manual")
    assert f"{LABELS}.gz is missing" in one_line(error)
    with pytest.raises(DataError) as error:
        read_idx_set(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} is not a folder" in one_line(error)


def test_empty_split(tmp_path):
    write_idx_set(tmp_path, num_test=0)
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz has no images"):
        read_idx_set(tmp_path)


def test_header_that_asks_for_too_much_is_not_allocated(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"\0" * 50)
    with pytest.raises(DataError, match="is cut: 66 bytes"):
        read_idx(path, ndim=3)


# --- builders --------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_in_its_published_split(tmp_path):
    builder = builders.build(builders.Digits, data_dir=str(tmp_path))
    digits = load_digits()
    x_train, x_test, y_train, y_test = train_test_split(
        digits.images, digits.target, test_size=0.5, shuffle=False
    )
    for split, x, y, count in (("train", x_train, y_train, 898), ("test", x_test, y_test, 899)):
        image, label = read(builder, split)
        assert image.shape == (count, 8, 8, 1) and image.dtype == np.uint8
        np.testing.assert_array_equal(image[..., 0], x)
        np.testing.assert_array_equal(label, y)
    assert builder.info.features["label"].num_classes == 10


@pytest.mark.parametrize("cls", [builders.MnistIdx, builders.FashionMnistIdx])
def test_idx_builder_keeps_pixels_labels_and_order(tmp_path, cls):
    arrays = write_idx_set(tmp_path / "manual")
    config = cls.config_of(tmp_path / "manual")
    builder = builders.build(cls, data_dir=str(tmp_path / "data"), config=config)
    for prefix, split in (("train", "train"), ("t10k", "test")):
        image, label = read(builder, split)
        np.testing.assert_array_equal(image[..., 0], arrays[f"{prefix}-images-idx3-ubyte"])
        np.testing.assert_array_equal(label, arrays[f"{prefix}-labels-idx1-ubyte"])
    assert set(builder.info.features) == {"image", "label"}


def test_fashion_mnist_names_are_those_of_tfds():
    theirs = tfds.builder_cls("fashion_mnist")
    assert theirs.__module__.startswith("tensorflow_datasets.")
    with quiet():
        names = theirs(data_dir="/nowhere").info.features["label"].names
    assert list(builders.FashionMnistIdx.CLASS_NAMES) == names


def test_registry_of_tfds_is_untouched():
    for cls in (builders.Digits, builders.MnistIdx, builders.FashionMnistIdx):
        with pytest.raises(tfds.core.registered.DatasetNotFoundError):
            tfds.builder_cls(cls.name)


def test_second_build_reads_what_is_there(tmp_path):
    write_idx_set(tmp_path / "manual")
    first = build_mnist(tmp_path / "manual", tmp_path / "data")
    records = sorted(Path(first.data_dir).glob("*array_record*"))
    before = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in records]
    assert before
    again = build_mnist(tmp_path / "manual", tmp_path / "data")
    assert again.data_dir == first.data_dir
    after = [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in records]
    assert after == before


def test_each_manual_dir_gets_its_own_images(tmp_path):
    a = write_idx_set(tmp_path / "a", seed=1)
    b = write_idx_set(tmp_path / "b", seed=2)
    for folder, arrays in (("a", a), ("b", b), ("a", a)):
        image, _ = read(build_mnist(tmp_path / folder, tmp_path / "data"), "train")
        np.testing.assert_array_equal(image[..., 0], arrays[IMAGES])


def test_cut_source_is_refused_even_where_a_build_exists(tmp_path):
    write_idx_set(tmp_path / "manual")
    build_mnist(tmp_path / "manual", tmp_path / "data")
    path = tmp_path / "manual" / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cut or damaged"):
        build_mnist(tmp_path / "manual", tmp_path / "data")


def test_source_that_changes_during_the_build_is_refused(tmp_path):
    write_idx_set(tmp_path / "manual", seed=1)
    config = builders.MnistIdx.config_of(tmp_path / "manual")
    write_idx_set(tmp_path / "manual", seed=2)
    with pytest.raises(DataError, match="changed while they were read"):
        builders.build(builders.MnistIdx, data_dir=str(tmp_path / "data"), config=config)
    assert not list((tmp_path / "data").rglob("*array_record*"))
    assert not list((tmp_path / "data").rglob("incomplete.*"))


def test_folder_that_is_no_build_is_neither_used_nor_overwritten(tmp_path):
    folder = tmp_path / builders.Digits.name / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError) as error:
        builders.build(builders.Digits, data_dir=str(tmp_path))
    assert str(folder) in one_line(error) and "move it away" in str(error.value)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_damaged_description_is_one_line(tmp_path):
    write_idx_set(tmp_path / "manual")
    builder = build_mnist(tmp_path / "manual", tmp_path / "data")
    (builder.data_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError) as error:
        build_mnist(tmp_path / "manual", tmp_path / "data")
    assert builders.MnistIdx.name in one_line(error) and "move it away" in str(error.value)


def test_missing_records_are_one_line(tmp_path):
    write_idx_set(tmp_path / "manual")
    builder = build_mnist(tmp_path / "manual", tmp_path / "data")
    next(builder.data_path.glob("*test*array_record*")).unlink()
    with pytest.raises(DataError) as error:
        build_mnist(tmp_path / "manual", tmp_path / "data")
    assert "array_record-00000-of-00001 is missing" in one_line(error)


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError) as error:
        builders.build(builders.Digits, data_dir=str(tmp_path / "file"))
    assert "--config.data_dir=DIR" in one_line(error)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_builder_survives_pickling(tmp_path):
    arrays = write_idx_set(tmp_path / "manual")
    builder = pickle.loads(pickle.dumps(build_mnist(tmp_path / "manual", tmp_path / "data")))
    image, _ = read(builder, "train")
    np.testing.assert_array_equal(image[..., 0], arrays[IMAGES])


# --- other processes -------------------------------------------------------------------------

BUILD = """
import os, pathlib, signal, sys, time
from bn_research.data import builders

manual_dir, data_dir, mode, meeting = sys.argv[1:]
generate = builders.MnistIdx._generate_examples

def spoiled(self, image, label):
    for key, example in generate(self, image, label):
        if mode == "kill" and key == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "meet" and key == 5:
            (pathlib.Path(meeting) / str(os.getpid())).touch()
            deadline = time.monotonic() + 60
            while len(os.listdir(meeting)) < 2:
                assert time.monotonic() < deadline, "the other process never came"
                time.sleep(0.01)
        yield key, example

builders.MnistIdx._generate_examples = spoiled
config = builders.MnistIdx.config_of(manual_dir)
builder = builders.build(builders.MnistIdx, data_dir=data_dir, config=config)
sys.exit(0 if len(builder.as_data_source("train")) == 20 else 1)
"""


def start_build(tmp_path, mode):
    (tmp_path / "meeting").mkdir(exist_ok=True)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    folders = [str(tmp_path / "manual"), str(tmp_path / "data"), mode, str(tmp_path / "meeting")]
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *folders],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_build_is_not_taken_for_a_finished_one(tmp_path):
    arrays = write_idx_set(tmp_path / "manual")
    process = start_build(tmp_path, "kill")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said
    assert list((tmp_path / "data").rglob("incomplete.*")), "it was killed before it wrote anything"
    image, _ = read(build_mnist(tmp_path / "manual", tmp_path / "data"), "train")
    np.testing.assert_array_equal(image[..., 0], arrays[IMAGES])


def test_two_processes_that_build_at_once_both_end_well(tmp_path):
    arrays = write_idx_set(tmp_path / "manual")
    processes = [start_build(tmp_path, "meet") for _ in range(2)]
    for process in processes:
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, said
        assert said == ""
    assert not list((tmp_path / "data").rglob("incomplete.*"))
    image, _ = read(build_mnist(tmp_path / "manual", tmp_path / "data"), "train")
    np.testing.assert_array_equal(image[..., 0], arrays[IMAGES])
