"""Augmentation against numpy written another way, and against the distributions it claims."""

import io
import pickle

import numpy as np
import pytest
from imagenet_like import jpeg
from PIL import Image
from scipy import stats

from bn_research.data import augment
from bn_research.data.augment import (
    central_crop,
    cifar_augmentation,
    imagenet_augmentation,
    imagenet_evaluation,
    pad_and_crop,
    photometric_distortion,
    random_flip,
    random_resized_crop,
)
from bn_research.data.records import as_array


def noise(height, width, channels=3, *, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def resized(image, box, size):
    """Triangle filter, float64: a pixel's weight falls off linearly from the output's center."""

    def weights(length, low, high):
        scale = (high - low) / size
        centers = low + (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1)
        weight = np.maximum(1 - distance, 0)
        return weight / weight.sum(axis=1, keepdims=True)

    left, top, right, bottom = box
    down, across = weights(image.shape[0], top, bottom), weights(image.shape[1], left, right)
    return np.einsum("ih,hwc,jw->ijc", down, image.astype(np.float64), across, optimize=True)


def assert_close(image, expected, levels):
    assert as_array(image).dtype == np.uint8
    np.testing.assert_allclose(as_array(image).astype(float), expected, rtol=0, atol=levels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_pad_and_crop_is_a_window_of_the_padded_image(channels, padding):
    image = noise(7, 9, channels)
    padded = np.pad(image, [(padding, padding)] * 2 + [(0, 0)])
    for seed in range(40):
        top, left = np.random.default_rng(seed).integers(2 * padding + 1, size=2)
        window = pad_and_crop(image, np.random.default_rng(seed), padding=padding)
        np.testing.assert_array_equal(window, padded[top : top + 7, left : left + 9])


def test_shifts_are_uniform():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 4] = 255
    rng = np.random.default_rng(5)
    places = [
        np.argmax(pad_and_crop(image, rng, padding=4)) for _ in range(81 * 60)
    ]  # the bright pixel stays inside for every shift
    counts = np.bincount(places, minlength=81)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_half_of_the_images_are_mirrored():
    image = noise(3, 5)
    rng, pil_rng = np.random.default_rng(1), np.random.default_rng(1)
    flips = 0
    for _ in range(2000):
        flipped = as_array(random_flip(image, rng))
        mirrored = not np.array_equal(flipped, image)
        np.testing.assert_array_equal(flipped, image[:, ::-1] if mirrored else image)
        np.testing.assert_array_equal(
            as_array(random_flip(Image.fromarray(image), pil_rng)), flipped
        )
        flips += mirrored
    assert stats.binomtest(flips, 2000).pvalue > 1e-4


def boxes(lengths, count, *, seed):
    rng = np.random.default_rng(seed)
    return np.array(
        [augment._random_box(lengths, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)]
    )


@pytest.mark.parametrize("lengths", [(900, 900), (1000, 640)])
def test_crops_have_the_distribution_of_the_paper(lengths):
    width, height = lengths
    left, top, right, bottom = boxes(lengths, 4000, seed=2).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    w, h = right - left, bottom - top
    # Drawn again here, in bulk: what fits of all that could be.
    rng = np.random.default_rng(3)
    share = rng.uniform(0.08, 1, 40000) * width * height
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 40000))
    fits = (np.sqrt(share * aspect) <= width) & (np.sqrt(share / aspect) <= height)
    assert stats.ks_2samp(w * h, share[fits]).pvalue > 1e-4
    assert stats.ks_2samp(w / h, aspect[fits]).pvalue > 1e-4
    # Pixels are whole: a place is uniform over the slack, up to one.
    for start, slack in ((left, width - w), (top, height - h)):
        wide = slack > 200
        assert stats.kstest((start[wide] + 0.5) / (slack[wide] + 1), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(left / (width - w + 1), top / (height - h + 1))[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("lengths", "box"),
    [
        ((400, 10), (200 - 20 / 3, 0, 200 + 20 / 3, 10)),
        ((10, 400), (0, 200 - 20 / 3, 10, 200 + 20 / 3)),
    ],
)
def test_where_no_crop_fits_the_largest_central_one_is_taken(lengths, box):
    np.testing.assert_allclose(boxes(lengths, 3, seed=0), [box] * 3)


@pytest.mark.parametrize("size", [7, 16, 40])  # shrunk, and enlarged
def test_a_crop_is_resized_as_the_filter_says(size):
    image = noise(31, 45)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        box = augment._random_box((45, 31), rng, (0.08, 1.0), (3 / 4, 4 / 3))
        crop = random_resized_crop(image, np.random.default_rng(seed), size=size)
        assert_close(crop, resized(image, box, size), 1.5)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (50, 33), (40, 40)])
def test_central_crop_keeps_seven_eighths_of_the_shorter_side(height, width):
    image, side = noise(height, width), 0.875 * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    expected = resized(image, (left, top, left + side, top + side), 14)
    assert_close(central_crop(image, size=14), expected, 1.5)
    assert_close(imagenet_evaluation(14)(image), expected, 1.5)


def test_central_crop_is_that_of_resizing_first():
    image = Image.open(io.BytesIO(jpeg(np.random.default_rng(0), 1, sides=(300, 400))))
    scale = 256 / min(image.size)
    whole = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in whole.size)
    two_steps = np.asarray(whole.crop((left, top, left + 224, top + 224)), float)
    one_step = np.asarray(central_crop(image, size=224), float)
    assert np.abs(one_step - two_steps).mean() < 3  # half a pixel's shift of a noisy image


def test_a_jpeg_is_decoded_no_larger_and_no_smaller_than_needed():
    rng = np.random.default_rng(0)
    data = jpeg(rng, 2, sides=(900, 1000))
    whole = Image.open(io.BytesIO(data))
    seen = set()
    for seed in range(12):
        image = Image.open(io.BytesIO(data))
        crop = random_resized_crop(image, np.random.default_rng(seed), size=96)
        box = np.array(
            augment._random_box(whole.size, np.random.default_rng(seed), (0.08, 1), (3 / 4, 4 / 3))
        )
        scale = round(whole.width / image.width)
        seen.add(scale)
        sides = (box[2:] - box[:2]) / scale
        assert sides.min() >= 95 and (scale == 8 or sides.min() < 2 * 98)
        exact = resized(np.asarray(whole), box, 96)
        assert np.abs(np.asarray(crop, float) - exact).mean() < 3
    assert len(seen) > 1


def test_gray_jpegs_become_color():
    image = Image.open(io.BytesIO(jpeg(np.random.default_rng(0), 1, mode="L")))
    gray = np.asarray(central_crop(image, size=32))
    assert gray.shape == (32, 32, 3) and (gray == gray[..., :1]).all()
    out = imagenet_augmentation(24)(image, np.random.default_rng(0))
    assert as_array(out).shape == (24, 24, 3)


def distorted(image, order, factors):
    """Contrast, brightness and color blended in float64, rounded after each."""
    for i in order:
        luma = image @ [0.299, 0.587, 0.114]
        center = [np.round(np.round(luma).mean()), 0.0, np.round(luma)[..., None]][i]
        image = np.clip(np.round(center + factors[i] * (image - center)), 0, 255)
    return image


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_photometric_distortion_blends_as_howard_says(strength):
    image = noise(20, 24)
    orders = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        factors = rng.uniform(1 - strength, 1 + strength, 3)
        order = rng.permutation(3)
        orders.add(tuple(order))
        out = photometric_distortion(image, np.random.default_rng(seed), strength=strength)
        assert_close(out, distorted(image.astype(float), order, factors), 8)
        error = np.abs(np.asarray(out) - distorted(image.astype(float), order, factors))
        assert error.mean() < 2.0  # Pillow truncates where we round, and factors multiply that
    assert len(orders) == 6


def test_without_strength_nothing_is_distorted():
    image = noise(20, 24)
    out = photometric_distortion(image, np.random.default_rng(0), strength=0.0)
    np.testing.assert_array_equal(np.asarray(out), image)
    weak, none = (
        as_array(imagenet_augmentation(16, strength=strength)(image, np.random.default_rng(3)))
        for strength in (1e-9, 0)
    )
    np.testing.assert_array_equal(weak, none)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}; allowed: 0 to 1"):
        imagenet_augmentation(16, strength=strength)


@pytest.mark.parametrize(
    "transform",
    [cifar_augmentation(), imagenet_augmentation(24), imagenet_augmentation(24, strength=0)],
)
def test_the_generator_alone_decides_and_the_image_is_left_alone(transform):
    image = noise(32, 32)
    before = image.copy()
    copy = pickle.loads(pickle.dumps(transform))
    outs = [as_array(transform(image, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    again = as_array(copy(image, np.random.default_rng(1)))
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], again)
    assert not np.array_equal(outs[0], outs[2])
    np.testing.assert_array_equal(image, before)


def test_cifar_augmentation_is_a_window_then_a_flip():
    image = noise(32, 32)
    transform = cifar_augmentation()
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        window = pad_and_crop(image, rng, padding=4)
        expected = [window, window[:, ::-1]]
        out = transform(image, np.random.default_rng(seed))
        seen |= {i for i in (0, 1) if np.array_equal(out, expected[i])}
    assert seen == {0, 1}


def test_a_gray_jpeg_left_as_it_is_becomes_color():
    image = Image.open(io.BytesIO(jpeg(np.random.default_rng(0), 1, mode="L")))
    assert as_array(image).shape == (image.height, image.width, 3)
