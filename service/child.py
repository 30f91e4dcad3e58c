"""A child process of ``syncbn serve``."""

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from service.linux import die_with_parent

# A child that ran this long is restarted at once; one that did not waits, longer each time.
STABLE_S = 10.0
MAX_BACKOFF_S = 10.0

logger = logging.getLogger(__name__)


class Child:
    """A process that is started again when it ends.

    Args:
        name: for its log and for messages.
        log_path: takes its output.
    """

    def __init__(self, name: str, log_path: Path) -> None:
        self.name = name
        self._log_path = log_path
        self.pid: int | None = None
        self._started_at = 0.0
        self._num_short_lives = 0
        self.start_not_before = 0.0
        self.is_stopping = False

    def start(self, command: Sequence[str], environment: Mapping[str, str], *, pass_fds: Sequence[int] = ()) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C does not reach it."""
        with self._log_path.open("ab") as log:
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGKILL),
            )
        self.pid = process.pid
        process.returncode = 0  # waited for by the one loop that reaps every child
        self._started_at = time.monotonic()

    def ended(self, exit_status: int) -> None:
        """Note that it ended, and when it may start again."""
        self.pid = None
        now = time.monotonic()
        # Counted no further than the longest wait needs: a child may fail for days.
        self._num_short_lives = 0 if now - self._started_at > STABLE_S else min(self._num_short_lives + 1, 10)
        backoff_s = 0.0 if self._num_short_lives <= 1 else min(MAX_BACKOFF_S, 0.25 * 2**self._num_short_lives)
        self.start_not_before = now + backoff_s
        level = logging.INFO if self.is_stopping else logging.WARNING
        logger.log(level, "%s ended with status %d; see %s", self.name, exit_status, self._log_path)

    def send(self, signal_number: int) -> None:
        """Send a signal to it, and to its group if the signal kills."""
        if self.pid is None:
            return
        try:
            if signal_number == signal.SIGKILL:
                os.killpg(self.pid, signal_number)
            else:
                os.kill(self.pid, signal_number)
        except ProcessLookupError:
            return
