"""A job's feed: its events and metric points in one order, for those who follow it."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.job import Event, Reason
from service.domain.ports import Feed
from service.store.bulk import insert_rows
from service.store.metrics import read_points, select_points
from service.store.tables import events, jobs, metrics


def insert_events(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add events whose positions were taken under the job's lock."""
    insert_rows(connection, events, rows)


def list_events(connection: Connection, number: int, *, after: int, limit: int) -> tuple[Event, ...]:
    """Return the first events after a position, in order."""
    query = (
        sa.select(events)
        .where(events.c.job_number == number, events.c.position > after)
        .order_by(events.c.position)
        .limit(limit)
    )
    return tuple(_event_of(row) for row in connection.execute(query))


def read_feed(connection: Connection, number: int, *, after: int, limit: int) -> Feed:
    """Return what follows a position: at most ``limit`` events and reports, each report with all its points.

    Points that were superseded since are left out; the event ``resumed`` tells those who have seen them.
    """
    of_events = sa.select(events.c.position).where(events.c.job_number == number, events.c.position > after)
    of_points = (
        sa.select(metrics.c.position)
        .distinct()
        .where(metrics.c.job_number == number, metrics.c.position > after, ~metrics.c.superseded)
    )
    ranges = [query.order_by(sa.column("position")).limit(limit).subquery() for query in (of_events, of_points)]
    union = sa.union_all(*(sa.select(found.c.position) for found in ranges)).subquery()
    positions = connection.execute(sa.select(union.c.position).order_by(union.c.position).limit(limit)).scalars().all()
    if len(positions) < limit:
        last = connection.execute(sa.select(jobs.c.position).where(jobs.c.number == number)).scalar_one()
    else:
        last = positions[-1]
    event_rows = connection.execute(
        sa.select(events)
        .where(events.c.job_number == number, events.c.position > after, events.c.position <= last)
        .order_by(events.c.position)
    )
    points = (
        select_points(number)
        .where(metrics.c.position > after, metrics.c.position <= last)
        .order_by(metrics.c.position, metrics.c.name)
    )
    return Feed(
        events=tuple(_event_of(row) for row in event_rows),
        points=read_points(connection, points),
        position=last,
    )


def _event_of(row: Row[Any]) -> Event:
    return Event(
        position=row.position,
        time=row.time,
        kind=row.kind,
        attempt=row.attempt,
        reason=None if row.reason is None else Reason(row.reason),
        message=row.message,
        data=row.data,
    )
