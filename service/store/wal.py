"""Carries SQLite's write-ahead log into the database beside the writers, where it costs no commit its time."""

import logging
import threading
from pathlib import Path

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

# A log of so many bytes is carried over. Left to itself, SQLite does it within the commit that reaches 4 MB.
CHECKPOINT_BYTES = 4 << 20
# Pages at which a commit does it all the same, should writers never leave this thread the time for it: 128 MB.
AUTOCHECKPOINT_PAGES = 32_768
# After a commit; what is committed meanwhile goes with it.
_PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class WalCheckpoints:
    """A thread of a process that writes; it rests while nothing is written.

    Args:
        engine: of an SQLite file.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._log = Path(f"{engine.url.database}-wal")
        self._written = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def notice(self) -> None:
        """Say that something was committed."""
        if not self._written.is_set():
            self._written.set()
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
                    self._thread.start()

    def close(self) -> None:
        """End the thread; the next commit starts another."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._closing.set()
            self._written.set()
        if thread is not None:
            thread.join()
        self._closing.clear()
        self._written.clear()

    def _run(self) -> None:
        while True:
            self._written.wait()
            if self._closing.wait(_PAUSE_S):
                return
            self._written.clear()
            if self._is_long():
                self._carry_over()

    def _is_long(self) -> bool:
        try:
            return self._log.stat().st_size >= CHECKPOINT_BYTES
        except FileNotFoundError:  # the database keeps a journal of another mode
            return False

    def _carry_over(self) -> None:
        try:
            connection = self._engine.raw_connection()  # no transaction around it
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            finally:
                connection.close()
        except (DBAPIError, PoolTimeout, self._engine.dialect.loaded_dbapi.Error) as error:
            # A full disk, perhaps. Nothing is lost: the log has it, and grows until this can be done.
            logger.warning("The write-ahead log could not be carried over, will try again: %s", error)
