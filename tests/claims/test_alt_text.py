"""Alternative texts say where lines begin and end."""

import math

from bn_research.claims.alt_text import line_ends, panel_ends
from bn_research.claims.figures import band, new_figure


def test_each_labelled_line_is_told_from_its_first_to_its_last_finite_value():
    _, axis = new_figure()
    band(axis, [1, 10, 100], [[math.nan, 2, 1e-7], [math.inf, 4, 1e-7]], label="BN", color="C0")
    axis.plot([0, 1, 2], [0.12345, 7, math.nan], label="plain")
    axis.plot([0, 1], [5, 6])
    axis.plot([0], [math.nan], label="lost")
    axis.axhline(0.1, label="chance")
    assert line_ends(axis) == "BN: 3 to 1e-7; plain: 0.123 to 7; chance: 0.1"


def test_points_with_error_bars_are_told_and_vertical_lines_and_areas_are_not():
    _, axis = new_figure()
    axis.errorbar([1, 2], [-3, -4], yerr=[1, 2], label="noise")
    axis.errorbar([1], [5], label="point")
    axis.plot([1, 2], [1, 4], label="law: $d^{2}$")
    axis.axvline(1, label="limit")
    axis.fill_between([0, 1], [0, 1], label="area")
    told = sorted(line_ends(axis).split("; "))
    assert told == ["law: d^2: 1 to 4", "noise: −3 to −4", "point: 5"]


def test_of_no_lines_there_is_nothing_to_say():
    assert line_ends(new_figure()[1]) == ""


def test_panels_are_sentences():
    _, (above, below) = new_figure(rows=2)
    above.plot([0, 1], [1, 2], label="BN")
    below.plot([0, 1], [3, 3], label="plain")
    told = panel_ends({"low rate": above, "ECE": below})
    assert told == "Low rate: BN: 1 to 2. ECE: plain: 3."
