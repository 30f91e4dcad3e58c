"""What the parts need of each other. One contract suite per port runs on every implementation, fakes included."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from service.domain.job import Attempt, Checkpoint, Event, Failure, Job, JobStatus, MetricPoint, Outcome, Reason
from service.domain.journal import JournalRecord
from service.domain.placement import Node
from service.domain.spec import JobSpec


@dataclass(frozen=True, kw_only=True)
class IdempotencyKey:
    """Names a request, so that repeating it has no second effect.

    Attributes:
        owner: whose key it is.
        route: method and path template, such as ``POST /v1/jobs``.
        key: what the client chose.
        body_sha256: hash of the canonical body.
    """

    owner: str
    route: str
    key: str
    body_sha256: str


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """Jobs, newest first.

    Attributes:
        next_cursor: where the next page begins; None on the last one.
    """

    jobs: tuple[Job, ...]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class ClusterSnapshot:
    """The nodes as the scheduler last saw them; ``observed_at`` is None before it ever did."""

    nodes: tuple[Node, ...]
    observed_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Events and metrics of a job after a position, in order of position, and where to go on."""

    events: tuple[Event, ...]
    points: tuple[MetricPoint, ...]
    position: int


class JobStore(Protocol):
    """What the API needs of the store. Every method may raise ``Unavailable``."""

    def submit(self, spec: JobSpec, *, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        """Store a job as queued; it survives any crash once this returns.

        Returns:
            The job, and whether this call created it (False: the key was used before with the same body).

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            NotFound: there is none with this id.
        """
        ...

    def list_jobs(
        self,
        *,
        statuses: Sequence[JobStatus] = (),
        name: str | None = None,
        labels: Sequence[tuple[str, str]] = (),
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """Return jobs, newest first, that match everything given.

        Raises:
            InvalidCursor: this store did not hand it out.
        """
        ...

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; ask for the cancellation of one that is starting or running.

        Asking twice, or for a job that was cancelled, changes nothing.

        Raises:
            NotFound: no such job.
            InvalidTransition: it has already succeeded or failed.
        """
        ...

    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Return the attempts of a job in order. Raises ``NotFound``."""
        ...

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Return events after a position, in order. Raises ``NotFound``."""
        ...

    def metrics(self, job_id: str, *, names: Sequence[str] = (), after_step: int = -1) -> tuple[MetricPoint, ...]:
        """Return the points that count (none superseded), ordered by step, then name. Raises ``NotFound``."""
        ...

    def feed(self, job_id: str, *, after: int = 0, limit: int = 1000) -> Feed:
        """Return events and metric points after a position, for a stream. Raises ``NotFound``."""
        ...

    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return the committed checkpoints that count, by step. Raises ``NotFound``."""
        ...

    def cluster(self) -> ClusterSnapshot:
        """Return the nodes as the scheduler last saw them."""
        ...

    def ping(self) -> None:
        """Read something, to prove that the database answers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to lead.

    Attributes:
        holder: name of the process.
        epoch: grows at each change of holder; a fencing token.
    """

    holder: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class LiveAttempt:
    """A job with an attempt that has not been sealed."""

    job: Job
    attempt: Attempt


class SchedulerStore(Protocol):
    """What the scheduler needs of the store. Writes raise ``LeaseLost`` if the lease is not current."""

    def acquire_lease(self, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew the lease by the database's clock; None while another holds it."""
        ...

    def release_lease(self, lease: Lease) -> None:
        """Let another take it at once."""
        ...

    def record_nodes(self, lease: Lease, nodes: Sequence[Node]) -> None:
        """Replace the snapshot of the cluster."""
        ...

    def queued_jobs(self, limit: int = 1000) -> tuple[Job, ...]:
        """Return queued jobs: highest priority first, then first come."""
        ...

    def live_attempts(self) -> tuple[LiveAttempt, ...]:
        """Return attempts that are not sealed, with their jobs; they hold resources."""
        ...

    def create_attempt(self, lease: Lease, job_id: str, *, node_ids: Sequence[str]) -> Attempt | None:
        """Move a queued job to starting, with a new attempt of ``len(node_ids)`` ranks; None if it is not queued."""
        ...

    def set_message(self, lease: Lease, job_id: str, message: str) -> None:
        """Say why a queued job waits; nothing if it is not queued. Writes only if the message differs."""
        ...

    def ingest(self, lease: Lease, job_id: str, number: int, records: Sequence[JournalRecord]) -> None:
        """Take journal records into the store, in one transaction.

        Records up to the attempt's ``last_sequence`` are skipped. ``launched`` and ``running`` set the attempt's
        status; ``running`` also the job's, unless it is stopping; ``resumed`` supersedes metrics and checkpoints of
        earlier attempts beyond its step; ``checkpoint`` commits a row; ``ended`` ends the attempt, not the job.

        Raises:
            StaleWrite: the attempt is not the job's current one, or sealed.
            ValueError: the records leave a gap in the sequence.
        """
        ...

    def mark_stopping(self, lease: Lease, job_id: str, number: int, reason: Reason) -> None:
        """Note that the attempt was asked to stop.

        The job becomes ``stopping`` unless the reason is ``service_stopped``, after which it is queued again.
        """
        ...

    def seal_attempt(
        self, lease: Lease, job_id: str, number: int, *, outcome: Outcome, reason: Reason, failure: Failure | None
    ) -> Job:
        """End and seal an attempt, and move its job on as ``after_attempt`` decides, in one transaction.

        Nothing more is ingested for a sealed attempt. Sealing twice changes nothing.
        """
        ...

    def resumable_checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return committed checkpoints that were not superseded or quarantined, newest first."""
        ...

    def forget_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        """Drop the row of a checkpoint that the keep policy removes; its files go afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Launch:
    """All that a supervisor needs to run one attempt.

    Attributes:
        storage_url: root of run storage, a path or an fsspec URL.
        storage_id: what that root says of itself; another answer means another storage under the same name.
        checkpoints: where it may resume from, newest first.
        collective_timeout_s: how long a rank waits for its peers.
        start_timeout_s: how long all ranks may take to get a process.
        stop_grace_s: how long a rank that was asked to stop may take for its checkpoint.
    """

    job_id: str
    attempt: int
    spec: JobSpec
    node_ids: tuple[str, ...]
    storage_url: str
    storage_id: str
    checkpoints: tuple[Checkpoint, ...]
    collective_timeout_s: float
    start_timeout_s: float
    stop_grace_s: float


class SupervisorState(StrEnum):
    """What is known of a supervisor."""

    ALIVE = "alive"
    GONE = "gone"  # proven: it will write no more
    UNREACHABLE = "unreachable"  # may still be working


@dataclass(frozen=True, kw_only=True)
class JournalPage:
    """Journal records after a sequence number, and what is known of the one who writes them."""

    state: SupervisorState
    records: tuple[JournalRecord, ...]


class Cluster(Protocol):
    """What the scheduler needs of the cluster."""

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that are alive. Raises ``Unavailable``."""
        ...

    def launch(self, launch: Launch) -> None:
        """Start the supervisor of an attempt, without waiting for it; starting it twice has no second effect."""
        ...

    def read(self, job_id: str, attempt: int, *, after: int) -> JournalPage:
        """Return what an attempt reported since; never waits longer than a moment."""
        ...

    def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        """Ask an attempt for a checkpoint and an end; does not wait."""
        ...

    def close(self, job_id: str, attempt: int) -> None:
        """Release what is left of an attempt whose end has been recorded: its supervisor and placement group."""
        ...

    def supervised(self) -> tuple[tuple[str, int], ...]:
        """Return job and attempt of every supervisor in the cluster. Raises ``Unavailable``."""
        ...


class RunFiles(Protocol):
    """What API and scheduler need of run storage. Paths are relative to its root."""

    def size(self, path: str) -> int:
        """Return a file's size in bytes. Raises ``NotFound``."""
        ...

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a file. Raises ``NotFound``."""
        ...

    def log_size(self, job_id: str, attempt: int, rank: int) -> int:
        """Return the bytes logged by a rank so far; 0 if none."""
        ...

    def read_log(self, job_id: str, attempt: int, rank: int, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a rank's log, as far as they exist."""
        ...

    def was_launched(self, job_id: str, attempt: int) -> bool:
        """Return whether a supervisor has taken the attempt's launch marker."""
        ...

    def prevent_launch(self, job_id: str, attempt: int) -> bool:
        """Take the launch marker, so that no supervisor ever will; False if one already has."""
        ...

    def journal(self, job_id: str, attempt: int, *, after: int) -> Iterator[JournalRecord]:
        """Yield the durable journal records after a sequence number, in order, up to the first that is torn."""
        ...

    def remove_checkpoint(self, path: str) -> None:
        """Remove a checkpoint's directory, its manifest first; nothing if it is not there."""
        ...
