"""Tests of bn_research.training.preemption: alone, and in a job of two real processes."""

import json
import os
import signal
import time

import pytest
from counting import finish, start, start_job, wait_for_step

from bn_research.training.preemption import Preemption, Stopped


def test_sigterm_is_noted_as_often_as_it_comes_and_given_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ours"))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(2) and preemption.requested(3)
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.requested(4)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["ours"]
        with Preemption() as preemption:  # another run of the same process starts afresh
            assert not preemption.requested(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_once_stopped_more_of_it_does_no_harm():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped), Preemption():
            raise Stopped(3)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigint_stays_keyboard_interrupt():
    # Ignored where the tests run in a shell's background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Preemption():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopped_tells_the_step():
    assert str(Stopped(30)) == "stopped by SIGTERM at step 30, saved" and Stopped(30).step == 30


def test_sigterm_to_one_process_stops_all_at_one_step_and_the_run_goes_on(tmp_path):
    """The run is ended by one process: a run may go on with other processes than it began with."""
    workdir = tmp_path / "run"
    flags = ["--config.steps=40", "--config.pause=0.2"]
    processes = start_job(workdir, *flags)
    try:
        wait_for_step(workdir, 3, processes)
        processes[1].send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not (workdir / "saving").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in processes * 2:  # more of them, while process 0 saves
            process.send_signal(signal.SIGTERM)
    finally:
        ended = [finish(process) for process in processes]
    step, total = json.loads((workdir / "saved.json").read_text())
    assert 3 <= step < 40 and total == 6 * step
    assert [(workdir / f"step{index}").read_text() for index in range(2)] == [f"{step}"] * 2
    assert [status for status, _, _ in ended] == [4, 4]
    assert [out for _, out, _ in ended] == ["", ""]
    assert [err for _, _, err in ended] == [
        f"counting: stopped by SIGTERM at step {step}, saved; start again with the same command "
        "to go on\n",
        "",
    ]
    assert not (workdir / "results.json").exists()

    status, _, err = finish(start(workdir, *flags, devices=4))
    assert (status, err) == (0, "")
    measured = json.loads((workdir / "results.json").read_text())["claims"][0]["measured"]
    assert measured == {"total": 240.0, "devices": 4}
