"""Points of the scheduler's work at which a test has it end or stop, to see another one go on from there.

For tests only: nothing happens at a point unless the environment variable ``SYNCBN_CRASH_AT`` names a file, and that
file holds the point's name and a signal, as in ``after_claim SIGKILL``. The first process that gets there removes the
file and sends itself the signal, so that its successor, which has the same environment, passes.
"""

import os
import signal
from enum import StrEnum
from pathlib import Path


class CrashPoint(StrEnum):
    """A point between two effects of which the second may never come."""

    BEFORE_CLAIM = "before_claim"  # a queued job is about to get an attempt
    AFTER_CLAIM = "after_claim"  # it has one, of which the cluster knows nothing
    BEFORE_LAUNCH = "before_launch"  # the supervisor is about to be asked for
    AFTER_LAUNCH = "after_launch"  # it was, and nothing has been heard of it
    BEFORE_RECORD = "before_record"  # records of the journal were read
    AFTER_RECORD = "after_record"  # they are in the store, and what follows from them is not
    BEFORE_RESULT = "before_result"  # the attempt's end is known
    AFTER_RESULT = "after_result"  # it is sealed, and its supervisor not closed


_FILE = os.environ.get("SYNCBN_CRASH_AT")


def reach(point: CrashPoint) -> None:
    """Pass a point, or be ended or stopped there."""
    if _FILE is not None:
        _crash(Path(_FILE), point)


def _crash(file: Path, point: CrashPoint) -> None:
    try:
        named, signal_name = file.read_text().split()
    except FileNotFoundError:
        return
    if named == point:
        file.unlink()
        os.kill(os.getpid(), signal.Signals[signal_name])
