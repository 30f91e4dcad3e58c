"""Implementations of the domain's ports in memory, and the API over them on a port of this machine.

They keep the promises that the ports write down, so the contract suites run on them too.
"""

import base64
import binascii
import copy
import hashlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.domain.curve import Bucket, Curve
from service.domain.errors import (
    FieldProblem,
    IdempotencyConflict,
    InvalidCursor,
    InvalidSpec,
    InvalidTransition,
    LeaseLost,
    NotFound,
    StaleWrite,
    Unavailable,
)
from service.domain.job import (
    DEFAULT_OWNER,
    Attempt,
    AttemptStatus,
    Checkpoint,
    CheckpointFile,
    Event,
    Failure,
    Job,
    JobStatus,
    MetricPoint,
    Origin,
    Outcome,
    Reason,
    check_transition,
)
from service.domain.journal import (
    CheckpointQuarantined,
    CheckpointWritten,
    Ended,
    ExactnessFound,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Report,
    Resumed,
    Running,
    Warned,
    utc_now,
)
from service.domain.placement import Node
from service.domain.ports import (
    ClusterSnapshot,
    Feed,
    Followed,
    HeldBack,
    IdempotencyKey,
    JobPage,
    Lease,
    LeaseState,
    LiveAttempt,
    LogPart,
)
from service.domain.queue import DEFAULT_QUEUE, Queue, QueueState
from service.domain.retry import Ending, NextStep, after_attempt, describe_retry
from service.domain.spec import JobSpec, parse_spec
from tests.fake_uploads import FakeUploadFiles, FakeUploadStore

if TYPE_CHECKING:
    from service.api.server import ApiServer

LIVE = (AttemptStatus.CREATED, AttemptStatus.LAUNCHED, AttemptStatus.RUNNING, AttemptStatus.ENDED)


@dataclass(kw_only=True)
class _Row:
    """All that is kept of one job; what is superseded stays, but does not count.

    Attributes:
        superseded_points: (position, name).
        superseded_checkpoints: (attempt, step).
        running_from_s: when an attempt began to run, in seconds since its supervisor did, by number.
        said: what an attempt said at its end, by number.
    """

    number: int
    job: Job
    attempts: list[Attempt] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    points: list[MetricPoint] = field(default_factory=list)
    checkpoints: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)
    superseded_points: set[tuple[int, str]] = field(default_factory=set)
    superseded_checkpoints: set[tuple[int, int]] = field(default_factory=set)
    quarantined: set[tuple[int, int]] = field(default_factory=set)
    running_from_s: dict[int, float] = field(default_factory=dict)
    said: dict[int, str] = field(default_factory=dict)
    position: int = 0
    start_by: float | None = None

    def change(self, **values: object) -> None:
        self.job = self.job.model_copy(update=values)

    def change_attempt(self, number: int, **values: object) -> None:
        self.attempts[number - 1] = self.attempts[number - 1].model_copy(update=values)

    def add_event(
        self, kind: str, message: str, reason: Reason | None = None, *, time: datetime | None = None, **data: object
    ) -> None:
        self.position += 1
        self.events.append(
            Event(
                position=self.position,
                time=time or utc_now(),
                kind=kind,
                attempt=self.job.attempt,
                reason=reason,
                message=message,
                data=data,
            )
        )

    def move(self, status: JobStatus, reason: Reason, message: str, *, time: datetime | None = None) -> None:
        check_transition(self.job.status, status)
        self.add_event("status", message, reason, time=time, **{"from": self.job.status, "to": status})
        self.change(status=status, reason=reason, message=message)
        if status.is_terminal:
            self.change(ended_at=utc_now())
        if status is not JobStatus.QUEUED:
            self.change(not_before=None)
        if status.is_terminal or status is JobStatus.PAUSED:
            self.change(cancel_requested=False, pause_requested=False, resize_requested=False)

    def counting_points(self) -> list[MetricPoint]:
        return [point for point in self.points if (point.position, point.name) not in self.superseded_points]

    def counting(self) -> list[Checkpoint]:
        left_out = self.superseded_checkpoints | self.quarantined
        return sorted(
            (one for key, one in self.checkpoints.items() if key not in left_out),
            key=lambda checkpoint: checkpoint.step,
        )


def naive_curves(
    points: Sequence[MetricPoint], width: int, from_step: int = 0, to_step: int | None = None
) -> dict[str, Curve]:
    """Roll points up, by the definition."""
    groups: dict[str, dict[int, list[MetricPoint]]] = {}
    for point in sorted(points, key=lambda point: point.step):
        place = point.step // width
        if from_step // width <= place and (to_step is None or place <= to_step // width):
            groups.setdefault(point.name, {}).setdefault(place, []).append(point)
    return {
        name: Curve(bucket_steps=width, buckets=tuple(_naive_bucket(group) for group in of_name.values()))
        for name, of_name in sorted(groups.items())
    }


def _naive_bucket(points: list[MetricPoint]) -> Bucket:
    values = [Fraction(point.value) for point in points if point.value is not None]
    return Bucket(
        first_step=points[0].step,
        last_step=points[-1].step,
        finite_count=len(values),
        nonfinite_count=len(points) - len(values),
        min=float(min(values)) if values else None,
        mean=float(sum(values) / len(values)) if values else None,
        max=float(max(values)) if values else None,
        last=points[-1].value,
        last_nonfinite=points[-1].nonfinite,
        attempt=points[-1].attempt,
    )


class FakeJobStore:
    """``JobStore`` and ``SchedulerStore`` in memory.

    ``unavailable`` makes every call raise ``Unavailable``; ``error`` makes every call raise that.
    """

    def __init__(self) -> None:
        self.unavailable = False
        self.error: Exception | None = None
        self._lock = threading.RLock()
        self._rows: dict[str, _Row] = {}
        self._keys: dict[tuple[str, str, str], tuple[str, str]] = {}
        self._nodes = ClusterSnapshot(nodes=(), observed_at=None)
        self._lease = LeaseState(holder=None, epoch=0, num_renewals=0)
        self._queues = {DEFAULT_QUEUE: Queue(name=DEFAULT_QUEUE)}
        self._usage_s: dict[str, float] = {}

    # What the API needs.

    def submit(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        with self._transaction():
            earlier = self._replayed(key)
            if earlier is not None:
                return earlier, False
            job = self._add(spec, Reason.SUBMITTED, owner)
            self._claim(key, job.id)
            return job, True

    def submit_soon(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> Future[tuple[Job, bool]]:
        future: Future[tuple[Job, bool]] = Future()
        try:
            future.set_result(self.submit(spec, owner=owner, key=key))
        except Exception as error:
            future.set_exception(error)
        return future

    def _add(self, spec: JobSpec, reason: Reason, owner: str, origin: Origin | None = None) -> Job:
        self._check_relations(spec)
        number = len(self._rows) + 1
        reason, status = (Reason.HELD, JobStatus.PAUSED) if spec.hold else (reason, JobStatus.QUEUED)
        job = Job(
            id=f"job-{number:04d}",
            owner=owner,
            spec=spec,
            status=status,
            reason=reason,
            message="Waits to be placed.",
            attempt=0,
            retries_used=0,
            step=0 if origin is None else origin.step,
            num_steps=spec.num_steps,
            cancel_requested=False,
            forked_from=origin,
            running_s=0.0,
            failure=None,
            created_at=utc_now(),
            started_at=None,
            ended_at=None,
        )
        row = self._rows[job.id] = _Row(number=number, job=job)
        if spec.start_deadline_s is not None:
            row.start_by = time.monotonic() + spec.start_deadline_s
        row.add_event("status", job.message, reason, time=job.created_at, **{"from": None, "to": status})
        return job

    def unfinished_before(self, spec: JobSpec) -> tuple[str, ...]:
        with self._transaction():
            self._check_relations(spec)
            return tuple(sorted(one for one in spec.after if self._rows[one].job.status is not JobStatus.SUCCEEDED))

    def _check_relations(self, spec: JobSpec) -> None:
        problems = []
        if spec.queue not in self._queues:
            problems.append(FieldProblem(field="queue", message="there is no such queue."))
        for place, job_id in enumerate(spec.after):
            if job_id not in self._rows:
                problems.append(FieldProblem(field=f"after.{place}", message="there is no such job."))
            elif self._rows[job_id].job.status in (JobStatus.FAILED, JobStatus.CANCELLED):
                problems.append(FieldProblem(field=f"after.{place}", message="it has ended without success."))
        if problems:
            raise InvalidSpec("The job cannot be queued.", tuple(problems))

    def replayed(self, key: IdempotencyKey) -> Job | None:
        with self._transaction():
            return self._replayed(key)

    def _replayed(self, key: IdempotencyKey | None) -> Job | None:
        name = None if key is None else (key.owner, key.route, key.key)
        if key is None or name is None or name not in self._keys:
            return None
        body_sha256, job_id = self._keys[name]
        if body_sha256 != key.body_sha256:
            raise IdempotencyConflict(f"The idempotency key {key.key!r} was used before with another body.")
        return self._rows[job_id].job

    def _claim(self, key: IdempotencyKey | None, job_id: str) -> None:
        if key is not None:
            self._keys[key.owner, key.route, key.key] = (key.body_sha256, job_id)

    def get(self, job_id: str) -> Job:
        with self._transaction():
            return self._row(job_id).job

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
        with self._transaction():
            before = len(self._rows) + 1 if cursor is None else _decode_cursor(cursor)
            found = [
                row
                for row in sorted(self._rows.values(), key=lambda row: -row.number)
                if row.number < before
                and (not statuses or row.job.status in statuses)
                and name in (None, row.job.spec.name)
                and queue in (None, row.job.spec.queue)
                and owner in (None, row.job.owner)
                and all(row.job.spec.labels.get(key) == value for key, value in labels)
            ]
            shown = found[:limit]
            return JobPage(
                jobs=tuple(row.job for row in shown),
                next_cursor=_encode_cursor(shown[-1].number) if len(found) > limit else None,
            )

    def request_cancel(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, self._cancel)

    def _cancel(self, row: _Row) -> None:
        job = row.job
        if job.status in (JobStatus.QUEUED, JobStatus.PAUSED):
            row.move(JobStatus.CANCELLED, Reason.CANCELLED, "Cancelled.")
        elif job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
            raise InvalidTransition(f"Job {row.job.id} has already {job.status}; there is nothing left to cancel.")
        elif (
            job.status in (JobStatus.STARTING, JobStatus.RUNNING) or job.pause_requested
        ) and not job.cancel_requested:
            row.change(cancel_requested=True)
            row.add_event("cancel_requested", "Asked to cancel.", Reason.CANCEL_REQUESTED)

    def request_pause(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, self._pause)

    def _pause(self, row: _Row) -> None:
        job = row.job
        if job.status is JobStatus.QUEUED:
            row.move(JobStatus.PAUSED, Reason.PAUSED, "Paused.")
        elif (
            job.status.is_terminal
            or job.cancel_requested
            or (job.status is JobStatus.STOPPING and not job.pause_requested)
        ):
            raise InvalidTransition(f"Job {row.job.id} is {job.status}; there is nothing left to pause.")
        elif job.status is not JobStatus.PAUSED and not job.pause_requested:
            row.change(pause_requested=True)
            row.add_event("pause_requested", "Asked to pause.", Reason.PAUSE_REQUESTED)

    def resume(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, self._resume)

    def _resume(self, row: _Row) -> None:
        if row.job.status is JobStatus.SUCCEEDED:
            raise InvalidTransition(f"Job {row.job.id} has done all its steps. Fork it with more steps to go on.")
        if row.job.status not in (JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED):
            raise InvalidTransition(
                f"Job {row.job.id} is {row.job.status}; nothing to resume. Wait until it has stopped."
            )
        if row.job.spec.queue not in self._queues:
            raise InvalidTransition(f"Queue {row.job.spec.queue} is gone. Make it again, or fork with another queue.")
        if row.job.reason is Reason.TIMEOUT:
            row.change(running_s=0.0)
        row.change(retries_used=0, preemptions_used=0, failure=None, ended_at=None)
        if row.job.spec.start_deadline_s is not None and row.job.started_at is None:
            row.start_by = time.monotonic() + row.job.spec.start_deadline_s
        row.move(JobStatus.QUEUED, Reason.RESUMED, "Resumed.")

    def request_resize(self, job_id: str, workers: int, *, key: IdempotencyKey | None = None) -> Job:
        def resize(row: _Row) -> None:
            job = row.job
            if job.status.is_terminal or job.status is JobStatus.STOPPING or job.cancel_requested:
                raise InvalidTransition(f"Job {job_id} is {job.status}; it is not resized any more.")
            live = [attempt for attempt in row.attempts if attempt.status in LIVE]
            row.change(workers_wanted=workers, resize_requested=bool(live) and live[0].world_size != workers)
            row.add_event("resize_requested", f"Asked for {workers}.", Reason.RESIZED, workers=workers)

        return self._wish(job_id, key, resize)

    def fork(
        self, spec: JobSpec, origin: Origin, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        with self._transaction():
            parent = self._row(origin.job_id)
            earlier = self._replayed(key)
            if earlier is not None:
                return earlier, False
            if (origin.attempt, origin.step) not in {(one.attempt, one.step) for one in parent.counting()}:
                raise NotFound(f"The checkpoint of step {origin.step} of job {origin.job_id} was removed.")
            job = self._add(spec, Reason.FORKED, owner, origin)
            parent.add_event("forked", f"Forked at step {origin.step}.", job_id=job.id)
            self._claim(key, job.id)
            return job, True

    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        with self._transaction():
            return tuple(self._row(job_id).attempts)

    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        with self._transaction():
            return tuple([event for event in self._row(job_id).events if event.position > after][:limit])

    def metrics(
        self, job_id: str, *, names: Sequence[str] = (), after_step: int = -1, to_step: int | None = None
    ) -> tuple[MetricPoint, ...]:
        with self._transaction():
            row = self._row(job_id)
            points = [
                point
                for point in row.counting_points()
                if point.step > after_step
                and (to_step is None or point.step <= to_step)
                and (not names or point.name in names)
            ]
            return tuple(sorted(points, key=lambda point: (point.step, point.name)))

    def curves(
        self,
        job_id: str,
        *,
        max_points: int,
        names: Sequence[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
    ) -> Mapping[str, Curve]:
        width = 1
        while True:
            curves = naive_curves(self.metrics(job_id, names=names), width, from_step, to_step)
            if all(len(curve.buckets) <= max_points for curve in curves.values()):
                return curves
            width *= 2

    def _feed(self, job_id: str, *, after: int, limit: int) -> Feed:
        with self._transaction():
            row = self._row(job_id)
            events = [event for event in row.events if event.position > after]
            points = [point for point in row.counting_points() if point.position > after]
            positions = sorted({event.position for event in events} | {point.position for point in points})[:limit]
            last = positions[-1] if len(positions) == limit else row.position
            return Feed(
                events=tuple(event for event in events if event.position <= last),
                points=tuple(point for point in points if point.position <= last),
                position=last,
            )

    def follow(self, after: Mapping[str, int], *, limit: int = 10_000) -> Mapping[str, Followed]:
        with self._transaction():
            share = max(1, limit // max(1, len(after)))
            found = {}
            for job_id, position in after.items():
                if job_id in self._rows:
                    job, feed = self._rows[job_id].job, self._feed(job_id, after=position, limit=share)
                    found[job_id] = Followed(
                        feed=feed,
                        has_more=feed.position < self._rows[job_id].position,
                        status=job.status,
                        reason=job.reason,
                        message=job.message,
                    )
            return found

    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        with self._transaction():
            return tuple(self._row(job_id).counting())

    def cluster(self) -> ClusterSnapshot:
        with self._transaction():
            return self._nodes

    def queue_states(self) -> tuple[QueueState, ...]:
        with self._transaction():
            return tuple(
                QueueState(
                    queue=queue,
                    usage_s=self._usage_s.get(name, 0.0),
                    num_queued=sum(
                        row.job.spec.queue == name and row.job.status is JobStatus.QUEUED for row in self._rows.values()
                    ),
                    num_live=sum(
                        row.job.spec.queue == name and attempt.status in LIVE
                        for row in self._rows.values()
                        for attempt in row.attempts
                    ),
                )
                for name, queue in sorted(self._queues.items())
            )

    def put_queue(self, queue: Queue) -> bool:
        with self._transaction():
            is_new = queue.name not in self._queues
            self._queues[queue.name] = queue
            return is_new

    def remove_queue(self, name: str) -> None:
        with self._transaction():
            if name not in self._queues:
                raise NotFound(f"There is no queue {name!r}.")
            in_it = [row for row in self._rows.values() if row.job.spec.queue == name]
            if name == DEFAULT_QUEUE or not all(row.job.status.is_terminal for row in in_it):
                raise InvalidTransition(f"Queue {name} cannot be removed.")
            del self._queues[name]
            self._usage_s.pop(name, None)

    def ping(self) -> None:
        with self._transaction():
            pass

    # What the scheduler needs.

    def read_lease(self) -> LeaseState:
        with self._transaction():
            return self._lease

    def take_lease(self, holder: str, *, seen: LeaseState) -> Lease | None:
        with self._transaction():
            if self._lease != seen:
                return None
            self._lease = LeaseState(holder=holder, epoch=seen.epoch + 1, num_renewals=0)
            return Lease(holder=holder, epoch=seen.epoch + 1)

    def renew_lease(self, lease: Lease) -> None:
        with self._transaction(lease):
            self._lease = replace(self._lease, num_renewals=self._lease.num_renewals + 1)

    def release_lease(self, lease: Lease) -> None:
        with self._transaction():
            if self._holds(lease):
                self._lease = replace(self._lease, holder=None)

    def _holds(self, lease: Lease) -> bool:
        return (lease.holder, lease.epoch) == (self._lease.holder, self._lease.epoch)

    def record_nodes(self, lease: Lease, nodes: Sequence[Node]) -> None:
        with self._transaction(lease):
            self._nodes = ClusterSnapshot(nodes=tuple(nodes), observed_at=utc_now())

    def queued_jobs(self, limit: int = 1000) -> tuple[Job, ...]:
        with self._transaction():
            queued = [row for row in self._rows.values() if row.job.status is JobStatus.QUEUED]
            held_back = self.held_back()
            queued.sort(key=lambda row: (row.job.id in held_back, -row.job.spec.priority, row.number))
            counts: Counter[str] = Counter()
            listed = []
            for row in queued:
                counts[row.job.spec.queue] += 1
                if counts[row.job.spec.queue] <= limit:
                    listed.append(row)
            listed.sort(key=lambda row: (-row.job.spec.priority, row.number))
            return tuple(row.job for row in listed)

    def held_back(self) -> Mapping[str, HeldBack]:
        with self._transaction():
            now = utc_now()
            held = {}
            for job in (row.job for row in self._rows.values() if row.job.status is JobStatus.QUEUED):
                unfinished = tuple(
                    sorted(one for one in job.spec.after if self._rows[one].job.status is not JobStatus.SUCCEEDED)
                )
                retry_in_s = 0.0 if job.not_before is None else max(0.0, (job.not_before - now).total_seconds())
                if unfinished or retry_in_s:
                    held[job.id] = HeldBack(waits_for=unfinished, retry_in_s=retry_in_s)
            return held

    def fail_hopeless(self, lease: Lease) -> tuple[str, ...]:
        with self._transaction(lease):
            failed = []
            for row in self._rows.values():
                job = row.job
                if job.status is not JobStatus.QUEUED:
                    continue
                before = {self._rows[one].job.status for one in job.spec.after}
                if before & {JobStatus.FAILED, JobStatus.CANCELLED}:
                    row.move(JobStatus.FAILED, Reason.DEPENDENCY_FAILED, "A job that it comes after has failed.")
                elif row.start_by is not None and job.started_at is None and time.monotonic() >= row.start_by:
                    row.move(JobStatus.FAILED, Reason.START_DEADLINE, "It had not started in time.")
                else:
                    continue
                failed.append(job.id)
                if len(failed) == 200:
                    break
            return tuple(failed)

    def queues(self) -> tuple[Queue, ...]:
        with self._transaction():
            return tuple(queue for _, queue in sorted(self._queues.items()))

    def queue_usage(self) -> Mapping[str, float]:
        with self._transaction():
            return {name: self._usage_s.get(name, 0.0) for name in self._queues}

    def record_usage(self, lease: Lease, usage_s: Mapping[str, float]) -> None:
        with self._transaction(lease):
            self._usage_s.update({name: value for name, value in usage_s.items() if name in self._queues})

    def live_attempts(self) -> tuple[LiveAttempt, ...]:
        with self._transaction():
            return tuple(
                LiveAttempt(job=row.job, attempt=attempt)
                for row in self._rows.values()
                for attempt in row.attempts
                if attempt.status in LIVE
            )

    def create_attempt(self, lease: Lease, job_id: str, *, node_ids: Sequence[str]) -> Attempt | None:
        with self._transaction(lease):
            row = self._row(job_id)
            if row.job.status is not JobStatus.QUEUED:
                return None
            return self._begin(row, node_ids, Reason.ADMITTED)

    def mark_resizing(self, lease: Lease, job_id: str, number: int, *, node_ids: Sequence[str], message: str) -> None:
        with self._transaction(lease):
            row = self._row(job_id)
            self._check_current(row, number)
            attempt, job = row.attempts[number - 1], row.job
            if (
                job.status is JobStatus.RUNNING
                and attempt.status is not AttemptStatus.ENDED
                and attempt.stop_reason is None
                and not (job.cancel_requested or job.pause_requested)
            ):
                row.change_attempt(number, stop_reason=Reason.RESIZED, target_node_ids=tuple(node_ids))
                row.add_event("stop_requested", message, Reason.RESIZED, world_size=len(node_ids))

    def _begin(self, row: _Row, node_ids: Sequence[str], reason: Reason) -> Attempt:
        attempt = Attempt(
            job_id=row.job.id,
            number=row.job.attempt + 1,
            status=AttemptStatus.CREATED,
            world_size=len(node_ids),
            node_ids=tuple(node_ids),
            last_sequence=0,
            resumed_from_step=None,
            stop_reason=None,
            outcome=None,
            reason=None,
            failure=None,
            created_at=utc_now(),
            running_at=None,
            ended_at=None,
        )
        row.attempts.append(attempt)
        row.change(attempt=attempt.number)
        if len(node_ids) == row.job.workers_wanted:
            row.change(resize_requested=False)
        row.move(JobStatus.STARTING, reason, f"Placed on {len(node_ids)} worker(s); starting.")
        row.add_event("attempt_created", f"Attempt {attempt.number} created.", world_size=len(node_ids))
        return attempt

    def mark_preempting(self, lease: Lease, job_id: str, number: int, *, message: str) -> None:
        with self._transaction(lease):
            row = self._row(job_id)
            self._check_current(row, number)
            attempt = row.attempts[number - 1]
            if attempt.status is AttemptStatus.ENDED or attempt.stop_reason is not None or _wish_of(row.job):
                return
            row.change_attempt(number, stop_reason=Reason.PREEMPTED)
            row.add_event("stop_requested", message, Reason.PREEMPTED)

    def set_message(self, lease: Lease, job_id: str, message: str) -> None:
        with self._transaction(lease):
            row = self._row(job_id)
            if row.job.status is JobStatus.QUEUED:
                row.change(message=message)

    def ingest(self, lease: Lease, job_id: str, number: int, records: Sequence[JournalRecord]) -> None:
        with self._transaction(lease):
            row = copy.deepcopy(self._row(job_id))  # all of the records or none
            if number != row.job.attempt or row.attempts[number - 1].status is AttemptStatus.SEALED:
                raise StaleWrite(f"Attempt {number} of job {job_id} is not current.")
            for record in records:
                last = row.attempts[number - 1].last_sequence
                if record.sequence <= last:
                    continue
                if record.sequence != last + 1:
                    raise ValueError(f"record {record.sequence} follows {last}")
                other = getattr(record.report, "job_id", None)
                _take(row, number, record, row if other in (None, job_id) else self._row(other))
                attempt = row.attempts[number - 1]
                if attempt.running_at is not None:
                    row.running_from_s.setdefault(number, record.elapsed_s)
                    row.change_attempt(number, ran_s=record.elapsed_s - row.running_from_s[number])
                row.change_attempt(number, last_sequence=record.sequence)
            self._rows[job_id] = row

    def mark_stopping(self, lease: Lease, job_id: str, number: int, reason: Reason) -> None:
        with self._transaction(lease):
            row = self._row(job_id)
            self._check_current(row, number)
            if row.job.status is JobStatus.STOPPING or row.attempts[number - 1].stop_reason is reason:
                return
            row.change_attempt(number, stop_reason=reason)
            if reason is Reason.SERVICE_STOPPED:
                row.add_event("stop_requested", "Asked to stop: the service stops.", reason)
            else:
                row.move(JobStatus.STOPPING, reason, f"Asked to stop: {reason}.")

    def _check_current(self, row: _Row, number: int) -> None:
        if number != row.job.attempt or row.attempts[number - 1].status is AttemptStatus.SEALED:
            raise StaleWrite(f"Attempt {number} of job {row.job.id} is not current.")

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
        with self._transaction(lease):
            row = self._row(job_id)
            if not 1 <= number <= len(row.attempts):
                raise StaleWrite(f"Job {job_id} has no attempt {number}.")
            attempt = row.attempts[number - 1]
            if attempt.status is AttemptStatus.SEALED:
                return row.job
            failure = failure or attempt.failure
            row.change_attempt(
                number,
                status=AttemptStatus.SEALED,
                outcome=outcome,
                reason=reason,
                failure=failure,
                ended_at=attempt.ended_at or utc_now(),
            )
            if attempt.ended_at is None:
                row.add_event("ended", f"Attempt {number} ended: {reason}.", reason, outcome=outcome)
            row.change(running_s=row.job.running_s + attempt.ran_s)
            following = _following(row, outcome, reason, is_placed=next_node_ids is not None)
            if following.status is JobStatus.STARTING:
                assert next_node_ids is not None
                self._begin(row, next_node_ids, following.reason)
            else:
                _move_on(row, following, reason, failure)
            return row.job

    def resumable_checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        with self._transaction():
            row = self._row(job_id)
            origin = row.job.forked_from
            own = row.counting()[::-1]
            if origin is None:
                return tuple(own)
            parent, key = self._row(origin.job_id), (origin.attempt, origin.step)
            is_there = key in parent.checkpoints and key not in parent.quarantined
            return (*own, *([parent.checkpoints[key]] if is_there else []))

    def retire_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        with self._transaction(lease):
            self._row(job_id).superseded_checkpoints.add((attempt, step))

    def removable_checkpoints(self, job_id: str | None = None) -> tuple[Checkpoint, ...]:
        with self._transaction():
            needed = [
                row.job.forked_from
                for row in self._rows.values()
                if row.job.forked_from is not None and not row.counting() and not row.job.status.is_terminal
            ]
            return tuple(
                row.checkpoints[attempt, step]
                for row in (self._rows.values() if job_id is None else [self._row(job_id)])
                for attempt, step in sorted(row.checkpoints, key=lambda key: key[::-1])
                if (attempt, step) in row.superseded_checkpoints | row.quarantined
                and Origin(job_id=row.job.id, attempt=attempt, step=step) not in needed
            )

    def committed_paths(self, job_id: str, attempt: int) -> frozenset[str]:
        with self._transaction():
            found = self._row(job_id).checkpoints.items()
            return frozenset(checkpoint.path for (number, _), checkpoint in found if number == attempt)

    def forget_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        with self._transaction(lease):
            self._row(job_id).checkpoints.pop((attempt, step), None)

    def _wish(self, job_id: str, key: IdempotencyKey | None, effect: Callable[[_Row], None]) -> Job:
        with self._transaction():
            row = self._row(job_id)
            if self._replayed(key) is None:
                effect(row)
                self._claim(key, job_id)
            return row.job

    @contextmanager
    def _transaction(self, lease: Lease | None = None) -> Iterator[None]:
        with self._lock:
            if self.error is not None:
                raise self.error
            if self.unavailable:
                raise Unavailable("The database does not answer.")
            if lease is not None and not self._holds(lease):
                raise LeaseLost(f"{lease.holder} no longer leads.")
            yield

    def _row(self, job_id: str) -> _Row:
        if job_id not in self._rows:
            raise NotFound(f"There is no job {job_id!r}.")
        return self._rows[job_id]


def _take(row: _Row, number: int, record: JournalRecord, damaged: _Row) -> None:
    time = record.time
    match record.report:
        case Launched(supervisor_pid=pid):
            _advance(row, number, AttemptStatus.LAUNCHED)
            row.add_event("launched", "The supervisor runs.", time=time, supervisor_pid=pid)
        case Placed(node_ids=node_ids):
            row.change_attempt(number, node_ids=node_ids)
            row.add_event("placed", f"{len(node_ids)} worker(s) have a process.", time=time)
        case Resumed(step=step):
            row.superseded_points |= {(point.position, point.name) for point in row.points if point.step > step}
            row.superseded_checkpoints |= {key for key in row.checkpoints if key[1] > step}
            row.change_attempt(number, resumed_from_step=step)
            row.change(step=step)
            row.add_event("resumed", f"Continues from step {step}.", time=time, step=step)
        case Running(num_steps=num_steps):
            _advance(row, number, AttemptStatus.RUNNING)
            row.change_attempt(number, running_at=row.attempts[number - 1].running_at or time)
            row.change(num_steps=num_steps, started_at=row.job.started_at or time)
            if row.job.status is JobStatus.STARTING:
                row.move(JobStatus.RUNNING, Reason.ALL_RANKS_STEPPED, "Every rank trains.", time=time)
        case Metrics(step=step, values=values, nonfinite=nonfinite):
            names = values.keys() | nonfinite.keys()
            if not names:
                return
            row.superseded_points |= {
                (point.position, point.name) for point in row.points if point.step == step and point.name in names
            }
            row.position += 1
            row.points.extend(
                MetricPoint(
                    position=row.position,
                    attempt=number,
                    step=step,
                    name=name,
                    value=values.get(name),
                    nonfinite=nonfinite.get(name),
                )
                for name in sorted(names)
            )
            _reach(row, number, step)
        case CheckpointWritten(step=step):
            row.superseded_checkpoints |= {key for key in row.checkpoints if key[1] == step}
            row.superseded_checkpoints -= {(number, step)}
            row.quarantined -= {(number, step)}
            row.checkpoints[number, step] = Checkpoint(
                job_id=row.job.id,
                attempt=number,
                created_at=time,
                **record.report.model_dump(exclude={"kind"}),
            )
            _reach(row, number, step)
            row.add_event("checkpoint", f"Checkpoint of step {step}.", time=time, step=step)
        case CheckpointQuarantined(step=step, message=message, attempt=attempt):
            counting = damaged.checkpoints.keys() - damaged.superseded_checkpoints
            keys = counting if attempt is None else {(attempt, step)}
            damaged.quarantined |= {key for key in keys if key[1] == step}
            row.add_event("checkpoint_quarantined", message, time=time, step=step, job_id=damaged.job.id)
        case Warned(message=message, rank=rank):
            row.add_event("warning", message, time=time, rank=rank)
        case ExactnessFound(exact=exact, reasons=reasons) as report:
            row.change(exact=exact, exactness=report.message)
            row.add_event("exactness", report.message, time=time, exact=exact, reasons=list(reasons))
        case Ended(outcome=outcome, reason=reason, failure=failure, step=step, message=message):
            _advance(row, number, AttemptStatus.ENDED)
            row.change_attempt(number, outcome=outcome, reason=reason, failure=failure, ended_at=time)
            row.said[number] = message
            _reach(row, number, step)
            row.add_event("ended", message, reason, time=time, outcome=outcome, step=step)


def _reach(row: _Row, number: int, step: int) -> None:
    row.change(step=max(step, row.job.step))
    row.change_attempt(number, step=max(step, row.attempts[number - 1].step or 0))


def _advance(row: _Row, number: int, status: AttemptStatus) -> None:
    order = list(AttemptStatus)
    row.change_attempt(number, status=max(row.attempts[number - 1].status, status, key=order.index))


def _wish_of(job: Job) -> Reason | None:
    if job.cancel_requested:
        return Reason.CANCEL_REQUESTED
    return Reason.PAUSE_REQUESTED if job.pause_requested else None


def _following(row: _Row, outcome: Outcome, reason: Reason, *, is_placed: bool) -> NextStep:
    job, stop_reason, wish = row.job, row.attempts[-1].stop_reason, _wish_of(row.job)
    return after_attempt(
        outcome=outcome,
        reason=reason,
        status=job.status if wish is None else JobStatus.STOPPING,
        stop_reason=stop_reason if wish is None or stop_reason is Reason.TIMEOUT else wish,
        retries_used=job.retries_used,
        retry=job.spec.retry,
        endings=_endings(row),
        is_placed=is_placed,
    )


def _endings(row: _Row) -> list[Ending]:
    resumed_after = max([event.attempt for event in row.events if event.reason is Reason.RESUMED], default=0)
    return [
        Ending(
            reason=attempt.reason,
            error_type=None if attempt.failure is None else attempt.failure.error_type,
            step=attempt.step,
        )
        for attempt in row.attempts[resumed_after:]
        if attempt.reason is not None
    ]


def _move_on(row: _Row, following: NextStep, reason: Reason, failure: Failure | None) -> None:
    job = row.job
    row.change(
        retries_used=job.retries_used + following.costs_retry,
        preemptions_used=job.preemptions_used + (following.reason is Reason.PREEMPTED),
    )
    message = row.said.get(job.attempt) or f"Attempt {job.attempt} ended: {reason}."
    if following.status is JobStatus.FAILED:
        row.change(failure=failure)
        message = f"{failure.error_type}: {failure.message}" if failure else message
    elif following.costs_retry:
        if following.pause_s:
            row.change(not_before=utc_now() + timedelta(seconds=following.pause_s))
        message = describe_retry(
            attempt=job.attempt,
            reason=reason,
            retry_number=job.retries_used + 1,
            budget=job.spec.retry.budget,
            pause_s=following.pause_s,
        )
        row.add_event(
            "retry",
            message,
            reason,
            retry=job.retries_used + 1,
            budget=job.spec.retry.budget,
            pause_s=following.pause_s,
        )
    wish = _wish_of(job)
    if (
        following.status in (JobStatus.CANCELLED, JobStatus.PAUSED)
        and job.status is not JobStatus.STOPPING
        and wish is not None
    ):
        row.move(JobStatus.STOPPING, wish, "Asked to stop.")
    row.move(following.status, following.reason, message)


def _encode_cursor(number: int) -> str:
    return base64.urlsafe_b64encode(f"fake:{number}".encode()).decode()


def _decode_cursor(cursor: str) -> int:
    try:
        prefix, _, number = base64.urlsafe_b64decode(cursor).decode().partition(":")
        if prefix == "fake":
            return int(number)
    except (binascii.Error, ValueError):
        pass
    raise InvalidCursor("The cursor is not one that this service hands out. Start again without a cursor.")


class FakeRunFiles:
    """``RunFiles`` in memory: ``files`` by path, ``logs`` by (job, attempt, rank), ``journals`` by (job, attempt).

    ``log_starts`` says where a log begins that is not kept whole.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.logs: dict[tuple[str, int, int], bytes] = {}
        self.log_starts: dict[tuple[str, int, int], int] = {}
        self.journals: dict[tuple[str, int], list[JournalRecord]] = {}
        self.launched: set[tuple[str, int]] = set()

    def size(self, path: str) -> int:
        return len(self._file(path))

    def read(self, path: str, start: int, stop: int) -> bytes:
        return self._file(path)[start:stop]

    def log_size(self, job_id: str, attempt: int, rank: int) -> int:
        return len(self.logs.get((job_id, attempt, rank), b""))

    def read_log(self, job_id: str, attempt: int, rank: int, start: int, num_bytes: int) -> LogPart:
        start = max(start, self.log_starts.get((job_id, attempt, rank), 0))
        return LogPart(start=start, content=self.logs.get((job_id, attempt, rank), b"")[start : start + num_bytes])

    def prevent_launch(self, job_id: str, attempt: int) -> bool:
        return not self.was_launched(job_id, attempt)

    def was_launched(self, job_id: str, attempt: int) -> bool:
        return (job_id, attempt) in self.launched

    def journal(self, job_id: str, attempt: int, *, after: int) -> Iterator[JournalRecord]:
        return (record for record in self.journals.get((job_id, attempt), []) if record.sequence > after)

    def remove_checkpoint(self, path: str) -> None:
        for name in [name for name in self.files if name.startswith(f"{path}/")]:
            del self.files[name]

    def seal(self, job_id: str, attempt: int) -> None:
        pass  # nothing runs on that would look for it

    def remove_uncommitted(self, job_id: str, attempt: int, committed: Set[str]) -> None:
        below = f"jobs/{job_id}/attempts/{attempt}/checkpoints/"
        for name in [
            name for name in self.files if name.startswith(below) and name.rpartition("/")[0] not in committed
        ]:
            del self.files[name]

    def remove_partial_uploads(self, older_than_s: float) -> None:
        pass  # whatever is here is whole

    def _file(self, path: str) -> bytes:
        if path not in self.files:
            raise NotFound(f"There is no file {path}.")
        return self.files[path]


class FakeScheduler:
    """Moves the jobs of a store on, as a scheduler with a cluster would.

    Args:
        store: the jobs.
        files: where checkpoints and logs go.
    """

    def __init__(self, store: FakeJobStore, files: FakeRunFiles) -> None:
        self.store = store
        self.files = files

    def start(self, job_id: str) -> int:
        """Begin an attempt, up to its first step; return its number."""
        spec = self.store.get(job_id).spec
        attempt = self.store.create_attempt(self._lease(), job_id, node_ids=["node"] * spec.workers.max)
        assert attempt is not None
        self.report(job_id, Launched(supervisor_pid=1), Running(num_steps=spec.num_steps or 1))
        return attempt.number

    def report(self, job_id: str, *reports: Report) -> None:
        """Take reports of the current attempt into the store."""
        attempt = self.store.attempts(job_id)[-1]
        records = [
            JournalRecord.model_validate(
                {"sequence": attempt.last_sequence + place, "time": utc_now(), "report": report.model_dump()}
            )
            for place, report in enumerate(reports, 1)
        ]
        self.store.ingest(self._lease(), job_id, attempt.number, records)

    def metrics(self, job_id: str, step: int, **values: float) -> None:
        """Report metrics; ``train_loss`` stands for ``train/loss``."""
        named = {name.replace("_", "/", 1): value for name, value in values.items()}
        self.report(job_id, Metrics.of(step, named))

    def checkpoint(self, job_id: str, step: int, files: Mapping[str, bytes], **metrics: float) -> None:
        """Commit a checkpoint with these files."""
        job = self.store.get(job_id)
        path = f"jobs/{job_id}/attempts/{job.attempt}/checkpoints/{step}"
        manifest = b'{"format": 1}'
        for name, content in {**files, "manifest.json": manifest}.items():
            self.files.files[f"{path}/{name}"] = content
        report = CheckpointWritten(
            step=step,
            path=path,
            manifest_sha256=sha256(manifest),
            files=tuple(
                CheckpointFile(name=name, size_bytes=len(content), sha256=sha256(content))
                for name, content in files.items()
            ),
            metrics={name.replace("_", "/", 1): value for name, value in metrics.items()},
        )
        self.report(job_id, report)

    def end(
        self,
        job_id: str,
        outcome: Outcome = Outcome.SUCCEEDED,
        reason: Reason = Reason.COMPLETED,
        failure: Failure | None = None,
    ) -> Job:
        """End and seal the current attempt."""
        job = self.store.get(job_id)
        return self.store.seal_attempt(
            self._lease(), job_id, job.attempt, outcome=outcome, reason=reason, failure=failure
        )

    def stop(self, job_id: str, reason: Reason = Reason.CANCEL_REQUESTED) -> None:
        """Ask the current attempt to stop."""
        self.store.mark_stopping(self._lease(), job_id, self.store.get(job_id).attempt, reason)

    def _lease(self) -> Lease:
        lease = self.store.take_lease("fake", seen=self.store.read_lease())
        assert lease is not None
        return lease


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class FakeService:
    """The API over a fake store, served on a loopback port by a thread; can be stopped and started again.

    Args:
        token: what it asks for.
        capacity: as ``create_app`` takes it.
    """

    def __init__(self, *, token: str = "secret-token", capacity: Sequence[Node] | None = None) -> None:
        self.store = FakeJobStore()
        self.files = FakeRunFiles()
        self.scheduler = FakeScheduler(self.store, self.files)
        self.uploads = FakeUploadStore()
        self.limits = {"max_bundle_bytes": 1 << 21, "max_dataset_bytes": 1 << 22}
        self.token = token
        self.capacity = capacity
        self.nudges = 0
        self.heartbeat_s = 15.0
        self.was_stopped = False
        self._port = 0
        self._server: ApiServer | None = None
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        """Forget all jobs and files."""
        self.store.__init__()  # type: ignore[misc]
        self.files.__init__()  # type: ignore[misc]
        self.uploads.uploads.clear()
        self.nudges = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the port of the last time if there was one."""
        from service.api.app import create_app
        from service.api.server import api_server, bind
        from service.api.streaming import StreamSettings
        from service.api.uploads import Uploads

        listener = bind(port=self._port)
        self._port = listener.getsockname()[1]
        app = create_app(
            store=self.store,
            files=self.files,
            uploads=Uploads(
                rows=self.uploads,
                files=FakeUploadFiles(self.files),
                directory=Path(tempfile.gettempdir()),
                **self.limits,
            ),
            token=self.token,
            nudge=self._nudge,
            capacity=self.capacity,
            streams=StreamSettings(poll_s=0.01, heartbeat_s=self.heartbeat_s),
        )
        self._server = api_server(app, shutdown_grace_s=1)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server is not None and self._server.started)

    def stop(self) -> None:
        """Stop as a terminated server would; connections under way are ended."""
        self.was_stopped = True
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=10)
            assert not self._thread.is_alive()
            self._server = self._thread = None

    def submit(self, **changes: object) -> Job:
        """Store a job, without the API."""
        return self.store.submit(spec(**changes))[0]

    def _nudge(self) -> None:
        self.nudges += 1


@pytest.fixture(scope="session")
def running_services() -> Iterator[list[FakeService]]:
    """Keep a service from one test to the next: stopping one takes uvicorn a tenth of a second."""
    services: list[FakeService] = []
    yield services
    for service in services:
        service.stop()


@pytest.fixture
def service(running_services: list[FakeService]) -> Iterator[FakeService]:
    """A service without jobs, with its settings as they were made."""
    if not running_services:
        running_services.append(FakeService())
        running_services[0].start()
    service = running_services[0]
    service.reset()
    yield service
    if service.was_stopped:  # a test that did so may have changed what it starts with
        running_services.clear()
        service.stop()


def spec_data(**changes: object) -> dict[str, object]:
    """Return a small job as a user writes it; ``batch__size=4`` changes a field below another."""
    data: dict[str, object] = {
        "name": "digits",
        "model": {"factory": "builtin:mlp"},
        "dataset": {"factory": "builtin:digits"},
        "batch": {"size": 16},
        "steps": 10,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = data
        for parent in parents:
            inner = inner.setdefault(parent, {})  # type: ignore[assignment]
        inner[last] = value
    return data


def spec(**changes: object) -> JobSpec:
    """Return a small job; changes as ``spec_data`` takes them."""
    return parse_spec(spec_data(**changes))


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return when a condition holds; fail if it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold in time"
        time.sleep(0.005)
