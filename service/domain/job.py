"""A job, its attempts and what is known of them."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from service.domain.errors import InvalidTransition
from service.domain.record import Record
from service.domain.spec import JobSpec

# Of a job whose submitter did not say whose it is.
DEFAULT_OWNER = "default"


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended; what failed or was cancelled may still be resumed by its owner."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class AttemptStatus(StrEnum):
    """Where an attempt stands."""

    CREATED = "created"
    LAUNCHED = "launched"
    RUNNING = "running"
    ENDED = "ended"
    SEALED = "sealed"


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"  # running it again would fail again
    LOST = "lost"  # something under it went away
    STOPPED = "stopped"  # asked to stop


class Reason(StrEnum):
    """Why a job's status changed, for programs to read."""

    SUBMITTED = "submitted"
    ADMITTED = "admitted"
    ALL_RANKS_STEPPED = "all_ranks_stepped"
    COMPLETED = "completed"
    CANCEL_REQUESTED = "cancel_requested"
    CANCELLED = "cancelled"
    PAUSE_REQUESTED = "pause_requested"
    PAUSED = "paused"
    RESIZED = "resized"
    RESUMED = "resumed"
    HELD = "held"
    PREEMPTED = "preempted"
    FORKED = "forked"
    USER_ERROR = "user_error"
    RANK_LOST = "rank_lost"
    NODE_LOST = "node_lost"
    SUPERVISOR_LOST = "supervisor_lost"
    LAUNCH_FAILED = "launch_failed"
    COLLECTIVE_FAILED = "collective_failed"
    CHECKPOINT_FAILED = "checkpoint_failed"
    OUT_OF_MEMORY = "out_of_memory"
    REPEATED_FAILURE = "repeated_failure"
    DEPENDENCY_FAILED = "dependency_failed"
    START_DEADLINE = "start_deadline"
    SERVICE_STOPPED = "service_stopped"
    TIMEOUT = "timeout"
    RETRIES_EXHAUSTED = "retries_exhausted"


HELD_MESSAGE = "Held, as was asked for. Resume it to have it placed."
"""Of a job that was submitted with ``hold``."""


TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = MappingProxyType(
    {
        JobStatus.QUEUED: frozenset({JobStatus.STARTING, JobStatus.CANCELLED, JobStatus.PAUSED, JobStatus.FAILED}),
        JobStatus.STARTING: frozenset(
            {JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.STOPPING, JobStatus.SUCCEEDED, JobStatus.FAILED}
        ),
        JobStatus.RUNNING: frozenset(
            {JobStatus.STARTING, JobStatus.QUEUED, JobStatus.STOPPING, JobStatus.SUCCEEDED, JobStatus.FAILED}
        ),
        JobStatus.STOPPING: frozenset({JobStatus.CANCELLED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED}),
        JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
        JobStatus.SUCCEEDED: frozenset(),
        JobStatus.FAILED: frozenset({JobStatus.QUEUED}),
        JobStatus.CANCELLED: frozenset({JobStatus.QUEUED}),
    }
)


def check_transition(before: JobStatus, after: JobStatus) -> None:
    """Refuse a change of status that the life of a job does not have.

    Raises:
        InvalidTransition: ``after`` does not follow ``before``.
    """
    if after not in TRANSITIONS[before]:
        raise InvalidTransition(f"A job that is {before} cannot become {after}.")


class Failure(Record):
    """The first error of an attempt.

    Attributes:
        rank: which rank met it; None where no rank did.
        error_type: class of the exception, or the signal.
        message: what it says.
        traceback: of the rank's process, where there was one.
    """

    rank: int | None = None
    error_type: str
    message: str
    traceback: str | None = None


class Origin(Record):
    """The checkpoint that a job was forked from.

    Attributes:
        job_id: whose it is.
        attempt: which attempt of that job wrote it.
        step: optimizer steps done.
    """

    job_id: str
    attempt: int
    step: int


class Job(Record):
    """A job as the store knows it.

    Attributes:
        reason: why it has its status.
        message: the same in words.
        attempt: number of the current or last attempt; 0 before the first.
        owner: whose it is.
        retries_used: attempts that were lost and counted against ``spec.retry.budget``, since it was last resumed.
        preemptions_used: likewise attempts that were stopped for another job, against ``spec.retry.preemptions``.
        not_before: a retry waits until then, by the database's clock; None: it does not.
        step: optimizer steps done, along the line of attempts that counts.
        num_steps: steps of the whole job, where known.
        cancel_requested: a cancel was asked for and not yet carried out.
        pause_requested: likewise a pause.
        workers_wanted: most workers that the job is to have, as its owner last asked; None: ``spec.workers.max``.
        resize_requested: the owner asked for that, and the present attempt does not have them yet.
        forked_from: where it began, if not at step 0.
        exact: whether its result is independent of the number of workers, as its last attempt found; None before.
        exactness: the same in words: what makes it depend on them; what a rehearsal showed.
        running_s: time spent running in ended attempts, in seconds.
    """

    id: str
    owner: str = DEFAULT_OWNER
    spec: JobSpec
    status: JobStatus
    reason: Reason
    message: str
    attempt: int
    retries_used: int
    preemptions_used: int = 0
    not_before: datetime | None = None
    step: int
    num_steps: int | None
    cancel_requested: bool
    pause_requested: bool = False
    workers_wanted: int | None = None
    resize_requested: bool = False
    forked_from: Origin | None = None
    exact: bool | None = None
    exactness: str | None = None
    running_s: float
    failure: Failure | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None


class Attempt(Record):
    """One try at running a job.

    Attributes:
        number: from 1; the fencing token of everything it writes.
        node_ids: the node of each rank, in the order of ranks.
        last_sequence: the last journal record taken into the store; 0 before the first.
        resumed_from_step: step of the checkpoint it started from; 0 from the beginning; None before it said so.
        step: the last step that it reported; None before the first report.
        ran_s: how long it had run when it reported last, by its supervisor's monotonic clock, in seconds.
        stop_reason: why it was asked to stop, if it was.
        target_node_ids: where the next attempt goes, if this one was asked to stop to be resized; held for it.
    """

    job_id: str
    number: int
    status: AttemptStatus
    world_size: int
    node_ids: tuple[str, ...]
    last_sequence: int
    resumed_from_step: int | None
    step: int | None = None
    stop_reason: Reason | None
    target_node_ids: tuple[str, ...] | None = None
    outcome: Outcome | None
    reason: Reason | None
    failure: Failure | None
    created_at: datetime
    running_at: datetime | None
    ran_s: float = 0.0
    ended_at: datetime | None


class Event(Record):
    """A change in the life of a job.

    Attributes:
        position: place in the job's feed, shared with its metrics; grows, and never skips a late commit.
        kind: such as ``status`` or ``checkpoint``.
        data: what the kind carries.
    """

    position: int
    time: datetime
    kind: str
    attempt: int
    reason: Reason | None
    message: str
    data: dict[str, Any]


class MetricPoint(Record):
    """One value of one metric at one step.

    Attributes:
        position: place in the job's feed; the metrics of one report share it.
        name: such as ``train/loss``.
        value: None where it is not a finite number; ``nonfinite`` then says which.
    """

    position: int
    attempt: int
    step: int
    name: str
    value: float | None
    nonfinite: str | None = None


class CheckpointFile(Record):
    """A file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: str


class Checkpoint(Record):
    """A committed checkpoint.

    Attributes:
        path: directory, relative to the run storage's root.
        manifest_sha256: hash of ``manifest.json``, which holds those of all other files.
        metrics: the values reported with it.
    """

    job_id: str
    attempt: int
    step: int
    path: str
    manifest_sha256: str
    files: tuple[CheckpointFile, ...]
    metrics: dict[str, float]
    created_at: datetime
