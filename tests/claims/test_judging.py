"""Records as numbers: order, gaps, choices, and the words of notes."""

import math

import numpy as np
import pytest

from bn_research.claims.bounded import Bounded, ratio
from bn_research.claims.estimate import Estimate
from bn_research.claims.judging import (
    at_end,
    by_seed,
    choose,
    final,
    listed,
    lost,
    numbers,
    with_intervals,
)

RECORDS = [
    {"arm": "BN", "seed": 1, "loss": None, "curve": [1, None]},
    {"arm": "BN", "seed": 0, "loss": 2.0, "curve": [3, 4]},
    {"arm": "plain", "seed": 0, "loss": 5.0, "curve": [5, 6]},
]


def test_records_come_in_the_order_of_seeds():
    assert [r["seed"] for r in by_seed(RECORDS, arm="BN")] == [0, 1]
    assert by_seed(RECORDS, arm="BN", seed=1) == RECORDS[:1]
    assert by_seed(RECORDS, arm="none") == []


def test_numbers_of_records():
    bn = by_seed(RECORDS, arm="BN")
    np.testing.assert_array_equal(numbers(bn, "loss"), [2, math.nan])
    np.testing.assert_array_equal(numbers(bn, "curve"), [[3, 4], [1, math.nan]])
    np.testing.assert_array_equal(numbers(bn, lambda r: 10 * r["seed"]), [0, 10])


def test_final_is_the_last_tenth():
    assert final([9.0] * 18 + [1.0, 2.0]) == 1.5
    assert final([9.0, 4.0]) == 4.0
    assert math.isnan(final([1.0, None]))


def run(rate, loss, diverged=0, seed=0):
    return {"rate": rate, "loss": loss, "diverged": diverged, "seed": seed}


def test_the_lowest_score_is_chosen_and_lost_runs_lose():
    runs = [run(0.1, 0.5), run(0.2, 0.2), run(0.4, 0.0, diverged=1), run(0.8, None)]
    assert choose(runs, "loss") == run(0.2, 0.2)
    assert choose(runs, lambda r: -r["rate"])["rate"] == 0.8  # of what did not diverge
    assert choose(runs[2:], "loss")["rate"] == 0.4  # all are lost: the first
    assert choose([run(0.1, 1.0), run(0.2, 1.0)], "loss")["rate"] == 0.1
    assert choose([run(0.1, 1.0), run(0.2, math.inf)], lambda r: -r["loss"])["rate"] == 0.1


def test_a_setting_is_judged_by_the_mean_of_its_seeds():
    runs = [
        *(run(0.1, 0.5, seed=0), run(0.1, 0.1, seed=1)),
        *(run(0.2, 0.2, seed=0), run(0.2, 0.3, seed=1)),
        *(run(0.3, 0.0, seed=0), run(0.3, 0.0, diverged=1, seed=1)),
        run(0.4, None),
    ]
    assert choose(runs, "loss", fields=("rate",)) == run(0.2, 0.2)


def test_ends_of_a_grid():
    assert at_end(1, [4, 1, 2]) and at_end(4, [4, 1, 2]) and not at_end(2, [4, 1, 2])


@pytest.mark.parametrize("unknown", [False, True])
def test_intervals_stand_beside_their_numbers(unknown):
    many = ratio([4.0, 6.0], [Bounded(1.0, math.inf) if unknown else 2.0, 3.0])
    found = with_intervals({"gain": Estimate(2.0, 1.0, 3.0, 5), "ratio": many, "rate": 0.1})
    assert list(found) == [
        *("gain", "gain, low", "gain, high", "ratio", "ratio, low", "ratio, high", "rate")
    ]
    assert list(found.values())[:3] == [2, 1, 3] and found["rate"] == 0.1
    assert (found["ratio, low"], found["ratio, high"]) == many.interval
    assert found["ratio"] == (many.mean.high if unknown else many.mean.low)


def test_sentences_are_there_only_where_there_is_something_to_tell():
    runs = [run(0.1, 1.0, diverged=2), run(0.2, 1.0)]
    assert lost(runs) == ". Of 2 runs 1 had steps that were not finite and not taken"
    assert lost(runs, runs="networks").startswith(". Of 2 networks 1 had")
    assert lost(runs[1:]) == ""
    assert listed("At an end", ["a", "b"]) == ". At an end: a, b"
    assert listed("At an end", ["a", "b"], "; ") == ". At an end: a; b"
    assert listed("At an end", []) == ""
