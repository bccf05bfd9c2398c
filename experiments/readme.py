"""Writes the tables of the pages from the committed results: python -m experiments.readme.

Between `<!-- results:NAME -->` and `<!-- /results:NAME -->` stands what
`docs/results/NAME/results.json` says, between `<!-- benchmark:NAME -->` and its end the text of
`docs/benchmarks/NAME.md`; a test fails when the two differ.
"""

import json
import re
from pathlib import Path

from bn_research.claims import atomic
from bn_research.claims.formatting import format_duration
from bn_research.claims.report import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/scaling.md")
_BLOCK = re.compile(r"(<!-- (results|benchmark):(\w+) -->\n).*?(<!-- /\2:\3 -->)", re.DOTALL)


def render(text: str, docs: Path) -> str:
    """The text with every block of results or of a benchmark written anew."""

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        if kind == "benchmark":
            return f"{start}{(docs / 'benchmarks' / f'{name}.md').read_text()}{end}"
        results = json.loads((docs / "results" / name / "results.json").read_text())
        command = f"python -m experiments.{name} --preset={results['preset']}"
        ran = (
            f"Measured with `{command}` on `{results['dataset']}`, {len(results['seeds'])} seeds, "
            f"in {format_duration(results['wall_seconds'])}:"
        )
        return f"{start}{ran}\n\n{markdown_table(results)}\n{end}"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        atomic.write_bytes(path, render(path.read_text(), ROOT / "docs").encode())
