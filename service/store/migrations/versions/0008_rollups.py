"""Roll-ups of training curves, made of the points that there are; points by position, and by metric and step."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
WIDTHS = (16, 128, 1024, 8192, 65536)
ROWS_AT_ONCE = 5000

Summary = dict[str, Any]


def upgrade() -> None:
    _remake_metrics()
    rollups = op.create_table(
        "metric_rollups",
        sa.Column("job_number", NUMBER, nullable=False),
        sa.Column("width", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("start", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("last_step", sa.BigInteger(), nullable=False),
        sa.Column("finite_count", sa.BigInteger(), nullable=False),
        sa.Column("nonfinite_count", sa.BigInteger(), nullable=False),
        sa.Column("min", sa.Double(), nullable=True),
        sa.Column("mean", sa.Double(), nullable=True),
        sa.Column("max", sa.Double(), nullable=True),
        sa.Column("last", sa.Double(), nullable=True),
        sa.Column("last_nonfinite", sa.String(length=8), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_metric_rollups_job_number"),
        sa.PrimaryKeyConstraint("job_number", "width", "name", "start", name="pk_metric_rollups"),
        sqlite_with_rowid=False,
    )
    connection = op.get_bind()
    numbers = connection.execute(sa.text("SELECT number FROM jobs WHERE attempt > 0 ORDER BY number")).scalars().all()
    rows: list[Summary] = []
    for number in numbers:
        for row in _rows_of(connection, number):
            rows.append(row)
            if len(rows) == ROWS_AT_ONCE:
                connection.execute(sa.insert(rollups), rows)
                rows = []
    if rows:
        connection.execute(sa.insert(rollups), rows)


def _remake_metrics() -> None:
    """Give points a key that their job's feed is read by, and no second index for that."""
    op.drop_index("ix_metrics_curve", "metrics")
    op.drop_index("ix_metrics_feed", "metrics")
    op.rename_table("metrics", "metrics_before")
    if op.get_context().dialect.name == "postgresql":
        op.drop_constraint("pk_metrics", "metrics_before")  # frees its name
    op.create_table(
        "metrics",
        sa.Column("job_number", NUMBER, autoincrement=False, nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("nonfinite", sa.String(length=8), nullable=True),
        sa.Column("superseded", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("job_number", "position", "name", name="pk_metrics"),
        sqlite_with_rowid=False,
    )
    columns = "job_number, position, name, attempt, sequence, step, value, nonfinite, superseded"
    op.execute(
        f"INSERT INTO metrics ({columns}) SELECT {columns} FROM metrics_before "  # noqa: S608 - of our own names
        "ORDER BY job_number, position, name"
    )
    op.drop_table("metrics_before")
    op.create_index(
        "ix_metrics_curve",
        "metrics",
        ["job_number", "name", "step"],
        sqlite_where=sa.text("superseded = 0"),
        postgresql_where=sa.text("NOT superseded"),
    )


def _rows_of(connection: sa.Connection, number: int) -> Iterator[Summary]:
    query = sa.text(
        "SELECT name, step, value, nonfinite, attempt FROM metrics "
        "WHERE job_number = :number AND NOT superseded ORDER BY name, step"
    )
    points = connection.execute(query.execution_options(yield_per=ROWS_AT_ONCE), {"number": number})
    by_place = groupby(points, key=lambda point: (point.name, point.step // WIDTHS[0]))
    levels: list[list[Summary]] = [[] for _ in WIDTHS]

    def close(level: int) -> Iterator[Summary]:
        """Give out a bucket whose parts are all there, and what it completes."""
        parts, levels[level] = levels[level], []
        if parts:
            one = _merged(parts)
            yield one | {"width": WIDTHS[level], "start": one["first_step"] // WIDTHS[level] * WIDTHS[level]}
            if level + 1 < len(WIDTHS):
                waiting = levels[level + 1]
                if waiting and not _together(waiting[0], one, WIDTHS[level + 1]):
                    yield from close(level + 1)
                levels[level + 1].append(one)

    for (name, _), group in by_place:
        for point in group:
            one = _single(number, name, point)
            if levels[0] and not _together(levels[0][0], one, WIDTHS[0]):
                yield from close(0)
            levels[0].append(one)
    for level in range(len(WIDTHS)):
        yield from close(level)


def _together(first: Summary, second: Summary, width: int) -> bool:
    return bool(first["name"] == second["name"] and first["first_step"] // width == second["first_step"] // width)


def _single(number: int, name: str, point: Any) -> Summary:  # noqa: ANN401 - a row
    return {
        "job_number": number,
        "name": name,
        "first_step": point.step,
        "last_step": point.step,
        "finite_count": int(point.value is not None),
        "nonfinite_count": int(point.value is None),
        "min": point.value,
        "mean": point.value,
        "max": point.value,
        "last": point.value,
        "last_nonfinite": point.nonfinite,
        "attempt": point.attempt,
    }


def _merged(parts: Sequence[Summary]) -> Summary:
    count = sum(part["finite_count"] for part in parts)
    finite = [part for part in parts if part["finite_count"]]
    return parts[-1] | {
        "first_step": parts[0]["first_step"],
        "finite_count": count,
        "nonfinite_count": sum(part["nonfinite_count"] for part in parts),
        "min": min((part["min"] for part in finite), default=None),
        "mean": sum(part["mean"] * (part["finite_count"] / count) for part in finite) if count else None,
        "max": max((part["max"] for part in finite), default=None),
    }
