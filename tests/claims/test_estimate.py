"""Intervals against closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from bn_research.claims.estimate import (
    Estimate,
    estimate,
    median_interval,
    paired_difference,
    ratio_of_means,
    slope,
)


def t_quantile_1(p):
    """Student's t with one degree of freedom is Cauchy's distribution."""
    return math.tan(math.pi * (p - 0.5))


def t_quantile_2(p):
    """With two degrees of freedom F(t) = 1/2 + t / (2 sqrt(2 + t^2)), solved for t."""
    u = 2 * p - 1
    return u * math.sqrt(2 / (1 - u * u))


def test_closed_forms_agree_with_printed_tables():
    assert t_quantile_1(0.975) == pytest.approx(12.706, abs=5e-4)
    assert t_quantile_2(0.975) == pytest.approx(4.303, abs=5e-4)


def test_interval_of_three_values():
    # mean 2, s = 1, so the half-width is t / sqrt(3)
    half = t_quantile_2(0.975) / math.sqrt(3)
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half, 3), rel=1e-12)


def test_interval_of_two_values_at_another_confidence():
    # mean 3, s = sqrt(2), s / sqrt(2) = 1
    half = t_quantile_1(0.95)
    got = estimate([2.0, 4.0], confidence=0.9)
    assert got == pytest.approx((3.0, 3 - half, 3 + half, 2), rel=1e-12)


def test_equal_values_give_a_point():
    assert estimate([2.0] * 5) == (2.0, 2.0, 2.0, 5)


def test_one_value_gives_no_interval():
    got = estimate([2.0])
    assert got == (2.0, -math.inf, math.inf, 1)
    assert got.interval == (-math.inf, math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=rf"values\[1\] = {bad}"):
        estimate([1.0, bad, 2.0])


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0])
def test_values_must_be_a_vector(values):
    with pytest.raises(ValueError, match="values must be one number per seed"):
        estimate(values)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="confidence"):
        estimate([1.0, 2.0], confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        slope([1.0, 2.0, 3.0], [1.0, 2.0, 4.0], confidence=confidence)


def test_pairing_removes_what_the_seeds_do_to_both_arms():
    # Differences 1, 2, 3; the arms alone vary a hundred times as much.
    got = paired_difference([101.0, 2.0, 303.0], [100.0, 0.0, 300.0])
    half = t_quantile_2(0.975) / math.sqrt(3)
    assert got == pytest.approx((2.0, 2 - half, 2 + half, 3), rel=1e-12)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="paired by seed, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"b\[0\] = nan"):
        paired_difference([1.0], [math.nan])


def test_slope_of_three_points():
    # x = 0, 1, 2 and y = 0, 1, 3: slope Sxy / Sxx = 3 / 2; residuals 1/6, -1/3, 1/6, so
    # SSE = 1/6 with one degree of freedom and the standard error is sqrt(SSE / Sxx) = sqrt(1/12).
    half = t_quantile_1(0.975) * math.sqrt(1 / 12)
    got = slope([0.0, 1.0, 2.0], [0.0, 1.0, 3.0])
    assert got == pytest.approx((1.5, 1.5 - half, 1.5 + half, 3), rel=1e-10)


def test_slope_of_a_power_law():
    x = [1e-5, 1e-4, 1e-3, 1e-2]
    got = slope([math.log(v) for v in x], [math.log(7 * v**0.5) for v in x])
    assert got == pytest.approx((0.5, 0.5, 0.5, 4), rel=1e-6)


def test_slope_of_two_points_has_no_interval():
    assert slope([0.0, 2.0], [1.0, 5.0]) == (2.0, -math.inf, math.inf, 2)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0], "same length, got 2 and 1"),
        ([1.0], [1.0], "at least two different values"),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "at least two different values"),
        ([1.0, math.inf], [1.0, 2.0], r"x\[1\] = inf"),
        ([1.0, 2.0], [math.nan, 2.0], r"y\[0\] = nan"),
    ],
)
def test_slope_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        slope(x, y)


def test_words_and_rising_functions():
    found = Estimate(0.5, 0.25, 1.0, 4)
    assert str(found) == "0.5 [0.25, 1]"
    assert found.mapped(lambda x: 100 * x) == Estimate(50, 25, 100, 4)
    assert Estimate(0.0, -math.inf, math.inf, 1).mapped(np.exp) == Estimate(1, 0, math.inf, 1)


def test_ratio_of_means_is_where_students_test_turns():
    a, b = (np.random.default_rng(0).standard_normal((6, 2)) * 0.3 + [1.0, 2.0]).T
    found = ratio_of_means(a, b)
    assert found.low < found.mean < found.high and found.mean == pytest.approx(a.mean() / b.mean())
    for end in found.interval:
        assert stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.05)
    for end in ratio_of_means(a, b, confidence=0.8).interval:
        assert stats.ttest_1samp(a - end * b, 0).pvalue == pytest.approx(0.2)
    assert ratio_of_means(a, b - 2).interval == (-math.inf, math.inf)
    assert ratio_of_means(a[:1], b[:1]).interval == (-math.inf, math.inf)
    assert math.isnan(ratio_of_means([1.0, 2.0], [0.0, 0.0]).mean)
    with pytest.raises(ValueError, match="paired by seed, got 2 and 1"):
        ratio_of_means([1.0, 2.0], [1.0])


def test_intervals_of_quotients_and_medians_cover_the_truth():
    rng = np.random.default_rng(0)
    quotients, medians = [], []
    for _ in range(2000):
        a, b = rng.normal(1, 0.4, 5), rng.normal(2, 0.4, 5)
        low, high = ratio_of_means(a, b).interval
        quotients.append(low <= 0.5 <= high)
        low, high = median_interval(rng.exponential(size=12)).interval
        medians.append(low <= math.log(2) <= high)
    assert np.mean(quotients) == pytest.approx(0.95, abs=0.015)
    assert 0.95 <= np.mean(medians) <= 0.98  # of 12: 1 − 2·P(Binomial(12, ½) < 3) = 0.961


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(5, -math.inf, math.inf), (6, 1, 6), (10, 2, 9), (11, 2, 10), (25, 8, 18), (100, 40, 61)],
)
def test_interval_of_the_median(count, low, high):
    """Ranks from tables of the sign test, two-sided 5 %."""
    values = np.random.default_rng(0).permutation(np.arange(1, count + 1))
    assert median_interval(values) == Estimate((count + 1) / 2, low, high, count)
