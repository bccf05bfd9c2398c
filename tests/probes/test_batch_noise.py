"""Tests of bn_research.probes.batch_noise and batch_noise_sampling."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from bn_research.probes.batch_noise import StatisticsNoise, exact_moments, noise_law, variance_law
from bn_research.probes.batch_noise_sampling import (
    conditional_moments,
    describe_population,
    effective_batch_size,
    measured_noise,
    predicted_noise,
)


def generator(seed=0):
    return np.random.default_rng(seed)


# --- theory ---


@pytest.mark.parametrize("m", [8, 24])  # below, SciPy's density is off by 1e-6
@pytest.mark.parametrize("x", [-2.0, 0.0, 0.7, 3.0])
def test_exact_moments_are_those_of_the_noncentral_t(m, x):
    """Adaptive quadrature over SciPy's density."""
    density = stats.nct(m - 2, x * math.sqrt(m - 1)).pdf

    def moment(power):
        def integrand(angle):  # T = √(m(m − 2))·tan(angle) turns x̂ into √(m − 1)·sin(angle)
            t = math.sqrt(m * (m - 2)) * math.tan(angle)
            slope = math.sqrt(m * (m - 2)) / math.cos(angle) ** 2
            return density(t) * slope * (math.sqrt(m - 1) * math.sin(angle)) ** power

        return integrate.quad(integrand, -math.pi / 2, math.pi / 2, epsabs=1e-12)[0]

    found = exact_moments(x, m)
    assert found.mean == pytest.approx(moment(1), abs=1e-6)
    assert found.var == pytest.approx(moment(2) - moment(1) ** 2, abs=1e-6)


@pytest.mark.parametrize("m", [3, 8, 128])
def test_exact_moments_are_those_of_gaussian_batches(m):
    """Batches of explicit samples, normalized one by one; within 5 standard errors."""
    x, count = np.array([0.0, 1.0, 2.5]), 40_000
    others = generator().standard_normal((count, m - 1))
    batches = np.concatenate([np.broadcast_to(x[:, None, None], (3, count, 1)),
                              np.broadcast_to(others, (3, *others.shape))], axis=2)  # fmt: skip
    normalized = (x[:, None] - batches.mean(axis=2)) / batches.std(axis=2)
    found = exact_moments(x, m)
    error = normalized.std(axis=1) / math.sqrt(count)
    assert np.all(np.abs(normalized.mean(axis=1) - found.mean) < 5 * error)
    squares = (normalized - found.mean[:, None]) ** 2
    error = squares.std(axis=1) / math.sqrt(count)
    assert np.all(np.abs(squares.mean(axis=1) - found.var) < 5 * error)


@pytest.mark.parametrize("m", [3, 4, 9, 512])
def test_over_all_examples_the_normalized_value_has_mean_0_and_mean_square_1(m):
    """Of each batch they are 0 and 1 exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    found = exact_moments(nodes, m)
    assert weights @ found.mean == pytest.approx(0, abs=1e-12)
    assert weights @ (found.var + found.mean**2) == pytest.approx(1, abs=1e-7)


def test_exact_moments_come_to_the_law_as_the_batch_grows():
    x = np.linspace(-3, 3, 7)
    for m, tolerance in ((4096, 6e-3), (65536, 4e-4), (2**20, 3e-5)):
        exact, law = exact_moments(x, m), noise_law(x, m)
        np.testing.assert_allclose(exact.var, law.var, rtol=tolerance)
        np.testing.assert_allclose(
            m * (exact.mean - x), m * (law.mean - x), atol=1e2 / math.sqrt(m)
        )
    np.testing.assert_allclose(noise_law(2.0, 100).var, (1 + 2) / 100)
    np.testing.assert_allclose(noise_law(2.0, 100).mean, 2 + (1.5 - 4) / 100)


def test_known_ratios_of_exact_variance_and_law():
    x = np.array([0.0, 1.0, 2.0, 3.0])
    for m, expected in ((8, [1.536, 0.914, 0.306, 0.095]), (128, [1.024, 1.007, 0.944, 0.843])):
        ratios = exact_moments(x, m).var / noise_law(x, m).var
        np.testing.assert_allclose(ratios, expected, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.03])
def test_the_law_of_skewed_features_is_the_limit_of_exact_sums(share):
    """Features of two values: a batch is the number of its ones, which is binomial."""
    std = math.sqrt(share * (1 - share))
    skewness = (1 - 2 * share) / std
    kurtosis = 3 + (1 - 6 * share * (1 - share)) / std**2
    m, x = 200_000, np.array([-1.5, 0.0, 0.4, 2.0])
    spread = int(12 * math.sqrt(m) * std)
    ones = int(m * share) + np.arange(-spread, spread)
    weights = stats.binom.pmf(ones, m - 1, share)
    low, high = -share / std, (1 - share) / std
    total = ones * high + (m - 1 - ones) * low
    squares = ones * high**2 + (m - 1 - ones) * low**2
    mean = (total + x[:, None]) / m
    normalized = (x[:, None] - mean) / np.sqrt((squares + x[:, None] ** 2) / m - mean**2)
    expected = normalized @ weights
    var = (normalized - expected[:, None]) ** 2 @ weights
    law = noise_law(x, m, skewness=skewness, kurtosis=kurtosis)
    np.testing.assert_allclose(m * law.var, m * var, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(m * (law.mean - x), m * (expected - x), rtol=2e-2, atol=2e-2)


# --- measured ---


def enumerated(features, example, m):
    """Mean and variance of an example's normalized values over all batches that hold it."""
    others = [i for i in range(len(features)) if i != example]
    axes = tuple(range(features.ndim - 1))
    normalized = []
    for members in itertools.combinations(others, m - 1):
        batch = features[[example, *members]]
        normalized.append((features[example] - batch.mean(axis=axes)) / batch.std(axis=axes))
    return np.mean(normalized, axis=0), np.var(normalized, axis=0)


@pytest.mark.parametrize("shape", [(8, 2), (8, 2, 3, 2)])
def test_conditional_moments_are_those_of_all_batches(shape):
    features = (5 + 3 * generator(1).standard_normal(shape)).astype(np.float32)
    population = describe_population(features)
    for m in (3, 6):
        found = conditional_moments(population, [0, 5, 7], m, num_batches=20_000, rng=generator(2))
        for index, example in enumerate((0, 5, 7)):
            mean, var = enumerated(features.astype(np.float64), example, m)
            np.testing.assert_allclose(found.mean[index], mean, atol=0.03)
            np.testing.assert_allclose(found.var[index], var, rtol=0.05, atol=0.002)


def test_a_batch_of_the_whole_set_has_no_noise():
    population = describe_population(generator().standard_normal((9, 2)))
    found = conditional_moments(population, [3], 9, num_batches=5, rng=generator())
    np.testing.assert_allclose(found.mean[0], population.normalized[3], atol=1e-12)
    np.testing.assert_allclose(found.var, 0, atol=1e-12)


def test_a_feature_that_is_constant_in_a_batch_comes_out_as_zero():
    features = np.zeros((50, 1))
    features[0] = 7.0
    population = describe_population(features)
    found = conditional_moments(population, [1], 2, num_batches=4000, rng=generator())
    lone = 1 / 49  # of the batches hold the 7: there it is −1
    assert found.mean.item() == pytest.approx(-lone, abs=0.01)
    assert found.var.item() == pytest.approx(lone - lone**2, abs=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_features_are_not_numbers(dtype):
    """Their mean is rounded: twenty times 0.1 over 20 is not 0.1 in every order of the sum."""
    features = generator().standard_normal((20, 3)).astype(dtype)
    features[:, 1] = 0.1
    population = describe_population(features)
    assert np.isnan(population.normalized).all(axis=0).tolist() == [False, True, False]
    found = conditional_moments(population, [0], 4, num_batches=10, rng=generator())
    assert np.isnan(found.var[0]).tolist() == [False, True, False]


def test_population_has_the_moments_of_scipy_at_a_large_mean():
    features = 1e3 + generator().exponential(size=(500, 2, 2, 3))
    population = describe_population(features)
    flat = features.reshape(-1, 3)
    np.testing.assert_allclose(population.skewness, stats.skew(flat), rtol=1e-9)
    np.testing.assert_allclose(population.kurtosis, stats.kurtosis(flat, fisher=False), rtol=1e-9)
    z = stats.zscore(features, axis=(0, 1, 2))
    np.testing.assert_allclose(population.first, z.mean(axis=(1, 2)), atol=1e-9)
    np.testing.assert_allclose(population.second, (z**2).mean(axis=(1, 2)), atol=1e-9)
    assert (population.num_examples, population.num_positions) == (500, 4)


def test_noise_of_the_mean_is_exact_and_that_of_batches_measured():
    """All batches of 3 out of 7 images."""
    features = generator(3).standard_normal((7, 2, 2, 2))
    population = describe_population(features)
    z = population.normalized
    batches = [z[list(members)] for members in itertools.combinations(range(7), 3)]
    means = np.array([batch.mean(axis=(0, 1, 2)) for batch in batches])
    variances = np.array([batch.var(axis=(0, 1, 2)) for batch in batches])
    np.testing.assert_allclose(predicted_noise(population, 3).mean, means.var(axis=0), rtol=1e-9)
    found = measured_noise(population, 3, num_batches=20_000, rng=generator())
    np.testing.assert_allclose(found.mean, means.var(axis=0), rtol=0.05)
    np.testing.assert_allclose(found.var, variances.var(axis=0), rtol=0.05)
    cross = np.mean((means - means.mean(0)) * (variances - variances.mean(0)), axis=0)
    np.testing.assert_allclose(found.cross, cross, atol=0.05 * math.sqrt(found.mean.max()))


def test_of_a_dense_layer_the_prediction_is_the_law_with_its_skewness_and_kurtosis():
    population = describe_population(generator().exponential(size=(400, 3)))
    x, m = np.array([[-0.5], [1.0], [2.0]]), 40
    law = noise_law(x, m, skewness=population.skewness, kurtosis=population.kurtosis)
    factor = (400 - m) / 399
    np.testing.assert_allclose(
        variance_law(x, predicted_noise(population, m)), law.var * factor, rtol=1e-9
    )


def test_real_batches_follow_the_law_with_their_own_skewness():
    """Exponential features, N finite: neither the Gaussian law nor infinite N would pass."""
    population = describe_population(generator(4).exponential(size=(2000, 4)))
    m, chosen = 500, np.arange(200)
    found = conditional_moments(population, chosen, m, num_batches=1000, rng=generator(5))
    law = variance_law(population.normalized[chosen], predicted_noise(population, m))
    assert abs(np.median(found.var / law) - 1) < 0.04
    assert abs(np.median(found.var / noise_law(population.normalized[chosen], m).var) - 1) > 0.1


def test_effective_sizes_of_independent_equal_and_balanced_positions():
    draw, count, m = generator(6).standard_normal, 4000, 64
    pairs = draw((count, 2, 1, 1))
    for positions, expected in (
        (draw((count, 3, 3, 1)), (9, 9)),
        (np.broadcast_to(draw((count, 1, 1, 1)), (count, 3, 3, 1)), (1, 1)),
        (np.concatenate([pairs, 0.1 * draw((count, 2, 1, 1)) - pairs], axis=1), (800, 2)),
    ):
        population = describe_population(positions)
        sizes = effective_batch_size(population, m, predicted_noise(population, m))
        assert sizes.mean.item() / m == pytest.approx(expected[0], rel=0.1)
        assert sizes.var.item() / m == pytest.approx(expected[1], rel=0.1)
        noise = measured_noise(population, m, num_batches=2000, rng=generator(7))
        measured = effective_batch_size(population, m, noise)
        assert measured.mean.item() == pytest.approx(sizes.mean.item(), rel=0.15)
        assert measured.var.item() == pytest.approx(sizes.var.item(), rel=0.15)


# --- what is refused ---

POPULATION = describe_population(generator().standard_normal((10, 2)))
NOISE = StatisticsNoise(np.ones(2), np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: exact_moments(0.0, 2), "m=2"),
        (lambda: exact_moments(0.0, 8.0), "m=8.0"),  # type: ignore[arg-type]
        (lambda: exact_moments(math.nan, 8), "x=nan"),
        (lambda: noise_law(0.0, 0), "m=0"),
        (lambda: noise_law(0.0, 8, skewness=2.0, kurtosis=4.0), "kurtosis=4.0"),
        (lambda: describe_population(np.zeros(4)), "(4,)"),
        (lambda: describe_population(np.zeros((4, 2), int)), "int64"),
        (lambda: describe_population(np.full((4, 2), np.nan)), "NaN"),
        (lambda: predicted_noise(POPULATION, 11), "m=11"),
        (lambda: measured_noise(POPULATION, 1, num_batches=9, rng=generator()), "m=1"),
        (lambda: measured_noise(POPULATION, 3, num_batches=1, rng=generator()), "num_batches=1"),
        (lambda: effective_batch_size(POPULATION, 10, NOISE), "m=10"),
        (
            lambda: conditional_moments(POPULATION, [10], 3, num_batches=9, rng=generator()),
            "examples=[10]",
        ),
        (
            lambda: conditional_moments(
                POPULATION, np.array([0.5]), 3, num_batches=9, rng=generator()
            ),
            "examples=[0.5]",
        ),
    ],
)
def test_bad_arguments(call, named):
    with pytest.raises(ValueError, match="allowed|finite") as error:
        call()
    text = str(error.value)
    assert named in text and "\n" not in text
