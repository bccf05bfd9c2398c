"""Numbers, intervals and lines for people."""

import math

import pytest

from bn_research.claims.formatting import (
    aligned,
    display_width,
    format_duration,
    format_interval,
    format_measured,
    format_number,
    headline,
    printable,
    wrap,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (0.5, "0.5"),
        (2.302585, "2.303"),
        (-12.3456, "−12.35"),
        (0.0012345, "0.001234"),
        (9.9999e-4, "1e-3"),
        (3.2e-12, "3.2e-12"),
        (-3.21987e-12, "−3.22e-12"),
        (999.96, "1000"),
        (12345, "12345"),
        (999999.7, "1000000"),
        (11285224, "1.129e7"),
        (math.inf, "inf"),
        (-math.inf, "−inf"),
        (math.nan, "nan"),
        (None, "not finite"),
    ],
)
def test_numbers_for_people(value, text):
    assert format_number(value) == text


def test_intervals_and_durations_for_people():
    assert format_interval(None) == "none"
    assert format_interval((-0.5, math.inf)) == format_interval([-0.5, None]) == "[−0.5, inf]"
    assert format_interval([None, 0.5]) == "[−inf, 0.5]"


def test_numbers_are_shown_with_their_intervals():
    measured = {"x": 1.0, "x, low": 0.5, "y": 3.0, "x, high": None, "z, low": 2.0, "w, high": 1.0}
    assert format_measured(measured) == [
        ("x", "1 [0.5, inf]"),
        ("y", "3"),
        ("z, low", "2"),
        ("w, high", "1"),
    ]
    durations = {0.84: "0.84 s", 75.4: "75 s", 720: "12 min", 7500: "2 h 5 min", 3599: "1 h 0 min"}
    assert {seconds: format_duration(seconds) for seconds in durations} == durations


def test_a_headline_is_the_number_that_the_interval_is_about():
    measured = {"first": 9.0, "inside": 1.5, "middle": 2.0, "with": 2.5}
    entry = {"measured": measured, "interval": [1.0, 3.0]}
    ends = {"with, low": 1.0, "with, high": 3.0}
    assert headline(entry | {"measured": measured | ends}) == ("with", "2.5 [1, 3]")
    assert headline(entry) == ("middle", "2 [1, 3]")
    assert headline(entry | {"interval": [1.0, 2.5]}) == ("inside", "1.5 [1, 2.5]")
    assert headline(entry | {"interval": [2.5, None]}) == ("first", "9 [2.5, inf]")
    assert headline(entry | {"interval": [2.5, 2.5]}) == ("with", "2.5")
    assert headline(entry | {"interval": [4.0, 5.0]}) == ("first", "9")
    assert headline(entry | {"interval": None}) == ("first", "9")
    assert headline({"measured": {"lost": None, "x": 2.0}, "interval": [1, 3]}) == ("x", "2 [1, 3]")


def test_text_for_terminals():
    assert printable("σ ≤ √ε\t— naïve 漢", "ascii") == "sigma <= sqrt epsilon - naive ?"
    assert printable("σ ≤ 1", "utf-8") == "σ ≤ 1"
    assert display_width("θ̃漢a") == 4


def test_wrapping_breaks_after_hyphens_first():
    assert wrap("no-training-without-bn", 12) == ["no-training-", "without-bn"]
    assert wrap("abcdef gh", 4) == ["abcd", "ef", "gh"]
    assert wrap("a bb  ccc", 4) == ["a bb", "ccc"]
    assert wrap("漢漢漢", 4) == ["漢漢", "漢"]
    assert wrap("漢", 1) == ["漢"]
    assert wrap("", 4) == [""]


def test_aligned_columns_count_what_a_terminal_shows():
    """A combining accent takes no column, a wide character takes two."""
    rows = [("name", "σ"), ("e\u0301t\u00e9", "1.5"), ("層", "-10")]
    assert aligned(rows, left=1) == ["name    σ", "e\u0301t\u00e9   1.5", "層    -10"]
