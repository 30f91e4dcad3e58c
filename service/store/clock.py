"""The database's clock, the one clock that every process of the service shares."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class unix_now(FunctionElement[float]):
    """Seconds since 1970, read anew by each statement (not at the start of the transaction)."""

    type = sa.Double()
    inherit_cache = True


@compiles(unix_now, "sqlite")
def _in_sqlite(element: unix_now, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    # unixepoch() has fractions only since 3.42. 2440587.5 is the Julian day of 1970-01-01.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(unix_now, "postgresql")
def _in_postgresql(element: unix_now, compiler: SQLCompiler, **_: Any) -> str:  # noqa: ANN401 - SQLAlchemy's signature
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


def read_clock(connection: Connection) -> datetime:
    """Return the database's time."""
    return datetime.fromtimestamp(connection.execute(sa.select(unix_now())).scalar_one(), UTC)
