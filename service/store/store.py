"""The job database behind the domain's ports: each method is one transaction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime

from sqlalchemy.engine import Connection
from typing_extensions import override

from service.domain.curve import Curve
from service.domain.errors import NotFound
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
from service.domain.ports import (
    ClusterSnapshot,
    Followed,
    HeldBack,
    IdempotencyKey,
    JobPage,
    JobStore,
    Lease,
    LeaseState,
    LiveAttempt,
    SchedulerStore,
)
from service.domain.queue import Queue, QueueState
from service.domain.spec import JobSpec
from service.domain.uploads import NewUpload, Upload, UploadKind, UploadStore
from service.store import (
    attempts,
    checkpoints,
    cluster,
    dependencies,
    feed,
    idempotency,
    intake,
    jobs,
    leases,
    metrics,
    queues,
    rollups,
    uploads,
    wishes,
)
from service.store.clock import read_clock
from service.store.engine import Database
from service.store.group_commit import GroupCommit
from service.store.ids import new_job_id
from service.store.new_jobs import NewJob, add_job, find_unfinished
from service.store.submissions import Submission, submit_all

MAX_STEP = 2**63 - 1


class SqlStore(JobStore, SchedulerStore, UploadStore):
    """The job database; safe to share between threads. ``migrate`` makes its tables.

    Args:
        url: ``sqlite:///path`` or ``postgresql://user@host/name``; connected to when first used.

    Raises:
        ServiceError: from the constructor, for another kind of database or one that is kept in memory.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._submissions = GroupCommit(self._submit_all, name="submissions")
        self._queued = jobs.JobsOfRows()

    def close(self) -> None:
        """Close the connections. The store may still be used, and then connects anew."""
        self._submissions.close()
        self._database.close()

    # For the API

    @override
    def submit(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        return self.submit_soon(spec, owner=owner, key=key).result()

    @override
    def submit_soon(
        self, spec: JobSpec, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> Future[tuple[Job, bool]]:
        return self._submissions.put(Submission(spec=spec, owner=owner, key=key))

    @override
    def unfinished_before(self, spec: JobSpec) -> tuple[str, ...]:
        with self._database.reading() as connection:
            return find_unfinished(connection, spec)

    @override
    def get(self, job_id: str) -> Job:
        with self._database.reading() as connection:
            return jobs.get_job(connection, job_id)

    @override
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
        with self._database.reading() as connection:
            return jobs.list_page(
                connection,
                statuses=statuses,
                exactly={"name": name, "queue": queue, "owner": owner},
                labels=labels,
                limit=limit,
                cursor=cursor,
            )

    @override
    def replayed(self, key: IdempotencyKey) -> Job | None:
        with self._database.reading() as connection:
            job_id = idempotency.find_response(connection, key)
            return None if job_id is None else jobs.get_job(connection, job_id)

    @override
    def request_cancel(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, lambda connection, locked, now: wishes.request_cancel(locked, now))

    @override
    def request_pause(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, lambda connection, locked, now: wishes.request_pause(locked, now))

    @override
    def resume(self, job_id: str, *, key: IdempotencyKey | None = None) -> Job:
        return self._wish(job_id, key, lambda connection, locked, now: wishes.resume(connection, locked, now))

    @override
    def request_resize(self, job_id: str, workers: int, *, key: IdempotencyKey | None = None) -> Job:
        def resize(connection: Connection, locked: jobs.LockedJob, now: datetime) -> None:
            wishes.request_resize(locked, workers, attempts.live_world_size(connection, locked), now)

        return self._wish(job_id, key, resize)

    @override
    def fork(
        self, spec: JobSpec, origin: Origin, *, owner: str = DEFAULT_OWNER, key: IdempotencyKey | None = None
    ) -> tuple[Job, bool]:
        job_id = new_job_id()
        # The parent's lock: its checkpoint is not retired in between.
        with self._database.writing() as connection, jobs.locked_job(connection, origin.job_id) as parent:
            now = read_clock(connection)
            if key is not None:
                earlier_id = idempotency.claim_key(connection, key, job_id, now)
                if earlier_id is not None:
                    return jobs.get_job(connection, earlier_id), False
            listed = checkpoints.list_checkpoints(connection, origin.job_id, parent.number)
            if (origin.attempt, origin.step) not in {(one.attempt, one.step) for one in listed}:
                raise NotFound(f"The checkpoint of step {origin.step} of job {origin.job_id} was removed meanwhile.")
            parent.add_event("forked", f"Forked at step {origin.step}.", time=now, data={"job_id": job_id})
            return add_job(connection, NewJob(id=job_id, spec=spec, owner=owner, origin=origin), now), True

    @override
    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        with self._database.reading() as connection:
            return attempts.list_attempts(connection, job_id, jobs.find_number(connection, job_id))

    @override
    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        with self._database.reading() as connection:
            return feed.list_events(connection, jobs.find_number(connection, job_id), after=after, limit=limit)

    @override
    def metrics(
        self, job_id: str, *, names: Sequence[str] = (), after_step: int = -1, to_step: int | None = None
    ) -> tuple[MetricPoint, ...]:
        with self._database.reading() as connection:
            number = jobs.find_number(connection, job_id)
            rows = metrics.list_points(connection, number, names=names, after_step=after_step, to_step=to_step)
        return tuple(map(metrics.point_of, rows))  # a long curve takes longer than a transaction may rest

    @override
    def curves(
        self,
        job_id: str,
        *,
        max_points: int,
        names: Sequence[str] = (),
        from_step: int = 0,
        to_step: int | None = None,
    ) -> Mapping[str, Curve]:
        with self._database.reading() as connection:
            return rollups.read_curves(
                connection,
                jobs.find_number(connection, job_id),
                names=names,
                from_step=from_step,
                to_step=MAX_STEP if to_step is None else to_step,
                max_points=max_points,
            )

    @override
    def follow(self, after: Mapping[str, int], *, limit: int = 10_000) -> Mapping[str, Followed]:
        with self._database.reading() as connection:
            return feed.follow(connection, after, limit)

    @override
    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        with self._database.reading() as connection:
            return checkpoints.list_checkpoints(connection, job_id, jobs.find_number(connection, job_id))

    @override
    def cluster(self) -> ClusterSnapshot:
        with self._database.reading() as connection:
            return cluster.read_snapshot(connection)

    @override
    def queue_states(self) -> tuple[QueueState, ...]:
        with self._database.reading() as connection:
            return queues.list_states(connection)

    @override
    def put_queue(self, queue: Queue) -> bool:
        with self._database.writing() as connection:
            return queues.put(connection, queue)

    @override
    def remove_queue(self, name: str) -> None:
        with self._database.writing() as connection:
            queues.remove(connection, name)

    @override
    def add_upload(self, new: NewUpload) -> tuple[Upload, bool]:
        with self._database.writing() as connection:
            return uploads.add_upload(connection, new, read_clock(connection))

    @override
    def find_upload(self, kind: UploadKind, sha256: str) -> Upload | None:
        with self._database.reading() as connection:
            return uploads.find_upload(connection, kind, sha256)

    @override
    def list_uploads(self, kind: UploadKind, *, limit: int) -> tuple[Upload, ...]:
        with self._database.reading() as connection:
            return uploads.list_uploads(connection, kind, limit)

    @override
    def ping(self) -> None:
        self.cluster()

    # For the scheduler

    @override
    def read_lease(self) -> LeaseState:
        with self._database.reading() as connection:
            return leases.read(connection)

    @override
    def take_lease(self, holder: str, *, seen: LeaseState) -> Lease | None:
        with self._database.writing() as connection:
            return leases.take(connection, holder, seen)

    @override
    def renew_lease(self, lease: Lease) -> None:
        with self._database.writing() as connection:
            leases.renew(connection, lease)

    @override
    def release_lease(self, lease: Lease) -> None:
        with self._database.writing() as connection:
            leases.release(connection, lease)

    @override
    def record_nodes(self, lease: Lease, nodes: Sequence[Node]) -> None:
        with self._leading(lease) as connection:
            cluster.replace_nodes(connection, nodes, read_clock(connection))

    @override
    def queued_jobs(self, limit: int = 1000) -> tuple[Job, ...]:
        with self._database.reading() as connection:
            rows = jobs.list_queue(connection, limit, read_clock(connection))
        return self._queued.of(rows)  # a long queue takes longer than a transaction may rest

    @override
    def held_back(self) -> Mapping[str, HeldBack]:
        with self._database.reading() as connection:
            return dependencies.list_held_back(connection, read_clock(connection))

    @override
    def fail_hopeless(self, lease: Lease) -> tuple[str, ...]:
        with self._leading(lease) as connection:
            return dependencies.fail_hopeless(connection, read_clock(connection))

    @override
    def queues(self) -> tuple[Queue, ...]:
        with self._database.reading() as connection:
            return queues.list_queues(connection)

    @override
    def queue_usage(self) -> Mapping[str, float]:
        with self._database.reading() as connection:
            return queues.read_usage(connection)

    @override
    def record_usage(self, lease: Lease, usage_s: Mapping[str, float]) -> None:
        with self._leading(lease) as connection:
            queues.write_usage(connection, usage_s)

    @override
    def live_attempts(self) -> tuple[LiveAttempt, ...]:
        with self._database.reading() as connection:
            return attempts.list_live(connection)

    @override
    def create_attempt(self, lease: Lease, job_id: str, *, node_ids: Sequence[str]) -> Attempt | None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            return attempts.create_attempt(connection, locked, node_ids, read_clock(connection))

    @override
    def mark_resizing(self, lease: Lease, job_id: str, number: int, *, node_ids: Sequence[str], message: str) -> None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            attempt = attempts.current_attempt(connection, locked, number)
            now = read_clock(connection)
            attempts.mark_resizing(connection, locked, attempt, node_ids=node_ids, message=message, time=now)

    @override
    def mark_preempting(self, lease: Lease, job_id: str, number: int, *, message: str) -> None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            attempt = attempts.current_attempt(connection, locked, number)
            attempts.mark_preempting(connection, locked, attempt, message=message, time=read_clock(connection))

    @override
    def set_message(self, lease: Lease, job_id: str, message: str) -> None:
        with self._leading(lease) as connection:
            jobs.set_message(connection, job_id, message)

    @override
    def ingest(self, lease: Lease, job_id: str, number: int, records: Sequence[JournalRecord]) -> None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            attempt = attempts.current_attempt(connection, locked, number)
            intake.take_in(connection, locked, attempt, records)

    @override
    def mark_stopping(self, lease: Lease, job_id: str, number: int, reason: Reason) -> None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            attempt = attempts.current_attempt(connection, locked, number)
            attempts.mark_stopping(connection, locked, attempt, reason, read_clock(connection))

    @override
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
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            attempts.seal_attempt(
                connection,
                locked,
                number,
                outcome=outcome,
                reason=reason,
                failure=failure,
                next_node_ids=next_node_ids,
                time=read_clock(connection),
            )
            return locked.job

    @override
    def resumable_checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        with self._database.reading() as connection:
            job = jobs.get_job(connection, job_id)
            return checkpoints.list_resumable(connection, job, jobs.find_number(connection, job_id))

    @override
    def retire_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        # The job's lock: no fork comes in between.
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            checkpoints.retire(connection, locked.number, attempt, step)

    @override
    def removable_checkpoints(self, job_id: str | None = None) -> tuple[Checkpoint, ...]:
        with self._database.reading() as connection:
            number = None if job_id is None else jobs.find_number(connection, job_id)
            return checkpoints.list_removable(connection, number)

    @override
    def committed_paths(self, job_id: str, attempt: int) -> frozenset[str]:
        with self._database.reading() as connection:
            return checkpoints.list_paths(connection, jobs.find_number(connection, job_id), attempt)

    @override
    def forget_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        with self._leading(lease) as connection:
            checkpoints.forget(connection, jobs.find_number(connection, job_id), attempt, step)

    def _submit_all(self, submissions: Sequence[Submission]) -> Sequence[tuple[Job, bool] | Exception]:
        with self._database.writing() as connection:
            return submit_all(connection, submissions, read_clock(connection))

    def _wish(
        self,
        job_id: str,
        key: IdempotencyKey | None,
        effect: Callable[[Connection, jobs.LockedJob, datetime], None],
    ) -> Job:
        with self._database.writing() as connection, jobs.locked_job(connection, job_id) as locked:
            now = read_clock(connection)
            if key is None or idempotency.claim_key(connection, key, job_id, now) is None:
                effect(connection, locked, now)
            return locked.job

    @contextmanager
    def _leading(self, lease: Lease) -> Iterator[Connection]:
        with self._database.writing() as connection:
            leases.verify(connection, lease)
            yield connection
