"""Runs the Ray head, and ends all that it started once its own parent is gone.

Ray's agents wait for an answer of a head that was killed beside them, for up to a minute.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

import psutil

from service.linux import become_subreaper, die_with_parent

_SIGNALS = (signal.SIGTERM, signal.SIGCHLD)
_RECHECK_S = 0.05
_END_TIMEOUT_S = 30.0


def guard_command(command: Sequence[str]) -> list[str]:
    """Return the command that runs another one under a guard."""
    return [sys.executable, "-m", "service.cluster.head_guard", *command]


def main() -> None:
    """Run the command that follows; exits as it does, or once nothing of it is left when the parent is gone."""
    parent_pid = os.getppid()
    # Whatever loses its parent on the way is this process's to end.
    become_subreaper()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    die_with_parent(parent_pid, signal.SIGTERM)
    head = subprocess.Popen(sys.argv[1:], preexec_fn=partial(_prepare_head, os.getpid()))
    while True:
        if signal.sigwait(_SIGNALS) == signal.SIGTERM:
            if os.getppid() != parent_pid:
                _end_descendants()
                os._exit(1)
            head.send_signal(signal.SIGTERM)
        status = _reap(head.pid)
        if status is not None:
            os._exit(status if status >= 0 else 128 - status)


def _prepare_head(guard_pid: int) -> None:
    die_with_parent(guard_pid)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _reap(head_pid: int | None) -> int | None:
    """Bury whatever has ended; return the head's exit status if it has."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        if pid == head_pid:
            return os.waitstatus_to_exitcode(status)


def _end_descendants() -> None:
    deadline = time.monotonic() + _END_TIMEOUT_S
    while (rest := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for process in rest:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _reap(None)
        time.sleep(_RECHECK_S)


if __name__ == "__main__":
    main()
