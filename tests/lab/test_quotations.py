"""Numbers of the pages are written from the results, whatever their form."""

import json

import pytest

from bn_research.lab.pages import ROOT, read_results, render
from bn_research.lab.quotations import QuoteError, fill, quoted

RESULTS = {
    "speed": {
        "seeds": [0, 1, 2],
        "wall_seconds": 600.0,
        "claims": [
            {
                "id": "faster",
                "interval": [2.5, None],
                "verdict": "not reproduced",
                "note": "arms: a | b 0.25 [0.125, 0.5], later −3e-4",
                "measured": {
                    "ratio, BN/plain": 3.14159,
                    "ratio, BN/plain, low": 3.04,
                    "ratio, BN/plain, high": 3.26,
                    "tiny": 3.2e-12,
                    "lost": None,
                    "|x| ≤ 2": -0.004,
                },
            }
        ],
    }
}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("faster; ratio, BN/plain", "3.142"),
        ("faster; ratio, BN/plain; .1f", "3.1"),
        ("faster; ratio, BN/plain; .0f*100", "314"),
        ("faster; ±ratio, BN/plain; .1f", "3.1 [3.0, 3.3]"),
        ("faster; []ratio, BN/plain; .1f*-1", "[−3.3, −3.0]"),
        ("faster; []", "[2.5, inf]"),
        ("faster; low; .2f", "2.50"),
        ("faster; tiny", "3.2e-12"),
        ("faster; lost", "not finite"),
        (r"faster; \|x\| ≤ 2; .1f", "0.0"),
        (r"faster; ±note arms: a \| b; .2f", "0.25 [0.12, 0.50]"),
        ("faster; note later", "−3e-4"),
        ("faster; verdict", "not reproduced"),
        ("speed; seeds", "3"),
        ("speed; wall_seconds", "10 min"),
        ("all; claims", "1"),
        ("all; not reproduced", "1"),
        ("all; reproduced", "0"),
    ],
)
def test_what_stands_for_it(asked, said):
    assert quoted(asked, RESULTS) == said


def test_a_field_of_the_config():
    (name, results), *_ = read_results(ROOT / "docs").items()
    config = json.loads((ROOT / "docs" / "results" / name / "config.json").read_text())
    assert quoted(f"{name}; config.dataset", {name: results}) == config["dataset"]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("slower; ratio", "called 'slower'"),
        ("faster; ratio", "there are ratio, BN/plain"),
        ("faster; ±tiny", "'tiny' has no interval"),
        ("faster; note nothing", "not measured"),
        ("faster; tiny; .1q", "'.1q' is no format"),
        ("faster", "must be CLAIM; WHAT"),
        ("speed; minutes", "none of seeds"),
    ],
)
def test_what_is_not_there_is_refused(asked, complaint):
    with pytest.raises(QuoteError) as error:
        quoted(asked, RESULTS)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_only_what_stands_between_the_comments_is_written():
    text = 'it is <!--=faster; tiny; .0e-->old<!--/-->, a <!--"-->14.8<!--/--> and 3.1'
    assert fill(text, RESULTS) == text.replace("old", "3e-12")


@pytest.mark.parametrize("block", ["results:nothing", "pictures:transform"])
def test_a_block_that_nothing_fills_is_refused(block):
    with pytest.raises(QuoteError):
        render(f"<!-- {block} -->\n<!-- /{block} -->", ROOT / "docs")
