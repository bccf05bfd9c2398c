"""How long a process takes to its first training step, beside plain Flax and PyTorch.

    python -m benchmarks.startup [--network=cnn|mlp|inception] [--rounds=5] [--json] [--write]

Import: from the start of the process until its library is there. Build: network, optimizer, set.
First step: compilation and one step. Then one step more. Every process is new, in a new order every
round. × is the time to the end of the first step of ours, compiled before, over that of the other
in the same round: below 1 ours is faster. Medians, with quartiles of the ratio in brackets.

"Compiled before" finds its programs in the compilation cache, as every run of an experiment but the
first does.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.networks import NETWORKS
from benchmarks.train_programs import OURS, PROGRAMS, build, import_library, left_out
from benchmarks.turns import machine, ratio
from bn_research.claims import atomic

TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "startup.md"
CACHED = f"{OURS}, compiled before"


class Started(NamedTuple):
    """Of one process, seconds."""

    imported: float
    built: float
    first_step: float
    next_step: float

    @property
    def waited(self) -> float:
        """To the end of the first step."""
        return self.imported + self.built + self.first_step


def start(name: str, network: str, cache: str | None) -> Started:
    """Times a new process."""
    keep = [] if cache is None else [f"--cache={cache}"]
    program = OURS if name == CACHED else name
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", f"--network={network}"]
        + [f"--serve={program}", f"--since={time.time()}", *keep],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Started(*json.loads(done.stdout.splitlines()[-1]))


def serve(name: str, network: str, since: float, cache: str | None) -> None:
    """Starts as a program does and prints how long it took."""
    times = [since]
    import_library(name, cache)
    times.append(time.time())
    run = build(name, NETWORKS[network]._replace(steps=1))
    times.append(time.time())
    for _ in range(2):
        run()
        times.append(time.time())
    print(json.dumps(np.diff(times).tolist()))


def measure(network: str, rounds: int) -> dict[str, list[Started]]:
    """Programs that are not left out, in turn."""
    names = [CACHED, *(name for name, why in left_out(network).items() if not why)]
    found: dict[str, list[Started]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        start(CACHED, network, folder)  # fills the cache
        for _ in range(rounds):
            for name in random.sample(names, len(names)):
                cache = folder if name == CACHED else None
                found[name].append(start(name, network, cache))
    return found


def markdown(network: str, found: dict[str, list[Started]], reasons: dict[str, str]) -> str:
    """Programs as rows; ratios first."""
    lines = [
        f"| {network} | ours over it, × | to the first step | import | build | first step | next |",
        "|---" * 7 + "|",
    ]
    ours = [one.waited for one in found[CACHED]]
    for name in (CACHED, *reasons):
        if why := reasons.get(name):
            lines.append(f"| {name} | left out: {why} | | | | | |")
            continue
        waited = [one.waited for one in found[name]]
        own = "1" if name == CACHED else ratio(ours, waited)
        parts = np.median(np.array(found[name]), axis=0)
        cells = " | ".join(f"{seconds:.3g} s" for seconds in (np.median(waited), *parts))
        lines.append(f"| {name} | {own} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; --write keeps them for the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print every time")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    parser.add_argument("--serve", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.network, arguments.since, arguments.cache)
        return
    of = machine()
    networks = [arguments.network] if arguments.network else list(NETWORKS)
    found = {network: measure(network, arguments.rounds) for network in networks}
    if arguments.json:
        times = {n: {k: [s._asdict() for s in v] for k, v in f.items()} for n, f in found.items()}
        print(json.dumps({"left out": {n: left_out(n) for n in networks}, **times}))
        return
    from benchmarks.accuracy import versions

    tables = [markdown(network, one, left_out(network)) for network, one in found.items()]
    text = "\n\n".join(
        [
            *tables,
            f"Measured with `python -m benchmarks.startup`: medians of {arguments.rounds} rounds, "
            f"with quartiles of the ratio; {versions()}, {of}.",
        ]
    )
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
