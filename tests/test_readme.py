"""README.md and the pages of docs say what the committed results say, and the code runs."""

import json
import re
import shutil

import flax.linen as nn
import pytest

from bn_research.lab.launch import main
from bn_research.lab.pages import ROOT, pages, render, written
from bn_research.lab.rooms import load
from experiments import imagenet, init_sensitivity

README = (ROOT / "README.md").read_text()
PROBES = (ROOT / "docs" / "probes.md").read_text()
PAGES = [str(path.relative_to(ROOT)) for path in pages()]
_BLOCK = re.compile(r"<!-- (\w+:\w+) -->.*?<!-- /\1 -->", re.DOTALL)
_QUOTE = re.compile(r"<!--([=\"]).*?-->.*?<!--/-->|<!--\"-->.*?<!--/-->", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_results_are_those_committed(page):
    assert written(ROOT / page) == (ROOT / page).read_text(), (
        f"{page} differs from docs/results or its story: run `python -m experiments.readme`"
    )


def test_a_changed_number_changes_every_page_that_says_it(tmp_path):
    """The number, its interval and the verdict, in a table and in a sentence."""
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("figures"))
    path = docs / "results" / "learning_rate" / "results.json"
    results = json.loads(path.read_text())
    claim = results["claims"][0]
    name = "BN on all layers/plain, CNN, batch 32"
    claim["measured"] |= {name: 7.125, f"{name}, low": 6.5, f"{name}, high": 7.5}
    claim["interval"] = [6.5, 7.5]
    path.write_text(json.dumps(results))
    text = render(README, docs)
    assert f"{name} = 7.125 [6.5, 7.5]" in text and ">7.1 [6.5, 7.5]<" in text
    page = (ROOT / "docs" / "experiments" / "learning_rate.md").read_text()
    assert "7.125 [6.5, 7.5]" in render(page, docs)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("results/scale_invariance/results.json", '"verdict": "', '"verdict": "not '),
        ("results/transform/results.json", '"verdict": "', '"verdict": "not '),
        ("benchmarks/accuracy.md", "NaN", "0"),
        ("benchmarks/train_step.md", " ms", " s"),
    ],
)
def test_a_changed_result_changes_the_readme(tmp_path, name, old, new):
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("figures"))
    assert render(README, docs) == README
    text = (docs / name).read_text()
    assert old in text
    (docs / name).write_text(text.replace(old, new))
    assert render(README, docs) != README


def _prose(text):
    """Without blocks, code, links, and numbers that say where they come from."""
    text = re.sub(r"```.*?```", "", _BLOCK.sub("", text), flags=re.DOTALL)
    return re.sub(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)", "", _QUOTE.sub("", text))


_FIGURE = re.compile(r"\d+\.\d+|\d+e[-−]?\d+|\d\s?%|\[[^\]\n]*\d, [^\]\n]*\]")


def test_the_check_below_sees_a_number_typed_by_hand():
    typed = ["0.48 points", "1e-4 of it", "5 % less", "3 [2, 4] times"]
    assert all(_FIGURE.search(_prose(f"it is {text}")) for text in typed)
    said = ["<!--=a; b-->0.48<!--/--> points", '<!--"-->14.8<!--/-->', "`a=0.1`", "7 layers"]
    assert not any(_FIGURE.search(_prose(text)) for text in said)


@pytest.mark.parametrize("page", [p for p in PAGES if "experiments/" in p or p == "README.md"])
def test_no_figure_in_prose_is_typed_by_hand(page):
    text = _prose((ROOT / page).read_text())
    found = [text[max(0, m.start() - 40) : m.end() + 10] for m in _FIGURE.finditer(text)]
    assert not found, (
        f"{page}: quote what was measured as <!--=CLAIM; NUMBER--><!--/-->, and put what was not "
        f'between <!--"--> and <!--/-->: {found}'
    )


@pytest.mark.parametrize("page", PAGES)
def test_no_line_begins_with_a_quotation(page):
    """CommonMark would take the line for HTML and end the paragraph there."""
    text = (ROOT / page).read_text()
    assert re.findall(r"^\s*(?:[-*] )?<!--[=\"].*", text, re.MULTILINE) == []


def test_every_experiment_with_results_has_its_page():
    pages = {path.stem for path in (ROOT / "docs" / "experiments").glob("*.md")}
    assert pages == {path.parent.name for path in (ROOT / "docs").glob("results/*/results.json")}
    for name in pages:
        text = (ROOT / "experiments" / name / "story.md").read_text()
        assert f"<!-- results:{name} -->" in text and f"<!-- figures:{name} -->" in text


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs/results").glob("*/")))
def test_the_claims_of_the_results_are_those_of_the_code(name):
    """In their words too: a criterion that was changed after the run would show itself here."""
    results = json.loads((ROOT / "docs" / "results" / name / "results.json").read_text())
    fields = ("id", "statement", "source", "criterion", "expected")
    measured = [tuple(claim[field] for field in fields) for claim in results["claims"]]
    asked = [tuple(getattr(claim, field) for field in fields) for claim in load(name).claims]
    assert sorted(measured) == sorted(asked), (
        f"docs/results/{name} was measured for other claims: measure again (CONTRIBUTING, step 5)"
    )


def test_the_review_s_claims_stand_on_the_first_screen():
    """What the project is, two commands, one figure, and the verdicts, before any section."""
    first = README[: README.index("\n## ")]
    assert first.index("make demo") < first.index("make reproduce") < first.index("<img ")
    assert first.count("<img ") == 1 and first.index("<img ") < first.index(
        "<!-- verdicts:notes -->"
    )
    file, alt = re.search(r'<img src="([^"]+)" width="\d+" alt="([^"]+)">', first).groups()
    assert (ROOT / file).exists() and len(alt) > 40
    notes = [
        claim["statement"]
        for path in (ROOT / "docs").glob("results/*/results.json")
        for claim in json.loads(path.read_text())["claims"]
        if claim["source"].startswith("Notes")
    ]
    assert len(notes) >= 17 and all(statement in first for statement in notes)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, monkeypatch, tmp_path):
    """Those with a printed result have tests of their own below, experiments in test_commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn, "BatchNorm", nn.BatchNorm)  # README puts ours there
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        if not re.search(r"print\((?:audit|probe_linen)|^EXPERIMENT = ", block, re.MULTILINE):
            exec(compile(block, page, "exec"), {})


def test_the_audit_prints_what_it_shows(capsys):
    """Of each parameter the verdict; the digits are the machine's."""
    block, shown = re.search(
        r"```python\n(import jax[^`]*audit[^`]*)```\n\n```\n(.*?)```", README, re.S
    ).groups()
    assert len([line for line in block.splitlines() if line]) < 10
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for text in (shown, printed):
        assert re.search(r"\['w1'\] +invariant", text) and "together: ['b'], ['w2']" in text
    verdicts = [re.findall(r"^(\[\S+|\w[^-+–\d]*)", text, re.M) for text in (shown, printed)]
    assert verdicts[0] == verdicts[1]


def test_the_probe_prints_what_it_shows(capsys):
    """The same layers and findings; the digits are the machine's."""
    block, shown = re.search(
        r"```python\n(import jax[^`]*probe_linen[^`]*)```\n\n```\n(.*?)```", PROBES, re.S
    ).groups()
    exec(compile(block, "docs/probes.md", "exec"), {})
    printed = capsys.readouterr().out
    shapes = [re.findall(r"^(\S+ +\d+×[\d×]+)", text, re.M) for text in (shown, printed)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 7
    for text in (shown, printed):
        assert re.search(r"^signal lost from layer 2 \(conv2\) on.*weights by \d+× per", text, re.M)


_SHOWN = re.findall(r"```python\n((?:(?!```).)*?)```\n\n```\n(.*?)```", PROBES, re.DOTALL)


@pytest.mark.parametrize("number", range(len(_SHOWN)))
def test_the_probes_print_what_their_page_shows(number, capsys):
    """In all but digits, which are the machine's, and limits that rounding raises."""
    block, shown = _SHOWN[number]
    exec(compile(block, "docs/probes.md", "exec"), {})
    texts = [
        " ".join(re.sub(r"\(≤ [^)]*\)|[-+]?\b\d[\d.]*(e[-+]?\d+)?%?|\binf\b", " ", text).split())
        for text in (shown, capsys.readouterr().out)
    ]
    assert texts[0] == texts[1]


def test_the_page_of_the_probes_shows_what_each_prints():
    assert len(_SHOWN) == 7


@pytest.mark.parametrize("page", ["README.md", "docs/scaling.md"])
def test_flags_of_the_imagenet_job_exist(page, capsys):
    """Every flag that a launch of it gives stands in its --help."""
    assert main(imagenet.EXPERIMENT, ["imagenet", "--help"]) == 0
    known = capsys.readouterr().out
    text = (ROOT / page).read_text().replace("\\\n", " ")
    launches = re.findall(r"python -m experiments\.imagenet(.*)", text)
    assert len(launches) >= 3
    for flag in {flag for launch in launches for flag in re.findall(r"--([\w.]+)", launch)}:
        assert (f"  {flag[7:]} = " if flag.startswith("config.") else f"--{flag}") in known, flag


def test_files_and_presets_that_it_names_exist():
    for page in [*PAGES, "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([\w./-]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), (page, target)
    named = re.findall(r"^\| `(\w+)` \| (?:every|a first|the evidence)", README, re.MULTILINE)
    assert sorted(named) == sorted(init_sensitivity.PRESETS)
