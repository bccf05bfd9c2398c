"""Data sets by name: where each comes from, and one line where it cannot be had."""

import gzip
import io
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from imagenet_like import make_imagenet_like
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils
from tfds_like import prepare_as_tfds_would

from bn_research.data import DATASETS, EVALUATION_SPLIT, FULL_SCALE, DataError, builders, datasets
from bn_research.data.datasets import data_source, prepare
from bn_research.data.in_memory import load_examples
from bn_research.data.quiet import quiet

needs_debian = pytest.mark.skipif(
    not datasets.FASHION_MNIST_DIR.is_dir(),
    reason=f"{datasets.FASHION_MNIST_DIR} is absent: apt install dataset-fashion-mnist",
)


def write_idx_set(folder, *, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    images = {}
    for prefix, count in (("train", 6), ("t10k", 4)):
        image = rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        path = folder / f"{prefix}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(header + image.tobytes()))
        header = np.array([0x801, count], ">u4").tobytes()
        path = folder / f"{prefix}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(header + bytes(count)))
        images[prefix] = image
    return images


def refusal(*args, **kwargs):
    with pytest.raises(DataError) as error:
        prepare(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and message
    return message


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: False)


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "FASHION_MNIST_DIR", tmp_path / "no-such-package")


def test_every_set_has_a_one_line_description_and_a_full_scale():
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10", "imagenet2012"]
    assert list(FULL_SCALE) == list(EVALUATION_SPLIT) == list(DATASETS)
    assert all(text and "\n" not in text for text in DATASETS.values())


@pytest.mark.parametrize("name", ["imagenet", "", "Digits"])
def test_unknown_name_says_which_are_allowed(tmp_path, name):
    message = refusal(name, data_dir=tmp_path)
    assert repr(name) in message and all(known in message for known in DATASETS)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagenet2012"])
def test_manual_dir_where_it_means_nothing(tmp_path, name):
    assert "leave it empty" in refusal(name, data_dir=tmp_path, manual_dir=tmp_path)


def test_digits_use_tfds_default_data_dir(tmp_path):
    code = (
        "from bn_research.data import prepare, load_examples\n"
        "builder = prepare('digits')\n"
        "assert load_examples(builder, 'train').image.max() == 16\n"
        "assert builder.data_dir.startswith(__import__('os').environ['TFDS_DATA_DIR'])\n"
        "import sys\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    finished = run_python(code, TFDS_DATA_DIR=str(tmp_path / "sets"))
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == [builders.Digits.name]


def test_logging_of_the_caller_is_still_heard(tmp_path):
    code = (
        "import logging\n"
        "from bn_research.data import prepare, load_examples\n"
        "load_examples(prepare('digits'), 'train')\n"
        "logging.getLogger('caller').warning('heard')\n"
    )
    finished = run_python(code, TFDS_DATA_DIR=str(tmp_path))
    assert (finished.returncode, finished.stdout) == (0, "")
    assert len(finished.stderr.splitlines()) == 1 and "heard" in finished.stderr


def test_import_is_light():
    code = (
        "import sys, bn_research.data\n"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'sklearn', 'jax'} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)\n"
    )
    assert run_python(code).returncode == 0


def run_python(code, **env):
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_builds_are_silent(tmp_path, capfd):
    write_idx_set(tmp_path / "manual")
    load_examples(prepare("digits", data_dir=tmp_path), "test")
    load_examples(prepare("mnist", data_dir=tmp_path, manual_dir=tmp_path / "manual"), "test")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False])
def test_quiet_ends_with_its_block(monkeypatch, caplog, capsys, shown):
    monkeypatch.setattr(tqdm_utils, "_active", shown)
    logger = logging.getLogger("absl")
    with quiet():
        assert not tqdm_utils._active
        print("chatter")
        logger.warning("chatter")
        logger.error("trouble")
    assert tqdm_utils._active is shown
    logger.warning("heard")
    print("heard")
    assert caplog.messages == ["trouble", "heard"]
    assert capsys.readouterr() == ("heard\n", "")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_manual_dir_is_where_the_images_come_from(tmp_path, name):
    images = {seed: write_idx_set(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)}
    for seed in (1, 2, 1):
        builder = prepare(name, data_dir=tmp_path / "data", manual_dir=tmp_path / f"{seed}")
        image = load_examples(builder, "test").image
        np.testing.assert_array_equal(image[..., 0], images[seed]["t10k"])


def test_missing_manual_dir_is_refused_though_another_was_built(tmp_path):
    write_idx_set(tmp_path / "manual")
    prepare("mnist", data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    message = refusal("mnist", data_dir=tmp_path / "data", manual_dir=tmp_path / "gone")
    assert f"{tmp_path / 'gone'} is not a folder" in message


def test_fashion_mnist_takes_the_folder_of_debian_where_there_is_one(tmp_path, monkeypatch):
    images = write_idx_set(tmp_path / "debian")
    monkeypatch.setattr(datasets, "FASHION_MNIST_DIR", tmp_path / "debian")
    builder = prepare("fashion_mnist", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(load_examples(builder, "train").image[..., 0], images["train"])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_sets_prepared_by_tfds_are_read(tmp_path, name, no_tensorflow, no_debian, caplog):
    images = prepare_as_tfds_would(name, tmp_path)
    caplog.clear()
    examples = load_examples(prepare(name, data_dir=tmp_path), "train")
    assert not caplog.records, "tfds warns, once in a process, that OpenCV would be faster"
    assert examples.image.dtype == np.uint8 and examples.label.dtype == np.int32
    np.testing.assert_array_equal(examples.image[np.argsort(examples.label)], images)


def test_imagenet_is_read_without_tensorflow(tmp_path):
    contents = make_imagenet_like(tmp_path, 10, 4, num_classes_used=3)
    code = (
        "import sys\n"
        "from bn_research.data import EVALUATION_SPLIT, data_source, prepare\n"
        f"builder = prepare('imagenet2012', data_dir={str(tmp_path)!r})\n"
        "source = data_source(builder, EVALUATION_SPLIT['imagenet2012'], serialized=True)\n"
        "assert len(source) == 4\n"
        "assert builder.info.features['label'].num_classes == 1000\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    finished = run_python(code)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    source = data_source(prepare("imagenet2012", data_dir=tmp_path), "train")
    assert len(source) == 10
    for record in source:
        data, label = contents["train"][record["file_name"].decode()]
        assert record["label"] == label
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(record["image"], expected)


def test_imagenet_is_not_downloaded_even_with_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    message = refusal("imagenet2012", data_dir=tmp_path / "data")
    assert "cannot be downloaded" in message and "ILSVRC2012_img_val.tar" in message
    assert "TensorFlow" in message and not (tmp_path / "data").exists()


def test_ours_and_tfds_own_share_a_data_dir(tmp_path, no_tensorflow, no_debian):
    theirs = prepare_as_tfds_would("fashion_mnist", tmp_path / "data")
    ours = write_idx_set(tmp_path / "manual")
    builder = prepare("fashion_mnist", data_dir=tmp_path / "data", manual_dir=tmp_path / "manual")
    np.testing.assert_array_equal(load_examples(builder, "train").image[..., 0], ours["train"])
    own = load_examples(prepare("fashion_mnist", data_dir=tmp_path / "data"), "train")
    np.testing.assert_array_equal(own.image[np.argsort(own.label)], theirs)


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("mnist", ["--config.manual_dir=DIR", "bn_research[tfds-build]"]),
        (
            "fashion_mnist",
            ["apt install dataset-fashion-mnist", "--config.manual_dir=DIR", "[tfds-build]"],
        ),
        ("cifar10", ["bn_research[tfds-build]", "network"]),
        ("imagenet2012", ["--config.data_dir=DIR", "ILSVRC2012_img_train.tar", "tfds build"]),
    ],
)
def test_without_tensorflow_the_ways_out_are_named_and_nothing_is_tried(
    tmp_path, name, ways, no_tensorflow, no_debian, monkeypatch
):
    monkeypatch.setattr(datasets, "_unreachable", lambda url: pytest.fail("tried the network"))
    message = refusal(name, data_dir=tmp_path / "data")
    assert all(way in message for way in ways) and "TensorFlow" in message
    assert not (tmp_path / "data").exists()


def test_without_a_network_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(datasets, "_unreachable", lambda url: "no route to host")
    message = refusal("mnist", data_dir=tmp_path / "data")
    assert "no route to host" in message and "--config.manual_dir=DIR" in message
    assert not (tmp_path / "data").exists()


def test_a_closed_port_is_unreachable():
    assert "refused" in datasets._unreachable("http://127.0.0.1:9/").lower()


def test_download_that_hangs_is_given_up_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(datasets, "_unreachable", lambda url: None)
    monkeypatch.setattr(datasets, "DOWNLOAD_SECONDS", 3.0)
    monkeypatch.setattr(datasets, "PROBE_SECONDS", 1.0)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # tfds retries this for minutes
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    message = refusal("mnist", data_dir=tmp_path / "data")
    assert time.monotonic() - start < 20
    assert "no end after 3 s" in message and "--config.manual_dir=DIR" in message
    assert not list((tmp_path / "data").rglob("*mnist*"))


def test_download_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(datasets, "_unreachable", lambda url: None)
    (tmp_path / "data").write_text("not a folder")
    message = refusal("mnist", data_dir=tmp_path / "data")
    assert "NotADirectoryError" in message and "Traceback" not in message


def test_tfrecord_has_no_random_access(tmp_path, no_tensorflow):
    prepare_as_tfds_would("mnist", tmp_path)
    info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in info.parent.glob("*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    message = refusal("mnist", data_dir=tmp_path)
    assert "stored as tfrecord, which has no random access" in message


def test_data_source_has_random_access(tmp_path):
    builder = prepare("digits", data_dir=tmp_path)
    source = data_source(builder, "test")
    assert len(source) == 899
    assert source[3]["image"].shape == (8, 8, 1)
    np.testing.assert_array_equal(source.__getitems__([5, 3])[1]["image"], source[3]["image"])
    assert len(data_source(builder, "train[:10%]")) == 90


@pytest.mark.parametrize("split", ["validation", "train[:", ""])
def test_unknown_split_says_which_there_are(tmp_path, split):
    with pytest.raises(DataError) as error:
        data_source(prepare("digits", data_dir=tmp_path), split)
    message = str(error.value)
    assert repr(split) in message and "train, test" in message and "\n" not in message


@needs_debian
def test_fashion_mnist_of_debian_is_the_published_set(tmp_path):
    start = time.monotonic()
    builder = prepare("fashion_mnist", data_dir=tmp_path)
    built = time.monotonic()
    train, test = load_examples(builder, "train"), load_examples(builder, "test")
    read = time.monotonic()
    assert train.image.shape == (60000, 28, 28, 1) and test.image.shape == (10000, 28, 28, 1)
    for split, per_class in ((train, 6000), (test, 1000)):
        np.testing.assert_array_equal(np.bincount(split.label), [per_class] * 10)
    assert train.label[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    # Known of the published training images: mean 0.2860 and standard deviation 0.3530 of 255.
    assert train.image.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert train.image.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    # Generous: a shared machine. Alone, two cores take 6 s and 1 s.
    assert built - start < 60 and read - built < 24
