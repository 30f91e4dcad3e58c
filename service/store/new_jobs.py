"""New jobs: what they refer to, and their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.errors import FieldProblem, InvalidSpec
from service.domain.job import HELD_MESSAGE, Job, JobStatus, Origin, Reason
from service.domain.spec import JobSpec
from service.store import dependencies, feed, queues
from service.store.bulk import insert_rows
from service.store.tables import job_dependencies, job_labels, jobs


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be stored.

    Attributes:
        id: its own.
        spec: what was submitted.
        owner: whose it is.
        origin: the checkpoint of another job that it begins at; None: at step 0.
    """

    id: str
    spec: JobSpec
    owner: str
    origin: Origin | None = None


def find_relations(connection: Connection, new: Sequence[NewJob]) -> list[tuple[int, ...] | InvalidSpec]:
    """Return of each job the numbers of those that it comes after, or why it cannot be stored.

    The queues that they name stay to the end of the transaction.
    """
    known = queues.existing(connection, {one.spec.queue for one in new})
    return [_relations(connection, one.spec, known) for one in new]


def find_unfinished(connection: Connection, spec: JobSpec) -> tuple[str, ...]:
    """Return the ids of the jobs that have to succeed before a new one starts, and have not; locks nothing.

    Raises:
        InvalidSpec: as ``add_job`` raises it.
    """
    after = _relations(connection, spec, queues.existing(connection, {spec.queue}, stay=False))
    if isinstance(after, InvalidSpec):
        raise after
    return dependencies.find_unfinished(connection, after)


def add_job(connection: Connection, new: NewJob, time: datetime) -> Job:
    """Store a new job.

    Raises:
        InvalidSpec: it names a queue that there is not, or comes after a job that there is not or that has failed.
    """
    (after,) = find_relations(connection, [new])
    if isinstance(after, InvalidSpec):
        raise after
    (job,) = insert_jobs(connection, [new], [after], time)
    return job


def insert_jobs(
    connection: Connection, new: Sequence[NewJob], after: Sequence[Sequence[int]], time: datetime
) -> tuple[Job, ...]:
    """Store new jobs, each with its first event: as queued, or as paused where it is to be held.

    Args:
        connection: in a transaction for writing.
        new: the jobs.
        after: of each the numbers of those that have to succeed before it starts.
        time: now.

    Returns:
        The jobs, in the same order.
    """
    if not new:
        return ()
    numbers = _take_numbers(connection, len(new))
    created = tuple(_created(one, time) for one in new)
    numbered = list(zip(numbers, created, strict=True))
    insert_rows(connection, jobs, [_row_of(job, number) for number, job in numbered])
    labels = [
        {"job_number": number, "key": key, "value": value}
        for number, job in numbered
        for key, value in job.spec.labels.items()
    ]
    insert_rows(connection, job_labels, labels)
    links = [
        {"job_number": number, "after_number": one}
        for number, before in zip(numbers, after, strict=True)
        for one in before
    ]
    # Each locks the job that is come after: in one order, so that no two transactions wait for each other.
    insert_rows(connection, job_dependencies, sorted(links, key=itemgetter("after_number")))
    first_events = [
        {
            "job_number": number,
            "position": 1,
            "time": time,
            "kind": "status",
            "attempt": 0,
            "reason": job.reason,
            "message": job.message,
            "data": {"from": None, "to": job.status},
        }
        for number, job in numbered
    ]
    feed.insert_events(connection, first_events)
    return created


def _relations(connection: Connection, spec: JobSpec, known_queues: set[str]) -> tuple[int, ...] | InvalidSpec:
    if spec.queue not in known_queues:
        message = f"there is no queue {spec.queue!r}. List queues, or make it first."
        return InvalidSpec("The job cannot be queued.", (FieldProblem(field="queue", message=message),))
    try:
        return tuple(dependencies.find_numbers(connection, spec.after)) if spec.after else ()
    except InvalidSpec as error:
        return error


def _created(new: NewJob, time: datetime) -> Job:
    status, reason, message = JobStatus.QUEUED, Reason.SUBMITTED, "Waits to be placed."
    if new.origin is not None:
        reason = Reason.FORKED
        message = f"Forked from step {new.origin.step} of job {new.origin.job_id}. {message}"
    if new.spec.hold:
        status, reason, message = JobStatus.PAUSED, Reason.HELD, HELD_MESSAGE
    return Job(
        id=new.id,
        owner=new.owner,
        spec=new.spec,
        status=status,
        reason=reason,
        message=message,
        attempt=0,
        retries_used=0,
        step=0 if new.origin is None else new.origin.step,
        num_steps=new.spec.num_steps,
        cancel_requested=False,
        forked_from=new.origin,
        running_s=0.0,
        failure=None,
        created_at=time,
        started_at=None,
        ended_at=None,
    )


def _row_of(job: Job, number: int) -> dict[str, Any]:
    spec, origin = job.spec, job.forked_from
    start_by = None
    if spec.start_deadline_s is not None:
        start_by = job.created_at + timedelta(seconds=spec.start_deadline_s)
    return {
        "number": number,
        "id": job.id,
        "name": spec.name,
        "priority": spec.priority,
        "spec": spec.model_dump_json(),
        "status": job.status,
        "reason": job.reason,
        "message": job.message,
        "attempt": job.attempt,
        "retries_used": job.retries_used,
        "step": job.step,
        "num_steps": job.num_steps,
        "cancel_requested": job.cancel_requested,
        "running_s": job.running_s,
        "position": 1,
        "created_at": job.created_at,
        "origin_job_id": None if origin is None else origin.job_id,
        "origin_attempt": None if origin is None else origin.attempt,
        "origin_step": None if origin is None else origin.step,
        "owner": job.owner,
        "queue": spec.queue,
        "preemptions_used": job.preemptions_used,
        "start_by": start_by,
    }


def _take_numbers(connection: Connection, count: int) -> Sequence[int]:
    """Return the numbers of so many new rows, which other tables refer to, without asking for each."""
    if connection.dialect.name == "sqlite":
        # This transaction is the only one that writes; the table keeps the largest number that was ever used.
        last = connection.exec_driver_sql("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'").scalar() or 0
        return range(last + 1, last + 1 + count)
    taken = connection.execute(
        sa.text("SELECT nextval(pg_get_serial_sequence('jobs', 'number')) FROM generate_series(1, :count)"),
        {"count": count},
    )
    return taken.scalars().all()
