"""Censored numbers: bounds stay bounds, and intervals still cover the truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bn_research.claims.bounded import (
    UNBOUNDED,
    Bounded,
    bounded_slope,
    first_reaching,
    geometric_mean,
    known,
    log_slope,
    mean_of_curve,
    open_ratio,
    ratio,
)
from bn_research.claims.estimate import estimate


def exact(*values):
    return [Bounded(float(value), float(value)) for value in values]


def test_the_first_step_at_the_target():
    steps, values = [10, 20, 30, 40], [0.1, 0.6, 0.4, 0.9]
    assert first_reaching(steps, values, 0.5) == (20, 20)
    assert first_reaching(steps, values, 0.6) == (20, 20)
    assert first_reaching(steps, values, 0.61) == (40, 40)
    never = first_reaching(steps, values, 0.91)
    assert never == (40, math.inf) and never.is_censored
    assert first_reaching(steps, [math.nan, 0.7, math.nan, math.nan], 0.7) == (20, 20)
    assert first_reaching(steps, [math.nan] * 4, -math.inf).is_censored


def test_without_censoring_it_is_the_interval_of_the_logarithms():
    n, d = [1200.0, 900.0, 1500.0, 800.0], [300.0, 310.0, 280.0, 250.0]
    found = ratio(exact(*n), exact(*d))
    logs = np.log(n) - np.log(d)
    low, high = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    np.testing.assert_allclose(found.interval, np.exp([low, high]), rtol=1e-12)
    np.testing.assert_allclose(found.mean, [stats.gmean(np.array(n) / d)] * 2, rtol=1e-12)
    assert (found.pairs, found.censored) == (4, 0)


def test_a_bound_in_the_numerator_leaves_the_ratio_open_above():
    numerators = [*exact(900, 1000), Bounded(2000, math.inf)]
    found = ratio(numerators, exact(300, 310, 290))
    as_if = ratio(exact(900, 1000, 2000), exact(300, 310, 290))
    assert found.low == as_if.low and found.high == math.inf
    assert found.mean == (as_if.mean.low, math.inf) and found.censored == 1
    assert found.known == as_if.mean.low


def test_a_bound_in_the_denominator_leaves_it_open_below():
    denominators = [*exact(300, 310), Bounded(2000, math.inf)]
    found = ratio(exact(900, 1000, 950), denominators)
    as_if = ratio(exact(900, 1000, 950), exact(300, 310, 2000))
    assert found.low == 0 and found.high == as_if.high
    assert found.mean == (0, as_if.mean.low)
    assert found.known == as_if.mean.low


def test_bounds_on_both_sides_say_nothing():
    found = ratio([Bounded(100, math.inf)] * 3, [Bounded(100, math.inf)] * 3)
    assert found.interval == (0, math.inf) and found.censored == 3
    assert math.isnan(found.known)


def test_one_pair_has_no_interval():
    assert ratio(exact(4), exact(2)).interval == (0, math.inf)
    assert ratio(exact(4), exact(2)).mean == (2, 2)


@pytest.mark.parametrize("limit", [1.2, 2.0, 3.5])
def test_intervals_cover_the_truth_however_much_is_censored(limit):
    """Log-normal ratios of median 2, the numerators seen up to a limit only."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        numerators = 2 * np.exp(0.4 * rng.standard_normal(5))
        seen = [Bounded(min(x, limit), x if x <= limit else math.inf) for x in numerators]
        low, high = ratio(seen, exact(1, 1, 1, 1, 1)).interval
        covered.append(low <= 2 <= high)
    assert np.mean(covered) >= 0.93


def test_plain_numbers_are_measured_ones():
    assert ratio([4.0, 6], [2, 3.0]) == ratio(exact(4, 6), exact(2, 3))
    assert geometric_mean([2.0, 8.0]) == pytest.approx((4, 4))
    assert geometric_mean([2.0, Bounded(8.0, math.inf)]) == pytest.approx((4, math.inf))


def test_slope_is_that_of_scipy_and_bounds_are_those_of_the_corners():
    rng = np.random.default_rng(1)
    x, n, d = np.log([8, 32, 128]), np.exp(rng.normal(size=3)), np.exp(rng.normal(size=3))
    expected = stats.linregress(x, np.log(n / d)).slope
    assert bounded_slope(x, n, exact(*d)) == pytest.approx((expected, expected), abs=1e-12)
    wide = [Bounded(v, v * w) for v, w in zip(n, (1.5, 3.0, 2.0), strict=True)]
    corners = [
        stats.linregress(x, np.log(np.array(ends) / d)).slope for ends in itertools.product(*wide)
    ]
    found = bounded_slope(x, wide, exact(*d))
    np.testing.assert_allclose(found, [min(corners), max(corners)], atol=1e-12)
    open_end = [1.0, 1.0, Bounded(1.0, math.inf)]
    assert bounded_slope(x, open_end, [1.0] * 3) == pytest.approx((0, math.inf))


def test_slopes_over_seeds():
    x, powers = np.log([8, 32, 128]), np.array([0.5, 0.7, 0.4])
    numerators = [np.exp(at * powers) for at in x]
    ones = [[1.0] * 3] * 3
    found = log_slope(x, numerators, ones)
    np.testing.assert_allclose(found, estimate(powers), atol=1e-12)
    cut = [*numerators[:2], [Bounded(value, math.inf) for value in numerators[2]]]
    above = log_slope(x, cut, ones)
    assert above.low == pytest.approx(found.low) and above.high == math.inf
    assert math.isnan(above.mean) and above.count == 3
    both = log_slope(x, cut, cut)
    assert both.interval == (-math.inf, math.inf)


def test_words():
    assert str(ratio([2.0, 2.0], [1.0, 1.0])) == "2 [2, 2]"
    assert str(ratio([Bounded(2.0, math.inf)] * 2, [1.0, 1.0])) == "> 2 [2, inf]"
    assert str(Bounded(1500, 1500)) == "1500"
    assert str(Bounded(3000, math.inf)) == "> 3000"
    assert str(Bounded(0, 0.2)) == "< 0.2"
    assert str(Bounded(0.5, 2)) == "0.5 to 2"
    assert str(Bounded(0, math.inf)) == "unknown"


def test_bad_numbers():
    with pytest.raises(ValueError, match="paired by seed, got 1 and 2"):
        ratio(exact(1), exact(1, 2))
    with pytest.raises(ValueError, match="paired by seed, got 0 and 0"):
        ratio([], [])
    with pytest.raises(ValueError, match=r"positive and in order, got \(0.0, 0.0\)"):
        ratio(exact(0), exact(1))
    with pytest.raises(ValueError, match=r"in order, got \(3, 2\)"):
        ratio([Bounded(3, 2)], exact(1))
    with pytest.raises(ValueError, match="steps must rise"):
        first_reaching([2, 1], [0, 0], 1)
    with pytest.raises(ValueError, match="got shapes"):
        first_reaching([1, 2], [0], 1)
    with pytest.raises(ValueError, match="got nan"):
        first_reaching([1], [0], math.nan)


def test_mean_of_a_curve_with_what_is_lost():
    assert mean_of_curve([1.0, 4.0]).low == mean_of_curve([1.0, 4.0]).high == pytest.approx(2)
    assert mean_of_curve([1.0, 4.0, math.nan]) == pytest.approx((16 ** (1 / 3), math.inf))
    low, high = mean_of_curve([0.0, 1.0])
    assert low < high == pytest.approx(math.sqrt(1e-7))
    assert mean_of_curve([math.nan])[1] == math.inf
    assert mean_of_curve([0.0, 1.0], resolution=1e-4).high == pytest.approx(1e-2)


def test_an_end_of_which_nothing_is_known_is_open():
    measured, lost = known([1.0, 4.0]), known([2.0, math.nan])
    assert lost == [(2.0, 2.0), UNBOUNDED]
    assert open_ratio(measured, measured) == ratio(measured, measured)
    above, below = open_ratio(lost, measured), open_ratio(measured, lost)
    assert (above.low, above.mean.low, above.high) == (0, 0, math.inf)
    assert (below.low, below.high, below.mean.high) == (0, math.inf, math.inf)
    fast = open_ratio([Bounded(1e-30, 2.0)] * 2, [Bounded(1.0, 1.0)] * 2)
    assert (fast.low, fast.mean.low) == (0, 0) and fast.high == pytest.approx(2)
