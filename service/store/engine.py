"""Connections to the job database, and the two kinds of transaction that the store uses."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.domain.errors import DiskFull, ServiceError, Unavailable
from service.store.turns import LOCK_TIMEOUT_S, Turns
from service.store.wal import AUTOCHECKPOINT_PAGES, WalCheckpoints

try:
    import pysqlite3.dbapi2 as sqlite_driver  # carries an SQLite without the WAL-reset race
except ImportError:  # no wheel for this platform
    import sqlite3 as sqlite_driver

logger = logging.getLogger(__name__)


class Deadlock(Unavailable):
    """Transactions waited for each other, and this one was undone so that the others go on; they do not stay long."""


JournalMode = Literal["wal", "delete"]

_STATEMENT_TIMEOUT_S = 30
# No transaction of ours rests: one that does belongs to a process that was stopped, and others wait for its locks.
_IDLE_TIMEOUT_S = 5
_CONNECT_TIMEOUT_S = 5
_POOL_SIZE = 10
_POOL_OVERFLOW = 30  # with the pool, the 40 threads that an API process answers on
# Of PostgreSQL.
_DEADLOCK = "40P01"
_NO_SCHEMA = ("42P01", "3F000")  # undefined table, undefined schema
_NO_ROOM = ("53100",)  # disk full
_AWAY = ("25P03", "25006")  # idle for too long in a transaction; a server that only reads, such as a stand-by
# Of SQLite; the second where the index of the write-ahead log cannot grow.
_SQLITE_NO_ROOM = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")


class Database:
    """A database by its URL; connects when first used.

    Args:
        url: ``sqlite:///path`` or ``postgresql://user@host/name``.

    Raises:
        ServiceError: another kind of database, or one that does not outlive its process.
    """

    def __init__(self, url: str) -> None:
        self.engine = create_engine(url)
        is_sqlite = self.engine.dialect.name == "sqlite"
        self._turns = Turns(one_by_one=is_sqlite)
        self._checkpoints = WalCheckpoints(self.engine) if is_sqlite else None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that sees one moment of the database and changes nothing.

        Raises:
            Unavailable: the database does not answer.
        """
        with outages_as_unavailable(), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Open a transaction that is durable once this returns, and leaves nothing if its body raises.

        Raises:
            Unavailable: the database does not answer, or another transaction held a lock for too long.
            Deadlock: another transaction and this one waited for each other.
        """
        with self._turns.take(), outages_as_unavailable(), self.engine.connect() as connection:
            # A transaction that reads first and writes later would fail, not wait, where another wrote in between.
            connection.execution_options(sqlite_begin="IMMEDIATE")
            with connection.begin():
                yield connection
        if self._checkpoints is not None:
            self._checkpoints.notice()

    def close(self) -> None:
        """Close the connections that are not in use."""
        if self._checkpoints is not None:
            self._checkpoints.close()
        self.engine.dispose()


@contextmanager
def outages_as_unavailable() -> Iterator[None]:
    """Turn what the driver raises when the database does not answer into ``Unavailable``, or ``DiskFull``."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable(f"The database does not answer: {_first_line(error)}") from error
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if state in _NO_ROOM or getattr(error.orig, "sqlite_errorname", None) in _SQLITE_NO_ROOM:
            raise DiskFull(
                f"The disk of the job database is full ({_first_line(error)}), and nothing of this was stored. Make "
                "room on it. Until then the service shows what it has, and takes nothing new."
            ) from error
        if state == _DEADLOCK:
            raise Deadlock(f"Others changed the same rows of the database: {_first_line(error)}. Try again.") from error
        if state in _NO_SCHEMA:
            raise Unavailable(f"The database has no tables yet: {_first_line(error)}") from error
        is_away = state in _AWAY or error.connection_invalidated
        if is_away or isinstance(error, OperationalError | InterfaceError):
            raise Unavailable(f"The database does not answer: {_first_line(error)}") from error
        raise


def _first_line(error: DBAPIError | PoolTimeout) -> str:
    # The driver's own words: SQLAlchemy's add the statement and its parameters.
    lines = str(error.orig if isinstance(error, DBAPIError) else error).splitlines()
    return lines[0] if lines else type(error).__name__


def create_engine(url: str) -> Engine:
    """Return an engine whose connections keep what is committed through a loss of power.

    Args:
        url: as ``Database`` takes it.

    Raises:
        ServiceError: as ``Database`` raises it.
    """
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _create_sqlite_engine(parsed)
    if parsed.get_backend_name() == "postgresql":
        return _create_postgresql_engine(parsed)
    raise ServiceError(
        f"The job database is SQLite or PostgreSQL, not {parsed.get_backend_name()}. "
        "Use a URL such as sqlite:////var/lib/syncbn/service.sqlite or postgresql://user@host/name."
    )


def journal_mode(version: tuple[int, ...]) -> JournalMode:
    """Return the journal mode that is safe with a version of SQLite.

    Versions 3.7.0 to 3.51.2 may corrupt a database when the write-ahead log is reset while another process writes;
    fixed in 3.51.3 and, for older lines, in 3.50.7 and 3.44.6 (https://sqlite.org/wal.html#walresetbug).

    Args:
        version: such as ``(3, 51, 3)``.
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return "wal" if fixed else "delete"


def _create_sqlite_engine(url: sa.URL) -> Engine:
    if not url.database or ":memory:" in url.database or url.query.get("mode") == "memory":
        raise ServiceError("The job database must be a file: what is kept in memory is lost with the process.")
    engine = sa.create_engine(
        url,
        module=sqlite_driver,
        # Transactions are begun below; left to itself, the driver begins them at the first write.
        connect_args={"isolation_level": None, "timeout": LOCK_TIMEOUT_S},
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=LOCK_TIMEOUT_S,
    )
    wanted = journal_mode(sqlite_driver.sqlite_version_info)
    logged = threading.Event()

    def prepare(connection: Any, _record: object) -> None:  # noqa: ANN401 - the driver's, which is chosen at run time
        actual = _set_journal_mode(connection, wanted)
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute(f"PRAGMA wal_autocheckpoint={AUTOCHECKPOINT_PAGES}")
        # A rollback journal's commit is its removal, which only EXTRA makes durable.
        connection.execute(f"PRAGMA synchronous={'FULL' if actual == 'wal' else 'EXTRA'}")
        if not logged.is_set():
            logged.set()
            _log_journal_mode(actual, wanted)

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('sqlite_begin', 'DEFERRED')}")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


def _set_journal_mode(connection: Any, wanted: JournalMode) -> str:  # noqa: ANN401 - as above
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            actual = connection.execute("PRAGMA journal_mode").fetchone()[0]
            if actual != wanted:
                # Where the file system has no shared memory, this answers with the mode that it stays in.
                actual = connection.execute(f"PRAGMA journal_mode={wanted}").fetchone()[0]
        except sqlite_driver.OperationalError:
            # Two processes that change the mode at once get an error at once, whatever the busy timeout.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return str(actual)


def _log_journal_mode(actual: str, wanted: JournalMode) -> None:
    version = sqlite_driver.sqlite_version
    if wanted == "delete":
        logger.warning(
            "SQLite %s may corrupt a write-ahead log: using a rollback journal, which is slower. "
            "Install pysqlite3, or SQLite 3.51.3 or newer.",
            version,
        )
    elif actual != wanted:
        logger.warning("SQLite %s cannot keep a write-ahead log here: using journal mode %s.", version, actual)
    else:
        logger.info("SQLite %s with a write-ahead log.", version)


def _create_postgresql_engine(url: sa.URL) -> Engine:
    url = url.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(
        url,
        connect_args={} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_TIMEOUT_S},
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=LOCK_TIMEOUT_S,
        pool_pre_ping=True,  # a server that was restarted costs no request
    )

    def prepare(connection: Any, _record: object) -> None:  # noqa: ANN401 - psycopg is an optional dependency
        connection.execute(
            "SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false), "
            "set_config('idle_in_transaction_session_timeout', %s, false), "
            # An acknowledged submit is durable even where the server's default says otherwise.
            "CASE current_setting('synchronous_commit') WHEN 'off' "
            "THEN set_config('synchronous_commit', 'on', false) END",
            (f"{LOCK_TIMEOUT_S:g}s", f"{_STATEMENT_TIMEOUT_S}s", f"{_IDLE_TIMEOUT_S}s"),
        )
        connection.commit()

    event.listen(engine, "connect", prepare)
    return engine
