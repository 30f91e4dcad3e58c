"""The job database behind the domain's ports: each method is one transaction."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.engine import Connection
from typing_extensions import override

from service.domain.job import Attempt, Checkpoint, Event, Failure, Job, JobStatus, MetricPoint, Outcome, Reason
from service.domain.journal import JournalRecord
from service.domain.placement import Node
from service.domain.ports import (
    ClusterSnapshot,
    Feed,
    IdempotencyKey,
    JobPage,
    JobStore,
    Lease,
    LiveAttempt,
    SchedulerStore,
)
from service.domain.spec import JobSpec
from service.store import attempts, checkpoints, cluster, feed, idempotency, intake, jobs, leases, metrics
from service.store.clock import read_clock
from service.store.engine import Database
from service.store.ids import new_job_id


class SqlStore(JobStore, SchedulerStore):
    """The job database; safe to share between threads. ``migrate`` makes its tables.

    Args:
        url: ``sqlite:///path`` or ``postgresql://user@host/name``; connected to when first used.

    Raises:
        ServiceError: from the constructor, for another kind of database or one that is kept in memory.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)

    def close(self) -> None:
        """Close the connections. The store may still be used, and then connects anew."""
        self._database.close()

    # For the API

    @override
    def submit(self, spec: JobSpec, *, key: IdempotencyKey | None = None) -> tuple[Job, bool]:
        job_id = new_job_id()
        with self._database.writing() as connection:
            now = read_clock(connection)
            if key is not None:
                earlier_id = idempotency.claim_key(connection, key, job_id, now)
                if earlier_id is not None:
                    return jobs.get_job(connection, earlier_id), False
            return jobs.insert_job(connection, job_id, spec, now), True

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
        labels: Sequence[tuple[str, str]] = (),
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        with self._database.reading() as connection:
            return jobs.list_page(connection, statuses=statuses, name=name, labels=labels, limit=limit, cursor=cursor)

    @override
    def request_cancel(self, job_id: str) -> Job:
        with self._database.writing() as connection, jobs.locked_job(connection, job_id) as locked:
            return jobs.request_cancel(locked, read_clock(connection))

    @override
    def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        with self._database.reading() as connection:
            return attempts.list_attempts(connection, job_id, jobs.find_number(connection, job_id))

    @override
    def events(self, job_id: str, *, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        with self._database.reading() as connection:
            return feed.list_events(connection, jobs.find_number(connection, job_id), after=after, limit=limit)

    @override
    def metrics(self, job_id: str, *, names: Sequence[str] = (), after_step: int = -1) -> tuple[MetricPoint, ...]:
        with self._database.reading() as connection:
            number = jobs.find_number(connection, job_id)
            return metrics.list_points(connection, number, names=names, after_step=after_step)

    @override
    def feed(self, job_id: str, *, after: int = 0, limit: int = 1000) -> Feed:
        with self._database.reading() as connection:
            return feed.read_feed(connection, jobs.find_number(connection, job_id), after=after, limit=limit)

    @override
    def checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        with self._database.reading() as connection:
            return checkpoints.list_checkpoints(connection, job_id, jobs.find_number(connection, job_id))

    @override
    def cluster(self) -> ClusterSnapshot:
        with self._database.reading() as connection:
            return cluster.read_snapshot(connection)

    @override
    def ping(self) -> None:
        self.cluster()

    # For the scheduler

    @override
    def acquire_lease(self, holder: str, ttl_s: float) -> Lease | None:
        with self._database.writing() as connection:
            return leases.acquire(connection, holder, ttl_s)

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
            return jobs.list_queue(connection, limit)

    @override
    def live_attempts(self) -> tuple[LiveAttempt, ...]:
        with self._database.reading() as connection:
            return attempts.list_live(connection)

    @override
    def create_attempt(self, lease: Lease, job_id: str, *, node_ids: Sequence[str]) -> Attempt | None:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            return attempts.create_attempt(connection, locked, node_ids, read_clock(connection))

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
        self, lease: Lease, job_id: str, number: int, *, outcome: Outcome, reason: Reason, failure: Failure | None
    ) -> Job:
        with self._leading(lease) as connection, jobs.locked_job(connection, job_id) as locked:
            now = read_clock(connection)
            attempts.seal_attempt(connection, locked, number, outcome=outcome, reason=reason, failure=failure, time=now)
            return locked.job

    @override
    def resumable_checkpoints(self, job_id: str) -> tuple[Checkpoint, ...]:
        return self.checkpoints(job_id)[::-1]

    @override
    def forget_checkpoint(self, lease: Lease, job_id: str, attempt: int, step: int) -> None:
        with self._leading(lease) as connection:
            checkpoints.forget(connection, jobs.find_number(connection, job_id), attempt, step)

    @contextmanager
    def _leading(self, lease: Lease) -> Iterator[Connection]:
        with self._database.writing() as connection:
            leases.verify(connection, lease)
            yield connection
