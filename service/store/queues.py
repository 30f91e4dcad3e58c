"""Queues: their settings, what was used through them, and what is in them."""

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import AttemptStatus, JobStatus
from service.domain.queue import DEFAULT_QUEUE, Queue, QueueState, Quota
from service.store.bulk import insert_rows
from service.store.tables import attempts, jobs, queues

_ENDED = [status for status in JobStatus if status.is_terminal]


def list_queues(connection: Connection) -> tuple[Queue, ...]:
    """Return every queue, by name."""
    return tuple(_queue_of(row) for row in connection.execute(sa.select(queues).order_by(queues.c.name)))


def list_states(connection: Connection) -> tuple[QueueState, ...]:
    """Return every queue and what is in it, by name."""
    queued = _counts(
        connection,
        sa.select(jobs.c.queue, sa.func.count()).where(jobs.c.status == JobStatus.QUEUED).group_by(jobs.c.queue),
    )
    live = _counts(
        connection,
        sa.select(jobs.c.queue, sa.func.count())
        .join(attempts, attempts.c.job_number == jobs.c.number)
        .where(attempts.c.status != AttemptStatus.SEALED)
        .group_by(jobs.c.queue),
    )
    return tuple(
        QueueState(
            queue=_queue_of(row),
            usage_s=row.usage_s,
            num_queued=queued.get(row.name, 0),
            num_live=live.get(row.name, 0),
        )
        for row in connection.execute(sa.select(queues).order_by(queues.c.name))
    )


def existing(connection: Connection, names: Collection[str], *, stay: bool = True) -> set[str]:
    """Return those names that queues have.

    Args:
        connection: in a transaction, for writing if they stay.
        names: to look for.
        stay: whether these queues are kept from being removed to the end of the transaction.
    """
    query = sa.select(queues.c.name).where(queues.c.name.in_(names))
    if stay:
        query = query.with_for_update(key_share=True, read=True)
    return set(connection.execute(query).scalars())


def put(connection: Connection, queue: Queue) -> bool:
    """Make a queue, or give it these settings; return whether there was none of this name."""
    values = {
        "weight": queue.weight,
        "quota": queue.quota.model_dump(),
        "quota_per_owner": queue.quota_per_owner.model_dump(),
        "paused": queue.paused,
    }
    while not insert_rows(connection, queues, [{"name": queue.name, **values}], on_conflict="skip"):
        # None to change either: it was removed in between.
        if connection.execute(sa.update(queues).where(queues.c.name == queue.name).values(values)).rowcount:
            return False
    return True


def remove(connection: Connection, name: str) -> None:
    """Remove a queue.

    Raises:
        NotFound: there is none of this name.
        InvalidTransition: jobs of it have not ended, or it is the default queue.
    """
    if connection.execute(sa.select(queues.c.name).where(queues.c.name == name).with_for_update()).first() is None:
        raise NotFound(f"There is no queue {name!r}. List queues to see their names.")
    if name == DEFAULT_QUEUE:
        raise InvalidTransition("The default queue stays: jobs that name no queue wait in it. Pause it instead.")
    in_it = sa.select(sa.func.count()).where(jobs.c.queue == name, jobs.c.status.not_in(_ENDED))
    count = connection.execute(in_it).scalar_one()
    if count:
        raise InvalidTransition(f"{count} job(s) of queue {name} have not ended. Cancel them or wait for their end.")
    connection.execute(sa.delete(queues).where(queues.c.name == name))


def read_usage(connection: Connection) -> dict[str, float]:
    """Return the usage of every queue, in seconds of the whole cluster."""
    return _counts(connection, sa.select(queues.c.name, queues.c.usage_s))


def write_usage(connection: Connection, usage_s: Mapping[str, float]) -> None:
    """Keep the usage of queues."""
    for name, value in usage_s.items():
        connection.execute(sa.update(queues).where(queues.c.name == name).values(usage_s=value))


def _counts(connection: Connection, query: sa.Select[Any]) -> dict[str, Any]:
    return {row[0]: row[1] for row in connection.execute(query)}


def _queue_of(row: Row[Any]) -> Queue:
    return Queue(
        name=row.name,
        weight=row.weight,
        quota=Quota.model_validate(row.quota),
        quota_per_owner=Quota.model_validate(row.quota_per_owner),
        paused=row.paused,
    )
