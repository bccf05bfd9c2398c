"""How long `--help` of every experiment takes, and the list of them all.

    python -m benchmarks.command_line [--rounds=9] [--json] [--write]

Whole processes, in a new order every round: medians, with lowest and highest in brackets. What this
takes is imports. The time of an interpreter that imports jax and flax alone stands beside them.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy import versions
from benchmarks.turns import machine
from bn_research.claims import atomic
from bn_research.lab.rooms import experiment_names

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "command_line.md"
LIMIT = 2.0  # seconds, what is asked for
IMPORT = "import jax, flax.linen"


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds, one a round."""
    commands = {IMPORT: ["-c", IMPORT]}
    commands |= {name: ["-m", f"experiments.{name}", "--help"] for name in experiment_names()}
    commands["reproduce --list"] = ["-m", "bn_research.lab.reproduce", "--list"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name in random.sample(list(commands), len(commands)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *commands[name]], capture_output=True, check=True)
            found[name].append(time.perf_counter() - start)
    return found


def markdown(found: Mapping[str, Sequence[float]]) -> str:
    """Experiments as rows."""
    lines = [f"| | seconds, `--help` or `--list`, below {LIMIT:g} |", "|---|---|"]
    for name, seconds in found.items():
        low, middle, high = np.quantile(seconds, (0, 0.5, 1))
        missed = " **missed**" if middle >= LIMIT else ""
        lines.append(f"| `{name}` | {middle:.2f} [{low:.2f}, {high:.2f}]{missed} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table; --write keeps it for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    of = machine()
    found = measure(arguments.rounds)
    if arguments.json:
        print(json.dumps(found))
        return
    text = (
        f"{markdown(found)}\n\nMeasured with `python -m benchmarks.command_line`: medians of "
        f"{arguments.rounds} rounds, with lowest and highest; {versions()}, {of}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
