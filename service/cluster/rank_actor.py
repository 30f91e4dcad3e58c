"""The actor of one rank: it holds the rank's resources, its training process, its logs and its uploads."""

import os
import selectors
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError

from service.cluster.conversation import Conversation
from service.cluster.fork_client import ForkedProcess
from service.cluster.forkserver import RENDEZVOUS_FD, ForkRequest
from service.cluster.log_shipper import SHIP_INTERVAL_S, LogShipper, ShippingThread
from service.cluster.memory_watch import LOOK_INTERVAL_S, MemoryWatch
from service.cluster.names import NAMESPACE, node_agent_name
from service.cluster.preparation import Preparation
from service.cluster.rank_directory import RankDirectory, RankOwner
from service.cluster.rank_end import RankEnd
from service.cluster.report_sender import ReportSender
from service.domain.errors import UserCodeRefused
from service.domain.job import Checkpoint
from service.domain.ports import Launch
from service.domain.rank_protocol import RankTask, StopRequest
from service.domain.spec import STORED
from service.linux import process_state
from service.storage.checkpoints import fetch_checkpoint
from service.storage.layout import log_dir
from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter

# A dead peer's memory may take the kernel a while to tear down.
FORK_TIMEOUT_S = 30.0
AGENT_RETRY_S = 0.2
STOPPED = "T"  # by SIGSTOP; a process under a debugger shows another letter


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a rank landed.

    Attributes:
        node_id: of the node.
        address: by which its peers know that node.
        rendezvous_port: where it listens for them; rank 0 only.
    """

    node_id: str
    address: str
    rendezvous_port: int | None


# Its run, one of the calls that prepare, stop and kill, and the one that lasts as long as it does.
RANK_OPTIONS: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 4}


class RankActor:
    """Runs one training process after another, each for a rank of an attempt.

    The next may be prepared once ``run`` has returned what is clear: then nothing is left of the one before.
    """

    def __init__(self) -> None:
        self._address: str = ray.util.get_node_ip_address()
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._attempt: tuple[str, int] | None = None
        self._process: ForkedProcess | None = None

    def until_dead(self) -> None:
        """Never return; so whoever has asked learns of this actor's death."""
        threading.Event().wait()

    def prepare(self, launch: Launch, rank: int, supervisor: Any) -> RankPlace:  # noqa: ANN401 - Ray's handles are untyped
        """Fetch to this node what the job brings, before any rank waits for another; rank 0 listens for the others.

        It listens on the address that they know this node by, and on no other.

        Args:
            launch: the attempt.
            rank: which rank of it.
            supervisor: handle of the actor that takes the reports.

        Raises:
            UserCodeRefused: it cannot be used; the rank's log, in run storage by then, has more.
            ServiceError: it is not as it was uploaded, or this node does not see the service's run storage.
            OSError: it could not be fetched or installed this time; likewise.
        """
        self._launch = launch
        self._rank = rank
        self._supervisor = supervisor
        self._store = ObjectStore(launch.storage_url)
        self._rendezvous: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._process = None
        self._preparation: Preparation | None = None
        self._killed_in_state: str | None = None
        self._attempt = (launch.job_id, launch.attempt)
        self._store.check_identity(launch.storage_id)
        self._work_dir = Path(self._find_forkserver()[1])
        self._directory: RankDirectory | None = RankDirectory(self._work_dir, RankOwner.of(launch, rank))
        directory = log_dir(launch.job_id, launch.attempt, rank)
        max_bytes = launch.max_log_bytes
        segments = SegmentWriter(self._store, directory, max_bytes=max_bytes)
        self._shipper = LogShipper(self._log_path, segments, max_bytes=max_bytes)
        try:
            with open(os.open(self._log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
                self._preparation = Preparation.fetch(self._launch, self._store, self._work_dir / "cache", log)
        except (UserCodeRefused, OSError):
            self._shipper.ship()
            raise
        if self._rank == 0:
            self._rendezvous = socket.create_server((self._address, 0), backlog=1024)
        return RankPlace(
            node_id=self._node_id,
            address=self._address,
            rendezvous_port=int(self._rendezvous.getsockname()[1]) if self._rendezvous else None,
        )

    def start(self, rendezvous_host: str, rendezvous_port: int, resume_from: Checkpoint | None) -> int:
        """Start the training process, once every rank has been prepared.

        Args:
            rendezvous_host: address of rank 0.
            rendezvous_port: where rank 0 listens.
            resume_from: checkpoint to continue from.

        Returns:
            Its process id.
        """
        assert self._preparation is not None
        assert self._directory is not None
        socket_name, _ = self._find_forkserver()  # the one of before may have been replaced since
        resume_dir = None
        if resume_from is not None:
            resume_dir = fetch_checkpoint(self._store, resume_from, self._work_dir / "checkpoints")
        spec = self._launch.spec
        brought = self._preparation
        fields = {
            "job_id": self._launch.job_id,
            "attempt": self._launch.attempt,
            "spec": spec,
            "rank": self._rank,
            "world_size": len(self._launch.node_ids),
            "rendezvous_host": rendezvous_host,
            "rendezvous_port": rendezvous_port,
            "rendezvous_fd": RENDEZVOUS_FD if self._rendezvous else None,
            "interface": _interface_of(self._address),
            "num_threads": max(1, int(spec.resources.cpus_per_rank)),
            "staging_dir": str(self._directory.path / "staging"),
            "resume_dir": None if resume_dir is None else str(resume_dir),
            "resume_job_id": None if resume_from is None else resume_from.job_id,
            "code_dir": None if brought.code_dir is None else str(brought.code_dir),
            "packages_dir": None if brought.packages_dir is None else str(brought.packages_dir),
            "uploads": {sha256: str(path) for sha256, path in brought.uploads.items()},
            "collective_timeout_s": self._launch.collective_timeout_s,
        }
        task = RankTask.model_validate(fields, context=STORED)  # it was accepted when it was submitted
        gpu_ids = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)}
        if brought.code_dir is not None:
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the directory is shared, and compared with its hashes
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            descriptors = [theirs.fileno(), *([self._rendezvous.fileno()] if self._rendezvous else [])]
            self._process = ForkedProcess(
                socket_name=socket_name,
                request=ForkRequest(
                    job_id=self._launch.job_id,
                    attempt=self._launch.attempt,
                    rank=self._rank,
                    devices=tuple(f"gpu:{gpu_id}" for gpu_id in gpu_ids),
                    environment=environment,
                    log_path=str(self._log_path),
                ),
                task_json=task.model_dump_json(),
                descriptors=descriptors,
                timeout_s=FORK_TIMEOUT_S,
            )
        if self._rendezvous:
            self._rendezvous.close()  # the process has its own copy
        return self._process.pid

    @property
    def _log_path(self) -> Path:
        assert self._directory is not None
        return self._directory.log_path

    def _find_forkserver(self) -> tuple[str, str]:
        """Return the socket name of this node's forkserver and its work directory; waits for one being replaced."""
        deadline = time.monotonic() + self._launch.start_timeout_s
        while True:
            try:
                agent: Any = ray.get_actor(node_agent_name(self._node_id), namespace=NAMESPACE)
                answer: Any = ray.get(agent.forkserver.remote(), timeout=max(0.0, deadline - time.monotonic()))
            except (ValueError, RayActorError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(AGENT_RETRY_S)
            else:
                socket_name, work_dir = answer
                return socket_name, work_dir

    def run(self) -> RankEnd:
        """Pass on what the process reports until it and its group are gone; returns once everything is shipped."""
        assert self._process is not None
        assert self._channel is not None
        assert self._shipper is not None
        reports = ReportSender(self._supervisor, self._launch, self._rank)
        conversation = Conversation(self._launch, self._rank, reports, self._store)
        shipping = ShippingThread(self._shipper)
        memory = MemoryWatch(self._process.pid, self._launch.spec.resources.memory_bytes_per_rank)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._process, selectors.EVENT_READ)
            next_ship = seen_going_at = time.monotonic() + SHIP_INTERVAL_S
            is_gone = False
            while not is_gone:
                ready = {key.fileobj for key, _ in selector.select(LOOK_INTERVAL_S)}
                if self._channel in ready and not conversation.receive(self._channel):
                    selector.unregister(self._channel)
                is_gone = self._process in ready
                if memory.look():
                    with suppress(OSError):  # it has ended meanwhile
                        self._process.kill()
                now = time.monotonic()
                if now >= next_ship:
                    shipping.submit_if_idle()
                    next_ship = now + SHIP_INTERVAL_S
                    if process_state(self._process.pid) != STOPPED:
                        seen_going_at = now
                    elif now - seen_going_at > self._launch.collective_timeout_s:
                        self._kill()  # a rank without peers has nobody who would miss it
        exit_status = self._process.exit_status()
        # What the process sent is here; only a helper of it that got away could still hold the other end.
        self._channel.setblocking(False)
        while conversation.receive(self._channel):
            pass
        end = conversation.close(exit_status)
        if exit_status == -signal.SIGKILL:
            end = replace(end, killed_in_state=self._killed_in_state)
        if self._killed_in_state is None:
            why = memory.explain(exit_status, None if end.error is None else end.error.error_type)
            end = replace(end, out_of_memory=why)
        is_shipped = shipping.finish()
        self._channel.close()
        self._process.close()
        assert self._directory is not None
        if is_shipped:  # else this node's agent goes on with it once this actor is gone
            self._directory.remove()
        assert self._preparation is not None
        self._preparation.close()
        return replace(end, is_clear=is_shipped)

    def stop(self, job_id: str, attempt: int) -> None:
        """Ask the process for a checkpoint and an end, if it is this attempt's."""
        if self._attempt == (job_id, attempt) and self._channel is not None:
            try:
                self._channel.sendall(StopRequest().model_dump_json().encode() + b"\n")
            except OSError:
                return  # it has ended meanwhile; run() says how

    def kill(self, job_id: str, attempt: int) -> None:
        """Kill the process, if it is this attempt's; ``run`` returns once it and its group are gone."""
        if self._attempt == (job_id, attempt):
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._killed_in_state = self._killed_in_state or process_state(self._process.pid)
            try:
                self._process.kill()
            except OSError:
                return  # gone already


def _interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IP address; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None
