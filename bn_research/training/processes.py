"""Several processes as one job: how they find each other, agree, and end together.

`jax.distributed` joins the processes, but an address that nobody answers, two processes that
disagree on their number, and a process that dies all end in `abort()` with a page of C++ log, some
after minutes. So process 0 first listens on the coordinator's port itself: the others say who they
are, and a job that cannot be is refused in one line. These connections stay open beside JAX's
service. A process that dies closes its own, whatever the rest were doing, and they all end.

How soon a lost process ends the others: a killed one at once; one whose machine or network is gone
after 30 s (TCP keepalive); one that is frozen after 60 s (heartbeats of JAX's service).
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from bn_research.training.native_output import NativeOutput

LOST = 5  # exit status: another process of the job was lost, or a collective failed
_BAD_INPUT = 2
_HEARTBEAT_SECONDS = 60
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_SECONDS_FOR_NEWS = 2.0  # within which a loss is heard of, once a collective has failed of it
_COLLECTIVE = re.compile(r"gloo|nccl|rccl|coordination|distributed service", re.IGNORECASE)
_TOGETHER = ("coordinator_address", "num_processes", "process_id")


class ProcessError(ValueError):
    """Processes that cannot be one job; the message is one line for people."""

    def __init__(self, message: object) -> None:
        """Keeps the message on one line, whatever the error of the system it quotes."""
        super().__init__(" ".join(str(message).split()))


class _Peer:
    """A connection to another process; messages are JSON lists, one a line."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in _KEEPALIVE.items():
            if hasattr(socket, name):  # macOS has not all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self._connection = connection
        self._reader = connection.makefile("rb")
        self._lock = threading.Lock()

    def say(self, *message: Any) -> None:
        """Sends a message; to a process that is gone, nothing."""
        with self._lock, contextlib.suppress(OSError):  # whoever listens hears that it is gone
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, timeout: float | None = None) -> list[Any] | None:
        """The next message; None when it is gone, silent too long, or speaks otherwise."""
        try:
            self._connection.settimeout(timeout)
            message = json.loads(self._reader.readline(4096))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, list) and message else None

    def close(self) -> None:
        """Ends the connection; whoever listens to it hears so."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Job:
    """This process's part in a job that it has joined; every process must come to `end`.

    Attributes:
      index: of this process; process 0 is the one that writes.
      count: of processes.
    """

    def __init__(self, index: int, count: int, peers: dict[int, _Peer], *, name: str):
        """Listens to the peers: all others in process 0, process 0 alone in the others."""
        self.index = index
        self.count = count
        self._peers = peers
        self._prefix = f"{name}: " if name else ""
        self._votes: dict[int, tuple[str, int]] = {}
        self._agreed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._last_words = threading.Lock()
        self._joining = True
        self._ending = False
        self._output = NativeOutput(self._aborted)
        self._listeners = [
            threading.Thread(target=self._listen, args=(index, peer), daemon=True)
            for index, peer in peers.items()
        ]
        for listener in self._listeners:
            listener.start()

    def agree(self, name: str, value: int = 0) -> int:
        """The largest value of any process, once all have come here with the same name.

        Waits as long as it takes: a process that is lost meanwhile ends the job.
        """
        if self.index == 0:
            self._vote(0, name, value)
        else:
            self._peers[0].say("vote", name, value)
        return self._agreed.get()

    def barrier(self, name: str) -> None:
        """Waits until all processes have come here."""
        self.agree(name)

    def end(self, status: int = 0) -> int:
        """Leaves the job when its work is done; returns the largest status of any process."""
        import jax

        status = self.agree("end", status)
        jax.distributed.shutdown()
        self._output.flush()
        self._close()
        return status

    def fail(self, error: BaseException, status: int | None = None) -> NoReturn:
        """Ends every process of the job, because this one cannot go on.

        Args:
          error: why. If it came of another process's loss, that is what is reported.
          status: for an error that is told in one line. Others are shown with a traceback and
            status 1, except for failed collectives: one line and status 5.
        """
        collective = status is None and _COLLECTIVE.search(f"{type(error).__name__}: {error}")
        # A loss breaks collectives and files in many ways before it is heard of. And where all
        # processes fail of one cause, process 0 is the one to tell of it.
        time.sleep(_SECONDS_FOR_NEWS if collective or self.index else 0.2)
        line, traced = None, False
        if collective:
            status, line = LOST, f"a collective failed ({_first_words(error)}); start the job again"
        elif status is not None:
            line = " ".join(str(error).split())
        elif isinstance(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
        else:
            status, traced = 1, True
        self._output.flush()
        if traced:
            traceback.print_exception(error)
        self._leave(self.index, status, line)

    def _listen(self, index: int, peer: _Peer) -> None:
        while (message := peer.hear()) is not None:
            match message:
                case ["vote", str(name), int(value)]:
                    self._vote(index, name, value)
                case ["agreed", name, value]:
                    self._ending = name == "end"
                    self._agreed.put(value)
                case ["left", who, status]:
                    line = f"process {who} ended with status {status}: see there"
                    self._leave(who, status, self._loss(who) if status == LOST else line)
        if not self._ending:
            self._leave(index, LOST, self._loss(index))

    def _loss(self, who: int) -> str:
        return (
            f"process {who} of {self.count} was lost; start the job again with the same command "
            "to go on"
        )

    def _vote(self, index: int, name: str, value: int) -> None:
        with self._lock:
            self._votes[index] = (name, value)
            if len(self._votes) < self.count:
                return
            votes = dict(self._votes)
            self._votes.clear()
        different = {other for other, _ in votes.values()}
        if len(different) > 1:
            where = ", ".join(f"process {who} at {at!r}" for who, (at, _) in sorted(votes.items()))
            self._leave(0, LOST, f"the processes are not in step: {where}")
        self._ending = name == "end"
        agreed = max(value for _, value in votes.values())
        for peer in self._peers.values():
            peer.say("agreed", name, agreed)
        self._agreed.put(agreed)

    def _leave(self, who: int, status: int, line: str | None) -> NoReturn:
        """Ends this process now, and tells the others of process `who` and its status."""
        if not self._last_words.acquire(blocking=False):
            while True:  # another thread is at it
                time.sleep(1)
        self._ending = True
        for index, peer in self._peers.items():
            if index != who:
                peer.say("left", who, status)
        if line is not None:
            self._output.write(f"{self._prefix}{line}\n")
        # A thread of its own: the main thread may hold the stream's lock for good.
        flusher = threading.Thread(target=_flush, daemon=True)
        flusher.start()
        flusher.join(1)
        # JAX's service lives in process 0 and takes the others with it: let them read first.
        deadline = time.monotonic() + 2
        for listener in self._listeners if self.index == 0 else ():
            if listener is not threading.current_thread():
                listener.join(max(0.0, deadline - time.monotonic()))
        # Neither JAX's barrier at exit nor the main thread, stuck in a collective, would end.
        os._exit(status)

    def _aborted(self, log: str) -> None:
        """Called where native code aborts; returns where that has nothing to do with the job."""
        time.sleep(_SECONDS_FOR_NEWS)  # whoever hears of a loss tells it better
        if not _COLLECTIVE.search(log):
            return
        if self._joining:
            self._leave(
                self.index, _BAD_INPUT, "JAX's service at the coordinator_address does not answer"
            )
        found = re.search(r"[Tt]ask (\d+) heartbeat|unhealthy[^\n]*\n(\d+)", log)
        who = int(found[1] or found[2]) if found else 0
        self._leave(who, LOST, self._loss(who))

    def _close(self) -> None:
        global _job
        _job = None
        for peer in self._peers.values():
            peer.close()
        for listener in self._listeners:
            listener.join(1)


_job: Job | None = None


def current() -> Job | None:
    """The job that this process has joined and not yet ended; None where it works alone."""
    return _job


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60.0,
    name: str = "",
) -> Job:
    """Makes this process one of a job; call it before anything touches a device.

    From here on Python's stdout and stderr are apart from those of native code: what that writes to
    stdout is dropped, and its stderr comes late.

    Args:
      coordinator_address: HOST:PORT on which process 0 listens. With neither this nor the next
        two, JAX detects the job: SLURM, Open MPI, mpi4py, Kubernetes, Cloud TPU.
      num_processes: of the job.
      process_id: of this process, from 0.
      timeout: seconds to wait for the other processes.
      name: of the program, which begins the line that reports a loss.

    Raises:
      ProcessError: no job of these processes comes about within the timeout; the other processes
        that have come are told.
    """
    global _job
    import jax

    given = (coordinator_address, num_processes, process_id)
    missing = [key for key, value in zip(_TOGETHER, given, strict=True) if value is None]
    devices = None
    if len(missing) == len(_TOGETHER):
        coordinator_address, num_processes, process_id, devices = _detect(timeout)
    elif missing:
        raise ProcessError(f"{', '.join(_TOGETHER)} go together: give {' and '.join(missing)} too")
    assert coordinator_address is not None and num_processes is not None and process_id is not None
    if num_processes < 1:
        raise ProcessError(f"num_processes={num_processes} is not allowed: it must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ProcessError(
            f"process_id={process_id} is not allowed: with num_processes={num_processes} it must "
            f"lie between 0 and {num_processes - 1}"
        )
    host, _, port = coordinator_address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ProcessError(
            f"coordinator_address={coordinator_address!r} is not allowed: give HOST:PORT, where "
            "process 0 listens"
        )
    if process_id == 0:
        peers = _gather(coordinator_address, int(port), num_processes, timeout)
    else:
        address = (host.strip("[]"), int(port))
        peers = {0: _reach(coordinator_address, address, num_processes, process_id, timeout)}
    job = Job(process_id, num_processes, peers, name=name)
    # gRPC would ask a proxy even for its own host.
    exempt = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
    os.environ["no_grpc_proxy"] = ",".join(filter(None, [exempt, host.strip("[]")]))
    jax.config.update("jax_check_proxy_envs", False)
    # It would take SIGTERM for good; see `preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=devices,
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
        # Where collectives first connect, Gloo gives up on a process that comes 30 s after another,
        # as one may that compiles or reads more. Here all come at once.
        connect = jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")
        connect(np.zeros(jax.local_device_count())).block_until_ready()
    except (RuntimeError, ValueError) as error:
        job.fail(ProcessError(f"JAX cannot join the processes: {error}"), _BAD_INPUT)
    job._joining = False
    _job = job
    return job


def _detect(timeout: float) -> tuple[str, int, int, Sequence[int] | None]:
    """Address, count, index and devices of this process as JAX's cluster environments tell them."""
    from jax._src import clusters  # `initialize` detects by the same, but then aborts by itself

    # Open MPI from version 5 tells nothing but through mpi4py, which JAX does not try by itself.
    by_mpi4py = (
        "OMPI_COMM_WORLD_SIZE" in os.environ
        and "OMPI_MCA_orte_hnp_uri" not in os.environ
        and importlib.util.find_spec("mpi4py") is not None
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            address, count, index, devices = (
                clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    os.environ.get("JAX_COORDINATOR_ADDRESS"),
                    None,
                    None,
                    None,
                    "mpi4py" if by_mpi4py else None,
                    int(timeout),
                )
            )
        except Exception as error:  # of Kubernetes's client, sockets, the environment's variables
            raise ProcessError(f"JAX cannot tell what job this is: {error!r}") from error
    if address is None or count is None or index is None:
        reasons = "".join(f" ({warning.message})" for warning in said)
        raise ProcessError(
            "no job of several processes is to be seen: JAX looks for SLURM, Open MPI, Kubernetes "
            f"and Cloud TPU{reasons}; give {', '.join(_TOGETHER)} instead"
        )
    return address, count, index, devices


def _gather(address: str, port: int, count: int, timeout: float) -> dict[int, _Peer]:
    """Process 0's connections to all others."""
    peers: dict[int, _Peer] = {}

    def refuse(reason: str) -> NoReturn:
        for peer in peers.values():
            peer.say("refused", reason)
        raise ProcessError(reason)

    deadline = time.monotonic() + timeout
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise ProcessError(
            f"process 0 cannot listen on the port of coordinator_address={address!r} "
            f"({os.strerror(error.errno or 0)}): give a free port, and process_id=0 to one process"
        ) from error
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = ", ".join(str(i) for i in range(1, count) if i not in peers)
                refuse(
                    f"of num_processes={count} only {len(peers) + 1} came to {address} within "
                    f"{timeout:g} s (process_id {absent} did not): start all, with this number"
                )
            peer = _Peer(connection)
            match peer.hear(2):
                case ["bn_research", int(theirs), int(index)]:
                    taken = index in peers
                    peers[-1 if taken else index] = peer
                    if theirs != count:
                        refuse(
                            f"process {index} was started with num_processes={theirs}, process 0 "
                            f"with num_processes={count}: give all the same"
                        )
                    if taken:
                        refuse(f"two processes came with process_id={index}: give each its own")
                case _:
                    peer.close()  # a stranger at the port
    for peer in peers.values():
        peer.say("welcome")
    return peers


def _reach(
    address: str, host_and_port: tuple[str, int], count: int, index: int, timeout: float
) -> _Peer:
    """Another process's connection to process 0."""
    deadline = time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        try:
            connection = socket.create_connection(host_and_port, max(0.1, min(5.0, remaining)))
            # Of its own ports, a host may choose the very one that it calls.
            if connection.getsockname() != connection.getpeername():
                break
            connection.close()
        except OSError as error:
            if remaining <= 0:
                raise ProcessError(
                    f"coordinator_address={address!r} cannot be reached within {timeout:g} s "
                    f"({error}): start process 0 there, or give its address"
                ) from error
        time.sleep(0.2)
    peer = _Peer(connection)
    peer.say("bn_research", count, index)
    # Process 0 may have come last, and then waits as long for others.
    match peer.hear(timeout + 5):
        case ["welcome"]:
            return peer
        case ["refused", str(reason)]:
            raise ProcessError(reason)
        case _:
            raise ProcessError(
                f"coordinator_address={address!r} answers, but not as a process 0 that waits for "
                "others: it is another program, or a job that is complete; give another port"
            )


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
