"""Does a training job survive? SIGKILLs at random moments, and the bits at the end, as a table.

    python -m benchmarks.durability [--kills=20] [--write]

A small job of `experiments.imagenet` (digits, a CNN with BN, a checkpoint every 20 steps) is run
once undisturbed; then over and over, killed at random moments, until it has been killed so often;
then it may finish. Then the same with two processes of two CPU devices each, one of which, chosen
at random, is killed; the other has to end by itself. What counts is whether the parameters,
running statistics, losses and evaluations at the end are those of the undisturbed run, to the
last bit.
"""

import argparse
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bn_research.claims import atomic

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "benchmarks" / "durability.md"
_PATIENCE = 600.0  # seconds that no run may take
_LOST = 5  # the exit status of a process whose job has lost another
_SHARE = 0.4  # of an undisturbed run that is trained, about, before the last kill


class Outcome(NamedTuple):
    """What became of a job."""

    kills: int  # that met a running process
    before: int  # of these, before the first step
    saving: int  # of these, while a checkpoint was being written
    wait: float  # longest until the other process had ended, seconds; 0 for a process alone
    result: list[str]  # lines of metrics.jsonl, sorted


def start(workdir: Path, steps: int, processes: int) -> list[subprocess.Popen]:
    """Starts the job's processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.imagenet", "--preset=smoke"]
    command += [f"--workdir={workdir}", f"--config.num_steps={steps}", "--config.network=c8 f10"]
    command += ["--config.checkpoint_every=20", f"--config.evaluate_every={steps // 4}"]
    command += ["--config.keep_checkpoints=2"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2" if processes > 1 else "1"}
    environment["PYTHONPATH"] = str(ROOT)
    return [
        subprocess.Popen(
            command
            + (
                [
                    f"--coordinator_address=127.0.0.1:{port}",
                    f"--num_processes={processes}",
                    f"--process_id={index}",
                ]
                if processes > 1
                else []
            ),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def time_calm(workdir: Path, steps: int, processes: int) -> tuple[float, float]:
    """Seconds until the first checkpoint, and from there to the end, of an undisturbed run."""
    began = time.monotonic()
    running = start(workdir, steps, processes)
    while not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        if running[0].poll() is not None:
            break
        time.sleep(0.05)
    first = time.monotonic() - began
    finish(running)
    return first, time.monotonic() - began - first


def finish(running: list[subprocess.Popen]) -> None:
    """Waits for an undisturbed end."""
    for process in running:
        _, said = process.communicate(timeout=_PATIENCE)
        if process.returncode:
            raise SystemExit(f"status {process.returncode}: {said[-500:]}")


def result(workdir: Path) -> list[str]:
    """What the run has measured, and the digest of what it has trained."""
    return sorted((workdir / "metrics.jsonl").read_text().splitlines())


def torment(
    workdir: Path, steps: int, processes: int, kills: int, longest: float, dice: random.Random
) -> Outcome:
    """Kills the job so often, then lets it finish."""
    done = before = saving = 0
    slowest = 0.0
    while done < kills:
        running = start(workdir, steps, processes)
        victim = dice.choice(running)
        try:
            victim.wait(dice.uniform(0, longest))
            raise SystemExit(f"the run ended after {done} kills: give it more --steps")
        except subprocess.TimeoutExpired:
            pass
        checkpoints = workdir / "checkpoints"
        names = [p.name for p in checkpoints.iterdir()] if checkpoints.is_dir() else []
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        done += 1
        before += not any(name.isdigit() for name in names)
        saving += any("saving" in name for name in names)
        for process in running:
            _, said = process.communicate(timeout=_PATIENCE)
            if process is not victim:
                slowest = max(slowest, time.monotonic() - killed)
                if process.returncode not in (2, _LOST) or "Traceback" in said:
                    raise SystemExit(f"status {process.returncode}: {said[-500:]}")
        print(f"{processes} process(es), kill {done}: checkpoints {sorted(names)}", flush=True)
    finish(start(workdir, steps, processes))
    return Outcome(done, before, saving, slowest, result(workdir))


def main() -> None:
    """Prints the table; --write keeps it for the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--steps", type=int, default=6400, help="of a run, a multiple of 320")
    parser.add_argument("--write", action="store_true", help=f"also write {TABLE.name}")
    arguments = parser.parse_args()
    dice = random.Random(0)
    lines = [
        "| job | SIGKILLs | before the first checkpoint | while one was written | "
        "other process ended within | final bits |",
        "|---|---|---|---|---|---|",
    ]
    for processes, name in ((1, "one process"), (2, "two processes, one of them killed")):
        with tempfile.TemporaryDirectory() as folder:
            steps = arguments.steps // processes**2  # a step of two takes longer
            first, rest = time_calm(Path(folder, "calm"), steps, processes)
            # Kills uniform over 0 ... first + d let (d²/2)/(first + d) seconds of training pass.
            each = _SHARE * rest / arguments.kills
            longest = first + each + math.sqrt(each**2 + 2 * first * each)
            calm = result(Path(folder, "calm"))
            found = torment(Path(folder, "storm"), steps, processes, arguments.kills, longest, dice)
        digest = next(json.loads(line)["digest"] for line in calm if "digest" in line)
        same = f"identical ({digest[:12]}…)" if found.result == calm else "**different**"
        wait = f"{found.wait:.1f} s" if processes > 1 else "–"
        lines.append(
            f"| {name} | {found.kills} | {found.before} | {found.saving} | {wait} | {same} |"
        )
    lines += [
        "",
        "Measured with `python -m benchmarks.durability`, 2 CPU cores. A process whose peer is",
        "killed before the two have met waits a minute for it.",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        atomic.write_bytes(TABLE, f"{text}\n".encode())


if __name__ == "__main__":
    main()
