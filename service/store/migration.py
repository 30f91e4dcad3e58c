"""Bringing a database's tables up to date."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from service.domain.errors import ServiceError
from service.store.engine import create_engine, outages_as_unavailable

logger = logging.getLogger(__name__)

_WAIT_S = 60  # for another process's migration
_ADVISORY_LOCK = 0x73796E63626E  # "syncbn"; PostgreSQL keeps these numbers per database


def migrate(url: str) -> None:
    """Create the tables, or change those of an earlier version, in one transaction; nothing where they are current.

    Processes that do so at once wait for each other.

    Args:
        url: as ``SqlStore`` takes it.

    Raises:
        Unavailable: the database does not answer, or is in use.
        ServiceError: its tables were made by a later version of the service.
    """
    # Takes 0.2 s to import, which the processes that find their tables in place need not spend.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    engine = create_engine(url)
    try:
        with outages_as_unavailable(), _exclusive(engine) as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise ServiceError(
            f"The tables of the job database were made by a later version of the service ({error}). "
            "Install that version, or restore a backup."
        ) from error
    finally:
        engine.dispose()


@contextmanager
def _exclusive(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that no other migration runs beside."""
    with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            # Neither can be changed within a transaction, so past SQLAlchemy. Without foreign keys, because SQLite
            # changes a table by making a new one and dropping the old; they are checked before the commit.
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.execute(f"PRAGMA busy_timeout={_WAIT_S * 1000}")
            driver.execute("PRAGMA foreign_keys=OFF")
            connection.execution_options(sqlite_begin="IMMEDIATE")
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.execute(
                    sa.select(
                        sa.func.set_config("lock_timeout", f"{_WAIT_S}s", True),
                        sa.func.set_config("statement_timeout", "0", True),
                    )
                )
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            yield connection
            if connection.dialect.name == "sqlite":
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                assert not broken, f"the migration leaves rows that refer to nothing: {broken[:3]}"
