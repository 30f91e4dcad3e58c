"""A job's feed: its events and metric points in one order, for those who follow it."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.job import Event, JobStatus, MetricPoint, Reason
from service.domain.ports import Feed, Followed
from service.store.bulk import insert_rows
from service.store.metrics import POINT_COLUMNS, point_of
from service.store.tables import events, jobs, metrics

_MOST_JOBS = 500  # in one statement


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


def follow(connection: Connection, after: Mapping[str, int], limit: int) -> dict[str, Followed]:
    """Return what the feeds of many jobs hold after a position of each, in as few statements as for one.

    Points that were superseded since are left out; the event ``resumed`` tells those who have seen them.
    """
    ids = sorted(after)
    rows = [
        row
        for first in range(0, len(ids), _MOST_JOBS)
        for row in connection.execute(
            sa.select(jobs.c.number, jobs.c.id, jobs.c.position, jobs.c.status, jobs.c.reason, jobs.c.message).where(
                jobs.c.id.in_(ids[first : first + _MOST_JOBS])
            )
        )
    ]
    moved = [row for row in rows if row.position > after[row.id]]
    share = max(1, limit // max(1, len(moved)))
    ranges = {row.number: range(after[row.id] + 1, min(row.position, after[row.id] + share) + 1) for row in moved}
    feeds = _read_ranges(connection, ranges)
    return {
        row.id: Followed(
            feed=feeds.get(row.number) or Feed(events=(), points=(), position=row.position),
            has_more=row.number in feeds and feeds[row.number].position < row.position,
            status=JobStatus(row.status),
            reason=Reason(row.reason),
            message=row.message,
        )
        for row in rows
    }


def _read_ranges(connection: Connection, ranges: Mapping[int, range]) -> dict[int, Feed]:
    """Return the feeds of jobs between positions, by the numbers of their rows."""
    found: dict[int, tuple[list[Event], list[MetricPoint]]] = {number: ([], []) for number in ranges}
    numbers = list(ranges)
    for first in range(0, len(numbers), _MOST_JOBS):
        some = numbers[first : first + _MOST_JOBS]
        # One range of an index for each job: the tables are read through the list, not the other way round.
        wanted = (
            sa.values(
                sa.column("number", sa.BigInteger),
                sa.column("first", sa.BigInteger),
                sa.column("last", sa.BigInteger),
                name="ranges",
            )
            .data([(number, ranges[number].start, ranges[number].stop - 1) for number in some])
            .cte("wanted")
        )
        of_events = (
            sa.select(events)
            .join_from(wanted, events, _within(events, wanted))
            .order_by(events.c.job_number, events.c.position)
        )
        for row in connection.execute(of_events):
            found[row.job_number][0].append(_event_of(row))
        of_points = (
            sa.select(*POINT_COLUMNS, metrics.c.job_number)
            .join_from(wanted, metrics, _within(metrics, wanted))
            .where(~metrics.c.superseded)
            .order_by(metrics.c.job_number, metrics.c.position, metrics.c.name)
        )
        for *point, number in connection.execute(of_points):
            found[number][1].append(point_of(point))
    return {
        number: Feed(events=tuple(of_job), points=tuple(points), position=ranges[number].stop - 1)
        for number, (of_job, points) in found.items()
    }


def _within(table: sa.Table, wanted: sa.CTE) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.job_number == wanted.c.number, table.c.position.between(wanted.c.first, wanted.c.last))


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
