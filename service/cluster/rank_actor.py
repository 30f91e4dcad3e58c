"""The actor of one rank: it holds the rank's resources, its training process, its logs and its uploads."""

import selectors
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError

from service.cluster.fork_client import ForkedProcess
from service.cluster.forkserver import RENDEZVOUS_FD, ForkRequest
from service.cluster.log_shipper import LogShipper
from service.cluster.names import node_agent_name
from service.domain.errors import ServiceError
from service.domain.job import Checkpoint
from service.domain.journal import CheckpointWritten, Warned
from service.domain.ports import Launch
from service.domain.rank_protocol import Errored, Finished, FromRank, RankTask, Staged, StopRequest, parse_from_rank
from service.storage.checkpoints import fetch_checkpoint, publish_checkpoint
from service.storage.layout import log_dir
from service.storage.object_store import ObjectStore

SHIP_INTERVAL_S = 0.3
# A dead peer's memory may take the kernel a while to tear down.
FORK_TIMEOUT_S = 30.0
# How long the last checkpoint, the last of the log and the last reports may take once the process is gone.
UPLOAD_TIMEOUT_S = 600.0
LAST_SHIP_TIMEOUT_S = 5.0
REPORT_TIMEOUT_S = 10.0
AGENT_RETRY_S = 0.2


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a rank landed."""

    node_id: str
    address: str


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How a rank's process ended.

    Attributes:
        exit_status: its exit code; negative is the signal that ended it.
        step: optimizer steps done, where it said so.
        stopped: it was asked to stop and did.
        error: what it reported, if it did.
    """

    exit_status: int
    step: int | None
    stopped: bool
    error: Errored | None

    @property
    def is_clean(self) -> bool:
        """Whether the rank did all it was asked to."""
        return self.exit_status == 0 and self.error is None and self.step is not None


class RankActor:
    """Runs one training process.

    Args:
        launch: the attempt.
        rank: which rank of it.
        supervisor: handle of the actor that takes the reports.
    """

    def __init__(self, launch: Launch, rank: int, supervisor: Any) -> None:  # noqa: ANN401 - Ray's handles are untyped
        self._launch = launch
        self._rank = rank
        self._supervisor = supervisor
        self._store = ObjectStore(launch.storage_url)
        self._rendezvous: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._process: ForkedProcess | None = None
        self._address: str = ray.util.get_node_ip_address()
        self._directory = Path()
        self._shipper: LogShipper | None = None

    def place(self) -> RankPlace:
        """Return where this rank landed."""
        return RankPlace(node_id=ray.get_runtime_context().get_node_id(), address=self._address)

    def open_rendezvous(self) -> int:
        """Listen for the other ranks on the address that they know this node by; rank 0 only.

        Returns:
            The port.
        """
        self._rendezvous = socket.create_server((self._address, 0), backlog=1024)
        return int(self._rendezvous.getsockname()[1])

    def start(self, rendezvous_host: str, rendezvous_port: int, resume_from: Checkpoint | None) -> int:
        """Start the training process.

        Args:
            rendezvous_host: address of rank 0.
            rendezvous_port: where rank 0 listens.
            resume_from: checkpoint to continue from.

        Returns:
            Its process id.
        """
        self._store.check_identity(self._launch.storage_id)
        socket_name, work_dir = self._find_forkserver()
        job_dir = Path(work_dir) / self._launch.job_id
        _remove_earlier_attempts(job_dir, self._launch.attempt)
        self._directory = job_dir / str(self._launch.attempt) / f"rank-{self._rank}"
        self._directory.mkdir(parents=True)
        resume_dir = None
        if resume_from is not None:
            resume_dir = fetch_checkpoint(self._store, resume_from, Path(work_dir) / "checkpoints")
        spec = self._launch.spec
        task = RankTask(
            job_id=self._launch.job_id,
            attempt=self._launch.attempt,
            spec=spec,
            rank=self._rank,
            world_size=len(self._launch.node_ids),
            rendezvous_host=rendezvous_host,
            rendezvous_port=rendezvous_port,
            rendezvous_fd=RENDEZVOUS_FD if self._rendezvous else None,
            interface=_interface_of(self._address),
            num_threads=max(1, int(spec.resources.cpus_per_rank)),
            staging_dir=str(self._directory / "staging"),
            resume_dir=None if resume_dir is None else str(resume_dir),
            collective_timeout_s=self._launch.collective_timeout_s,
        )
        gpu_ids = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
        log_path = self._directory / "output.log"
        self._shipper = LogShipper(
            log_path, self._store, log_dir(self._launch.job_id, self._launch.attempt, self._rank)
        )
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
                    environment={"CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)},
                    log_path=str(log_path),
                ),
                task_json=task.model_dump_json(),
                descriptors=descriptors,
                timeout_s=FORK_TIMEOUT_S,
            )
        if self._rendezvous:
            self._rendezvous.close()  # the process has its own copy
        return self._process.pid

    def _find_forkserver(self) -> tuple[str, str]:
        """Return the socket name of this node's forkserver and its work directory; waits for one being replaced."""
        deadline = time.monotonic() + self._launch.start_timeout_s
        while True:
            try:
                agent: Any = ray.get_actor(node_agent_name(ray.get_runtime_context().get_node_id()))
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
        reports = _Reports(self._supervisor, self._rank)
        conversation = _Conversation(self._launch, self._rank, reports, self._store)
        shipping = _Shipping(self._shipper)
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            selector.register(self._process, selectors.EVENT_READ)
            next_ship = time.monotonic() + SHIP_INTERVAL_S
            is_gone = False
            while not is_gone:
                ready = {key.fileobj for key, _ in selector.select(max(0.0, next_ship - time.monotonic()))}
                if self._channel in ready and not conversation.receive(self._channel):
                    selector.unregister(self._channel)
                is_gone = self._process in ready
                if time.monotonic() >= next_ship:
                    shipping.submit_if_idle()
                    next_ship = time.monotonic() + SHIP_INTERVAL_S
        exit_status = self._process.exit_status()
        # What the process sent is here; only a helper of it that got away could still hold the other end.
        self._channel.setblocking(False)
        while conversation.receive(self._channel):
            pass
        end = conversation.close(exit_status)
        shipping.finish()
        self._channel.close()
        self._process.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        return end

    def stop(self) -> None:
        """Ask the process for a checkpoint and an end."""
        if self._channel is not None:
            try:
                self._channel.sendall(StopRequest().model_dump_json().encode() + b"\n")
            except OSError:
                return  # it has ended meanwhile; run() says how

    def kill(self) -> None:
        """Kill the process; ``run`` returns once it and its group are gone."""
        if self._process is not None:
            try:
                self._process.kill()
            except OSError:
                return  # gone already


class _Shipping:
    """Ships the log from a thread of its own: storage that stalls must not stall what the process reports."""

    def __init__(self, shipper: LogShipper) -> None:
        self._shipper = shipper
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ship")
        self._last: Future[bool] | None = None

    def submit_if_idle(self) -> None:
        """Ship what is new, unless shipping is under way."""
        if self._last is None or self._last.done():
            self._last = self._thread.submit(self._shipper.ship)

    def finish(self) -> None:
        """Ship the rest, within a time; what storage refuses until then is lost."""
        deadline = time.monotonic() + LAST_SHIP_TIMEOUT_S
        while time.monotonic() < deadline:
            self.submit_if_idle()
            assert self._last is not None
            done, _ = wait([self._last], timeout=SHIP_INTERVAL_S)
            if done and self._last.result():
                break
        self._thread.shutdown(wait=False)


class _Reports:
    """The way to the supervisor; keeps the order of what is sent."""

    def __init__(self, supervisor: Any, rank: int) -> None:  # noqa: ANN401 - Ray's handles are untyped
        self._supervisor = supervisor
        self._rank = rank
        self._under_way: list[Any] = []
        self._sending = threading.Lock()

    def send(self, reports: Sequence[FromRank | CheckpointWritten]) -> None:
        """Send reports, without waiting for them to arrive."""
        if not reports:
            return
        with self._sending:  # checkpoints are reported from the thread that uploads them
            if self._under_way:
                self._under_way = ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)[1]
            self._under_way.append(self._supervisor.report.remote(self._rank, list(reports)))

    def arrive(self) -> None:
        """Wait until everything has arrived.

        Raises:
            RayError: something did not. The rank's end must not pass for a clean one then.
        """
        ray.get(self._under_way, timeout=REPORT_TIMEOUT_S)


class _Conversation:
    """What the process says, passed on in order; checkpoints are uploaded beside it, in their order."""

    def __init__(self, launch: Launch, rank: int, reports: "_Reports", store: ObjectStore) -> None:
        self._launch = launch
        self._rank = rank
        self._reports = reports
        self._store = store
        self._pending = b""
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[Future[Errored | None]] = []
        self._error: Errored | None = None
        self._finished: Finished | None = None

    def receive(self, channel: socket.socket) -> bool:
        """Take in what can be read now; False at the end of it."""
        try:
            data = channel.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return False
        *lines, self._pending = (self._pending + data).split(b"\n")
        self._take([parse_from_rank(line) for line in lines])
        return True

    def close(self, exit_status: int) -> RankEnd:
        """Wait for the uploads and say how it ended."""
        # A checkpoint that could not be stored is a warning while later ones may follow; the last one is the result.
        last_upload = self._uploads[-1].result(UPLOAD_TIMEOUT_S) if self._uploads else None
        self._uploader.shutdown()
        # The end of a rank may overtake its reports on the way to the supervisor, which would close its journal.
        self._reports.arrive()
        finished = self._finished
        return RankEnd(
            exit_status=exit_status,
            step=None if finished is None else finished.step,
            stopped=finished is not None and finished.stopped,
            error=self._error or last_upload,
        )

    def _take(self, messages: Sequence[FromRank]) -> None:
        reports: list[Any] = []
        for message in messages:
            if isinstance(message, Errored):
                self._error = message
            elif isinstance(message, Finished):
                self._finished = message
            elif isinstance(message, Staged):
                self._reports.send(reports)
                reports = []
                self._uploads.append(self._uploader.submit(self._upload, message))
            else:
                reports.append(message)
        self._reports.send(reports)

    def _upload(self, staged: Staged) -> Errored | None:
        directory = Path(staged.directory)
        try:
            written = publish_checkpoint(self._store, self._launch.job_id, self._launch.attempt, staged.step, directory)
        except (OSError, ServiceError) as error:
            message = f"The checkpoint of step {staged.step} could not be stored: {error}"
            self._reports.send([Warned(message=message, rank=self._rank)])
            return Errored(cause="checkpoint", error_type=type(error).__name__, message=message, traceback="")
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self._reports.send([written])
        return None


def _remove_earlier_attempts(job_dir: Path, attempt: int) -> None:
    """Remove what attempts whose rank actors were killed left on this node."""
    for path in job_dir.glob("*"):
        if path.name.isdecimal() and int(path.name) < attempt:
            shutil.rmtree(path, ignore_errors=True)


def _interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IP address; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return None
