"""Inputs centred, scaled and whitened: every transform against NumPy in float64."""

import numpy as np
import pytest

from bn_research.normalization import input_whitening
from bn_research.normalization.input_whitening import (
    TRANSFORMS,
    apply_transform,
    fit_transform,
    second_moment,
    transform_inputs,
)

SHAPE = (4, 3, 2)
PIXELS = 24
DEAD = (0, 5, 23)  # pixels that are constant in the training set alone
WHITENED = ("zca", "pca")


def drawn(seed, count):
    """Correlated pixels from 0 to 1 of very different spread."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((PIXELS, PIXELS)) * np.logspace(0, -1, PIXELS)
    x = 1 / (1 + np.exp(-rng.standard_normal((count, PIXELS)) @ mixing))
    return x.reshape(count, *SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def images():
    train, test = drawn(0, 90), drawn(1, 7)
    train.reshape(90, -1)[:, DEAD] = (0.0, 0.3, 1.0)  # 0.3 is no sum of powers of two
    return train, test


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def moments(x):
    return flat(x).mean(axis=0), np.cov(flat(x).T, bias=True)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shapes_and_dtypes_are_those_of_the_network(images, name):
    for before, after in zip(images, transform_inputs(*images, name, epsilon=0.01), strict=True):
        assert after.shape == before.shape and after.dtype == np.float32
        assert np.isfinite(after).all()


def test_raw_and_centred(images):
    for before, after in zip(images, transform_inputs(*images, "raw", epsilon=0.1), strict=True):
        np.testing.assert_array_equal(before, after)
    mean = flat(images[0]).mean(axis=0)
    for before, after in zip(images, transform_inputs(*images, "centred", epsilon=0), strict=True):
        np.testing.assert_allclose(flat(after), flat(before) - mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.0, 0.03])
def test_scaled(images, epsilon):
    train, test = transform_inputs(*images, "scaled", epsilon=epsilon)
    mean, sigma = moments(images[0])
    var = np.diag(sigma) + epsilon * np.diag(sigma).mean()
    lives = np.setdiff1d(np.arange(PIXELS), DEAD)
    for before, after in zip(images, (train, test), strict=True):
        expected = (flat(before) - mean)[:, lives] / np.sqrt(var[lives])
        np.testing.assert_allclose(flat(after)[:, lives], expected, rtol=0, atol=2e-6)
        # The test images do vary there.
        np.testing.assert_array_equal(flat(after)[:, DEAD], 0)
    if epsilon == 0:
        np.testing.assert_allclose(flat(train)[:, lives].var(axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.03])
def test_whitened_covariance(images, epsilon):
    """Eigenvalues λ/(λ + ε·mean λ), in the eigenvectors of Σ for ZCA, along the axes for PCA."""
    _, sigma = moments(images[0])
    values, vectors = np.linalg.eigh(sigma)
    rank = PIXELS - len(DEAD)
    left = np.where(np.arange(PIXELS) < len(DEAD), 0, values)
    left = left / np.where(left > 0, left + epsilon * values.mean(), 1)
    if epsilon == 0:
        np.testing.assert_allclose(left.sum(), rank)  # the identity on what varies
    expected = {"zca": (vectors * left) @ vectors.T, "pca": np.diag(left[::-1])}
    for name in WHITENED:
        train, _ = transform_inputs(*images, name, epsilon=epsilon)
        mean, found = moments(train)
        np.testing.assert_allclose(mean, 0, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=3e-6)
        # Before the result is rounded to float32 it holds to float64.
        matrix = fit_transform(images[0], name, epsilon=epsilon).matrix
        np.testing.assert_allclose(matrix @ sigma @ matrix.T, expected[name], rtol=0, atol=1e-11)


def test_zca_is_symmetric_and_moves_the_images_least(images):
    matrices = {name: fit_transform(images[0], name, epsilon=0.01).matrix for name in WHITENED}
    np.testing.assert_allclose(matrices["zca"], matrices["zca"].T, rtol=0, atol=1e-12)
    assert not np.allclose(matrices["pca"], matrices["pca"].T, atol=0.1)
    centred, zca, pca = (
        transform_inputs(*images, name, epsilon=0.01)[0] for name in ("centred", *WHITENED)
    )
    assert np.linalg.norm(zca - centred) < 0.9 * np.linalg.norm(pca - centred)


def test_pca_and_zca_differ_by_a_rotation(images):
    """All distances and inner products agree, of test images too."""
    zca, pca = (
        np.concatenate([flat(part) for part in transform_inputs(*images, name, epsilon=0.01)])
        for name in WHITENED
    )
    np.testing.assert_allclose(zca @ zca.T, pca @ pca.T, rtol=0, atol=3e-4)
    assert np.abs(zca - pca).max() > 1
    # The sign of an eigenvector is fixed: its largest entry is positive. Dead ones have 0.
    matrix = fit_transform(images[0], "pca", epsilon=0.01).matrix[: PIXELS - len(DEAD)]
    assert (np.take_along_axis(matrix, np.abs(matrix).argmax(axis=1)[:, None], 1) > 0).all()


@pytest.mark.parametrize("name", ["centred", "scaled", *WHITENED])
def test_only_the_training_set_is_fitted(images, name):
    """An image is transformed alike in the training set, in the test set, and beside any other."""
    train, test = images
    mixed = np.concatenate([train[:3], 100 + test])
    whole, part = transform_inputs(train, mixed, name, epsilon=0.01)
    np.testing.assert_allclose(part[:3], whole[:3], rtol=0, atol=1e-5)
    fitted = fit_transform(train, name, epsilon=0.01)
    np.testing.assert_array_equal(apply_transform(train, fitted), whole)
    assert np.abs(part[3:].mean()) > 1 or name == "pca"


@pytest.mark.parametrize("name", WHITENED)
def test_what_never_varies_in_training_comes_out_as_zero(images, name):
    """With any ε: a test image that differs from another in dead pixels alone is the same."""
    train, test = images
    lit = test.copy()
    lit.reshape(len(lit), -1)[:, DEAD] += 5.0
    for epsilon in (0.0, 0.01):
        plain = transform_inputs(train, test, name, epsilon=epsilon)[1]
        other = transform_inputs(train, lit, name, epsilon=epsilon)[1]
        np.testing.assert_allclose(other, plain, rtol=0, atol=1e-5)


def test_condition_before_and_after(images):
    train, _ = images
    extended = np.column_stack([flat(train), np.ones(len(train))])
    values = np.linalg.eigvalsh(extended.T @ extended / len(train))[len(DEAD) :]
    found = second_moment(train)
    assert found["rank"] == PIXELS + 1 - len(DEAD)  # dead pixels are multiples of the constant
    assert found["largest"] == pytest.approx(values[-1], rel=1e-9)
    assert found["smallest"] == pytest.approx(values[0], rel=1e-6)
    assert found["condition_number"] == pytest.approx(values[-1] / values[0], rel=1e-6)

    _, sigma = moments(train)
    values = np.linalg.eigvalsh(sigma)[len(DEAD) :]
    added = 0.02 * values.sum() / PIXELS
    for name in WHITENED:  # the bias has the eigenvalue 1
        white = second_moment(transform_inputs(train, train, name, epsilon=0.02)[0])
        assert white["rank"] == PIXELS + 1 - len(DEAD)
        assert white["condition_number"] == pytest.approx(1 + added / values[0], rel=1e-5)
        exact = second_moment(transform_inputs(train, train, name, epsilon=0.0)[0])
        assert exact["condition_number"] == pytest.approx(1, rel=1e-5)
    ranks = [
        second_moment(transform_inputs(train, train, name, epsilon=0.02)[0])
        for name in ("raw", "centred", "scaled")
    ]
    conditions = [found["condition_number"] for found in ranks]
    assert conditions[0] > conditions[1] > conditions[2]


@pytest.mark.parametrize("name", ["scaled", "zca"])
def test_chunks_change_nothing(images, name, monkeypatch):
    train, test = images
    whole = transform_inputs(train, test, name, epsilon=0.01)
    monkeypatch.setattr(input_whitening, "_CHUNK", 40)  # 90 = 40 + 40 + 10
    for before, after in zip(whole, transform_inputs(train, test, name, epsilon=0.01), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_bad_arguments_are_refused(images):
    train, test = images
    for arguments, epsilon, message in [
        ((train, test, "lda"), 0.0, "name='lda' is unknown: allowed are raw, centred"),
        ((train, test, "zca"), -0.1, "epsilon=-0.1 is not allowed"),
        ((train, test, "zca"), float("nan"), "epsilon=nan is not allowed"),
        ((train, test[:, :2], "zca"), 0.0, "test_images has shape"),
        (((255 * train).astype(np.uint8), test, "raw"), 0.0, "images have dtype uint8"),
        ((train[:0], test, "raw"), 0.0, "images is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            transform_inputs(*arguments, epsilon=epsilon)
