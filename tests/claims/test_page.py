"""What a run writes: schema, escaping, the same bytes, whole files, a table that fits."""

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from bn_research.claims import atomic
from bn_research.claims.claim import Claim
from bn_research.claims.figures import Figure, new_figure, save_figure
from bn_research.claims.finding import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Finding
from bn_research.claims.formatting import display_width
from bn_research.claims.html import elements, page
from bn_research.claims.html.page import write_report
from bn_research.claims.results import Run, results_document, write_json
from bn_research.claims.tables import verdict_table

EVIL = "<script>alert('x')</script>"
CLAIM_KEYS = "id statement source criterion expected measured interval verdict note".split()


def claim(slug="a-claim", **texts):
    return Claim(
        **({"id": slug, "statement": "A holds.", "source": "Notes"} | texts),
        **{"criterion": "σ ≥ 1; not reproduced below", "expected": "σ = 2"},
    )


def findings():
    return [
        Finding(claim("first"), {"sigma": 2.0, "steps": 12345}, (1.5, 2.5), REPRODUCED),
        Finding(claim("second"), {"x": math.nan, "y": 1.0}, None, NOT_REPRODUCED, "Seed 3 failed"),
        Finding(claim("third"), {"z": -math.inf}, (-math.inf, 3.0), INCONCLUSIVE),
    ]


def document(found=None):
    return results_document(
        experiment="init_sensitivity",
        preset="smoke",
        dataset="digits",
        seeds=range(2),
        wall_seconds=3,
        findings=findings() if found is None else found,
    )


def strict_loads(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def a_run(**changes):
    run = Run(
        title="Title",
        question="Is it so?",
        results=document(),
        figures=[],
        config={"seeds": 2},
        environment={"python": "3.11"},
        command="python -m experiments.init_sensitivity",
    )
    return run._replace(**changes)


class Parsed(HTMLParser):
    """Tags, ids and text of a page; checks that tags are balanced."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.stack = [], "", []
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_results_follow_schema_1(tmp_path):
    write_json(tmp_path / "results.json", document())
    text = (tmp_path / "results.json").read_text("utf-8")
    results = strict_loads(text)
    assert list(results) == [
        *("schema", "experiment", "preset", "dataset", "seeds", "wall_seconds", "claims")
    ]
    assert results["schema"] == 1
    assert results["seeds"] == [0, 1]
    assert isinstance(results["wall_seconds"], float)
    for entry in results["claims"]:
        assert list(entry) == CLAIM_KEYS
        assert all(
            isinstance(entry[k], str) for k in CLAIM_KEYS if k not in ("measured", "interval")
        )
        assert all(v is None or isinstance(v, float) for v in entry["measured"].values())
        ends = entry["interval"]
        assert ends is None or (len(ends) == 2 and any(isinstance(end, float) for end in ends))
    assert [entry["verdict"] for entry in results["claims"]] == [
        *("reproduced", "not reproduced", "inconclusive")
    ]
    assert results == document()
    assert text.endswith("}\n")


def test_numbers_that_are_not_finite_become_null_and_are_told():
    first, second, third = document()["claims"]
    assert first["note"] == ""
    assert first["interval"] == [1.5, 2.5]
    assert second["measured"] == {"x": None, "y": 1.0}
    assert second["note"] == "Seed 3 failed. Not finite, stored as null: x (nan)."
    assert third["interval"] == [None, 3.0]  # a bound is kept
    assert third["note"] == "Not finite, stored as null: z (−inf)."


def test_results_refuse_doubles_and_bad_times():
    with pytest.raises(ValueError, match="'first' more than once"):
        document([findings()[0]] * 2)
    for bad in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="wall_seconds"):
            results_document(
                experiment="e", preset="p", dataset="", seeds=[0], wall_seconds=bad, findings=[]
            )


def test_json_keeps_the_old_file_when_it_cannot_write(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    old = path.read_bytes()
    with pytest.raises(ValueError):
        write_json(path, {"new": math.nan})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    for name in ("fsync", "replace"):

        def fail(*_args):
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                write_json(path, {"new": 2})
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_data_are_on_disk_before_the_name_is_theirs(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (calls.append((n, a)), f(*a))[1])
    atomic.write_bytes(tmp_path / "a", b"x")
    assert [name for name, _ in calls] == ["fsync", "replace"]
    source, target = calls[1][1]
    assert source.parent == target.parent == tmp_path


def test_report_is_one_whole_page_with_alt_texts(tmp_path):
    fig, axis = new_figure()
    axis.plot([0, 1])
    words = {"title": "Loss & rate", "alt": 'A "falling" line', "caption": "It falls."}
    saved = save_figure(fig, tmp_path / "a.png", **words)
    write_report(tmp_path / "report.html", a_run(figures=[saved]))
    html = (tmp_path / "report.html").read_text("utf-8")
    parsed = Parsed(html)
    assert html.startswith("<!DOCTYPE html>")
    assert parsed.all("html") == [{"lang": "en"}]
    (image,) = parsed.all("img")
    assert image["alt"] == words["alt"]
    assert (image["width"], image["height"]) == ("690", "465")
    assert image["src"].startswith("data:image/webp;base64,UklGR")
    for text in (words["title"], words["caption"], "Is it so?", "[1.5, 2.5]", "12345"):
        assert text in parsed.text
    for entry in document()["claims"]:
        for key in ("statement", "source", "criterion", "expected", "verdict", "note"):
            assert entry[key] in parsed.text
    assert {"viewport", "color-scheme"} <= {meta.get("name") for meta in parsed.all("meta")}
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_report_asks_for_nothing_outside_itself():
    html = page.render(a_run())
    parsed = Parsed(html)
    assert not parsed.all("script")
    links = [a[key] for _, a in parsed.tags for key in ("src", "href", "action") if key in a]
    assert all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|https?:", html)
    assert "default-src 'none'" in html


def test_everything_from_outside_is_escaped(tmp_path):
    fig, _ = new_figure()
    saved = save_figure(fig, tmp_path / "a.png", title=EVIL, alt=f'"{EVIL}', caption=EVIL)
    bad = Claim("evil", EVIL, EVIL, EVIL, EVIL)
    results = results_document(
        experiment=EVIL,
        preset=EVIL,
        dataset=EVIL,
        seeds=[0],
        wall_seconds=1,
        findings=[Finding(bad, {EVIL: 1.0}, None, REPRODUCED, EVIL)],
    )
    html = page.render(
        a_run(
            title=EVIL,
            question=EVIL,
            results=results,
            figures=[saved],
            config={EVIL: {EVIL: EVIL}, "list": [EVIL]},
            environment={EVIL: EVIL},
            command=EVIL,
        )
    )
    assert "<script" not in html
    parsed = Parsed(html)  # quotes that break out of an attribute would unbalance it
    assert parsed.all("img")[0]["alt"] == f'"{EVIL}'
    assert html.count("&lt;script&gt;") >= 20


def test_a_dollar_is_no_placeholder():
    html = page.render(a_run(command="echo $title ${x}"))
    assert "echo $title ${x}" in Parsed(html).text


def test_report_bytes_are_the_same(tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, a_run())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_report_keeps_the_old_file_when_a_figure_is_missing_or_bad(tmp_path):
    path, figure = tmp_path / "report.html", tmp_path / "a.png"
    path.write_text("old")
    broken = [Figure(figure, "t", "a", "c")]
    with pytest.raises(FileNotFoundError):
        write_report(path, a_run(figures=broken))
    figure.write_bytes(b"GIF89a" + bytes(30))
    with pytest.raises(ValueError, match=r"figure must be a PNG, got .*a\.png"):
        write_report(path, a_run(figures=broken))
    assert path.read_text() == "old"


def test_nested_config_gets_dotted_names():
    config = {"train": {"rate": 0.1, "empty": {}}, "none": None, "text": "", "seeds": [0, 1]}
    text = Parsed(page.render(a_run(config=config))).text
    for row in ("train.rate0.1", "train.empty{}", "nonenull", 'text""', "seeds[0, 1]"):
        assert row in text


def test_report_without_claims_or_tables():
    text = Parsed(page.render(a_run(results=document([]), config={}))).text
    assert "No claim was tested." in text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_table_fits_and_loses_no_word(width, encoding):
    long = Finding(
        claim("exponential-rate-equals-weight-decay"),
        {"an_unbroken_name_that_no_column_can_hold_in_one_line": -3.2e-12, "θ̃": 1.0},
        (-1.234e-12, 3.2e-12),
        NOT_REPRODUCED,
        "A note with \x1b[31mcolour\x1b[0m and\nlines " + "word " * 40,
    )
    table = verdict_table([*findings(), long], width=width, encoding=encoding)
    table.encode(encoding)
    lines = table.split("\n")
    assert max(map(display_width, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    assert "\x1b" not in table
    packed = re.sub(r"\s", "", table)
    assert "1reproduced,2notreproduced,1inconclusive" in packed
    assert table.count("word") == 40
    for verdict in ("reproduced", "not reproduced", "inconclusive"):
        assert any(line.endswith(f"  {verdict}") for line in lines)
    assert "-3.2e-12" in packed.replace("−", "-")
    assert "sigma = 2" in verdict_table(findings(), width=120, encoding="ascii")


def test_table_is_as_narrow_as_its_text_and_tells_what_it_leaves_out():
    many = Finding(claim(), {f"m{i}": float(i) for i in range(9)}, None, REPRODUCED)
    table = verdict_table([many], width=120, encoding="utf-8")
    assert "m5 = 5" in table
    assert "m6" not in table
    assert "(3 more in results.json)" in table
    assert max(map(len, table.split("\n"))) < 80


def test_table_width_follows_the_terminal(monkeypatch):
    text = Finding(claim(), {"x": 1.0}, None, REPRODUCED)
    wide = Finding(claim("wide", statement="A."), {"word " * 60: 1.0}, None, REPRODUCED)
    for columns, expected in ((40, 80), (100, 100), (300, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = verdict_table([text, wide], encoding="utf-8").split("\n")
        assert max(map(len, lines)) == expected
    with pytest.raises(ValueError, match="width must be at least 60, got 20"):
        verdict_table([text], width=20)


def test_many_numbers_are_folded():
    assert "<details>" not in elements.numbers([("x", "1")] * 12, shown=12)
    folded = elements.numbers([(f"x{i}", "1 [0, 2]") for i in range(15)], shown=12)
    shown, _, rest = folded.partition("<details><summary>3 more</summary>")
    assert shown.count("<dt>") == 12 and rest.count("<dt>") == 3 and "x14" in rest


def test_an_open_end_needs_no_note():
    measured = {"x": 3.0, "x, low": 2.0, "x, high": math.inf, "y, high": math.inf}
    finding = Finding(claim("first"), measured, (2.0, math.inf), REPRODUCED)
    entry = results_document(
        experiment="e", preset="p", dataset="", seeds=[0], wall_seconds=1.0, findings=[finding]
    )["claims"][0]
    assert entry["note"] == "Not finite, stored as null: y, high (inf)."
    assert entry["measured"]["x, high"] is None and entry["interval"] == [2.0, None]
