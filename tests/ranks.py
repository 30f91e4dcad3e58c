"""Runs a function on several ranks: real processes, one new gloo group per call, loopback only.

The processes stay warm between calls, so a call costs tens of milliseconds; those of a call that failed are replaced.
They are forked from a server that has torch imported and end with the process that called. Functions and arguments
are pickled: a function must be found under its name in an importable module.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


class RankError(AssertionError):
    """A rank raised, ended early or missed the deadline; the message holds the rank and its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 30) -> list[Any]:
    """Calls `function(rank, *args)` on every rank of a new process group.

    Each rank has one thread and a generator seeded with its rank.

    Args:
        world_size: Number of ranks.
        function: Module-level function; its result has to pickle.
        *args: Handed to every rank.
        timeout_s: For the whole call; the group's collectives time out a little earlier.

    Returns:
        The ranks' results, by rank.

    Raises:
        RankError: With the traceback of the rank that failed first; its own exception, where it pickles, is the cause.
    """
    deadline = time.monotonic() + timeout_s
    ranks = [_idle.pop() if _idle else _start() for _ in range(world_size)]
    try:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            for rank, worker in enumerate(ranks):
                group = _Group(
                    rank=rank, world_size=world_size, store=str(Path(folder, "store")), timeout_s=timeout_s * 0.8
                )
                worker.connection.send_bytes(pickle.dumps((sys.path, group)))
                worker.connection.send_bytes(pickle.dumps((function, args)))
            results = _collect(ranks, deadline)
            for worker in ranks:  # only now: a peer may have needed a rank that was done
                worker.connection.send_bytes(_LEAVE_GROUP)
    except BaseException:
        for worker in ranks:
            worker.kill()
        raise
    _idle.extend(ranks)
    return results


@dataclass(frozen=True, kw_only=True)
class _Group:
    rank: int
    world_size: int
    store: str
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class _Failure:
    at: float  # time.monotonic(), which the processes of one host share
    traceback: str
    exception: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(timeout=10)


_LEAVE_GROUP = b"leave"
_idle: list[_Worker] = []
_processes = multiprocessing.get_context("forkserver")
# The last two are imported by torch itself, by the first backward and the first optimizer, and take over a second.
_processes.set_forkserver_preload(
    [
        "pytest",
        "torch",
        "torch.distributed",
        "torch.nn.parallel",
        "torch.fx.experimental.symbolic_shapes",
        "torch._dynamo",
    ]
)


def _start() -> _Worker:
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process=process, connection=ours)


def _collect(ranks: list[_Worker], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    waiting = {worker.connection: rank for rank, worker in enumerate(ranks)}
    while waiting and not failures:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(ranks)} did not finish before the deadline")
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                outcome = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                process = ranks[rank].process
                process.join(timeout=10)
                outcome = _Failure(at=time.monotonic(), traceback=f"ended with exit code {process.exitcode}")
            if isinstance(outcome, _Failure):
                failures[rank] = outcome
            else:
                results[rank] = outcome
    if failures:
        # The others only follow: a collective fails once a peer is gone.
        rank, first = min(failures.items(), key=lambda item: item[1].at)
        raise RankError(f"rank {rank} of {len(ranks)}: {first.traceback}") from first.exception
    return [results[rank] for rank in range(len(ranks))]


def _work(connection: Connection) -> None:
    """Serves calls until the caller hangs up, or until one fails."""
    _die_with_parent()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        while True:
            sys.path[:], group = pickle.loads(connection.recv_bytes())
            call = connection.recv_bytes()
            try:
                connection.send_bytes(pickle.dumps(_run(group, call)))
            except BaseException as error:
                connection.send_bytes(_dump_failure(error))
                return
            connection.recv_bytes()  # _LEAVE_GROUP
            if dist.is_initialized():
                dist.destroy_process_group()
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
    finally:
        # Without a farewell: peers notice a rank that is gone at once, while leaving a group may wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(group: _Group, call: bytes) -> Any:
    import torch
    import torch.distributed as dist

    function, args = pickle.loads(call)
    torch.manual_seed(group.rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(group.store, group.world_size),  # a TCPStore would listen on every interface
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=group.timeout_s),
    )
    return function(group.rank, *args)


def _dump_failure(error: BaseException) -> bytes:
    at, text = time.monotonic(), "".join(traceback.format_exception(error))
    try:
        return pickle.dumps(_Failure(at=at, traceback=text, exception=error))
    except Exception:  # an exception that does not pickle still has a traceback
        return pickle.dumps(_Failure(at=at, traceback=text))


def _die_with_parent() -> None:
    """The fork server ends with the test process; the ranks end with the fork server, whatever they are doing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
