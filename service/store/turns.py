"""Whose turn it is to write, and how many may wait for theirs."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.domain.errors import Unavailable

LOCK_TIMEOUT_S = 5.0
"""How long a transaction waits for another's lock."""

MAX_WAITING = 24
"""Most threads that wait while no write gets through; the others of the 40 that an API process has are for reads."""

STALLED_S = 0.5
"""After so long without a write that got through, the database is not busy but locked."""


class Turns:
    """Lets threads write.

    Args:
        one_by_one: whether the database has one writer. Threads that wait here are woken at once, whereas the busy
            handler of SQLite sleeps, ever longer.
    """

    def __init__(self, *, one_by_one: bool) -> None:
        self._turn = threading.Lock() if one_by_one else None
        self._guard = threading.Lock()
        self._num_writing = 0
        self._written_at = 0.0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Have one's turn for the length of the context.

        Raises:
            Unavailable: it did not come in time, or others wait already while none gets through.
        """
        with self._guard:
            if self._num_writing == 0:
                self._written_at = time.monotonic()  # nobody has tried since, so nobody knows
            self._num_writing += 1
        try:
            self._refuse_if_stalled()
            with self._waiting():
                yield
            self._written_at = time.monotonic()
        finally:
            with self._guard:
                self._num_writing -= 1

    def _refuse_if_stalled(self) -> None:
        stalled_s = time.monotonic() - self._written_at
        if self._num_writing > MAX_WAITING and stalled_s > STALLED_S:
            raise Unavailable(f"The database has taken no write for {stalled_s:.1f} s, and many wait. Try again.")

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self._turn is None:
            yield
            return
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not self._turn.acquire(timeout=STALLED_S):
            self._refuse_if_stalled()
            if time.monotonic() >= deadline:
                raise Unavailable(f"The database was busy with other writes for {LOCK_TIMEOUT_S:g} s. Try again.")
        try:
            yield
        finally:
            self._turn.release()
