"""The page of all experiments as text: escaping, links, alternative texts, policy, failures."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from PIL import Image, ImageChops

from bn_research.claims.figures import Figure
from bn_research.claims.html.images import embed
from bn_research.claims.html.overview import render, write_overview
from bn_research.claims.results import Failure, Run

EVIL = "</script><script>alert('x')</script>\"&"
VERDICTS = ("reproduced", "not reproduced", "inconclusive")


def claim(name, verdict="reproduced", **changes):
    return {
        "id": name,
        "statement": f"{name} holds.",
        "source": "Notes",
        "criterion": "σ ≥ 1; not reproduced below",
        "expected": "2",
        "measured": {"x": 1.0, "x, low": 0.5, "x, high": None} | {f"m{i}": 2.0 for i in range(4)},
        "interval": [0.5, None],
        "verdict": verdict,
        "note": "Seed 3 failed.",
    } | changes


def run(name, claims, figures=(), **changes):
    results = {
        "schema": 1,
        "experiment": name,
        "preset": "smoke",
        "dataset": "digits",
        "seeds": [0, 1],
        "wall_seconds": 75.0,
        "claims": claims,
    }
    return Run(
        title=f"Title of {name}",
        question="Is it so?",
        command=f"python -m experiments.{name}",
        results=results,
        figures=figures,
        config={"seeds": 2},
        environment={"python": "3.11"},
    )._replace(**changes)


@pytest.fixture
def figures(tmp_path):
    """A square figure of claim b and a wide one of claim a and of a claim that is not there."""
    found = []
    for name, size, claims in (("one", (40, 40), ("b",)), ("two", (90, 30), ("a", "gone"))):
        path = tmp_path / f"{name}.png"
        image = Image.new("P", size)
        image.putpalette([0, 0, 0, 0, 114, 178, 213, 94, 0])
        image.putdata([(i * 7) % 3 for i in range(size[0] * size[1])])
        image.save(path)
        found.append(Figure(path, f"Title {name}", f"Alt {name}", f"Caption {name}", claims))
    return found


def failure(**changes):
    words = {"experiment": "third", "command": "python -m third", "status": -9}
    return Failure(**words, reason="killed: memory", log="line 1\nline <2>")._replace(**changes)


def page(runs, failures=(), **changes):
    words = {"title": "All", "introduction": "Claims.", "command": "python -m experiments.all"}
    return render(**words | changes, runs=runs, failures=failures)


class Parsed(HTMLParser):
    """Tags with their attributes and text; checks that they are balanced."""

    VOID = {"meta", "link", "img", "input"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.stack, self.ids = [], [], {}
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        entry = {"tag": tag, "text": "", **dict(attrs)}
        self.tags.append(entry)
        if "id" in entry:
            assert entry["id"] not in self.ids, f"{entry['id']} stands twice"
            self.ids[entry["id"]] = entry
        if tag not in self.VOID:
            self.stack.append(entry)

    def handle_endtag(self, tag):
        assert self.stack.pop()["tag"] == tag

    def handle_data(self, data):
        for entry in self.stack:
            entry["text"] += data

    def all(self, tag, **attrs):
        wanted = {"tag": tag, **attrs}
        return [t for t in self.tags if wanted.items() <= t.items()]


def two_runs(figures):
    first = run("first", [claim("a"), claim("b", "not reproduced"), claim("c", "inconclusive")])
    return [first, run("second", [claim("a"), claim("b")], figures)]


def test_each_claim_is_a_row_with_what_was_measured(figures):
    parsed = Parsed(page(two_runs(figures)))
    rows = parsed.all("tr", role="row")[1:]
    assert [row["data-verdict"] for row in rows] == [*VERDICTS, "reproduced", "reproduced"]
    assert [row["data-experiment"] for row in rows] == ["first"] * 3 + ["second"] * 2
    for text in ("a holds.", "Notes", "σ ≥ 1", "x1 [0.5, inf]", "2 more"):
        assert text in rows[0]["text"]
    counts = parsed.all("ul", **{"class": "counts"})[0]["text"]
    assert counts == "3 ✓ reproduced1 ✗ not reproduced1 ~ inconclusive"


def test_every_link_leads_somewhere_and_a_claim_to_its_first_figure(figures):
    parsed = Parsed(page(two_runs(figures), [failure()]))
    links = parsed.all("a")
    assert links and all(link["href"][0] == "#" for link in links)
    assert {link["href"][1:] for link in links} <= parsed.ids.keys()
    targets = {a["text"]: parsed.ids[a["href"][1:]]["text"] for a in links}
    assert "Title one" in targets["Figure 1"] and "Title two" in targets["Figure 2"]
    # The figures belong to the second experiment and say nothing of the claims of the first.
    found = [re.findall(r"Figure \d", row["text"]) for row in parsed.all("tr", role="row")[1:]]
    assert found == [[], [], [], ["Figure 2"], ["Figure 1"], []]


def test_each_figure_has_alt_text_caption_number_and_command(figures):
    parsed = Parsed(page(two_runs(figures)))
    shown = [t for t in parsed.all("figure")]
    assert len(shown) == len(parsed.all("img")) == 2
    for index, (figure, image) in enumerate(zip(shown, parsed.all("img"), strict=True)):
        assert image["alt"] == figures[index].alt
        assert (image["loading"], image["decoding"]) == ("lazy", "async")
        for text in (f"Figure {index + 1}. ", figures[index].caption, "-m experiments.second"):
            assert text in figure["text"]
    assert "Shows b" in shown[0]["text"] and "Shows a" in shown[1]["text"]
    assert "gone" not in shown[1]["text"]  # what is no claim of the run has nothing to link to


def test_pictures_are_the_same_pixels(figures, tmp_path):
    for figure, image in zip(figures, Parsed(page(two_runs(figures))).all("img"), strict=True):
        head, data = image["src"].split(",")
        assert head == "data:image/webp;base64"
        copy = tmp_path / "copy.webp"
        copy.write_bytes(base64.b64decode(data))
        with Image.open(figure.path) as a, Image.open(copy) as b:
            assert a.convert("RGB").tobytes() == b.convert("RGB").tobytes()
            assert (image["width"], image["height"]) == tuple(map(str, a.size))


def test_many_colours_become_near_ones(tmp_path):
    image = Image.linear_gradient("L").convert("RGB")  # 256 shades
    image.save(tmp_path / "a.png")
    data = base64.b64decode(embed(tmp_path / "a.png").uri.split(",")[1])
    (tmp_path / "a.webp").write_bytes(data)
    with Image.open(tmp_path / "a.webp") as found:
        assert len(found.convert("RGB").getcolors()) <= 128
        _, worst = ImageChops.difference(image, found.convert("RGB")).convert("L").getextrema()
    assert worst <= 4


def test_a_failed_experiment_is_a_row_that_leads_to_its_log(figures):
    parsed = Parsed(page(two_runs(figures), [failure(), failure(experiment="fourth", log="")]))
    rows = parsed.all("tr", **{"data-verdict": "failed"})
    assert [row["data-experiment"] for row in rows] == ["third", "fourth"]
    assert "killed: memory" in rows[0]["text"]
    section = parsed.ids["experiment-third"]["text"]
    for text in ("killed: memory", "-9", "python -m third", "line 1\nline <2>"):
        assert text in section
    assert "The log is empty." in parsed.ids["experiment-fourth"]["text"]
    assert parsed.all("ul", **{"class": "counts"})[0]["text"].endswith("2 ! failed")
    without = Parsed(page(two_runs(figures)))
    assert not without.all("button", **{"data-verdict": "failed"})


def test_everything_from_outside_is_escaped(figures):
    figure = Figure(figures[0].path, EVIL, EVIL, EVIL, (EVIL,))
    words = ("id", "statement", "source", "criterion", "expected", "note")
    evil = claim("x", **dict.fromkeys(words, EVIL), measured={EVIL: 1.0})
    runs = [
        run(
            EVIL,
            [evil],
            [figure],
            title=EVIL,
            question=EVIL,
            command=EVIL,
            config={EVIL: {EVIL: EVIL}},
            environment={EVIL: [EVIL]},
        )
    ]
    failures = [Failure(f"2{EVIL}", EVIL, 1, EVIL, EVIL)]
    html = page(runs, failures, title=EVIL, introduction=EVIL, command=EVIL)
    parsed = Parsed(html)
    assert html.count("<script") == 1
    assert parsed.all("img")[0]["alt"] == EVIL
    assert {a["href"][1:] for a in parsed.all("a")} <= parsed.ids.keys()
    assert all(re.fullmatch(r"#[\w-]+", a["href"]) for a in parsed.all("a"))
    assert not any(name.startswith("on") for tag in parsed.tags for name in tag)


def test_nothing_is_fetched_and_only_the_one_script_may_run(figures):
    html = page(two_runs(figures))
    parsed = Parsed(html)
    (script,) = parsed.all("script")
    assert script.keys() == {"tag", "text"}
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["content"]
    assert "default-src 'none'" in policy["content"]
    assert all(t["src"].startswith("data:") for t in parsed.tags if "src" in t)
    assert not re.search(r"url\(|@import|https?:", html)


def test_without_a_claim_there_is_no_table():
    for runs in ([], [run("first", [])]):
        parsed = Parsed(page(runs))
        assert not parsed.all("form")
        assert "No claim was tested." in parsed.all("main")[0]["text"]


def test_an_experiment_twice_is_refused_and_the_old_page_kept(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    words = {"title": "All", "introduction": "Claims.", "command": "c"}
    with pytest.raises(ValueError, match="another experiment, got 'third' more than once"):
        write_overview(path, **words, runs=[run("third", [])], failures=[failure()])
    with pytest.raises(FileNotFoundError):
        gone = [Figure(tmp_path / "gone.png", "t", "a", "c")]
        write_overview(path, **words, runs=[run("first", [], gone)], failures=[])
    assert path.read_text() == "old"


def test_equal_runs_give_equal_bytes(figures, tmp_path):
    for name in ("a", "b"):
        words = {"title": "All", "introduction": "Claims.", "command": "c"}
        runs = two_runs(figures)
        write_overview(tmp_path / name, **words, runs=runs, failures=[failure()])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
