"""How long a user waits for an experiment of the preset `quick`.

    python -m benchmarks.quick [--only=NAME,NAME] [--json] [--write]

Whole processes, one after the other, each with a workdir of its own. `quick` runs twice: the first
time all programs are compiled, the second time they are found in the compilation cache, which is a
new one for this benchmark.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.accuracy import versions
from benchmarks.turns import machine
from bn_research.claims import atomic
from bn_research.lab.rooms import experiment_names

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "benchmarks" / "quick.md"
LIMIT = 90.0  # seconds, what is asked for


class Waited(NamedTuple):
    """For one experiment, seconds."""

    seconds: list[float]  # with an empty cache, with a filled one; none where it cannot run
    left_out: str  # why, in the experiment's words


def _seconds(arguments: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Of one process, and its last line on stderr if it did not end well."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment
    )
    seconds = time.perf_counter() - start
    return seconds, (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""


def wait_for(name: str, folder: Path) -> Waited:
    """Times one experiment, with workdirs and a cache in folder."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / f"{name}-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as the experiments themselves set
    }
    module = f"experiments.{name}"
    found = []
    for number in range(2):
        workdir = folder / f"{name}-{number}"
        seconds, error = _seconds([module, "--preset=quick", f"--workdir={workdir}"], environment)
        if error:
            return Waited([], error)
        found.append(seconds)
    return Waited(found, "")


def markdown(waited: dict[str, Waited]) -> str:
    """Experiments as rows."""
    lines = [
        f"| experiment | `--preset=quick`, below {LIMIT:g} s | compiled before |",
        "|---|---|---|",
    ]
    for name, one in waited.items():
        times = [one.left_out, ""]
        if one.seconds:
            times = [f"{seconds:.0f} s" for seconds in one.seconds]
            times[0] += " **missed**" if one.seconds[0] >= LIMIT else ""
        lines.append(f"| `{name}` | {' | '.join(times)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table; --write keeps it for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=lambda text: text.split(","), default=experiment_names())
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(experiment_names()):
        parser.error(
            f"--only={','.join(sorted(unknown))}: allowed are {', '.join(experiment_names())}"
        )
    of = machine()
    with tempfile.TemporaryDirectory() as folder:
        waited = {}
        for name in tqdm(arguments.only):
            waited[name] = wait_for(name, Path(folder))
            tqdm.write(f"{name}: {waited[name]}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({name: one._asdict() for name, one in waited.items()}))
        return
    text = (
        f"{markdown(waited)}\n\nMeasured with `python -m benchmarks.quick`, one run each; "
        f"{versions()}, {of}."
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
