"""Writes the tables of README.md from the committed results: python -m experiments.readme.

Between `<!-- results:NAME -->` and `<!-- /results:NAME -->` stands what
`docs/results/NAME/results.json` says; a test fails when the two differ.
"""

import json
import re
from pathlib import Path

from bn_research.claims import atomic
from bn_research.claims.formatting import format_duration
from bn_research.claims.report import markdown_table

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results:\2 -->)", re.DOTALL)


def render(text: str, results_folder: Path) -> str:
    """The text with every block of results written anew."""

    def block(match: re.Match[str]) -> str:
        results = json.loads((results_folder / match[2] / "results.json").read_text())
        command = f"python -m experiments.{match[2]} --preset={results['preset']}"
        ran = (
            f"Measured with `{command}` on `{results['dataset']}`, {len(results['seeds'])} seeds, "
            f"in {format_duration(results['wall_seconds'])}:"
        )
        return f"{match[1]}{ran}\n\n{markdown_table(results)}\n{match[3]}"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    atomic.write_bytes(readme, render(readme.read_text(), ROOT / "docs" / "results").encode())
