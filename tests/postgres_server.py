"""A PostgreSQL server of a test's own, which it may restart; in a directory that goes with the test."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT_S = 30


class PostgresServer:
    """One that listens on a free port of 127.0.0.1.

    Args:
        binaries: directory of ``initdb`` and ``pg_ctl``.
        directory: for its data; belongs to the user that runs it.
        user: who that is; None: the one that runs this process.
    """

    def __init__(self, binaries: Path, directory: Path, user: str | None) -> None:
        self._binaries = binaries
        self._data = directory / "data"
        self._log = directory / "log"
        self._user = user
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        self._run("initdb", "-D", str(self._data), "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={directory}"
        (self._data / "postgresql.auto.conf").open("a").close()
        self._options = options
        self.start()

    def start(self) -> None:
        """Return when it answers."""
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._log), "-o", self._options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """End it: ``fast`` ends every connection, ``immediate`` is as good as ``kill -9``."""
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / program), *arguments],
            user=self._user,
            cwd=self._data.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would be held open by the server
            stderr=subprocess.DEVNULL,
            timeout=START_TIMEOUT_S + 30,
        )
        log = self._log.read_text() if self._log.exists() else ""
        assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{log}"


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server; skip where there is none to start, or fail if it is required."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) + [Path(place) for place in _on_the_path()]
    if not found:
        reason = "no PostgreSQL server is installed that could be restarted"
        if "postgres" in os.environ.get("SYNCBN_REQUIRE", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    # A server does not run as root, and whoever it runs as has to get to its directory; those of pytest are private.
    user = "nobody" if os.geteuid() == 0 else None
    directory = Path(tempfile.mkdtemp(prefix="syncbn-pg-"))
    if user is not None:
        shutil.chown(directory, user)
    server = PostgresServer(found[-1], directory, user)
    try:
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)


def _on_the_path() -> list[str]:
    place = shutil.which("initdb")
    return [] if place is None else [os.path.dirname(place)]
