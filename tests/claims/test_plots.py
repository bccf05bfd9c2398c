"""Shared marks: what is drawn where, and curves of unequal runs."""

import math

import numpy as np
import pytest

from bn_research.claims.estimate import Estimate
from bn_research.claims.figures import GREY, PALETTE, new_figure
from bn_research.claims.plots import (
    bands,
    interval_row,
    log_ticks,
    name_rows,
    over_seeds,
    padded,
    points,
    reference,
    running_mean,
)


@pytest.fixture
def axis():
    return new_figure()[1]


def test_bands_have_names_colours_and_styles_by_key(axis):
    curves = {"plain": [[1, 2], [3, 4]], "BN": [[5, 6]]}
    looks = {"plain": PALETTE.blue, "BN": (PALETTE.green, ":")}
    bands(axis, [0, 1], curves, looks, names={"plain": "no BN", "BN": "with BN"}, marker="s")
    plain, bn = axis.get_lines()
    np.testing.assert_array_equal(plain.get_ydata(), [2, 3])
    assert [line.get_label() for line in (plain, bn)] == ["no BN", "with BN"]
    assert [line.get_color() for line in (plain, bn)] == [PALETTE.blue, PALETTE.green]
    assert [line.get_linestyle() for line in (plain, bn)] == ["-", ":"]
    assert plain.get_marker() == bn.get_marker() == "s"
    bands(axis, [0, 1], {"BN": [[1, 1]]}, looks, linestyle="--")
    assert axis.get_lines()[-1].get_label() == "BN"
    assert axis.get_lines()[-1].get_linestyle() == "--"


def test_points_reach_from_the_lowest_to_the_highest_seed(axis):
    points(axis, [1, 2], [[1, 10], [2, 20], [6, 0]], color=PALETTE.blue, marker="o", label="a")
    (container,) = axis.containers
    line, _, (bars,) = container.lines
    np.testing.assert_allclose(line.get_ydata(), [3, 10])
    assert line.get_linestyle() == "None"
    spans = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [(1, 6), (0, 20)])


def test_a_row_has_a_bar_where_it_has_an_interval(axis):
    interval_row(axis, 1, Estimate(2.0, 1.0, 4.0, 5), color=PALETTE.blue)
    bar, mark = axis.get_lines()
    assert list(bar.get_xdata()) == [1, 4] and list(bar.get_ydata()) == [1, 1]
    assert list(mark.get_xdata()) == [2] and mark.get_marker() == "o"
    interval_row(axis, 0, Estimate(2.0, -math.inf, math.inf, 1), color=PALETTE.blue, marker="D")
    assert len(axis.get_lines()) == 3
    name_rows(axis, ["first", "second"])
    assert axis.get_ylim() == (1.5, -0.5)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["first", "second"]


def test_references_are_grey_and_dashed_unless_told(axis):
    reference(axis, y=0.5, label="chance")
    reference(axis, x=2, color="black", linestyle=":")
    across, upright = axis.get_lines()
    assert list(across.get_ydata()) == [0.5, 0.5] and across.get_color() == GREY
    assert across.get_linestyle() == "--" and across.get_label() == "chance"
    assert list(upright.get_xdata()) == [2, 2] and upright.get_color() == "black"


@pytest.mark.parametrize("side", ["x", "y"])
def test_ticks_are_these_values_on_one_side_alone(axis, side):
    axis.plot([1, 2, 64], [1, 2, 64])
    axis.set(xscale="log", yscale="log")
    log_ticks(axis, [2, 0.5, 32], side=side, base=10)
    ruler, other = (axis.xaxis, axis.yaxis) if side == "x" else (axis.yaxis, axis.xaxis)
    assert [text.get_text() for text in ruler.get_ticklabels()] == ["2", "0.5", "32"]
    assert len(ruler.get_minorticklocs()) == 0 < len(other.get_minorticklocs())
    log_ticks(axis, [2, 32], side=side)
    assert ruler.get_transform().base == 2


def test_unequal_runs_end_in_nan():
    nan = math.nan
    np.testing.assert_array_equal(padded([[1, None, 3], [4]]), [[1, nan, 3], [4, nan, nan]])
    np.testing.assert_array_equal(padded([[1]], 2), [[1, nan]])
    assert padded([], 2).shape == (0, 2)


def test_running_mean_is_of_what_there_is():
    curves = np.array([[1.0, 3.0, 5.0, math.nan]])
    np.testing.assert_array_equal(running_mean(curves, 2), [[1, 2, 4, math.nan]])
    np.testing.assert_array_equal(running_mean(curves[:, :3], 3), [[1, 2, 3]])


def test_words_of_bands():
    assert over_seeds(5) == "Line: mean of 5 seeds; band: lowest to highest"
