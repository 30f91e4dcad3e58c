"""A real forkserver with a tiny entry point, and processes of it as a rank actor would hold them."""

import json
import os
import select
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from service.cluster.fork_client import ForkedProcess
from service.cluster.forkserver import ForkRequest

ROOT = Path(__file__).parents[3]
ENTRY = "tests.integration.cluster.forked_entry:main"
DEADLINE_S = 20.0
REAPER = "syncbn-reaper"


class Watch:
    """Tells when a process has ended, by a descriptor that stands for it and no later holder of its number."""

    def __init__(self, pid):
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = None

    def is_over(self, timeout_s=0.0):
        return self._fd is None or bool(select.select([self._fd], [], [], timeout_s)[0])

    def wait(self):
        assert self.is_over(DEADLINE_S), f"process {self.pid} still runs after {DEADLINE_S} s"

    def close(self):
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Forked:
    """A forked process, the far end of its channel, and its log."""

    def __init__(self, process, channel, log_path):
        self.process = process
        self.pid = process.pid
        self.log_path = log_path
        self.watch = Watch(process.pid)
        channel.settimeout(DEADLINE_S)
        self._channel = channel
        self._lines = channel.makefile("rw")

    def order(self, do, **details):
        """Send an order that has no answer."""
        self._lines.write(json.dumps({"do": do, **details}) + "\n")
        self._lines.flush()

    def ask(self, do, **details):
        self.order(do, **details)
        return json.loads(self._lines.readline())

    def is_reported(self, timeout_s):
        """Whether the forkserver has something to say about it."""
        return bool(select.select([self.process], [], [], timeout_s)[0])

    def close(self):
        self.process.close()
        self._lines.close()
        self._channel.close()
        self.watch.close()


class Server:
    """A forkserver; as a context manager it leaves nothing behind."""

    def __init__(self, directory, **environment):
        self.socket_name = f"syncbn-test-{uuid.uuid4().hex}"
        command = [sys.executable, "-m", "service.cluster.forkserver", "--socket", self.socket_name]
        command += ["--parent-pid", str(os.getpid()), "--entry", ENTRY, "--preload", "json", "socket"]
        command += ["--fences", str(directory / "fences")]
        with (directory / "forkserver.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            )
        assert self.process.stdout.readline() == b"ready\n", (directory / "forkserver.log").read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()

    @property
    def pid(self):
        return self.process.pid

    def forked_pids(self):
        """Of all descendants but the reaper."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child.pid for child in children if child.name() != REAPER]

    def reaper_pid(self):
        return next(child.pid for child in psutil.Process(self.pid).children() if child.name() == REAPER)

    def num_descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Owner:
    """Holds processes of a forkserver, for jobs that nobody else has; lets go of all of them at the end."""

    def __init__(self, server, directory):
        self.server = server
        self._directory = directory
        self._prefix = uuid.uuid4().hex
        self._forked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for forked in self._forked:
            forked.close()

    def moved_to(self, server):
        """One for the same jobs at another forkserver."""
        other = Owner(server, self._directory)
        other._prefix = self._prefix
        return other

    def request(self, *, job="job", attempt=1, rank=0, devices=(), environment=None):
        return ForkRequest(
            job_id=f"{self._prefix}-{job}",
            attempt=attempt,
            rank=rank,
            devices=devices,
            environment=environment or {},
            log_path=str(self._directory / f"{job}-{attempt}-{rank}.log"),
        )

    def fork(self, *, task="{}", rendezvous=None, timeout_s=DEADLINE_S, **request):
        """Start a process. Raises ``ForkRefused``."""
        wanted = self.request(**request)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = ForkedProcess(
                    socket_name=self.server.socket_name,
                    request=wanted,
                    task_json=task,
                    descriptors=[theirs.fileno(), *([] if rendezvous is None else [rendezvous.fileno()])],
                    timeout_s=timeout_s,
                )
            except BaseException:
                ours.close()
                raise
        self._forked.append(Forked(process, ours, Path(wanted.log_path)))
        return self._forked[-1]
