"""The page of all committed results in headless Chromium: as a reader meets it."""

import contextlib
import shutil
from pathlib import Path

import pytest

from bn_research.claims.formatting import headline
from bn_research.claims.html.overview import write_overview
from bn_research.claims.results import Failure, read_run

playwright = pytest.importorskip("playwright.sync_api")

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
RESULTS = Path(__file__).parents[2] / "docs" / "results"
SIZES = {"phone": (360, 740), "tablet": (976, 740), "desk": (1280, 900)}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

# Elements with text of their own whose colour is too near to that of what lies behind them.
FAINT = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const parse = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) =>
      c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility()) continue;
    const [a, b] = [parse(getComputedStyle(e).color).slice(0, 3), behind(e)].map(luminance);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  }
  return [...new Set(faint)];
}"""


@pytest.fixture(scope="module")
def runs():
    """All but one, which is to have failed."""
    folders = sorted(path.parent for path in RESULTS.glob("*/results.json"))
    return [read_run(folder) for folder in folders if folder.name != "imagenet"]


@pytest.fixture(scope="module")
def claims(runs):
    return [claim for run in runs for claim in run.results["claims"]]


@pytest.fixture(scope="module")
def path(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    log = f"Traceback (most recent call last):\nValueError: {'no folder ' * 30}{'x' * 300}"
    failure = Failure(
        "imagenet", "python -m experiments.imagenet", 2, "no data at " + "y" * 90, log
    )
    write_overview(
        path,
        title="Batch normalization: what is claimed, and what was measured",
        introduction="Each claim was tested by an experiment. " * 4,
        command="python -m experiments.reproduce --preset=standard --workdir=runs/reproduce",
        runs=runs,
        failures=[failure],
    )
    return path


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, path):
    """Opens the page; whatever the console says, violations of the policy too, is an error."""
    with contextlib.ExitStack() as stack:
        said = []

        def opened(size="desk", **options):
            width, height = SIZES[size]
            viewport = {"width": width, "height": height}
            context = stack.enter_context(
                contextlib.closing(browser.new_context(viewport=viewport, **options))
            )
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: request.url.startswith("data:") or asked(request))
            page.goto(path.as_uri())
            return page

        def asked(request):
            if request.url != path.as_uri():
                said.append(request.url)

        yield opened
        assert said == []


def rows(page):
    """Ids, or names of failed experiments, of the rows that are shown."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".verdicts tbody tr")]
        .filter((row) => row.checkVisibility())
        .map((row) => row.querySelector("code")?.textContent ?? row.dataset.experiment)"""
    )


def status(page):
    return page.get_by_role("status").inner_text()


def verdict_button(page, verdict):
    return page.locator(f".filters [data-verdict='{verdict}']")


def ids_of(claims, *verdicts):
    return [claim["id"] for claim in claims if claim["verdict"] in verdicts]


def test_page_is_small(path):
    assert path.stat().st_size < 3e6


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_screen_and_can_be_read(opened, size, scheme):
    page = opened(size, color_scheme=scheme)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut_off = page.evaluate(
        """() => [...document.querySelectorAll(".verdicts .cell, .verdicts th, .verdicts dd")]
        .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
        .map((e) => e.textContent)"""
    )
    assert cut_off == []
    if size == "desk":
        page.evaluate("document.querySelectorAll('.filters button').forEach((b) => b.click())")
        assert page.evaluate(FAINT) == []


def test_search_narrows_the_rows_to_those_with_every_word(opened, claims):
    page = opened()
    assert rows(page) == [*(claim["id"] for claim in claims), "imagenet"]
    assert status(page) == f"{len(claims)} of {len(claims)} claims shown, 1 of 1 failed experiments"
    search = page.get_by_role("searchbox", name="Search")
    search.fill("Tiny-INIT-vanishing")
    assert rows(page) == ["tiny-init-vanishing-signal"]
    assert status(page).startswith(f"1 of {len(claims)} claims shown, 0 of 1")
    search.fill("init_sensitivity  theory")
    found = rows(page)
    assert found and set(found) < {claim["id"] for claim in claims}
    search.fill("no-such-word")
    assert rows(page) == []
    assert status(page).startswith("0 of")
    page.get_by_role("button", name="Clear filters").click()
    assert len(rows(page)) == len(claims) + 1
    assert not page.get_by_role("button", name="Clear filters").is_visible()


def test_verdicts_filter_and_count(opened, claims):
    page = opened()
    for verdict in ("reproduced", "not reproduced", "inconclusive"):
        button = verdict_button(page, verdict)
        expected = ids_of(claims, verdict)
        assert button.locator("b").inner_text() == str(len(expected))
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert rows(page) == expected
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
    verdict_button(page, "failed").click()
    assert rows(page) == ["imagenet"]
    verdict_button(page, "not reproduced").click()
    assert rows(page) == [*ids_of(claims, "not reproduced"), "imagenet"]


def test_counts_follow_the_other_filters(opened, runs):
    page = opened()
    own = next(run for run in runs if run.results["experiment"] == "init_sensitivity")
    page.get_by_role("combobox", name="Experiment").select_option("init_sensitivity")
    verdict_button(page, "inconclusive").click()
    for verdict in ("reproduced", "not reproduced", "inconclusive"):
        count = len(ids_of(own.results["claims"], verdict))
        assert verdict_button(page, verdict).locator("b").inner_text() == str(count)
    assert rows(page) == ids_of(own.results["claims"], "inconclusive")


def test_columns_sort_both_ways_and_filters_stay(opened, claims):
    page = opened()
    head = page.get_by_role("columnheader", name="Measured")
    numbers = {claim["id"]: claim["measured"][headline(claim)[0]] for claim in claims}
    for order, sign in (("ascending", 1), ("descending", -1), ("ascending", 1)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        found = rows(page)
        assert found[-1] == "imagenet"  # what has no number stays last
        assert found[:-1] == sorted(numbers, key=lambda name: sign * numbers[name])
    verdict_button(page, "inconclusive").click()
    page.get_by_role("columnheader", name="Claim").get_by_role("button").click()
    assert head.get_attribute("aria-sort") is None
    by_statement = sorted(
        (claim for claim in claims if claim["verdict"] == "inconclusive"),
        key=lambda claim: claim["statement"].lower(),
    )
    assert rows(page) == [claim["id"] for claim in by_statement]
    verdict_button(page, "inconclusive").click()
    page.get_by_role("columnheader", name="Verdict").get_by_role("button").click()
    order = ("reproduced", "not reproduced", "inconclusive")
    assert rows(page) == ["imagenet", *(name for v in order for name in ids_of(claims, v))]


def test_a_phone_sorts_by_a_list_and_has_room_for_a_finger(opened, claims):
    page = opened("phone", has_touch=True)
    page.get_by_role("combobox", name="Order").select_option("3 descending")
    numbers = {claim["id"]: claim["measured"][headline(claim)[0]] for claim in claims}
    assert rows(page)[:3] == sorted(numbers, key=lambda name: -numbers[name])[:3]
    small = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, summary")]
        .filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 40)
        .map((e) => e.textContent)"""
    )
    assert small == []


def test_the_keyboard_reaches_every_control(opened, claims):
    page = opened()
    page.get_by_role("searchbox", name="Search").focus()
    page.keyboard.press("Tab")
    assert page.get_by_role("combobox", name="Experiment").evaluate(
        "e => e === document.activeElement"
    )
    page.keyboard.press("Tab")
    assert verdict_button(page, "reproduced").evaluate("e => e === document.activeElement")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Space")
    assert rows(page) == ids_of(claims, "reproduced")
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Clear filters"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Claim"
    page.keyboard.press("Enter")
    assert page.get_by_role("columnheader", name="Claim").get_attribute("aria-sort") == "ascending"


def test_links_lead_to_figures_that_are_drawn(opened, runs):
    page = opened()
    page.get_by_role("link", name="Figure 1", exact=True).click()
    image = page.locator("figure").first.locator("img")
    image.evaluate("image => image.decode()")
    assert image.evaluate("e => [e.naturalWidth, e.naturalHeight]") == image.evaluate(
        "e => [Number(e.getAttribute('width')), Number(e.getAttribute('height'))]"
    )
    top = page.locator("figure").first.evaluate("e => e.getBoundingClientRect().top")
    assert 0 <= top < 100
    assert page.locator("img").count() == sum(len(run.figures) for run in runs)


def test_without_a_script_the_table_is_whole(opened, claims):
    page = opened(java_script_enabled=False)
    assert page.locator(".verdicts tbody tr:visible").count() == len(claims) + 1
    assert not page.locator(".tools").is_visible()
    assert page.locator(".verdicts thead button").count() == 0
    assert page.locator(".counts").is_visible()


def test_paper_shows_what_a_click_would_and_no_controls(opened):
    page = opened()
    page.set_viewport_size({"width": 680, "height": 960})  # A4 without its margins
    page.emulate_media(media="print")
    hidden = page.locator(".tools, .jump, .back")
    assert not any(hidden.nth(i).is_visible() for i in range(hidden.count()))
    tables = page.locator(".experiment details .pairs")
    assert tables.count() > 20
    assert tables.evaluate_all("all => all.every((e) => e.checkVisibility())")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.locator(".verdicts :is(td, th)").evaluate_all(
        "all => all.filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
    )
    assert wide == []
