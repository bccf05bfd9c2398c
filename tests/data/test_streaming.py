"""The stream: the same batches whoever makes them, each example once an epoch, no orphans."""

import functools
import gzip
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from imagenet_like import make_imagenet_like
from PIL import Image
from tfds_like import prepare_as_tfds_would

from bn_research.data import (
    EVALUATION_SPLIT,
    DataError,
    data_source,
    evaluation_batches,
    load_examples,
    prepare,
    streaming,
    training_batches,
)
from bn_research.data.augment import central_crop, cifar_augmentation, imagenet_augmentation
from bn_research.data.records import as_array

TRAIN, TEST = 103, 37  # divisible by no batch size below


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """MNIST-like; the first two pixels of an image are its number, in base 16."""
    folder = tmp_path_factory.mktemp("numbered")
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        images = np.full((count, 28, 28), 200, np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 16)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, header, values in (
            ("images-idx3", [0x803, count, 28, 28], images),
            ("labels-idx1", [0x801, count], labels),
        ):
            data = np.array(header, ">u4").tobytes() + values.tobytes()
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    return prepare("mnist", data_dir=folder / "data", manual_dir=folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    contents = make_imagenet_like(folder, 40, 11)
    return prepare("imagenet2012", data_dir=folder), contents


def stamp(image, rng):
    """Write a random number below the number of the image."""
    image = image.copy()
    image[1, :8, 0] = rng.integers(0, 256, 8)
    return image


def number(image):
    return image[..., 0, 0, 0] * 16 + image[..., 0, 1, 0].astype(int)


def take(count, builder, **options):
    options = {"batch_size": 12, "seed": 3, "transform": stamp} | options
    with training_batches(builder, "train", **options) as batches:
        return list(itertools.islice(batches, count))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(other)
        for leaf, same in zip(one, other, strict=True):
            assert type(leaf) is np.ndarray and leaf.dtype == same.dtype
            np.testing.assert_array_equal(leaf, same)


@pytest.fixture(scope="module")
def stream(numbered):
    """The first batches of 12: three epochs and a part of the fourth."""
    return take(30, numbered)


def test_batches_hold_the_examples_of_the_set(numbered, stream):
    whole = load_examples(numbered, "train")
    for batch in stream:
        assert batch.image.shape == (12, 28, 28, 1) and batch.image.dtype == np.uint8
        assert batch.label.dtype == np.int32
        index = number(batch.image)
        image = batch.image.copy()
        image[:, 1, :8] = whole.image[index][:, 1, :8]
        np.testing.assert_array_equal(image, whole.image[index])
        np.testing.assert_array_equal(batch.label, whole.label[index])


def test_each_example_is_seen_exactly_once_an_epoch(stream):
    order = np.concatenate([number(batch.image) for batch in stream])
    epochs = [order[start : start + TRAIN] for start in range(0, 3 * TRAIN, TRAIN)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(TRAIN))
    for one, other in itertools.combinations([*epochs, np.arange(TRAIN)], 2):
        assert np.mean(one == other) < 0.1  # 1 of 103 is expected


def test_orders_of_epochs_and_seeds_are_independent():
    # grain's own shuffle fails this by 20 standard deviations.
    count = 50_000
    orders = [streaming._permutation(seed, epoch, count) for seed in range(3) for epoch in range(4)]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) * count**0.5 < 5


def test_augmentation_differs_between_epochs_and_seeds(numbered, stream):
    stamps = np.concatenate([batch.image[:, 1, :8, 0] for batch in stream])
    assert len(np.unique(stamps, axis=0)) == len(stamps) == 360
    other = np.concatenate([batch.image[:, 1, :8, 0] for batch in take(30, numbered, seed=4)])
    assert len(np.unique(np.concatenate([stamps, other]), axis=0)) == 720
    assert (stamps.mean(), stamps.std()) == pytest.approx((127.5, 73.9), rel=0.03)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batches_of_one(numbered, stream, process_count):
    parts = [
        take(30, numbered, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    joined = [
        type(stream[0])(*(np.concatenate(leaves) for leaves in zip(*rows, strict=True)))
        for rows in zip(*parts, strict=True)
    ]
    assert_equal(joined, stream)


def test_a_batch_may_hold_more_than_the_set(numbered, stream):
    (batch,) = take(1, numbered, batch_size=240)
    assert_equal(
        [batch],
        [type(batch)(*(np.concatenate(leaves) for leaves in zip(*stream[:20], strict=True)))],
    )


@pytest.mark.parametrize("start", [1, 8, 9, 25])  # an epoch ends within batch 8
def test_a_stream_opened_at_a_step_goes_on_from_there(numbered, stream, start):
    assert_equal(take(30 - start, numbered, start_step=start), stream[start:])


def test_a_far_step_is_opened_at_once(numbered):
    begin = time.monotonic()
    (batch,) = take(1, numbered, start_step=10**12)
    assert time.monotonic() - begin < 10 and len(batch.label) == 12


def test_workers_make_the_same_batches(numbered, stream):
    assert_equal(take(25, numbered, num_workers=2, start_step=5), stream[5:])
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 30, 60])
def test_evaluation_covers_all_once_in_order(numbered, process_count, batch_size):
    parts = []
    for index in range(process_count):
        with evaluation_batches(
            numbered,
            "test",
            batch_size=batch_size,
            process_index=index,
            process_count=process_count,
        ) as batches:
            parts.append(list(batches))
    assert {len(part) for part in parts} == {-(-TEST // batch_size)}
    seen, labels = [], []
    for rows in zip(*parts, strict=True):
        for batch in rows:
            assert batch.image.shape == (batch_size // process_count, 28, 28, 1)
            assert batch.label.shape == batch.where.shape == (batch_size // process_count,)
            assert batch.where.dtype == bool and batch.label.dtype == np.int32
            assert not batch.image[~batch.where].any() and not batch.label[~batch.where].any()
            seen += number(batch.image[batch.where]).tolist()
            labels += batch.label[batch.where].tolist()
    assert seen == list(range(TEST)) and labels == [i % 10 for i in range(TEST)]


def test_evaluation_by_workers_is_the_same(numbered):
    runs = []
    for num_workers in (0, 2):
        with evaluation_batches(numbered, "test", batch_size=8, num_workers=num_workers) as batches:
            runs.append(list(batches))
            assert list(batches) == []
    assert_equal(*runs)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", ["digits", "cifar10", "fashion_mnist"])
def test_every_kind_of_set_streams(tmp_path, monkeypatch, name):
    if name != "digits":
        prepare_as_tfds_would(name, tmp_path)  # PNG, as tfds stores them
    monkeypatch.setattr("bn_research.data.datasets.FASHION_MNIST_DIR", tmp_path / "none")
    builder = prepare(name, data_dir=tmp_path)
    whole = load_examples(builder, EVALUATION_SPLIT[name])
    count = len(whole.label)
    with evaluation_batches(builder, EVALUATION_SPLIT[name], batch_size=count) as batches:
        (batch,) = batches
    np.testing.assert_array_equal(batch.image, whole.image)
    np.testing.assert_array_equal(batch.label, whole.label)


def test_photographs_are_cropped_and_labelled(photographs):
    builder, contents = photographs
    names = [record["file_name"].decode() for record in data_source(builder, "validation")]
    crop = functools.partial(central_crop, size=32)
    with evaluation_batches(builder, "validation", batch_size=4, transform=crop) as batches:
        batches = list(batches)
    image = np.concatenate([batch.image[batch.where] for batch in batches])
    label = np.concatenate([batch.label[batch.where] for batch in batches])
    assert len(image) == 11
    for i, name in enumerate(names):
        data, expected = contents["validation"][name]
        assert label[i] == expected
        np.testing.assert_array_equal(image[i], as_array(crop(Image.open(io.BytesIO(data)))))


def test_photographs_train_at_one_size(photographs):
    builder, _ = photographs
    batches = take(5, builder, batch_size=16, transform=imagenet_augmentation(24))
    assert {batch.image.shape for batch in batches} == {(16, 24, 24, 3)}
    half = take(
        5,
        builder,
        batch_size=16,
        transform=imagenet_augmentation(24),
        process_index=1,
        process_count=2,
    )
    assert_equal(half, [type(batch)(*(leaf[8:] for leaf in batch)) for batch in batches])


def test_images_that_differ_in_size_want_a_transform(photographs):
    with pytest.raises(ValueError, match="give a transform that makes them equal") as error:
        take(1, photographs[0], transform=None)
    assert "\n" not in str(error.value)


def test_without_transform_images_stay_as_they_are(numbered, stream):
    (batch,) = take(1, numbered, transform=None)
    np.testing.assert_array_equal(number(batch.image), number(stream[0].image))
    assert (batch.image[:, 1:] == 200).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; allowed: a positive multiple of the 1 processes"),
        ({"batch_size": 10, "process_count": 4}, "batch_size is 10; .* of the 4 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; allowed: 0 to 1"),
        ({"process_index": -1}, "process_index is -1; allowed: 0 to 0"),
        ({"process_count": 0}, "process_count is 0; allowed"),
        ({"seed": -1}, "seed is -1; allowed"),
        ({"start_step": -1}, "start_step is -1; allowed"),
        ({"num_workers": -1}, "num_workers is -1; allowed"),
    ],
)
def test_bad_arguments(numbered, options, message):
    with pytest.raises(ValueError, match=message) as error:
        take(1, numbered, **options)
    assert "\n" not in str(error.value)
    if not {"seed", "start_step"} & set(options):
        options = {"batch_size": 12} | options
        with pytest.raises(ValueError, match=message):
            evaluation_batches(numbered, "test", **options)


def test_unknown_and_empty_splits(numbered):
    for split, message in (("validation", "mnist_idx has train, test"), ("test[:0]", "test.:0")):
        for open_batches in (
            functools.partial(training_batches, seed=0),
            evaluation_batches,
        ):
            with pytest.raises(DataError, match=message) as error:
                open_batches(numbered, split, batch_size=4)
            assert "\n" not in str(error.value)


def test_a_closed_stream_says_so(numbered):
    batches = training_batches(numbered, "train", batch_size=4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="the stream of batches is closed"):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_records_are_one_line(tmp_path, numbered, num_workers):
    shutil.copytree(Path(numbered.data_dir).parents[1], tmp_path / "mnist_idx")
    (path,) = (tmp_path / "mnist_idx").rglob("*train*array_record*")
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) * 3 // 4, 16):
        data[place] ^= 0xFF
    path.write_bytes(data)
    builder = type(numbered)(data_dir=str(tmp_path), config=numbered.builder_config)
    with pytest.raises(DataError) as error:
        take(9, builder, num_workers=num_workers)
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and "is damaged" in message


def test_a_photograph_cut_short_is_damage(tmp_path):
    def cut(data):
        return data[: len(data) // 2]

    contents = make_imagenet_like(tmp_path, 4, 4, edit=cut)
    assert contents
    builder = prepare("imagenet2012", data_dir=tmp_path)
    with pytest.raises(DataError, match="is damaged .OSError"):
        take(1, builder, transform=imagenet_augmentation(24))


def workers():
    return [child.pid for child in multiprocessing.active_children()]


def test_signals_are_the_parents_and_a_lost_worker_is_told(numbered):
    with training_batches(numbered, "train", batch_size=8, seed=0, num_workers=1) as batches:
        next(batches)
        (worker,) = workers()
        os.kill(worker, signal.SIGINT)
        os.kill(worker, signal.SIGTERM)
        for _ in range(20):
            next(batches)
        os.kill(worker, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(DataError, match="worker that reads .* was lost .*exit code -9") as e:
            for _ in range(20):
                next(batches)
        assert time.monotonic() - begin < 20 and "\n" not in str(e.value)


SCRIPT = """
import multiprocessing, sys, time
from bn_research.data import prepare, training_batches

def transform(image, rng):
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    return image

if __name__ == "__main__":
    batches = training_batches(
        prepare("digits", data_dir=sys.argv[1]), "train", batch_size=8, seed=0,
        transform=transform, num_workers=1,
    )
    next(batches)
    if sys.argv[2] == "stay":
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def run_script(tmp_path, *arguments):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "sets"), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_stream_left_open_ends_with_its_program_in_silence(tmp_path):
    process = run_script(tmp_path, "end")
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


def test_workers_end_with_a_killed_parent(tmp_path):
    process = run_script(tmp_path, "stay")
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids and all(is_alive(pid) for pid in pids)
    process.kill()
    process.communicate(timeout=20)
    end = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid):
    """Whether it runs; one that ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_cifar_augmentation_streams(tmp_path):
    builder = prepare("digits", data_dir=tmp_path)
    plain, augmented = (
        take(3, builder, transform=transform) for transform in (None, cifar_augmentation(padding=1))
    )
    for one, other in zip(plain, augmented, strict=True):
        np.testing.assert_array_equal(one.label, other.label)
        assert one.image.shape == other.image.shape and (one.image != other.image).any()
