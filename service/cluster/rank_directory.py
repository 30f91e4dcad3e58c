"""The node-local directory of a rank: its log under way and its staged checkpoints, for as long as its actor lives."""

import fcntl
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path


class RankDirectory:
    """Made empty, and held; the kernel lets go with the process, so that others can tell it from an abandoned one.

    Args:
        work_dir: of the node.
        job_id: whose it is.
        attempt: which attempt's.
        rank: which rank's.

    Attributes:
        path: the directory.
    """

    path: Path

    def __init__(self, work_dir: Path, *, job_id: str, attempt: int, rank: int) -> None:
        attempt_dir = work_dir / job_id / str(attempt)
        attempt_dir.mkdir(parents=True, exist_ok=True)
        self.path = attempt_dir / f"rank-{rank}"
        # Nobody may find it before it is held.
        unheld = attempt_dir / f".{uuid.uuid4().hex}"
        unheld.mkdir()
        self._hold = os.open(unheld, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._hold, fcntl.LOCK_EX)
        unheld.rename(self.path)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._hold)


def remove_abandoned(work_dir: Path) -> None:
    """Remove what rank actors that were killed left on this node, checkpoints of whole models among it."""
    for path in work_dir.glob("*/*/rank-*"):
        with suppress(OSError):  # another actor removes it, or holds it
            hold = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(hold)
