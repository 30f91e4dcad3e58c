"""Many rows in one statement, past what SQLAlchemy does for each of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

Value = Any
_Process = Callable[[Value], Value]


def insert_rows(
    connection: Connection, table: sa.Table, rows: Sequence[Mapping[str, Value]], *, or_nothing: bool = False
) -> int:
    """Insert rows, and return how many.

    PostgreSQL takes them as one JSON document, which is one statement to plan and one message to send; SQLite, which
    is called and not asked over a connection, one after another.

    Args:
        connection: in a transaction for writing.
        table: where to.
        rows: by column name, all with the same ones.
        or_nothing: leave out what conflicts with a row that is there; the rest is inserted.
    """
    if not rows:
        return 0
    names = tuple(rows[0])
    processes = _processes(connection.dialect, table, names)
    columns = ", ".join(names)
    tail = " ON CONFLICT DO NOTHING" if or_nothing else ""
    if connection.dialect.name == "sqlite":
        statement = f"INSERT INTO {table.name} ({columns}) VALUES ({', '.join('?' * len(names))}){tail}"  # noqa: S608
        values: Any = [
            tuple(
                value if process is None or value is None else process(value)
                for value, process in zip((row[name] for name in names), processes, strict=True)
            )
            for row in rows
        ]
    else:
        statement = (
            f"INSERT INTO {table.name} ({columns}) "  # noqa: S608 - of our own tables
            f"SELECT {columns} FROM json_populate_recordset(NULL::{table.name}, %s){tail}"
        )
        document = [
            {
                name: value if process is None or value is None else process(value)
                for (name, value), process in zip(row.items(), processes, strict=True)
            }
            for row in rows
        ]
        values = (json.dumps(document, allow_nan=False, default=_iso),)
    return connection.exec_driver_sql(statement, values).rowcount


@lru_cache(maxsize=64)
def _processes(dialect: sa.Dialect, table: sa.Table, names: tuple[str, ...]) -> tuple[_Process | None, ...]:
    """What each column's type does to a value; None: nothing."""
    return tuple(table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names)


def _iso(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
