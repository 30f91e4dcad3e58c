"""Jobs: their rows, pages and queue, and the lock under which one changes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.errors import NotFound
from service.domain.job import Failure, Job, JobStatus, Origin, Reason, check_transition
from service.domain.ports import JobPage
from service.domain.spec import STORED, JobSpec
from service.store import feed
from service.store.cursor import decode_cursor, encode_cursor
from service.store.tables import job_dependencies, job_labels, jobs

QUEUED = jobs.c.status == sa.literal_column("'queued'")
"""Written out, as the partial index of the queue has it."""

_STORED_AS_IS = frozenset(Job.model_fields) - {"id", "spec", "failure", "forked_from"}


class LockedJob:
    """A job under its row's lock: what happens to it is numbered here, and its row written once at the end.

    Attributes:
        job: as it will be once the transaction is committed.
        number: of its row.
    """

    def __init__(self, connection: Connection, row: Row[Any]) -> None:
        self.job = job_of(row)
        self.number: int = row.number
        self._connection = connection
        self._first_position: int = row.position
        self._position: int = row.position
        self._changes: dict[str, Any] = {}
        self._events: list[dict[str, Any]] = []
        self._columns: dict[str, Any] = {}

    def change(self, **values: object) -> None:
        """Give fields of the job new values."""
        self.job = self.job.model_copy(update=values)
        self._changes.update(values)

    def start_by(self, time: datetime | None) -> None:
        """Give the job a new deadline for its start; None: it has none any more."""
        self._columns["start_by"] = time

    def next_position(self) -> int:
        """Return the next place in the job's feed."""
        self._position += 1
        return self._position

    def add_event(
        self,
        kind: str,
        message: str,
        *,
        time: datetime,
        reason: Reason | None = None,
        data: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Note that something happened, in the job's present attempt."""
        self._events.append(
            {
                "job_number": self.number,
                "position": self.next_position(),
                "time": time,
                "kind": kind,
                "attempt": self.job.attempt,
                "reason": reason,
                "message": message,
                "data": dict(data),
            }
        )

    def move(self, status: JobStatus, reason: Reason, message: str, *, time: datetime) -> None:
        """Change the status.

        Raises:
            InvalidTransition: the life of a job has no such change.
        """
        check_transition(self.job.status, status)
        self.add_event("status", message, time=time, reason=reason, data={"from": self.job.status, "to": status})
        self.change(status=status, reason=reason, message=message)
        if status.is_terminal:
            self.change(ended_at=time)
        if status is not JobStatus.QUEUED and self.job.not_before is not None:
            self.change(not_before=None)
        if status.is_terminal or status is JobStatus.PAUSED:
            self.change(cancel_requested=False, pause_requested=False, resize_requested=False)

    def write(self) -> None:
        """Write what changed, if anything did."""
        if self._position == self._first_position and not self._changes and not self._columns:
            return
        feed.insert_events(self._connection, self._events)
        values = {name: value for name, value in self._changes.items() if name in _STORED_AS_IS}
        if "failure" in self._changes:
            values["failure"] = failure_row(self.job.failure)
        values |= self._columns | {"position": self._position}
        self._connection.execute(sa.update(jobs).where(jobs.c.number == self.number), values)


@contextmanager
def locked_job(connection: Connection, job_id: str) -> Iterator[LockedJob]:
    """Hold a job's lock to the end of the transaction; what changed is written when the body ends.

    Raises:
        NotFound: no such job.
    """
    locked = LockedJob(connection, _job_row(connection, job_id, for_update=True))
    yield locked
    locked.write()


def get_job(connection: Connection, job_id: str) -> Job:
    """Return a job.

    Raises:
        NotFound: no such job.
    """
    return job_of(_job_row(connection, job_id))


def find_number(connection: Connection, job_id: str) -> int:
    """Return the number of a job's row.

    Raises:
        NotFound: no such job.
    """
    number = connection.execute(sa.select(jobs.c.number).where(jobs.c.id == job_id)).scalar_one_or_none()
    if number is None:
        raise _not_found(job_id)
    return int(number)


def list_page(
    connection: Connection,
    *,
    statuses: Sequence[JobStatus],
    exactly: Mapping[str, str | None],
    labels: Sequence[tuple[str, str]],
    limit: int,
    cursor: str | None,
) -> JobPage:
    """Return a page of the jobs that match everything given, newest first.

    Args:
        connection: in a transaction.
        statuses: any of these; empty for all.
        exactly: columns and their values; None for any.
        labels: all of these keys and values.
        limit: most jobs.
        cursor: of the page; None for the first.

    Raises:
        InvalidCursor: ``cursor`` is none of ours.
    """
    conditions: list[sa.ColumnElement[bool]] = []
    number: sa.ColumnElement[int] = jobs.c.number
    source: sa.FromClause = jobs
    for place, (key, value) in enumerate(labels):
        labelled = job_labels.alias()
        conditions += [labelled.c.key == key, labelled.c.value == value]
        source = source.join(labelled, labelled.c.job_number == jobs.c.number)
        if place == 0:  # its index has the jobs with a label in order
            number = labelled.c.job_number
    if cursor is not None:
        conditions.append(number < decode_cursor(cursor))
    conditions += [jobs.c[column] == value for column, value in exactly.items() if value is not None]
    # Each status by itself is a range of an index, in order; a set of them would have to be sorted.
    ranges = [
        sa.select(number.label("number"))
        .select_from(source)
        .where(*conditions, *([] if status is None else [jobs.c.status == status]))
        .order_by(number.desc())
        .limit(limit + 1)
        .subquery()
        for status in dict.fromkeys(statuses or (None,))
    ]
    numbers = sa.union_all(*(sa.select(found.c.number) for found in ranges))
    rows = connection.execute(
        sa.select(jobs).where(jobs.c.number.in_(numbers)).order_by(jobs.c.number.desc()).limit(limit + 1)
    ).all()
    shown = rows[:limit]
    return JobPage(
        jobs=tuple(job_of(row) for row in shown),
        next_cursor=encode_cursor(shown[-1].number) if len(rows) > limit else None,
    )


def list_queue(connection: Connection, limit: int, now: datetime) -> Sequence[Row[Any]]:
    """Return the rows of queued jobs: highest priority first, then first come.

    Args:
        connection: in a transaction.
        limit: most jobs of one queue, so that a long one hides no other; those that may start come before the others.
        now: by the database's clock.
    """
    before = jobs.alias("before")
    comes_after = (
        sa.exists()
        .where(job_dependencies.c.job_number == jobs.c.number)
        .where(before.c.number == job_dependencies.c.after_number, before.c.status != JobStatus.SUCCEEDED)
    )
    waits = comes_after | (jobs.c.not_before > now)
    order = [sa.case((waits, 1), else_=0), jobs.c.priority.desc(), jobs.c.number]
    place = sa.func.row_number().over(partition_by=jobs.c.queue, order_by=order).label("place")
    placed = sa.select(jobs.c.number, place).where(QUEUED).subquery()
    query = (
        sa.select(jobs)
        .join(placed, placed.c.number == jobs.c.number)
        .where(placed.c.place <= limit)
        .order_by(jobs.c.priority.desc(), jobs.c.number)
    )
    return connection.execute(query).all()


class JobsOfRows:
    """Makes jobs of rows that are read again and again and change little in between: each state of one once.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._made: Mapping[int, tuple[Row[Any], Job]] = {}

    def of(self, rows: Sequence[Row[Any]]) -> tuple[Job, ...]:
        """Return the jobs of these rows; those of others are forgotten."""
        earlier, made = self._made, {}
        for row in rows:
            known = earlier.get(row.number)
            made[row.number] = known if known is not None and known[0] == row else (row, job_of(row))
        self._made = made
        return tuple(job for _, job in made.values())


def set_message(connection: Connection, job_id: str, message: str) -> None:
    """Say why a queued job waits; nothing if it is not queued or says so already."""
    connection.execute(
        sa.update(jobs).where(jobs.c.id == job_id, QUEUED, jobs.c.message != message).values(message=message)
    )


def job_of(row: Row[Any]) -> Job:
    """Return the job that a row holds."""
    # A job that was accepted is not checked again: what is asked of new ones may differ by now.
    return Job.model_validate(
        {
            "id": row.id,
            "owner": row.owner,
            "spec": _spec_of(row.spec),
            "status": JobStatus(row.status),
            "reason": Reason(row.reason),
            "message": row.message,
            "attempt": row.attempt,
            "retries_used": row.retries_used,
            "preemptions_used": row.preemptions_used,
            "not_before": row.not_before,
            "step": row.step,
            "num_steps": row.num_steps,
            "cancel_requested": row.cancel_requested,
            "pause_requested": row.pause_requested,
            "workers_wanted": row.workers_wanted,
            "resize_requested": row.resize_requested,
            "forked_from": origin_of(row),
            "exact": row.exact,
            "exactness": row.exactness,
            "running_s": row.running_s,
            "failure": failure_of(row.failure),
            "created_at": row.created_at,
            "started_at": row.started_at,
            "ended_at": row.ended_at,
        },
        context=STORED,
    )


def origin_of(row: Row[Any]) -> Origin | None:
    """Return where the job of a row was forked from, if it was."""
    if row.origin_job_id is None:
        return None
    return Origin(job_id=row.origin_job_id, attempt=row.origin_attempt, step=row.origin_step)


def failure_of(data: object) -> Failure | None:
    """Return the failure that a column holds."""
    return None if data is None else Failure.model_validate(data)


def failure_row(failure: Failure | None) -> dict[str, Any] | None:
    """Return what a column holds of a failure."""
    return None if failure is None else failure.model_dump()


@lru_cache(maxsize=4096)
def _spec_of(data: str) -> JobSpec:
    # The same jobs are read again and again; a specification never changes.
    return JobSpec.from_stored(data)


def _job_row(connection: Connection, job_id: str, *, for_update: bool = False) -> Row[Any]:
    query = sa.select(jobs).where(jobs.c.id == job_id)
    row = connection.execute(query.with_for_update() if for_update else query).one_or_none()
    if row is None:
        raise _not_found(job_id)
    return row


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"There is no job {job_id!r}. List jobs to see their ids.")
