"""Metric points: one per report and name, of which one per step and name counts."""

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.job import MetricPoint
from service.store.tables import metrics


def insert_points(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add points whose positions were taken under the job's lock."""
    if rows:
        connection.execute(sa.insert(metrics), rows)


def list_points(
    connection: Connection, number: int, *, names: Sequence[str], after_step: int
) -> tuple[MetricPoint, ...]:
    """Return the points that count, by step, then name."""
    query = select_points(number).where(metrics.c.step > after_step)
    if names:
        query = query.where(metrics.c.name.in_(names))
    return read_points(connection, query.order_by(metrics.c.step, metrics.c.name))


def supersede_beyond(connection: Connection, number: int, step: int) -> None:
    """Let no point after a step count."""
    _supersede(connection, number, metrics.c.step > step)


def supersede_at(connection: Connection, number: int, step: int, names: Iterable[str]) -> None:
    """Let the points of a step that have one of these names count no more."""
    _supersede(connection, number, metrics.c.step == step, metrics.c.name.in_(list(names)))


def select_points(number: int) -> sa.Select[Any]:
    """Return a query for the points of a job that count, to be narrowed and ordered."""
    columns = (metrics.c[name] for name in MetricPoint.model_fields)
    return sa.select(*columns).where(metrics.c.job_number == number, ~metrics.c.superseded)


def read_points(connection: Connection, query: sa.Select[Any]) -> tuple[MetricPoint, ...]:
    """Return the points that a query finds."""
    return tuple(
        MetricPoint(position=position, attempt=attempt, step=step, name=name, value=value, nonfinite=nonfinite)
        for position, attempt, step, name, value, nonfinite in connection.execute(query)
    )


def _supersede(connection: Connection, number: int, *conditions: sa.ColumnElement[bool]) -> None:
    connection.execute(
        sa.update(metrics)
        .where(metrics.c.job_number == number, ~metrics.c.superseded, *conditions)
        .values(superseded=True)
    )
