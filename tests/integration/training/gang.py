"""Runs the real entry point of a rank in real processes, each on one end of a socket pair.

The processes are forked from a server of this package's own that has imported what a rank needs and has run no torch
operation, as in production.
"""

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Self

from service.domain.journal import Metrics
from service.domain.rank_protocol import (
    Errored,
    Finished,
    FromRank,
    RankTask,
    Staged,
    StopRequest,
    parse_from_rank,
)
from service.domain.spec import JobSpec

DEADLINE_S = 40.0


@dataclass
class Rank:
    """A training process as its rank actor sees it."""

    pid: int
    channel: socket.socket
    log_path: Path
    messages: list[FromRank] = field(default_factory=list)
    ended_at: float | None = None  # time.monotonic()
    exit_status: int | None = None  # as subprocess.Popen.returncode
    received: bytes = b""

    def of(self, kind):
        return [message for message in self.messages if isinstance(message, kind)]

    def curve(self, name: str) -> list[float]:
        return [message.values[name] for message in self.of(Metrics) if name in message.values]

    @property
    def finished(self) -> Finished:
        (message,) = self.of(Finished)
        return message

    @property
    def errored(self) -> Errored:
        (message,) = self.of(Errored)
        return message

    @property
    def staged_dirs(self) -> dict[int, Path]:
        return {message.step: Path(message.directory) for message in self.of(Staged)}

    @property
    def log(self) -> str:
        return self.log_path.read_text()


class Gang:
    """The ranks of one attempt. As a context manager it leaves no process behind."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        world_size: int,
        staging_dir: Path,
        resume_dir: Path | None = None,
        collective_timeout_s: float = 30.0,
        max_file_bytes: int | None = None,
    ) -> None:
        staging_dir.mkdir(parents=True, exist_ok=True)
        self.ranks: list[Rank] = []
        self._selector = selectors.DefaultSelector()
        with socket.create_server(("127.0.0.1", 0)) as rendezvous:
            for rank in range(world_size):
                task = RankTask(
                    job_id=JOB_ID,
                    attempt=1,
                    spec=spec,
                    rank=rank,
                    world_size=world_size,
                    rendezvous_host="127.0.0.1",
                    rendezvous_port=rendezvous.getsockname()[1],
                    rendezvous_fd=rendezvous.fileno() if rank == 0 else None,
                    interface="lo",
                    num_threads=1,
                    staging_dir=str(staging_dir / "staging"),
                    resume_dir=None if resume_dir is None else str(resume_dir),
                    collective_timeout_s=collective_timeout_s,
                )
                self.ranks.append(_start(task, staging_dir / f"rank-{rank}.log", rendezvous, max_file_bytes))
                self._selector.register(self.ranks[-1].channel, selectors.EVENT_READ, self.ranks[-1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for rank in self.ranks:
            if rank.ended_at is None:
                os.kill(rank.pid, signal.SIGKILL)
        self.wait_for_the_end()

    def request_stop(self, rank: int) -> None:
        self.ranks[rank].channel.sendall(StopRequest().model_dump_json().encode() + b"\n")

    def hang_up(self, rank: int) -> None:
        """Close a rank's channel for writing, as the death of its actor does."""
        self.ranks[rank].channel.shutdown(socket.SHUT_WR)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            ready = self._selector.select(max(0.0, deadline - time.monotonic())) if self._selector.get_map() else []
            assert ready, "the condition was not met: " + "\n".join(rank.log for rank in self.ranks)
            for key, _ in ready:
                self._receive(key.data)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(message.step >= step for message in self.ranks[0].of(Metrics)))

    def wait_for_the_end(self) -> list[Rank]:
        self.wait_for(lambda: all(rank.ended_at is not None for rank in self.ranks))
        return self.ranks

    def _receive(self, rank: Rank) -> None:
        try:
            data = rank.channel.recv(1 << 16)
        except ConnectionResetError:  # it ended without having read what was sent to it
            data = b""
        if not data:
            rank.ended_at = time.monotonic()
            rank.exit_status = _ask({"wait": rank.pid})
            self._selector.unregister(rank.channel)
            rank.channel.close()
            return
        *lines, rank.received = (rank.received + data).split(b"\n")
        rank.messages += [parse_from_rank(line) for line in lines]


def run_gang(spec: JobSpec, **options) -> list[Rank]:
    """Run an attempt to its end."""
    with Gang(spec, **options) as gang:
        return gang.wait_for_the_end()


def run_job(spec: JobSpec, **options) -> Rank:
    """Run an attempt that must finish; return rank 0."""
    ranks = run_gang(spec, **options)
    for rank in ranks:
        assert rank.exit_status == 0, rank.log
    return ranks[0]


def job_spec(**overrides) -> JobSpec:
    """Return a small residual net on the digits; its settings are those of the examples, but for the overrides."""
    fields = {
        "name": "digits",
        "model": {"factory": "builtin:small-resnet", "args": {"width": 16}},
        "dataset": {"factory": "builtin:digits"},
        "optimizer": {"name": "sgd", "learning_rate": 0.05, "nesterov": True, "weight_decay": 5e-4},
        "schedule": {"warmup_steps": 5},
        "batch": {"size": 16},
        "steps": 10,
        "seed": 0,
        **overrides,
    }
    return JobSpec.model_validate(fields)


JOB_ID = "job_under_test"
MLP = {"factory": "builtin:mlp", "args": {"hidden_sizes": [32]}}


def _start(task: RankTask, log_path: Path, rendezvous: socket.socket, max_file_bytes: int | None) -> Rank:
    ours, theirs = socket.socketpair()
    with theirs, log_path.open("ab") as log:
        fds = [theirs.fileno(), log.fileno()] + ([rendezvous.fileno()] if task.rendezvous_fd is not None else [])
        pid = _ask({"task": task.model_dump_json(), "max_file_bytes": max_file_bytes}, fds)
    return Rank(pid=pid, channel=ours, log_path=log_path)


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = f"from {__name__} import _serve; _serve({theirs.fileno()})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        server = subprocess.Popen([sys.executable, "-c", command], pass_fds=[theirs.fileno()], env=environment)
    atexit.register(_stop, ours, server)
    return ours


def _stop(connection: socket.socket, server: subprocess.Popen[bytes]) -> None:
    connection.close()
    server.wait(timeout=10)


def _ask(request: dict[str, object], fds: list[int] = []) -> int:  # noqa: B006
    socket.send_fds(_server(), [json.dumps(request).encode()], fds)
    return int(_server().recv(64))


def _serve(fd: int) -> None:
    import torch._dynamo  # noqa: F401  an optimizer's constructor imports it

    import service.training.rank  # noqa: F401

    connection = socket.socket(fileno=fd)
    while True:
        data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if not data:
            return
        request = json.loads(data)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                connection.close()
                os._exit(_run(request, *fds))
            for inherited in fds:
                os.close(inherited)
        connection.send(str(answer).encode())


def _run(request, channel_fd: int, log_fd: int, rendezvous_fd: int | None = None) -> int:
    import resource

    from service.training import rank

    os.setsid()
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    if request["max_file_bytes"] is not None:  # as a full disk, for whoever is not root enough to mount one
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], resource.RLIM_INFINITY))
    task = RankTask.model_validate_json(request["task"]).model_copy(update={"rendezvous_fd": rendezvous_fd})
    status = rank.main(task.model_dump_json(), channel_fd)
    sys.stdout.flush()
    return status
