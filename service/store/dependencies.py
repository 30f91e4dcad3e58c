"""What keeps queued jobs from starting, whatever room there is: other jobs, pauses before retries, deadlines."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.errors import FieldProblem, InvalidSpec
from service.domain.job import JobStatus, Reason
from service.domain.ports import HeldBack
from service.store.jobs import QUEUED, locked_job
from service.store.tables import job_dependencies, jobs

MAX_FAILED = 200
"""Most jobs that one transaction fails, so that others can write soon."""

_WITHOUT_SUCCESS = (JobStatus.FAILED, JobStatus.CANCELLED)
_before = jobs.alias("before")
_PAIRS = job_dependencies.join(jobs, jobs.c.number == job_dependencies.c.job_number).join(
    _before, _before.c.number == job_dependencies.c.after_number
)


def find_numbers(connection: Connection, after: Sequence[str]) -> list[int]:
    """Return the rows' numbers of the jobs that a new one comes after.

    Raises:
        InvalidSpec: there is none of these ids, or it has ended without success.
    """
    query = sa.select(jobs.c.id, jobs.c.number, jobs.c.status).where(jobs.c.id.in_(after))
    found = {row.id: row for row in connection.execute(query)}
    problems = []
    for place, job_id in enumerate(after):
        field = f"after.{place}"
        if job_id not in found:
            problems.append(
                FieldProblem(field=field, message=f"there is no job {job_id!r}. List jobs to see their ids.")
            )
        elif found[job_id].status in _WITHOUT_SUCCESS:
            message = f"job {job_id} has {_ended(found[job_id].status)}. Resume it first, or leave it out."
            problems.append(FieldProblem(field=field, message=message))
    if problems:
        raise InvalidSpec("The job cannot wait for these jobs.", tuple(problems))
    return [found[job_id].number for job_id in after]


def find_unfinished(connection: Connection, numbers: Sequence[int]) -> tuple[str, ...]:
    """Return the ids of those of some jobs that have not succeeded, in the order of their submission."""
    query = sa.select(jobs.c.id).where(jobs.c.number.in_(numbers), jobs.c.status != JobStatus.SUCCEEDED)
    return tuple(connection.execute(query.order_by(jobs.c.number)).scalars())


def list_held_back(connection: Connection, now: datetime) -> dict[str, HeldBack]:
    """Return the queued jobs that may not start yet, by id."""
    waits_for: dict[str, list[str]] = defaultdict(list)
    unfinished = (
        sa.select(jobs.c.id, _before.c.id.label("before_id"))
        .select_from(_PAIRS)
        .where(QUEUED, _before.c.status != JobStatus.SUCCEEDED)
        .order_by(_before.c.number)
    )
    for row in connection.execute(unfinished):
        waits_for[row.id].append(row.before_id)
    pausing = sa.select(jobs.c.id, jobs.c.not_before).where(QUEUED, jobs.c.not_before > now)
    retry_in_s = {row.id: (row.not_before - now).total_seconds() for row in connection.execute(pausing)}
    return {
        job_id: HeldBack(waits_for=tuple(waits_for.get(job_id, ())), retry_in_s=retry_in_s.get(job_id, 0.0))
        for job_id in waits_for.keys() | retry_in_s.keys()
    }


def fail_hopeless(connection: Connection, now: datetime) -> tuple[str, ...]:
    """Fail the first of the queued jobs that will never start, at most ``MAX_FAILED``; return their ids."""
    hopeless: dict[tuple[int, str], tuple[Reason, str]] = {}
    late = sa.select(jobs.c.number, jobs.c.id).where(QUEUED, jobs.c.start_by <= now, jobs.c.started_at.is_(None))
    for number, job_id in connection.execute(late.order_by(jobs.c.number).limit(MAX_FAILED)):
        message = "It had not started when its start_deadline_s was over."
        hopeless[number, job_id] = (Reason.START_DEADLINE, message)
    without_success = (
        sa.select(jobs.c.number, jobs.c.id, _before.c.id.label("before_id"), _before.c.status)
        .select_from(_PAIRS)
        .where(QUEUED, _before.c.status.in_(_WITHOUT_SUCCESS))
        .order_by(jobs.c.number, _before.c.number)
        .limit(MAX_FAILED)
    )
    for row in connection.execute(without_success):
        message = (
            f"Job {row.before_id}, which it comes after, has {_ended(row.status)}. Resume both once that is mended."
        )
        hopeless[row.number, row.id] = (Reason.DEPENDENCY_FAILED, message)
    failed = []
    # In the order of their numbers, as submits lock the jobs that others come after: none waits for another in a ring.
    for (_, job_id), (reason, message) in sorted(hopeless.items())[:MAX_FAILED]:
        with locked_job(connection, job_id) as locked:
            if locked.job.status is JobStatus.QUEUED:
                locked.move(JobStatus.FAILED, reason, message, time=now)
                failed.append(job_id)
    return tuple(failed)


def _ended(status: str) -> str:
    return "failed" if status == JobStatus.FAILED else "been cancelled"
