"""Tests of bn_research.training.processes and native_output, with real processes on loopback."""

import json
import os
import shutil
import signal
import socket
import threading
import time

import pytest
from counting import finish, free_port, start, start_job, wait_for_step

from bn_research.training.processes import ProcessError, current, join

SECONDS_TO_NOTICE = 10.0  # a killed process; measured: under 0.5 s on two cores


def results_of(workdir):
    return json.loads((workdir / "results.json").read_text())["claims"][0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = finish(start(workdir, devices=4))
    assert (status, err) == (0, "")
    return results_of(workdir)


def assert_equals_one_process(workdir, ended, alone):
    """Both ended well, one wrote and printed, and the results are those of one process."""
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "".join(err for _, _, err in ended) == ""
    assert ended[1][1] == "" and "[Gloo]" not in ended[0][1]
    assert ended[0][1].rstrip().endswith(f"report: {workdir / 'report.html'}")
    assert results_of(workdir) == alone
    assert alone["measured"] == {"total": 24.0, "devices": 4}  # 4 steps of 0 + 1 + 2 + 3


def test_two_processes_equal_one(tmp_path, alone):
    """Behind a proxy, which JAX's service would ask even for this machine."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), f"http://127.0.0.1:{free_port()}")
    ended = [finish(process) for process in start_job(tmp_path / "run", **proxies)]
    assert_equals_one_process(tmp_path / "run", ended, alone)


def test_slurm_is_detected(tmp_path, alone):
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    processes = [
        start(tmp_path / "run", "--multiprocess", SLURM_PROCID=index, SLURM_LOCALID=index, **slurm)
        for index in ("0", "1")
    ]
    assert_equals_one_process(tmp_path / "run", [finish(process) for process in processes], alone)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_open_mpi_is_detected(tmp_path, alone):
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    port = str(free_port())
    process = start(tmp_path / "run", "--multiprocess", launcher=mpirun, JAX_COORDINATOR_PORT=port)
    status, out, err = finish(process)
    assert status == 0, err
    assert out.count("report: ") == 1 and results_of(tmp_path / "run") == alone


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("fault", ["collective", "host"])
def test_when_one_is_killed_the_other_ends_and_the_job_can_be_restarted(
    tmp_path, killed, fault, alone
):
    workdir = tmp_path / "run"
    flags = [f"--config.fault={fault}"]
    processes = start_job(workdir, *flags)
    try:
        wait_for_step(workdir, 2, processes)
        time.sleep(0.2)
        processes[killed].kill()
        start = time.monotonic()
        status, out, err = finish(processes[1 - killed], SECONDS_TO_NOTICE)
        assert time.monotonic() - start < SECONDS_TO_NOTICE
    finally:
        for process in processes:
            finish(process)
    assert (status, out) == (5, "")
    assert err == (
        f"counting: process {killed} of 2 was lost; start the job again with the same command to "
        "go on\n"
    )
    if (fault, killed) == ("collective", 0):  # the harder to end: JAX's service died as well
        (workdir / "saved.json").write_text("[2, 12.0]")  # as a checkpoint of step 2 would have
        again = [finish(process) for process in start_job(workdir, *flags)]
        assert_equals_one_process(workdir, again, alone)


def test_an_error_of_one_process_ends_all_and_is_shown_once(tmp_path):
    ended = [finish(p) for p in start_job(tmp_path / "run", "--config.fault=error")]
    assert [status for status, _, _ in ended] == [1, 1]
    assert "Traceback" in ended[1][2] and r"a mistake\nof ours" in ended[1][2]
    assert ended[0][1:] == ("", "counting: process 1 ended with status 1: see there\n")


@pytest.mark.parametrize(("flag", "said"), [("--config.steps=0", "steps=0"), ("", "in use by")])
def test_bad_input_that_process_0_finds_ends_all(tmp_path, flag, said):
    workdir = tmp_path / "run"
    if not flag:
        holder = start(workdir, "--config.pause=100")
        wait_for_step(workdir, 1, [holder])
        flag = "--config.pause=100"
    ended = [finish(process) for process in start_job(workdir, flag)]
    if said == "in use by":
        said = f"in use by process {holder.pid} on {socket.gethostname()}"
        holder.kill()
        finish(holder)
    assert [status for status, _, _ in ended] == [2, 2]
    assert [out for _, out, _ in ended] == ["", ""]
    assert said in ended[0][2] and ended[0][2].count("\n") == 1
    assert ended[1][2] == "counting: process 0 ended with status 2: see there\n"


def test_another_config_in_one_process_is_refused(tmp_path):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    processes = [
        start(
            tmp_path / "run",
            address,
            "--num_processes=2",
            f"--process_id={index}",
            f"--config.steps={3 + index}",
        )
        for index in range(2)
    ]
    ended = [finish(process) for process in processes]
    assert [status for status, _, _ in ended] == [2, 2]
    assert "steps (there 3, now 4)" in ended[1][2] and ended[1][2].count("\n") == 1
    assert ended[0][2] == "counting: process 1 ended with status 2: see there\n"


# What `join` refuses, it refuses before anything of JAX starts: so threads may play the processes.


def refusals(*processes, timeout=20.0, port=None):
    """What the processes (num_processes, process_id), started at once, are told, and how soon."""
    address = f"127.0.0.1:{port or free_port()}"
    told: list = [None] * len(processes)

    def play(place, count, index):
        try:
            join(address, count, index, timeout=timeout)
        except ProcessError as error:
            told[place] = str(error)

    start = time.monotonic()
    threads = [
        threading.Thread(target=play, args=(place, *process), daemon=True)
        for place, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert current() is None and all(line and "\n" not in line for line in told)
    return told, time.monotonic() - start


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_processes_that_disagree_on_their_number_are_told_at_once(counts):
    told, seconds = refusals((counts[0], 0), (counts[1], 1))
    assert told[0] == told[1] and seconds < 5
    assert told[0] == (
        f"process 1 was started with num_processes={counts[1]}, process 0 with "
        f"num_processes={counts[0]}: give all the same"
    )


def test_a_process_id_given_twice():
    told, seconds = refusals((3, 0), (3, 1), (3, 1))
    assert set(told) == {"two processes came with process_id=1: give each its own"}
    assert seconds < 5


def test_a_process_0_too_many():
    with socket.create_server(("", 0)) as server:
        told, _ = refusals((2, 0), port=server.getsockname()[1])
    assert "cannot listen on the port" in told[0] and "in use)" in told[0]


def test_too_few_processes():
    told, seconds = refusals((3, 0), (3, 2), timeout=1.0)
    assert told[0] == told[1] and "only 2 came" in told[0] and "(process_id 1 did not)" in told[0]
    assert 1 <= seconds < 5


def test_a_coordinator_out_of_reach():
    told, seconds = refusals((2, 1), timeout=1.0)
    assert "cannot be reached within 1 s" in told[0] and "refused" in told[0]
    assert 1 <= seconds < 5


def test_another_program_at_the_port():
    def answer():
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        told, _ = refusals((2, 1), timeout=1.0, port=server.getsockname()[1])
    assert "it is another program" in told[0]


def test_strangers_at_the_port_are_no_obstacle():
    port = free_port()

    def knock():
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\xff\n", b""):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as connection:
                        connection.sendall(content)
                    break
                except OSError:
                    time.sleep(0.05)

    thread = threading.Thread(target=knock)
    thread.start()
    told, _ = refusals((2, 0), timeout=2.0, port=port)
    thread.join()
    assert "only 1 came" in told[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("localhost:1", 2, None), "give process_id too"),
        ((None, 2, None), "give coordinator_address and process_id too"),
        (("localhost:1", 2, 2), "between 0 and 1"),
        (("localhost:1", 2, -1), "between 0 and 1"),
        (("localhost:1", 0, 0), "at least 1"),
        (("localhost", 2, 0), "HOST:PORT"),
        ((":1234", 2, 1), "HOST:PORT"),
        (("localhost:99999", 2, 0), "HOST:PORT"),
        ((None, None, None), "no job of several processes is to be seen"),
    ],
)
def test_bad_arguments(monkeypatch, arguments, said):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERN"))]:
        monkeypatch.delenv(name)
    with pytest.raises(ProcessError, match=said):
        join(*arguments, timeout=1.0)


def test_a_broken_environment_is_told_in_one_line(monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "many\nthings")
    with pytest.raises(ProcessError, match="JAX cannot tell what job this is") as error:
        join()
    assert "\n" not in str(error.value)


def test_a_service_that_does_not_come_is_told_in_one_line(tmp_path):
    """JAX's client would abort with a page of log."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def welcome():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b'["welcome"]\n')
            connection.recv(100)

        threading.Thread(target=welcome, daemon=True).start()
        script = (
            "import os; from bn_research.training.processes import join; "
            f"join('127.0.0.1:{server.getsockname()[1]}', 2, 1, timeout=1.0, name='x')"
        )
        process = start(tmp_path, script=script)
        status, out, err = finish(process)
    assert (status, out) == (2, "")
    assert err == "x: JAX's service at the coordinator_address does not answer\n"


def test_an_abort_that_is_not_the_jobs_stays_what_it_is(tmp_path):
    script = """
import ctypes, os, sys
from bn_research.training.native_output import NativeOutput
NativeOutput(lambda held: print("held:", held, file=sys.stderr))
os.write(2, b"native words"); os.write(1, b"native chatter")
print("ours", flush=True)
ctypes.CDLL(None).abort()
"""
    status, out, err = finish(start(tmp_path, script=script))
    assert (status, out) == (-signal.SIGABRT, "ours\n")
    assert err == "held: native words\nnative words"
