"""Many rows in one statement, past what SQLAlchemy does for each of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

Value = Any
_ROWS_PER_WRITE = 1000  # the server stores these while the next are written
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_Process = Callable[[Value], Value]


def insert_rows(
    connection: Connection,
    table: sa.Table,
    rows: Sequence[Mapping[str, Value]],
    *,
    on_conflict: Literal["fail", "skip", "replace"] = "fail",
) -> int:
    """Insert rows, and return how many.

    PostgreSQL takes them as one JSON document, which is one statement to plan and one message to send; SQLite, which
    is called and not asked over a connection, one after another.

    Args:
        connection: in a transaction for writing.
        table: where to.
        rows: by column name, all with the same ones.
        on_conflict: with a row of the same primary key that is there: what becomes of the new one.
    """
    if not rows:
        return 0
    names = tuple(rows[0])
    processes = _processes(connection.dialect, table, names)
    columns = ", ".join(names)
    tail = _tail(table, names, on_conflict)
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


def copy_rows(connection: Connection, table: str, columns: Sequence[str], rows: Sequence[tuple[Value, ...]]) -> None:
    """Insert thousands of rows in the shortest way that a database has: PostgreSQL's COPY, or a prepared statement.

    Args:
        connection: in a transaction for writing.
        table: where to.
        columns: of the rows, in their order.
        rows: of integers, floats, booleans, None and text that is ``plain``.
    """
    names = ", ".join(columns)
    if connection.dialect.name == "sqlite":
        places = ", ".join("?" * len(columns))
        connection.exec_driver_sql(f"INSERT INTO {table} ({names}) VALUES ({places})", list(rows))  # noqa: S608
        return
    statement = f"COPY {table} ({names}) FROM STDIN"
    driver = connection.connection.driver_connection
    base_error = connection.dialect.loaded_dbapi.Error
    assert driver is not None
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for first in range(0, len(rows), _ROWS_PER_WRITE):
                lines = ["\t".join(map(_copied, row)) for row in rows[first : first + _ROWS_PER_WRITE]]
                copy.write("\n".join(lines) + "\n")
    except base_error as error:
        # As SQLAlchemy raises it where it runs a statement itself.
        raise sa.exc.DBAPIError.instance(statement, None, error, base_error, dialect=connection.dialect) from error


def _copied(value: Value) -> str:
    """Return a value as COPY takes it."""
    if value is None:
        return "\\N"
    return _escaped(value) if isinstance(value, str) else repr(value)


@lru_cache(maxsize=1024)
def _escaped(text: str) -> str:
    return text.translate(_ESCAPES)


def _tail(table: sa.Table, names: Sequence[str], on_conflict: str) -> str:
    if on_conflict == "fail":
        return ""
    if on_conflict == "skip":
        return " ON CONFLICT DO NOTHING"
    keys = [column.name for column in table.primary_key]
    changes = ", ".join(f"{name} = excluded.{name}" for name in names if name not in keys)
    return f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {changes}"


@lru_cache(maxsize=64)
def _processes(dialect: sa.Dialect, table: sa.Table, names: tuple[str, ...]) -> tuple[_Process | None, ...]:
    """What each column's type does to a value; None: nothing."""
    return tuple(table.c[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names)


def _iso(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
