"""Tests of bn_research.claims.threshold."""

import itertools
import math

import numpy as np
import pytest

from bn_research.claims.threshold import highest_passing, next_place, search, threshold


def searched(stable, *, start, count, stride):
    """Outcomes of one search of a predicate over places, and the places in the order run."""
    order = []

    def run(wanted):
        order.extend(place for _, place in wanted)
        return [stable(place) for _, place in wanted]

    return search({"x": start}, run, count=count, stride=stride)["x"], order


@pytest.mark.parametrize("count", [2, 7, 16])
@pytest.mark.parametrize("stride", [1, 3])
def test_every_threshold_is_found_from_every_start(count, stride):
    rates = [2.0**k for k in range(count)]
    for highest, start in itertools.product(range(-1, count), range(count)):
        outcomes, order = searched(
            lambda place, last=highest: place <= last, start=start, count=count, stride=stride
        )
        down = max(0, start - highest) / max(1, stride // 2)
        assert len(set(order)) == len(order) <= 2 * math.log2(count) + 4 + down
        found = threshold(outcomes, rates, floor=1e-38)
        if highest == -1:
            assert found == (1e-38, rates[0]) and outcomes[0] is False
        elif highest == count - 1:
            assert found == (rates[-1], math.inf)
        else:
            assert found == (rates[highest], rates[highest])
            assert outcomes[highest] is True and outcomes[highest + 1] is False


def test_with_islands_both_ends_of_the_bracket_have_been_run():
    rng = np.random.default_rng(0)
    for _ in range(200):
        stable = rng.random(20) < 0.6
        outcomes, _ = searched(lambda p, s=stable: bool(s[p]), start=7, count=20, stride=2)
        low = max((p for p, ok in outcomes.items() if ok), default=-1)
        assert low == 19 or outcomes.get(low + 1) is False
        assert all(stable[p] == ok for p, ok in outcomes.items())


def test_a_start_too_high_does_not_leap_past_the_places_that_pass():
    """Only places 9 to 12 pass, as rates do below which a network is too slow."""
    outcomes, order = searched(lambda place: 9 <= place <= 12, start=16, count=37, stride=4)
    assert order[:3] == [16, 14, 12] and threshold(outcomes, range(37), floor=-1).low == 12


def test_searches_run_side_by_side():
    rounds = []

    def run(wanted):
        rounds.append([key for key, _ in wanted])
        return [place <= {"a": 3, "b": 11}[key] for key, place in wanted]

    found = search({"a": 4, "b": 4}, run, count=16, stride=2)
    assert [threshold(found[key], range(16), floor=-1).low for key in "ab"] == [3, 11]
    assert rounds[0] == ["a", "b"]


@pytest.mark.parametrize(("start", "stride"), [(-1, 1), (5, 1), (0, 0)])
def test_a_bad_start_or_stride_is_named(start, stride):
    with pytest.raises(ValueError, match=f"start={start}.*stride={stride}"):
        next_place({}, start=start, count=5, stride=stride)


def test_highest_passing():
    assert highest_passing({3: True, 4: False, 7: True}) == 7
    assert highest_passing({4: False}) is highest_passing({}) is None
