"""Checkpoints: committed by their row."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.job import Checkpoint, Job, JobStatus
from service.domain.journal import CheckpointWritten
from service.store.tables import checkpoints, jobs

_ENDED = [status for status in JobStatus if status.is_terminal]


def commit_checkpoint(
    connection: Connection, number: int, attempt: int, report: CheckpointWritten, time: datetime
) -> None:
    """Add a checkpoint; it takes the place of another one of the same step."""
    of_step = (checkpoints.c.job_number == number, checkpoints.c.step == report.step)
    connection.execute(sa.delete(checkpoints).where(*of_step, checkpoints.c.attempt == attempt))
    connection.execute(sa.update(checkpoints).where(*of_step).values(superseded=True))
    connection.execute(
        sa.insert(checkpoints),
        {
            "job_number": number,
            "attempt": attempt,
            "step": report.step,
            "path": report.path,
            "manifest_sha256": report.manifest_sha256,
            "files": [file.model_dump() for file in report.files],
            "metrics": report.metrics,
            "superseded": False,
            "quarantined": False,
            "created_at": time,
        },
    )


def supersede_beyond(connection: Connection, number: int, step: int) -> None:
    """Let no checkpoint after a step count."""
    connection.execute(
        sa.update(checkpoints)
        .where(checkpoints.c.job_number == number, checkpoints.c.step > step)
        .values(superseded=True)
    )


def quarantine(connection: Connection, job_id: str, attempt: int | None, step: int) -> None:
    """Let a checkpoint be neither listed nor resumed from; without an attempt the one of its step that counts."""
    number = sa.select(jobs.c.number).where(jobs.c.id == job_id).scalar_subquery()
    which = ~checkpoints.c.superseded if attempt is None else checkpoints.c.attempt == attempt
    connection.execute(
        sa.update(checkpoints)
        .where(checkpoints.c.job_number == number, checkpoints.c.step == step, which)
        .values(quarantined=True)
    )


def retire(connection: Connection, number: int, attempt: int, step: int) -> None:
    """Let a checkpoint count no more."""
    connection.execute(sa.update(checkpoints).where(*_is(number, attempt, step)).values(superseded=True))


def forget(connection: Connection, number: int, attempt: int, step: int) -> None:
    """Drop the row of a checkpoint; nothing if there is none."""
    connection.execute(sa.delete(checkpoints).where(*_is(number, attempt, step)))


def list_checkpoints(connection: Connection, job_id: str, number: int) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that count, by step: neither superseded nor quarantined."""
    query = (
        sa.select(checkpoints)
        .where(checkpoints.c.job_number == number, _counts(checkpoints))
        .order_by(checkpoints.c.step)
    )
    return tuple(_checkpoint_of(job_id, row) for row in connection.execute(query))


def list_resumable(connection: Connection, job: Job, number: int) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that count, newest first; last the one that the job was forked from, if it is there."""
    own = list_checkpoints(connection, job.id, number)[::-1]
    if job.forked_from is None:
        return own
    origin = job.forked_from
    query = (
        sa.select(checkpoints)
        .join(jobs, jobs.c.number == checkpoints.c.job_number)
        .where(
            jobs.c.id == origin.job_id,
            checkpoints.c.attempt == origin.attempt,
            checkpoints.c.step == origin.step,
            ~checkpoints.c.quarantined,
        )
    )
    return (*own, *(_checkpoint_of(origin.job_id, row) for row in connection.execute(query)))


def list_removable(connection: Connection, number: int | None) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that count no more and that no fork needs, of one job or of all, by job and step.

    A fork needs the one that it begins at until it has one of its own that counts, or has ended.
    """
    fork, own = jobs.alias(), checkpoints.alias()
    has_own = sa.exists().where(own.c.job_number == fork.c.number, _counts(own))
    is_needed = sa.exists().where(
        fork.c.origin_job_id == jobs.c.id,
        fork.c.origin_attempt == checkpoints.c.attempt,
        fork.c.origin_step == checkpoints.c.step,
        fork.c.status.not_in(_ENDED),
        ~has_own,
    )
    query = (
        sa.select(checkpoints, jobs.c.id.label("job_id"))
        .join(jobs, jobs.c.number == checkpoints.c.job_number)
        .where(~_counts(checkpoints), ~is_needed, *([] if number is None else [checkpoints.c.job_number == number]))
        .order_by(checkpoints.c.job_number, checkpoints.c.step, checkpoints.c.attempt)
    )
    return tuple(_checkpoint_of(row.job_id, row) for row in connection.execute(query))


def list_paths(connection: Connection, number: int, attempt: int) -> frozenset[str]:
    """Return the directories of the checkpoints of an attempt that have a row, whether or not they count."""
    of_attempt = (checkpoints.c.job_number == number, checkpoints.c.attempt == attempt)
    return frozenset(connection.execute(sa.select(checkpoints.c.path).where(*of_attempt)).scalars())


def _is(number: int, attempt: int, step: int) -> tuple[sa.ColumnElement[bool], ...]:
    return checkpoints.c.job_number == number, checkpoints.c.attempt == attempt, checkpoints.c.step == step


def _counts(table: sa.FromClause) -> sa.ColumnElement[bool]:
    return sa.and_(~table.c.superseded, ~table.c.quarantined)


def _checkpoint_of(job_id: str, row: Row[Any]) -> Checkpoint:
    return Checkpoint(
        job_id=job_id,
        attempt=row.attempt,
        step=row.step,
        path=row.path,
        manifest_sha256=row.manifest_sha256,
        files=row.files,
        metrics=row.metrics,
        created_at=row.created_at,
    )
