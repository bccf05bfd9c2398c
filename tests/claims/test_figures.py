"""Figures: bytes that do not change, bands that tell the truth, text that does not collide."""

import functools
import math
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from bn_research.claims.figures import (
    DPI,
    PALETTE,
    band,
    end_labels,
    new_figure,
    save_all,
    save_figure,
    shared_legend,
)

WORDS = {"title": "Loss", "alt": "The loss falls.", "caption": "Mean over seeds."}
NAN = math.nan


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw():
    fig, axis = new_figure()
    band(axis, [0, 1, 2], [[1, 2, 3], [2, 3, 5]], label="BN", color=PALETTE.blue)
    shared_legend(fig)
    return fig


def band_edges(axis):
    """Lowest and highest y of each band, by x."""
    edges = {}
    for path in axis.collections[0].get_paths():
        for x, y in path.vertices:
            low, high = edges.get(x, (y, y))
            edges[x] = min(low, y), max(high, y)
    return edges


def png_chunks(data):
    position, names = 8, []
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        names.append(data[position + 4 : position + 8])
        position += length + 12
    return names


def test_saved_bytes_are_the_same_and_carry_no_metadata(tmp_path):
    first = save_figure(draw(), tmp_path / "new" / "a.png", **WORDS)
    second = save_figure(draw(), tmp_path / "b.png", **WORDS)
    data = first.path.read_bytes()
    assert data == second.path.read_bytes()
    chunks = set(png_chunks(data))
    assert chunks == {b"IHDR", b"pHYs", b"PLTE", b"IDAT", b"IEND"}  # no text, no time
    assert (first.title, first.alt, first.caption, first.claims) == (*WORDS.values(), ())
    assert struct.unpack(">II", data[16:24]) == (690, 465)
    assert len(data) < 12_000


def test_claims_are_kept_and_checked(tmp_path):
    path = tmp_path / "a.png"
    saved = save_figure(draw(), path, **WORDS, claims=["a-claim", "other"])
    assert saved.claims == ("a-claim", "other")
    path.unlink()
    for claims in ("a-claim", ["A claim"], ["a-claim", ""]):
        with pytest.raises(ValueError, match="claims must be a sequence of ids of claims, got"):
            save_figure(draw(), path, **WORDS, claims=claims)
    with pytest.raises(ValueError, match="claims must name each claim once"):
        save_figure(draw(), path, **WORDS, claims=["a-claim", "other", "a-claim"])
    assert not path.exists()


def true_and_saved(fig, path):
    """What was drawn and what was saved, as integers [height, width, 3]."""
    save_figure(fig, path, **WORDS)
    fig.savefig(path.with_suffix(".true.png"), dpi=DPI, facecolor="white")
    images = [Image.open(file).convert("RGB") for file in (path.with_suffix(".true.png"), path)]
    return [np.asarray(image).astype(int) for image in images]


def test_colours_are_kept_where_a_palette_does_not_hold_them_all(tmp_path):
    fig, axes = new_figure(columns=2)
    x = np.linspace(0, 1, 50)
    for index, color in enumerate(PALETTE):
        curve = np.sin(6 * x + index)
        band(axes[0], x, [curve - 0.4, curve + 0.4], label="", color=color)
    axes[0].plot(0.5, 0.0, "o", color="#ff00ff", markersize=3)  # a colour that is rare
    ramp = np.linspace(0, 1, 400)[None]
    axes[1].imshow(ramp, aspect="auto", cmap="RdBu")  # a hundred more colours
    axes[1].scatter(40 * x, x - 0.5, s=4, color=PALETTE.sky, alpha=0.5, linewidth=0)
    true, saved = true_and_saved(fig, tmp_path / "a.png")
    assert len(np.unique(true.reshape(-1, 3), axis=0)) > 2000
    white = np.all(true == 255, axis=-1)
    assert white.mean() > 0.2
    assert (saved[white] == 255).all()
    off = np.abs(saved - true).max(axis=-1)
    for color in (*PALETTE, "#ff00ff"):
        drawn = np.all(true == [int(color[i : i + 2], 16) for i in (1, 3, 5)], axis=-1)
        assert drawn.sum() > 20 and off[drawn].max() < 4
    assert off.max() < 32 and (off >= 8).mean() < 0.06


def test_few_colours_are_kept_as_they_are(tmp_path):
    fig, axis = new_figure()
    axis.plot([0, 1], [0, 1], color=PALETTE.blue)
    axis.set_axis_off()
    true, saved = true_and_saved(fig, tmp_path / "a.png")
    np.testing.assert_array_equal(saved, true)


def test_saving_again_gives_the_same_bytes(tmp_path):
    fig = draw()
    one = save_figure(fig, tmp_path / "a.png", **WORDS).path.read_bytes()
    two = save_figure(fig, tmp_path / "a.png", **WORDS).path.read_bytes()
    assert one == two


@pytest.mark.parametrize("name", WORDS)
def test_words_are_required(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must not be empty"):
        save_figure(draw(), tmp_path / "a.png", **(WORDS | {name: " "}))
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_figure(draw(), tmp_path / "a.jpg", **WORDS)
    assert not list(tmp_path.iterdir())


def test_figures_are_saved_under_the_names_of_their_functions(tmp_path):
    words = {"alt": "The loss falls.", "caption": "Mean over seeds."}

    def _loss(config, records):
        """Loss of training.

        More on it.
        """
        assert (config, records) == ("config", "records")
        return draw(), words | {"claims": ("a-claim",)}

    def accuracy(config, records):
        """Does it train?"""
        return draw(), words

    def named(what, config, records):
        return draw(), words | {"title": f"Of {what}", "file": f"of_{what}"}

    def nothing(config, records):
        """Not drawn."""

    draws = [_loss, nothing, accuracy, functools.partial(named, "both")]
    found = save_all(draws, tmp_path, "config", "records")
    assert [figure.path.name for figure in found] == ["loss.png", "accuracy.png", "of_both.png"]
    assert [figure.title for figure in found] == ["Loss of training", "Does it train?", "Of both"]
    assert found[0].claims == ("a-claim",) and found[0].alt == words["alt"]
    assert all(figure.path.exists() for figure in found)


def test_a_band_takes_looks_of_its_line():
    _, axis = new_figure()
    line = band(axis, [0, 1], [1, 2], label="a", color="black", marker="o", markersize=5)
    assert (line.get_marker(), line.get_markersize(), line.get_linewidth()) == ("o", 5, 1.8)


def test_neither_pyplot_nor_jax_is_loaded():
    code = (
        "import sys, bn_research.claims.html.overview; "
        "sys.exit(' '.join({'matplotlib.pyplot', 'jax', 'absl'} & set(sys.modules)) or None)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    ("columns", "rows", "shape", "size"),
    [(1, 1, (), (4.6, 3.1)), (2, 1, (2,), (6.8, 3.1)), (2, 3, (3, 2), (6.8, 9.3))],
)
def test_axes_and_size(columns, rows, shape, size):
    fig, axes = new_figure(columns=columns, rows=rows)
    assert np.shape(axes) == shape
    assert tuple(fig.get_size_inches()) == pytest.approx(size)


def test_size_can_be_given_and_panels_are_counted():
    fig, _ = new_figure(width=3, height=2)
    assert tuple(fig.get_size_inches()) == (3, 2)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        new_figure(rows=0)


def test_palette_by_name_and_index():
    assert PALETTE[0] == PALETTE.blue
    assert len(set(PALETTE)) == 7


def test_band_of_the_range_leaves_missing_values_out():
    _, axis = new_figure()
    curves = [[1.0, 2.0, NAN, NAN], [3.0, NAN, NAN, 4.0]]
    line = band(axis, [0, 1, 2, 3], curves, label="BN", color="C0", mark_lost=False)
    np.testing.assert_array_equal(line.get_ydata(), [2.0, 2.0, NAN, 4.0])
    edges = band_edges(axis)
    assert edges[0.0] == (1.0, 3.0)
    assert edges[1.0] == (2.0, 2.0)
    assert 2.0 not in edges


def test_band_of_the_interval_is_students():
    _, axis = new_figure()
    line = band(axis, [0, 1], [[1, 1], [2, 1], [3, 1]], label="", color="C0", spread="interval")
    half = 4.302652729911275 / math.sqrt(3)  # t of two degrees of freedom, s = 1
    assert band_edges(axis)[0.0] == pytest.approx((2 - half, 2 + half))
    assert band_edges(axis)[1.0] == pytest.approx((1, 1))
    np.testing.assert_array_equal(line.get_ydata(), [2, 1])


def test_one_seed_has_a_line_and_no_interval():
    _, axis = new_figure()
    line = band(axis, [0, 1], [1.0, 2.0], label="BN", color="C0", spread="interval")
    np.testing.assert_array_equal(line.get_ydata(), [1, 2])
    assert not band_edges(axis)


def test_a_lost_seed_is_marked_where_it_was_last_seen():
    _, axis = new_figure()
    curves = [[1, 2, 3], [5, math.inf, NAN], [NAN, 7, 8], [NAN, NAN, NAN]]
    band(axis, [10, 20, 30], curves, label="BN", color="C0")
    crosses = [line.get_xydata().tolist() for line in axis.get_lines() if line.get_marker() == "x"]
    assert crosses == [[[10.0, 5.0]]]


def test_band_refuses_other_shapes_and_spreads():
    _, axis = new_figure()
    with pytest.raises(ValueError, match=r"curves must be \[seeds, 2\]"):
        band(axis, [0, 1], [[1, 2, 3]], label="", color="C0")
    with pytest.raises(ValueError, match="spread must be one of .*'std'"):
        band(axis, [0, 1], [[1, 2]], label="", color="C0", spread="std")


def test_shared_legend_names_each_label_once_and_covers_no_axes():
    fig, axes = new_figure(columns=2)
    for axis in axes:
        for label in ("BN", "plain"):
            axis.plot([0, 1], [0, 1], label=label)
    shared_legend(fig)
    fig.canvas.draw()
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["BN", "plain"]
    for axis in axes:
        assert not legend.get_window_extent().overlaps(axis.get_window_extent())


def test_legend_without_labels_is_none():
    fig, _ = new_figure()
    shared_legend(fig)
    assert not fig.legends


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_end_labels_do_not_collide_and_keep_their_order(scale):
    fig, axis = new_figure()
    ends = [1.0, 1.001, 1.002, 50.0]
    for end in ends:
        axis.plot([0, 1], [end + 1, end], label=str(end))
    axis.plot([0, 1], [1, 1])  # without a label
    axis.set_yscale(scale)
    end_labels(axis)
    fig.canvas.draw()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [str(end) for end in ends]
    centres = [(box.y0 + box.y1) / 2 for box in boxes]
    assert centres == sorted(centres)
    gaps = np.diff(centres) * 72 / fig.dpi
    assert gaps.min() > 11
    assert all(box.x1 <= fig.bbox.x1 for box in boxes)


def test_end_labels_skip_lines_without_points():
    _, axis = new_figure()
    axis.plot([0, 1], [NAN, NAN], label="lost")
    end_labels(axis)
    assert not axis.texts
