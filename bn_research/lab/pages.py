"""Writes the pages from the committed results: python -m experiments.readme.

No number that a run has measured is typed by hand. In README.md and docs:

    <!-- results:NAME --> … <!-- /results:NAME -->        the claims of docs/results/NAME as a table
    <!-- figures:NAME --> …                               its figures with what they show
    <!-- verdicts:notes --> …                             a row for each claim of the review
    <!-- verdicts:all --> …                               a row for each claim
    <!-- benchmark:NAME --> …                             docs/benchmarks/NAME.md
    <!--=CLAIM; NUMBER; FORMAT-->0.48<!--/-->             one number: quotations.py

docs/experiments/NAME.md is written from experiments/NAME/story.md, whose marks are empty; the other
pages are filled where they are. A test fails where a page differs from what this writes.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from bn_research.claims import atomic
from bn_research.claims.formatting import format_duration, headline
from bn_research.claims.tables import markdown_table
from bn_research.lab.quotations import QuoteError, Results, fill
from bn_research.lab.rooms import reading_order

ROOT = Path(__file__).parents[2]  # of a clone
_NOTES = "Notes"  # claims of the review that asked for this project name it in their source
_BLOCK = re.compile(r"(<!-- (\w+):(\w+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages of docs that people read."""
    docs = root / "docs"
    rooms = [path.parent.name for path in sorted(root.glob("experiments/*/story.md"))]
    stories = [docs / "experiments" / f"{room}.md" for room in rooms]
    return [root / "README.md", *sorted(docs.glob("*.md")), *stories]


def written(page: Path) -> str:
    """The text that a page must have.

    Raises:
      QuoteError: as of `render`.
    """
    folder = folder_of(page)
    if page.parent.name != "experiments":
        return render(page.read_text(), ROOT / "docs", folder=folder)
    story = f"experiments/{page.stem}/story.md"
    text = render((ROOT / story).read_text(), ROOT / "docs", folder=folder)
    return f"<!-- Written from {story}: change that, then run make pages. -->\n\n{text}"


def folder_of(page: Path) -> str:
    """Path from a page to docs/results, for its links."""
    return os.path.relpath(ROOT / "docs" / "results", page.parent)


def read_results(docs: Path) -> Results:
    """Every results.json of docs/results, by experiment."""
    found = sorted(docs.glob("results/*/results.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def render(text: str, docs: Path, *, folder: str = "docs/results") -> str:
    """The text of a page with every block and every number written anew.

    Args:
      text: of the page.
      docs: the folder with results/ and benchmarks/.
      folder: docs/results as the page reaches it.

    Raises:
      QuoteError: a block or a number names something that no run has measured.
    """
    results = read_results(docs)

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        return f"{start}{_content(kind, name, docs, results, folder)}{end}"

    return fill(_BLOCK.sub(block, text), results)


def _content(kind: str, name: str, docs: Path, results: Results, folder: str) -> str:
    if kind == "benchmark":
        return (docs / "benchmarks" / f"{name}.md").read_text()
    if kind == "verdicts":
        return _verdicts(results, folder, of_notes=name == "notes")
    if name not in results:
        raise QuoteError(f"no docs/results/{name}/results.json; there are {', '.join(results)}")
    if kind == "results":
        return _table(name, results[name])
    if kind == "figures":
        return _figures(docs / "results" / name, f"{folder}/{name}")
    raise QuoteError(
        f"unknown block {kind}:{name}: allowed are results, figures, verdicts, benchmark"
    )


def _table(name: str, results: dict[str, Any]) -> str:
    ran = (
        f"Measured with `python -m experiments.{name} --preset={results['preset']}` on "
        f"`{results['dataset']}`, {len(results['seeds'])} "
        f"seed{'' if len(results['seeds']) == 1 else 's'}, "
        f"in {format_duration(results['wall_seconds'])}:"
    )
    return f"{ran}\n\n{markdown_table(results)}\n"


def _figures(run: Path, folder: str) -> str:
    try:
        figures = json.loads((run / "report.json").read_text())["figures"]
    except FileNotFoundError as error:
        raise QuoteError(f"docs/results/{run.name} has no report.json") from error
    return "".join(
        f"![{_cell(figure['alt'])}]({folder}/{figure['file']})\n\n"
        f"**{figure['title']}.** {figure['caption']}\n\n"
        for figure in figures
    )


def _verdicts(results: Results, folder: str, *, of_notes: bool) -> str:
    pages_folder = folder.replace("results", "experiments")
    lines = ["| claim | expected | measured, 95 % interval | verdict |", "|---|---|---|---|"]
    for name in reading_order(results):
        for claim in results[name]["claims"]:
            if of_notes and not claim["source"].startswith(_NOTES):
                continue
            cells = (
                f"[{claim['statement']}]({pages_folder}/{name}.md)",
                claim["expected"],
                " = ".join(headline(claim)) if claim["measured"] else "–",
                f"**{claim['verdict']}**",
            )
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Exit status, after every page that differs is written; 2 where a number is missing."""
    for name in read_results(ROOT / "docs"):
        story = ROOT / "experiments" / name / "story.md"
        wanted = [f"<!-- {kind}:{name} -->" for kind in ("figures", "results")]
        if not story.exists() or not all(block in story.read_text() for block in wanted):
            place = story.relative_to(ROOT)
            print(f"readme: {place} must be there with {' and '.join(wanted)}", file=sys.stderr)
            return 2
    for path in pages():
        try:
            text = written(path)
        except QuoteError as error:
            print(f"readme: {path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if not path.exists() or text != path.read_text():
            atomic.write_bytes(path, text.encode())
            print(f"written: {path.relative_to(ROOT)}")
    return 0
