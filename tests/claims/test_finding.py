"""Verdicts at the borders of their criteria."""

import itertools
import math

import pytest

from bn_research.claims.claim import Claim
from bn_research.claims.estimate import Estimate, estimate
from bn_research.claims.finding import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Finding,
    conjunction,
    decide,
    verdict_of,
)

CLAIM = Claim("a-claim", "A holds.", "Notes", "A >= 1", "A = 2")


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


def test_a_refutation_comes_first_and_neither_decides_nothing():
    assert verdict_of(reproduced=True, refuted=False) == REPRODUCED
    assert verdict_of(reproduced=False, refuted=True) == NOT_REPRODUCED
    assert verdict_of(reproduced=True, refuted=True) == NOT_REPRODUCED
    assert verdict_of(reproduced=False, refuted=False) == INCONCLUSIVE
