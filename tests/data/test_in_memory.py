"""A split in host memory, and the scale of its pixels."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bn_research.data import FULL_SCALE, DataError, load_examples, prepare, scale_images
from bn_research.data.datasets import data_source
from bn_research.data.in_memory import _CHUNK, SCALES, Examples


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare("digits", data_dir=tmp_path_factory.mktemp("digits"))


def test_examples_are_those_of_the_source(digits):
    train, test = load_examples(digits, "train"), load_examples(digits, "test")
    assert isinstance(train, Examples)
    source = load_digits()
    image = np.concatenate([train.image, test.image])
    assert image.dtype == np.uint8 and image.shape == (1797, 8, 8, 1)
    np.testing.assert_array_equal(image[..., 0], source.images)
    label = np.concatenate([train.label, test.label])
    assert label.dtype == np.int32
    np.testing.assert_array_equal(label, source.target)


def test_fast_reading_equals_that_of_tfds(digits):
    examples = load_examples(digits, "train[10:200]")
    slow = list(data_source(digits, "train[10:200]"))
    np.testing.assert_array_equal(examples.image, [record["image"] for record in slow])
    np.testing.assert_array_equal(examples.label, [record["label"] for record in slow])


def test_chunks_join_without_a_seam(digits, monkeypatch):
    whole = load_examples(digits, "train")
    monkeypatch.setattr("bn_research.data.in_memory._CHUNK", 100)
    for part, expected in zip(load_examples(digits, "train"), whole, strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (100, 100), (898, 898), (10**6, 898)])
def test_limit_takes_the_first(digits, limit, count):
    part, whole = load_examples(digits, "train", limit=limit), load_examples(digits, "train")
    assert len(part.image) == len(part.label) == count
    np.testing.assert_array_equal(part.image, whole.image[:count])
    np.testing.assert_array_equal(part.label, whole.label[:count])


@pytest.mark.parametrize("limit", [0, -1])
def test_bad_limit(digits, limit):
    with pytest.raises(ValueError, match=f"limit is {limit}; allowed"):
        load_examples(digits, "train", limit=limit)


def test_arrays_can_be_written_to(digits):
    examples = load_examples(digits, "test", limit=2)
    examples.image[0], examples.label[0] = 0, 0


def test_damaged_records_are_one_line(tmp_path):
    builder = prepare("digits", data_dir=tmp_path)
    path = next(builder.data_path.glob("*train*array_record*"))
    path.write_bytes(path.read_bytes()[: path.stat().length // 2])
    with pytest.raises(DataError) as error:
        load_examples(prepare("digits", data_dir=tmp_path), "train")
    message = str(error.value)
    assert "\n" not in message and builder.data_dir in message and "is damaged" in message


def test_standardized_has_unit_second_moment_on_the_reference(digits):
    train, test = load_examples(digits, "train").image, load_examples(digits, "test").image
    scaled = scale_images(train, "standardized", reference=train)
    assert scaled.dtype == np.float32 and scaled.shape == train.shape
    exact = scaled.astype(np.float64)
    assert exact.mean() == pytest.approx(0, abs=1e-6)
    assert np.square(exact).mean() == pytest.approx(1, abs=1e-6)
    # The test images take the training images' scalars, not their own.
    expected = (test - train.mean(dtype=np.float64)) / train.std(dtype=np.float64)
    np.testing.assert_allclose(
        scale_images(test, "standardized", reference=train), expected, rtol=1e-6, atol=1e-6
    )


def test_standardized_is_exact_over_many_chunks():
    # 8 million bright pixels of standard deviation 0.5: a float32 sum, or E[x^2] - E[x]^2 in
    # float32, is off by far more than the tolerance.
    reference = np.full((2 * _CHUNK + 1, 32, 32, 1), 254, np.uint8)
    reference[::2] = 255
    half = (len(reference) + 1) / 2 / len(reference)
    mean, std = 254 + half, (half * (1 - half)) ** 0.5
    scaled = scale_images(reference[:2], "standardized", reference=reference)
    np.testing.assert_allclose(scaled[0], (255 - mean) / std, rtol=1e-4)
    np.testing.assert_allclose(scaled[1], (254 - mean) / std, rtol=1e-4)


def test_unit_and_bytes_use_the_full_scale_and_not_the_data(digits):
    train = load_examples(digits, "train").image
    dark = np.minimum(train, 8)
    for images in (train, dark):
        unit = scale_images(images, "unit", reference=dark, full_scale=FULL_SCALE["digits"])
        assert unit.dtype == np.float32
        np.testing.assert_array_equal(unit, images / np.float32(16))
        scaled = scale_images(images, "bytes", reference=dark, full_scale=16)
        assert scaled.dtype == np.float32
        np.testing.assert_allclose(scaled, images * (255 / 16), rtol=1e-7)


def test_bytes_of_8_bit_images_are_themselves():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = scale_images(images, "bytes", reference=images, full_scale=255)
    np.testing.assert_array_equal(scaled, images)
    unit = scale_images(images, "unit", reference=images, full_scale=255)
    assert unit.min() == 0 and unit.max() == 1


def test_scaling_leaves_its_input_alone():
    images = np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1)
    before = images.copy()
    for method in SCALES:
        scale_images(images, method, reference=images, full_scale=255)
        np.testing.assert_array_equal(images, before)


def test_bad_arguments_say_what_is_allowed():
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    with pytest.raises(ValueError, match="method is 'zca'; allowed: standardized, unit, bytes"):
        scale_images(images, "zca", reference=images)
    for method in ("unit", "bytes"):
        for full_scale in (None, 0, -1):
            with pytest.raises(ValueError, match=f"full_scale is {full_scale}; '{method}' needs"):
                scale_images(images, method, reference=images, full_scale=full_scale)
    for reference in (np.zeros((2, 8, 8, 1), np.uint8), images[:0]):
        with pytest.raises(ValueError, match="reference has a standard deviation of"):
            scale_images(images, "standardized", reference=reference)
