"""Programs that take turns, each in a process of its own, so that a busy machine hits them alike.

A program answers every line of its input, the name of one of its parts, with the seconds of one
step of that part. Each process has the threads and the memory of one library only: beside each
other they would wait for each other.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

WARM_UP = 3  # turns that do not count


class Memory(NamedTuple):
    """Resident memory of a process, MiB."""

    before: float  # with its library imported, before it builds anything
    peak: float  # of its life, compilation included
    at_end: float


class Measured(NamedTuple):
    """Of one program."""

    seconds: dict[str, list[float]]  # part -> of a step, one a round
    memory: Memory


def resident() -> float:
    """Of this process, MiB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def serve(build: Callable[[], Mapping[str, Callable[[], int]]]) -> None:
    """Builds a program and runs the part named by each line of input.

    Args:
      build: makes part -> a function that takes some steps and returns how many.
    """
    before = resident()
    parts = build()
    for line in sys.stdin:
        if line.strip() == "memory":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            print(json.dumps(Memory(before, peak, resident())), flush=True)
            continue
        run = parts[line.strip()]
        start = time.perf_counter()
        steps = run()
        print((time.perf_counter() - start) / steps, flush=True)


class _Process:
    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            # Several processes share a GPU: none of them takes its memory beforehand.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )

    def ask(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{line}\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._process.args)} ended: see above")  # type: ignore[arg-type]
        return answer

    def close(self) -> None:
        self._process.communicate()


def take_turns(
    commands: Mapping[str, Sequence[str]], seconds: float, parts: Sequence[str] = ("step",)
) -> dict[str, Measured]:
    """Measures programs for so many seconds a part, in a new order every round.

    Args:
      commands: name -> module and arguments, of a program that calls `serve`.
      seconds: of rounds of each part, after all are warm; at least one round.
      parts: names that every program knows; one after the other.
    """
    processes = {name: _Process(command) for name, command in commands.items()}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in processes}
    try:
        for part in parts:
            for name, process in processes.items():
                found[name][part] = []
                for _ in range(WARM_UP):
                    process.ask(part)
            order, end = list(processes), time.monotonic() + seconds
            while time.monotonic() < end or not found[order[0]][part]:
                random.shuffle(order)
                for name in order:
                    found[name][part].append(float(processes[name].ask(part)))
        memory = {name: Memory(*json.loads(p.ask("memory"))) for name, p in processes.items()}
    finally:
        for process in processes.values():
            process.close()
    return {name: Measured(found[name], memory[name]) for name in processes}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """Median and quartiles of the ratios of each round."""
    quotients = np.asarray(numerator) / np.asarray(denominator)
    low, middle, high = np.quantile(quotients, (0.25, 0.5, 0.75))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def milliseconds(seconds: Sequence[float]) -> str:
    """Median."""
    return f"{np.median(seconds) * 1e3:.3g} ms"


def machine() -> str:
    """Cores, processor and present load, for the line below a table."""
    with open("/proc/cpuinfo") as info:
        names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return f"{os.cpu_count()} cores of {processor} (load average before: {os.getloadavg()[0]:.1f})"
