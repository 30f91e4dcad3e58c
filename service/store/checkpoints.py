"""Checkpoints: committed by their row."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.job import Checkpoint
from service.domain.journal import CheckpointWritten
from service.store.tables import checkpoints


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


def quarantine(connection: Connection, number: int, step: int) -> None:
    """Let the checkpoint of a step be neither listed nor resumed from."""
    connection.execute(
        sa.update(checkpoints)
        .where(checkpoints.c.job_number == number, checkpoints.c.step == step, ~checkpoints.c.superseded)
        .values(quarantined=True)
    )


def forget(connection: Connection, number: int, attempt: int, step: int) -> None:
    """Drop the row of a checkpoint; nothing if there is none."""
    connection.execute(
        sa.delete(checkpoints).where(
            checkpoints.c.job_number == number, checkpoints.c.attempt == attempt, checkpoints.c.step == step
        )
    )


def list_checkpoints(connection: Connection, job_id: str, number: int) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that count, by step: neither superseded nor quarantined."""
    query = (
        sa.select(checkpoints)
        .where(checkpoints.c.job_number == number, ~checkpoints.c.superseded, ~checkpoints.c.quarantined)
        .order_by(checkpoints.c.step)
    )
    return tuple(_checkpoint_of(job_id, row) for row in connection.execute(query))


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
