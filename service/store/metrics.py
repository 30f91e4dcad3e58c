"""Metric points: one per report and name, of which one per step and name counts."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.job import MetricPoint
from service.store.bulk import copy_rows
from service.store.tables import metrics

_MOST_STEPS = 500  # in one statement
POINT_COLUMNS: Sequence[sa.Column[Any]] = tuple(metrics.c[name] for name in MetricPoint.model_fields)


class PointRow(NamedTuple):
    """A row of the table, in its order of columns."""

    job_number: int
    position: int
    name: str
    attempt: int
    sequence: int
    step: int
    value: float | None
    nonfinite: str | None
    superseded: bool


def insert_points(connection: Connection, rows: Sequence[PointRow]) -> None:
    """Add points whose positions were taken under the job's lock, and whose names are ``plain``."""
    copy_rows(connection, metrics.name, PointRow._fields, rows)


def list_points(
    connection: Connection, number: int, *, names: Sequence[str], after_step: int, to_step: int | None
) -> Sequence[Row[Any]]:
    """Return the rows of the points that count, by step, then name."""
    query = sa.select(*POINT_COLUMNS).where(
        metrics.c.job_number == number, ~metrics.c.superseded, metrics.c.step > after_step
    )
    if to_step is not None:
        query = query.where(metrics.c.step <= to_step)
    if names:
        query = query.where(metrics.c.name.in_(names))
    return connection.execute(query.order_by(metrics.c.step, metrics.c.name)).all()


def supersede_beyond(connection: Connection, number: int, step: int) -> None:
    """Let no point after a step count."""
    connection.execute(
        sa.update(metrics)
        .where(metrics.c.job_number == number, ~metrics.c.superseded, metrics.c.step > step)
        .values(superseded=True)
    )


def supersede_at(
    connection: Connection, number: int, places: Collection[tuple[int, str]]
) -> frozenset[tuple[int, str]]:
    """Let points count no more.

    Args:
        connection: in a transaction for writing.
        number: of the job's row.
        places: their steps and names.

    Returns:
        Those places that had a point which counted.
    """
    found: set[tuple[int, str]] = set()
    steps = sorted({step for step, _ in places})
    names = sorted({name for _, name in places})
    for first in range(0, len(steps), _MOST_STEPS):
        query = sa.select(metrics.c.step, metrics.c.name).where(
            metrics.c.job_number == number,
            ~metrics.c.superseded,
            metrics.c.name.in_(names),
            metrics.c.step.in_(steps[first : first + _MOST_STEPS]),
        )
        found.update((step, name) for step, name in connection.execute(query))
    replaced = found.intersection(places)
    if replaced:
        connection.execute(
            sa.update(metrics)
            .where(
                metrics.c.job_number == number,
                ~metrics.c.superseded,
                metrics.c.step == sa.bindparam("at_step"),
                metrics.c.name == sa.bindparam("of_name"),
            )
            .values(superseded=True),
            [{"at_step": step, "of_name": name} for step, name in sorted(replaced)],
        )
    return frozenset(replaced)


def point_of(row: Sequence[Any]) -> MetricPoint:
    """Return the point that a row of ``POINT_COLUMNS`` holds."""
    position, attempt, step, name, value, nonfinite = row
    return MetricPoint(position=position, attempt=attempt, step=step, name=name, value=value, nonfinite=nonfinite)
