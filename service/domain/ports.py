"""What the parts need of each other. One contract suite per port runs on every implementation, fakes included."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from service.domain.curve import Curve
from service.domain.job import (
    DEFAULT_OWNER,
    Attempt,
    Checkpoint,
    Event,
    Failure,
    Job,
    JobStatus,
    MetricPoint,
    Origin,
    Outcome,
    Reason,
)
from service.domain.journal import JournalRecord
from service.domain.placement import Node
from service.domain.queue import Queue, QueueState
from service.domain.spec import JobSpec
from service.domain.uploads import NODE_CACHE_BYTES, PREPARE_TIMEOUT_S

# How long the last checkpoint of an attempt may take to reach run storage once its process is gone.
UPLOAD_TIMEOUT_S = 600.0
# Most that is kept of what a rank of an attempt prints; the newest.
MAX_LOG_BYTES = 1 << 30


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


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What a job's feed holds after a position, and how the job stood at that moment.

    Attributes:
        feed: up to ``feed.position``.
        has_more: the feed goes on beyond that.
    """

    feed: Feed
    has_more: bool
    status: JobStatus
    reason: Reason
    message: str


class JobStore(Protocol):
    """What the API needs of the store. Every method may raise ``Unavailable``.

    Methods that take a key have their effect once for it: a repetition returns the job as it is by now.
    """

    def submit(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        """Store a job as queued, or as paused where it is to be held; it survives any crash once this returns.

        Args:
            spec: the job.
            owner: whose it is.
            key: names the request.

        Returns:
            The job, and whether this call created it (False: the key was used before with the same body).

        Raises:
            InvalidSpec: it names a queue that there is not, or comes after a job that there is not or that has failed.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def submit_soon(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> "Future[tuple[Job, bool]]":
        """As ``submit``, without waiting: those that wait at once are made durable together.

        Each has its own outcome. Cancelled in time, it has no effect.
        """
        ...

    def unfinished_before(self, spec: JobSpec) -> tuple[str, ...]:
        """Return the ids of the jobs that have to succeed before this one could start, and have not; stores nothing.

        Raises:
            InvalidSpec: as ``submit`` raises it.
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
        queue: str | None = None,
        owner: str | None = None,
        labels: Sequence[tuple[str, str]] = (),
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """Return jobs, newest first, that match everything given.

        Raises:
            InvalidCursor: this store did not hand it out.
        """
        ...

    def replayed(self, key: IdempotencyKey) -> Job | None:
        """Return the job that an earlier request with this key was about; None if there was none.

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def request_cancel(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        """Cancel a queued or paused job at once; ask for the cancellation of one that is starting or running.

        Asking twice, or for a job that was cancelled, changes nothing.

        Raises:
            NotFound: no such job.
            InvalidTransition: it has already succeeded or failed.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def request_pause(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        """Pause a queued job at once; ask for a checkpoint and a pause of one that is starting or running.

        Asking twice, or for a job that is paused, changes nothing.

        Raises:
            NotFound: no such job.
            InvalidTransition: it has ended or is about to.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def resume(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        """Queue a job again that was paused, has failed or was cancelled; its retries are counted anew.

        Raises:
            NotFound: no such job.
            InvalidTransition: it has succeeded, or has not stopped, or its queue is gone.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def request_resize(self, job_id: str, workers: int, *, key: IdempotencyKey | None = None) -> Job:
        """Let a job have at most so many workers from now on, one of its exact numbers, and those soon if it runs.

        Raises:
            NotFound: no such job.
            InvalidTransition: it has ended or is about to.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def fork(
        self, spec: JobSpec, origin: Origin, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        """Store a job as ``submit`` does that begins at a checkpoint of another, which is kept while it is needed.

        Returns:
            The job, and whether this call created it.

        Raises:
            NotFound: that job, or that checkpoint of it, is not there any more.
            InvalidSpec: as ``submit`` raises it.
            IdempotencyConflict: the key was used with another body.
        """
        ...

    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Return the attempts of a job in order. Raises ``NotFound``."""
        ...

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """Return events after a position, in order. Raises ``NotFound``."""
        ...

    def metrics(
        self, job_id: str, *, names: Sequence[str] = (), after_step: int = -1, to_step: int | None = None
    ) -> tuple[MetricPoint, ...]:
        """Return the points that count (none superseded), ordered by step, then name. Raises ``NotFound``."""
        ...

    def curves(
        self,
        job_id: str,
        *,
        max_points: int,
        names: Sequence[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
    ) -> Mapping[str, Curve]:
        """Return training curves rolled up, of the points that count.

        Args:
            job_id: of which job.
            max_points: most buckets of a curve, at least 2; it is as fine as that allows, or nearly so.
            names: of the metrics; none: all of them.
            from_step: first step; the bucket that it lies in is whole.
            to_step: last step, likewise; None: the last that there is.

        Returns:
            By name those that have points in this range.

        Raises:
            NotFound: no such job.
        """
        ...

    def follow(self, after: Mapping[str, int], *, limit: int = 10_000) -> Mapping[str, Followed]:
        """Return what the feeds of many jobs hold after a position of each, all of it as of one moment.

        Args:
            after: positions, by id of the job.
            limit: about how many positions in all, shared among the jobs that have any; each gets at least one.

        Returns:
            By id; a job that there is not is left out.
        """
        ...

    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return the committed checkpoints that count, by step. Raises ``NotFound``."""
        ...

    def cluster(self) -> ClusterSnapshot:
        """Return the nodes as the scheduler last saw them."""
        ...

    def queue_states(self) -> tuple[QueueState, ...]:
        """Return every queue and what is in it, by name."""
        ...

    def queued_jobs(self, limit: int = 1000) -> tuple[Job, ...]:
        """Return queued jobs, at most so many of each queue: highest priority first, then first come.

        Where a queue has more, those that wait for other jobs or pause before a retry are left out first.
        """
        ...

    def held_back(self) -> Mapping[str, "HeldBack"]:
        """Return the queued jobs that may not start yet, by id."""
        ...

    def live_attempts(self) -> tuple["LiveAttempt", ...]:
        """Return attempts that are not sealed, with their jobs; they hold resources."""
        ...

    def put_queue(self, queue: Queue) -> bool:
        """Make a queue, or give it these settings.

        Returns:
            Whether there was none of this name.
        """
        ...

    def remove_queue(self, name: str) -> None:
        """Remove a queue.

        Raises:
            NotFound: there is none of this name.
            InvalidTransition: jobs of it have not ended, or it is the default queue.
        """
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
class LeaseState:
    """The lease as somebody saw it; two that are equal say that nothing happened to it in between.

    Attributes:
        holder: who leads; None: nobody, it was released.
        epoch: of the holder, or of the last one.
        num_renewals: grows as long as the holder lives.
    """

    holder: str | None
    epoch: int
    num_renewals: int


@dataclass(frozen=True, kw_only=True)
class LiveAttempt:
    """A job with an attempt that has not been sealed."""

    job: Job
    attempt: Attempt


@dataclass(frozen=True, kw_only=True)
class HeldBack:
    """Why a queued job may not start yet, whatever room there is.

    Attributes:
        waits_for: ids of the jobs that have to succeed first and have not ended.
        retry_in_s: the pause before its next retry ends then; 0 where there is none.
    """

    waits_for: tuple[str, ...] = ()
    retry_in_s: float = 0.0


class SchedulerStore(Protocol):
    """What the scheduler needs of the store. Writes raise ``LeaseLost`` if the lease is not current."""

    def read_lease(self) -> LeaseState:
        """Return the lease as it is; it says nothing about when it ends, which is for those to judge who watch it."""
        ...

    def take_lease(self, holder: str, *, seen: LeaseState) -> Lease | None:
        """Take the lease under a greater epoch, whoever holds it; None if it is no longer as it was seen."""
        ...

    def renew_lease(self, lease: Lease) -> None:
        """Change the lease, so that whoever watches it sees that its holder lives; late or not, if it is still held."""
        ...

    def release_lease(self, lease: Lease) -> None:
        """Let another take it at once."""
        ...

    def record_nodes(self, lease: Lease, nodes: Sequence[Node]) -> None:
        """Replace the snapshot of the cluster."""
        ...

    def queued_jobs(self, limit: int = 1000) -> tuple[Job, ...]:
        """Return queued jobs, at most so many of each queue: highest priority first, then first come.

        Where a queue has more, those that wait for other jobs or pause before a retry are left out first.
        """
        ...

    def held_back(self) -> Mapping[str, HeldBack]:
        """Return the queued jobs that may not start yet, by id."""
        ...

    def fail_hopeless(self, lease: Lease) -> tuple[str, ...]:
        """Fail queued jobs that will never start: one that they come after has failed, or their deadline has passed.

        A call fails the first few hundred of them, in the order of their submission; the next goes on.

        Returns:
            The ids of those that failed now.
        """
        ...

    def queues(self) -> tuple[Queue, ...]:
        """Return every queue, by name."""
        ...

    def queue_usage(self) -> Mapping[str, float]:
        """Return what ``record_usage`` was last told, by name of the queue; 0 before."""
        ...

    def record_usage(self, lease: Lease, usage_s: Mapping[str, float]) -> None:
        """Keep the usage of queues; nothing for a name that there is not."""
        ...

    def live_attempts(self) -> tuple[LiveAttempt, ...]:
        """Return attempts that are not sealed, with their jobs; they hold resources."""
        ...

    def create_attempt(self, lease: Lease, job_id: str, *, node_ids: Sequence[str]) -> Attempt | None:
        """Move a queued job to starting, with a new attempt of ``len(node_ids)`` ranks; None if it is not queued."""
        ...

    def mark_resizing(self, lease: Lease, job_id: str, number: int, *, node_ids: Sequence[str], message: str) -> None:
        """Note that a running attempt was asked to stop, so that the next one goes on on other nodes.

        The job stays running. Nothing happens if it does not run, or was asked to stop, pause or cancel.
        """
        ...

    def mark_preempting(self, lease: Lease, job_id: str, number: int, *, message: str) -> None:
        """Note that an attempt was asked to stop for a job of higher priority; its job is queued again then.

        Until then the job keeps its status. Nothing happens if it was asked to stop, pause or cancel.
        """
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

        The job becomes ``stopping`` unless the reason is ``service_stopped``, after which it is queued again. It
        takes the place of an earlier wish to resize the job.
        """
        ...

    def seal_attempt(
        self,
        lease: Lease,
        job_id: str,
        number: int,
        *,
        outcome: Outcome,
        reason: Reason,
        failure: Failure | None,
        next_node_ids: Sequence[str] | None = None,
    ) -> Job:
        """End and seal an attempt, and move its job on as ``after_attempt`` decides, in one transaction.

        Nothing more is ingested for a sealed attempt. Sealing twice changes nothing.

        Args:
            lease: of this scheduler.
            job_id: of which job.
            number: of which attempt.
            outcome: how it ended.
            reason: why.
            failure: its first error, if it met one.
            next_node_ids: where the job goes on if the attempt was stopped to be resized: the next attempt is created
                with it, so that no other job can take its place in between. None: the job is queued.
        """
        ...

    def resumable_checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return committed checkpoints that were not superseded or quarantined, newest first.

        In a fork the one that it was forked from comes last, under the job that wrote it, for as long as it is there.
        """
        ...

    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        """Return the committed checkpoints of a job that count, by step. Raises ``NotFound``."""
        ...

    def retire_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        """Let a checkpoint be neither listed nor resumed from, but for forks that begin at it already."""
        ...

    def removable_checkpoints(self, job_id: str | None = None) -> tuple[Checkpoint, ...]:
        """Return the checkpoints whose files nobody needs, of one job or of all.

        They were retired, superseded or quarantined, and no fork begins there that has not ended and has no checkpoint
        of its own.
        """
        ...

    def committed_paths(self, job_id: str, attempt: int) -> frozenset[str]:
        """Return the directories of the checkpoints of an attempt that have a row, whether or not they count."""
        ...

    def forget_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        """Drop the row of a checkpoint whose files are gone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Launch:
    """All that a supervisor needs to run one attempt.

    Attributes:
        storage_url: root of run storage, a path or an fsspec URL.
        storage_id: what that root says of itself; another answer means another storage under the same name.
        checkpoints: where it may resume from, newest first.
        forked_from: where the job began, if not at step 0: without a checkpoint it would be another job.
        collective_timeout_s: how long a rank waits for its peers.
        start_timeout_s: how long all ranks may take to get a process.
        stop_grace_s: how long a rank that was asked to stop may take for its checkpoint.
        prepare_timeout_s: how long a node may take, before its ranks start, to get what the job brings.
        node_cache_bytes: most that a node keeps of such things, but for those in use.
        max_log_bytes: most that is kept of what a rank prints.
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
    forked_from: Origin | None = None
    prepare_timeout_s: float = PREPARE_TIMEOUT_S
    node_cache_bytes: int = NODE_CACHE_BYTES
    max_log_bytes: int = MAX_LOG_BYTES


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

    def supervisors(self) -> tuple[str, ...]:
        """Return the names of all supervisors in the cluster. Raises ``Unavailable``."""
        ...

    def close_all_but(self, attempts: Collection[tuple[str, int]], supervisors: Collection[str]) -> None:
        """Close those of these supervisors that have none of these attempts (job, number). Raises ``Unavailable``."""
        ...


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """A part of a log.

    Attributes:
        start: offset of its first byte.
        content: the bytes.
    """

    start: int
    content: bytes


class RunFiles(Protocol):
    """What API and scheduler need of run storage. Paths are relative to its root."""

    def size(self, path: str) -> int:
        """Return a file's size in bytes. Raises ``NotFound``."""
        ...

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a file. Raises ``NotFound``."""
        ...

    def log_size(self, job_id: str, attempt: int, rank: int) -> int:
        """Return the bytes logged by a rank so far, those that are no longer kept among them; 0 if none."""
        ...

    def read_log(self, job_id: str, attempt: int, rank: int, start: int, num_bytes: int) -> LogPart:
        """Return at most ``num_bytes`` of a rank's log from an offset on, or from the first later byte that is kept."""
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

    def seal(self, job_id: str, attempt: int) -> None:
        """Tell whatever still runs of an attempt that it is over: it stores no more checkpoints, and ends."""
        ...

    def remove_uncommitted(self, job_id: str, attempt: int, committed: Set[str]) -> None:
        """Remove what an attempt that is sealed left of checkpoints, but for the directories that were committed."""
        ...

    def remove_partial_uploads(self, older_than_s: float) -> None:
        """Remove what is left of uploads that were cut short so many seconds ago."""
        ...
