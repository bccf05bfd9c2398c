"""An experiment for the tests of jobs: it adds up the numbers of all devices, step after step.

Run as a script it is one process of a job; the functions at its end start such processes.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 1
    dataset: str = "digits"
    steps: int = 4
    pause: float = 0.0  # seconds of a step
    fault: str = ""  # of process 1 in step 2, or what all do there for good


def prepare(config):
    if config.steps < 1:
        raise ValueError(f"steps={config.steps} is not allowed: at least 1")
    return None


def measure(config, data, path, *, parallel):
    import jax
    import numpy as np

    from bn_research.training.preemption import Preemption, Stopped

    index, count = jax.process_index(), jax.local_device_count()
    numbers = np.arange(count, dtype=np.float32) + index * count
    add = jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i")
    saved = path / "saved.json"
    step, total = json.loads(saved.read_text()) if saved.exists() else (0, 0.0)
    with Preemption() as preemption:
        while step < config.steps:
            total += float(add(numbers)[0])
            step += 1
            if step == 2 and config.fault == "error" and index == 1:
                raise KeyError("a mistake\nof ours")
            (path / f"step{index}").write_text(f"{step}")
            while step == 2 and config.fault == "collective":
                add(numbers).block_until_ready()
            while step == 2 and config.fault == "host":
                sum(range(100_000))
            time.sleep(config.pause)
            if preemption.requested(step):
                if index == 0:
                    (path / "saving").touch()
                    time.sleep(config.pause)
                    saved.write_text(json.dumps([step, total]))
                raise Stopped(step)
    return {"total": total, "devices": jax.device_count()}, parallel


def judge(config, records):
    from bn_research.claims.finding import REPRODUCED, Finding

    measured, parallel = records
    return [Finding(CLAIMS[0], measured, None, REPRODUCED, note=parallel)]


def draw(config, records, folder):
    return []


def start(workdir, *flags, devices=2, launcher=(), script=None, **environment):
    """A process of the experiment, or of another script, with that many devices."""
    what = [__file__, f"--workdir={workdir}", *flags] if script is None else ["-c", script]
    return subprocess.Popen(
        [*launcher, sys.executable, *what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": str(devices),
            **environment,
        },
    )


def start_job(workdir, *flags, count=2, **environment):
    """The processes of a job on this machine."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            workdir,
            f"--coordinator_address={address}",
            f"--num_processes={count}",
            f"--process_id={index}",
            *flags,
            **environment,
        )
        for index in range(count)
    ]


def finish(process, timeout=60):
    """Exit status, stdout and stderr of a process; it is killed after the timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for_step(workdir, step, processes, timeout=60):
    """Waits until every process has come to the step."""
    deadline = time.monotonic() + timeout
    paths = [workdir / f"step{index}" for index in range(len(processes))]
    while not all(path.exists() and int(path.read_text() or 0) >= step for path in paths):
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, finish(process)
        time.sleep(0.02)


if __name__ == "__main__":
    from bn_research.claims.claim import Claim
    from bn_research.lab.experiment import Experiment
    from bn_research.lab.launch import main

    CLAIM = Claim("sum-is-known", "The sum is known", "Gauss", "any", "n(n-1)/2 a step")
    CLAIMS = (CLAIM,)
    sys.exit(main(Experiment(__name__, {"quick": Config()}, distributed=True)))
