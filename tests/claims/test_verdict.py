"""Intervals against closed forms, verdicts at their borders."""

import itertools
import math

import pytest

from bn_research.claims.registry import Claim
from bn_research.claims.verdict import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Estimate,
    Finding,
    conjunction,
    decide,
    estimate,
    paired_difference,
    slope,
)

CLAIM = Claim("a-claim", "A holds.", "Notes", "A >= 1", "A = 2")


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


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((1.0, 2.0), REPRODUCED),  # the range is closed
        ((1.2, 1.2), REPRODUCED),
        ((0.9999, 2.0), INCONCLUSIVE),
        ((1.0, 2.0001), INCONCLUSIVE),
        ((0.0, 3.0), INCONCLUSIVE),
        ((0.0, 1.0), INCONCLUSIVE),  # touches
        ((2.0, 3.0), INCONCLUSIVE),
        ((0.0, 0.9999), NOT_REPRODUCED),
        ((2.0001, math.inf), NOT_REPRODUCED),
        ((-math.inf, math.inf), INCONCLUSIVE),
    ],
)
def test_decide_at_the_borders(interval, verdict):
    assert decide(interval, at_least=1.0, at_most=2.0) == verdict


def test_decide_with_one_bound_and_an_estimate():
    assert decide((3.0, math.inf), at_least=3.0) == REPRODUCED
    assert decide((0.0, 0.5), at_most=0.5) == REPRODUCED
    assert decide((0.0, 0.5), at_least=0.6) == NOT_REPRODUCED
    # The mean and the count lie outside, low and high inside: only the latter matter.
    assert decide(Estimate(9.0, 1.0, 2.0, 5), at_least=1.0, at_most=2.0) == REPRODUCED
    assert decide(estimate([5.0]), at_least=1.0) == INCONCLUSIVE


@pytest.mark.parametrize("interval", [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (1.0,)])
def test_decide_refuses_what_is_no_interval(interval):
    with pytest.raises(ValueError, match="interval must be a pair"):
        decide(interval, at_least=1.0)


def test_decide_refuses_a_criterion_that_cannot_fail_or_cannot_hold():
    with pytest.raises(ValueError, match="must be given"):
        decide((0.0, 1.0))
    with pytest.raises(ValueError, match="at_least must not exceed at_most"):
        decide((0.0, 1.0), at_least=2.0, at_most=1.0)
    with pytest.raises(ValueError, match="at_least must not exceed at_most"):
        decide((0.0, 1.0), at_least=math.nan)


def test_conjunction_is_as_strong_as_its_weakest_part():
    weakest_first = (NOT_REPRODUCED, INCONCLUSIVE, REPRODUCED)
    for parts in itertools.product(weakest_first, repeat=3):
        assert conjunction(*parts) == min(parts, key=weakest_first.index)
    assert conjunction(REPRODUCED) == REPRODUCED


def test_conjunction_refuses_nothing_and_unknown_words():
    with pytest.raises(ValueError, match="empty"):
        conjunction()
    with pytest.raises(ValueError, match="'maybe'"):
        conjunction(REPRODUCED, "maybe")


def test_finding_is_checked():
    Finding(CLAIM, {"a": math.nan}, None, REPRODUCED)
    Finding(CLAIM, {}, (-math.inf, math.inf), INCONCLUSIVE)
    with pytest.raises(ValueError, match="'Reproduced'"):
        Finding(CLAIM, {}, None, "Reproduced")
    with pytest.raises(ValueError, match="interval must be a pair"):
        Finding(CLAIM, {}, (2.0, 1.0), REPRODUCED)
    with pytest.raises(ValueError, match="interval must be a pair"):
        Finding(CLAIM, {}, estimate([1.0, 2.0]), REPRODUCED)
