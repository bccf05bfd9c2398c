"""`photometric_distortion`: by hand in numpy, against PIL, and the same however it is batched."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bn_research.training.distortion import (
    Factors,
    distort,
    draw_factors,
    photometric_distortion,
)

ORDERS = np.array(list(itertools.permutations(range(3))))
BATCH = len(ORDERS)


def pixels(channels=3, seed=0):
    return np.random.default_rng(seed).integers(256, size=(BATCH, 5, 4, channels), dtype=np.uint8)


def images(channels=3, seed=0, dtype=jnp.float32):
    return jnp.asarray(pixels(channels, seed) / 255, dtype)


def keys(count=BATCH, seed=0, **options):
    return jax.random.split(jax.random.key(seed, **options), count)


def factors(seed=1):
    """Every order once, and factors from 0.7 to 1.7."""
    drawn = np.random.default_rng(seed).uniform(0.7, 1.7, (3, BATCH)).astype(np.float32)
    return Factors(*drawn, ORDERS)


def by_hand(image, factors, low, high):
    """In float64, image by image."""
    results = []
    for i, v in enumerate(np.float64(image)):
        for kind in factors.order[i]:
            gray = v[..., :1]
            if v.shape[-1] == 3:
                gray = 0.299 * v[..., :1] + 0.587 * v[..., 1:2] + 0.114 * v[..., 2:]
            end = (gray.mean(), low, gray)[kind]
            v = np.clip(end + np.float64(factors[kind][i]) * (v - end), low, high)
        results.append(v)
    return np.stack(results)


@pytest.mark.parametrize(("channels", "low", "high"), [(3, 0.0, 1.0), (3, -1.0, 1.0), (1, -1, 3)])
def test_given_factors(channels, low, high):
    """In all six orders; some values are clipped at white."""
    x = images(channels) * (high - low) + low
    y = jax.jit(functools.partial(distort, low=low, high=high))(x, factors())
    np.testing.assert_allclose(
        y, by_hand(x, factors(), low, high), rtol=0, atol=2e-6 * (high - low)
    )
    assert 5 < np.sum(y == high) < y.size / 3


def test_it_is_what_pil_does():
    """PIL rounds the mean gray and the result of each step, one unit each, grown by at most 1.7."""
    y = 255 * np.asarray(distort(images(), factors()))
    enhancers = (ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Color)
    for i, order in enumerate(ORDERS):
        image = Image.fromarray(pixels()[i])
        for kind in order:
            image = enhancers[kind](image).enhance(float(factors()[kind][i]))
        np.testing.assert_allclose(y[i], np.asarray(image, np.float64), rtol=0, atol=6)


def test_ends_of_the_factors():
    """0 makes the mean gray, black and no color; 1 changes nothing but by rounding."""
    one, zero = np.ones(BATCH, np.float32), np.zeros(BATCH, np.float32)
    x, order = images(), np.tile(np.arange(3), (BATCH, 1))
    np.testing.assert_allclose(distort(x, Factors(one, one, one, order)), x, rtol=0, atol=2e-7)
    y = np.asarray(distort(x, Factors(zero, one, one, order)))
    np.testing.assert_allclose(np.ptp(y, (1, 2, 3)), 0, atol=1e-6)
    assert np.all(distort(x, Factors(one, zero, one, order)) == 0)
    y = np.asarray(distort(x, Factors(one, one, zero, order)))
    np.testing.assert_allclose(np.ptp(y, -1), 0, atol=1e-6)
    assert np.ptp(y) > 0.3


def test_law_of_the_factors():
    """Uniform, of mean 1 and variance strength²/3, uncorrelated; each order a sixth of the time."""
    count, strength = 2**14, 0.6
    drawn = jax.jit(functools.partial(draw_factors, strength=strength))(keys(count))
    values = np.asarray(drawn[:3], np.float64)
    spread = strength / np.sqrt(3)
    assert np.all(np.abs(values - 1) <= strength)
    assert np.all(np.abs(values.mean(1) - 1) < 5 * spread / np.sqrt(count))
    np.testing.assert_allclose(values.std(1), spread, rtol=0.03)
    correlations = np.corrcoef([*values, drawn.order[:, 0]])[np.triu_indices(4, 1)]
    assert np.all(np.abs(correlations) < 5 / np.sqrt(count))
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    np.testing.assert_array_equal(orders, ORDERS)
    np.testing.assert_allclose(counts, count / 6, rtol=0.1)
    with jax.enable_x64(True):
        for leaf, same in zip(drawn, draw_factors(keys(count), strength=strength), strict=True):
            np.testing.assert_array_equal(leaf, same)


def test_an_image_s_distortion_is_a_function_of_its_key_alone():
    """Whatever the other keys, the other images, the place in the batch and its size."""
    run = jax.jit(functools.partial(photometric_distortion, strength=0.5))
    x = images()
    y = np.asarray(run(x, keys()))
    by_parts = distort(x, draw_factors(keys(), strength=0.5))
    np.testing.assert_allclose(y, by_parts, rtol=0, atol=1e-6)
    assert np.all(np.abs(y - x).max((1, 2, 3)) > 0.01) and y.min() >= 0 and y.max() <= 1
    order = np.random.default_rng(1).permutation(BATCH)
    np.testing.assert_array_equal(run(x[order], keys()[order]), y[order])
    others = keys(seed=1).at[3].set(keys()[3])
    np.testing.assert_array_equal(run(x.at[4:].set(0.5), others)[3], y[3])
    assert not np.array_equal(run(x, others)[2], y[2])
    halves = [run(x[part], keys()[part]) for part in (slice(3), slice(3, None))]
    np.testing.assert_array_equal(np.concatenate(halves), y)


def test_strength_zero_changes_nothing():
    x = images().at[0, 0, 0].set(jnp.nan).at[1, 0, 0].set(-7.0)
    np.testing.assert_array_equal(photometric_distortion(x, keys(), strength=0), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    x = images(dtype=dtype)
    y = photometric_distortion(x, keys(), strength=0.3)
    wide = photometric_distortion(x.astype(jnp.float32), keys(), strength=0.3)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, wide.astype(dtype))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(strength=1.0), r"strength=1.0 is not allowed: it must be in \[0, 1\)"),
        (dict(strength=-0.1), "strength=-0.1 is not allowed"),
        (dict(strength=float("nan")), "strength=nan is not allowed"),
        (dict(image=pixels()), "image has dtype uint8: scale images to floating point"),
        (dict(image=images()[0]), r"image has shape \(5, 4, 3\): allowed is \(batch, height"),
        (dict(image=images(2)), r"image has shape \(6, 5, 4, 2\)"),
        (dict(low=1.0), "low=1.0 and high=1.0 are not allowed: low must be less"),
        (dict(keys=keys(8)), r"keys has shape \(8,\): one for each image is \(6,\)"),
        (dict(keys=jax.random.key_data(keys())), "keys has dtype uint32: allowed are typed keys"),
        (dict(keys=keys(impl="rbg"), strength=0), "generator rbg, which draws a batch by its"),
    ],
)
def test_bad_arguments(kwargs, message):
    kwargs = dict(image=images(), keys=keys(), strength=0.5) | kwargs
    with pytest.raises(ValueError, match=message):
        photometric_distortion(kwargs.pop("image"), kwargs.pop("keys"), **kwargs)
