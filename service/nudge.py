"""A hint to the scheduler that the database has news. Losing one costs a moment: the scheduler polls anyway."""

import hashlib
import select
import socket


def _address(database_url: str) -> str:
    # In the abstract namespace: no file to clean up, and a name of its own for each database.
    return "\0syncbn-nudge-" + hashlib.sha256(database_url.encode()).hexdigest()[:32]


class Nudge:
    """Sends hints.

    Args:
        database_url: which database has news.
    """

    def __init__(self, database_url: str) -> None:
        self._address = _address(database_url)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __call__(self) -> None:
        """Send a hint; nothing if nobody listens."""
        try:
            self._socket.sendto(b"\0", self._address)
        except OSError:
            return  # no scheduler, or it has plenty of hints waiting


class NudgeListener:
    """Waits for hints; one process per database does.

    Args:
        database_url: whose news.
    """

    def __init__(self, database_url: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(_address(database_url))
        except OSError:
            # Another scheduler of this machine hears them; this one polls, which suffices while it does not lead.
            self._socket.close()

    def wait(self, timeout_s: float) -> None:
        """Return after the time, or as soon as there is a hint."""
        if self._socket.fileno() < 0:
            select.select([], [], [], timeout_s)
            return
        if select.select([self._socket], [], [], timeout_s)[0]:
            try:
                while self._socket.recv(64):
                    pass
            except BlockingIOError:
                return
