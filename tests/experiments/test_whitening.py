"""Tests of experiments.whitening: steps to a loss, the choice of rates, verdicts, and images.

Every transform of images is held against NumPy in float64.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from experiments.whitening import PRESETS, measurements
from experiments.whitening.measurements import (
    apply_transform,
    fit_transform,
    prepare,
    second_moment,
    transform_inputs,
)
from experiments.whitening.regression import TRANSFORMS
from experiments.whitening.verdicts import Records, choose, judge, kinds, smoothed, steps_to_target

CONFIG = dataclasses.replace(PRESETS["smoke"], seeds=3, target_loss=0.5, window=2, num_steps=100)
KINDS = kinds(CONFIG)
SPECTRA = {name: {"condition_number": 10.0} for name in KINDS}


def record(steps, *, inputs="raw", placement="none", seed=0, rate=0.1, diverged=0, length=100):
    """A run whose loss falls from 2 to 0.1 before this step, so that its mean of two is 0.1 at it.

    The mean of 2 and 0.1 is above the target, that of 0.1 twice below.
    """
    loss = np.where(np.arange(1, length + 1) < steps - 0.5, 2.0, 0.1)
    loss[steps - 2 : steps] = 0.1
    return {
        "loss": [float(x) for x in loss],
        "inputs": inputs,
        "placement": placement,
        "seed": seed,
        "learning_rate": rate,
        "diverged": diverged,
        "accuracy": 0.9,
    }


def records(**steps):
    """Three seeds of every kind of inputs; steps of those without BN as given, else 40."""
    return [
        record(
            steps.get(name, 40) + seed % 2 if placement == "none" else 40,
            inputs=name,
            placement=placement,
            seed=seed,
        )
        for placement in ("none", "hidden")
        for name in KINDS
        for seed in range(3)
    ]


def setting(**changed):
    theory = {"predicted_steps": 100, "measured_steps": 100}
    eigen = {"top_eigenvalue": 101.2, "mean_eigenvalue": 101.0}
    drawn = {"name": "raw", "kappa": 1.0, "mean_norm": 10.0, "correlated": True}
    return {**theory, **eigen, **drawn, **changed}


def verdict(trained, *settings):
    regressions = [{"settings": list(settings) or [setting()]}]
    (found,) = judge(CONFIG, Records(regressions, SPECTRA, trained))
    return found


def test_the_averaged_loss():
    steps, loss = smoothed({"loss": [4.0, 2.0, 0.0, None, 1.0]}, 2)
    np.testing.assert_array_equal(steps, [2, 3, 4, 5])
    np.testing.assert_array_equal(loss, [3, 1, math.nan, math.nan])
    assert np.isnan(smoothed({"loss": [1.0]}, 2)[1]).all()


def test_steps_to_the_target():
    assert steps_to_target(CONFIG, record(30)) == (30, 30)
    assert steps_to_target(CONFIG, record(100)) == (100, 100)
    never = {"loss": [2.0] * 100}
    assert steps_to_target(CONFIG, never) == (100, math.inf)
    lost = {"loss": [2.0, None, None]}  # it ended early, and its bound is that of a whole run
    assert steps_to_target(CONFIG, lost) == (100, math.inf)


def test_the_best_rate_is_the_fastest_then_the_lowest():
    fast, slow = record(30, rate=0.1), record(60, rate=1.0)
    never = {**fast, "loss": [1.0] * 100, "learning_rate": 10.0}
    nearer = {**never, "loss": [0.7] * 100, "learning_rate": 20.0}
    lost = {**never, "loss": [0.7, None], "learning_rate": 30.0, "diverged": 2}
    assert choose(CONFIG, [slow, never, fast]) == 0.1
    assert choose(CONFIG, [never, nearer, lost]) == 20.0
    assert choose(CONFIG, [lost, never]) == 10.0


def test_the_order_as_claimed():
    found = verdict(records(raw=80, centred=60, scaled=40, zca=20, pca=20))
    assert found.verdict == REPRODUCED
    assert found.measured["steps raw/zca"] == pytest.approx((16 * 81 / 21) ** (1 / 3))
    assert found.interval[0] <= 3.95 <= found.interval[1]
    assert found.measured["steps raw/raw with BN"] == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize(
    "steps",
    [
        {"raw": 20, "scaled": 40, "zca": 40, "pca": 40},
        {"raw": 80, "scaled": 20, "zca": 40, "pca": 40},
        {"raw": 30, "scaled": 20, "zca": 40, "pca": 40},
    ],
)
def test_an_order_reversed_is_not_reproduced(steps):
    assert verdict(records(**steps)).verdict == NOT_REPRODUCED


def test_an_interval_over_one_is_inconclusive():
    trained = records(raw=80, scaled=40, zca=40)
    for run, steps in zip(
        [r for r in trained if (r["inputs"], r["placement"]) == ("zca", "none")],
        (30, 40, 55),
        strict=True,
    ):
        run["loss"] = record(steps)["loss"]
    assert verdict(trained).verdict == INCONCLUSIVE


def test_a_target_that_raw_inputs_never_reach_is_a_bound():
    trained = records(raw=80, scaled=40, zca=20, pca=20)
    for run in trained:
        if (run["inputs"], run["placement"]) == ("raw", "none"):
            run["loss"] = [2.0] * 100
    found = verdict(trained)
    assert found.interval[0] > 4 and found.interval[1] == math.inf
    assert found.verdict == REPRODUCED
    assert "3 did not reach the target" in found.note and "raw > 100, > 100, > 100" in found.note


def test_theory_decides_too():
    trained = records(raw=80, scaled=40, zca=20, pca=20)
    assert verdict(trained, setting(measured_steps=103)).verdict == NOT_REPRODUCED
    assert verdict(trained, setting(measured_steps=None)).verdict == NOT_REPRODUCED
    few = {"predicted_steps": 3, "measured_steps": 4}  # rounding may cost a step
    assert verdict(trained, setting(), setting(**few)).verdict == REPRODUCED
    assert verdict(trained, setting(top_eigenvalue=110.0)).verdict == NOT_REPRODUCED
    assert verdict(trained, setting(mean_norm=1.0)).verdict == INCONCLUSIVE  # no mean dominates


def test_results_are_those_of_the_ledger(smoke_run):
    path = smoke_run("whitening")
    (claim,) = json.loads((path / "results.json").read_text())["claims"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["name"].startswith("zca/train")]
    assert len(found) == 4  # two seeds, two placements
    trained = [line["accuracy"] for line in found if line["placement"] == "none"]
    assert claim["measured"]["test accuracy, zca"] == pytest.approx(np.mean(trained))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regression_examples": 4}, "more than features=4"),
        ({"other_epsilons": (0.1,)}, r"other_epsilons=\(0.1,\) is not allowed"),
        ({"other_targets": (2.0,)}, r"other_targets=\(2.0,\) is not allowed"),
        ({"num_steps": 30}, "multiple of steps_per_dispatch=20"),
        ({"window": 50}, "window=50 is not allowed"),
        ({"network": "f8 f7"}, "end it in f10"),
        ({"batch_size": 1000}, "batch_size=1000 is not allowed: at most 256"),
    ],
)
def test_bad_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        prepare(dataclasses.replace(PRESETS["smoke"], **changes))


# --- images ---

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
    monkeypatch.setattr(measurements, "_CHUNK", 40)  # 90 = 40 + 40 + 10
    for before, after in zip(whole, transform_inputs(train, test, name, epsilon=0.01), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_bad_arguments_are_refused(images):
    train, test = images
    for arguments, message in [
        ((train, test, "lda"), "name='lda' is unknown: allowed are raw, centred"),
        (((255 * train).astype(np.uint8), test, "raw"), "images have dtype uint8"),
    ]:
        with pytest.raises(ValueError, match=message):
            transform_inputs(*arguments, epsilon=0.0)
