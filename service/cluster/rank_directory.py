"""The node-local directory of a rank: its log under way and its staged checkpoints, for as long as its actor lives.

When an actor is killed, its directory stays behind with what it had not shipped yet of its rank's output, which is
wanted most just then. The node's agent ships that rest before it removes the directory.
"""

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from service.cluster.log_shipper import LogShipper
from service.domain.ports import Launch
from service.storage.layout import launch_marker, log_dir
from service.storage.node_cache import remove_tree
from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter

LOG_NAME = "output.log"
OWNER_NAME = "owner.json"
# Before a log that run storage has refused is offered again.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0

logger = logging.getLogger(__name__)


class RankOwner(BaseModel):
    """Whose directory it is, and where its log goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    attempt: int
    rank: int
    storage_url: str
    storage_id: str
    max_log_bytes: int

    @classmethod
    def of(cls, launch: Launch, rank: int) -> "RankOwner":
        """Return the owner of a rank's directory."""
        return cls(
            job_id=launch.job_id,
            attempt=launch.attempt,
            rank=rank,
            storage_url=launch.storage_url,
            storage_id=launch.storage_id,
            max_log_bytes=launch.max_log_bytes,
        )


class RankDirectory:
    """Made empty, and held; the kernel lets go with the process, so that others can tell it from an abandoned one.

    Args:
        work_dir: of the node.
        owner: whose it is.

    Attributes:
        path: the directory.
        log_path: where the output of the rank goes.
    """

    path: Path
    log_path: Path

    def __init__(self, work_dir: Path, owner: RankOwner) -> None:
        attempt_dir = work_dir / owner.job_id / str(owner.attempt)
        self.path = attempt_dir / f"rank-{owner.rank}"
        self.log_path = self.path / LOG_NAME
        # Nobody may find it before it is held.
        unheld = attempt_dir / f".{uuid.uuid4().hex}"
        while True:
            try:
                unheld.mkdir(parents=True)
            except FileNotFoundError:  # another rank of the attempt has just left it empty, and removed
                continue
            break
        self._hold = os.open(unheld, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._hold, fcntl.LOCK_EX)
        (unheld / OWNER_NAME).write_text(owner.model_dump_json())
        unheld.rename(self.path)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._hold)
        _remove_if_empty(self.path.parent)


class AbandonedDirectories:
    """Those of rank actors that were killed. Where run storage refuses a log, it is tried less and less often."""

    def __init__(self) -> None:
        self._refused: dict[Path, _Refusal] = {}

    def clear(self, work_dir: Path) -> None:
        """Ship what is left of logs on a node, and remove the directories.

        Where run storage does not take a log now, it stays for a later call; staged checkpoints of whole models do
        not.

        Args:
            work_dir: of the node.
        """
        for path in work_dir.glob("*/*/rank-*"):
            refusal = self._refused.get(path)
            if refusal is not None and time.monotonic() < refusal.retry_at:
                continue
            with _holding(path) as is_held:
                if not is_held:
                    continue
                if _ship_rest(path):
                    self._refused.pop(path, None)
                    shutil.rmtree(path, ignore_errors=True)
                    _remove_if_empty(path.parent)
                else:
                    self._refused[path] = _Refusal.after(refusal)
                    _remove_all_but_log(path)


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """When what run storage refused is tried again, by the monotonic clock, and after how long a pause, in seconds."""

    retry_at: float
    pause_s: float

    @classmethod
    def after(cls, earlier: "_Refusal | None") -> "_Refusal":
        pause_s = FIRST_PAUSE_S if earlier is None else min(2 * earlier.pause_s, LONGEST_PAUSE_S)
        return cls(retry_at=time.monotonic() + pause_s, pause_s=pause_s)


def _remove_if_empty(attempt_dir: Path) -> None:
    """Remove the directories of an attempt and its job, unless there are others in them."""
    with suppress(OSError):
        attempt_dir.rmdir()
        attempt_dir.parent.rmdir()


def clear_work_dir(work_dir: Path) -> None:
    """Remove a node's directory, but for those of ranks in it, whose logs may not be shipped yet."""
    for path in work_dir.iterdir() if work_dir.exists() else ():
        if path.is_file():
            path.unlink()
        elif not any(path.glob("*/rank-*")):
            remove_tree(path)
    with suppress(OSError):  # something stays, or there is none
        work_dir.rmdir()


@contextmanager
def _holding(path: Path) -> Iterator[bool]:
    """Hold a directory; False if its actor lives, or another removes it."""
    hold = -1
    with suppress(OSError):
        hold = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield hold >= 0 and _lock(hold)
    finally:
        if hold >= 0:
            os.close(hold)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _ship_rest(path: Path) -> bool:
    """Append what was not shipped of an abandoned log; False if it should be tried again."""
    try:
        owner = RankOwner.model_validate_json((path / OWNER_NAME).read_bytes())
    except (OSError, ValidationError):
        return True  # of another version of the service, or removed in part: nobody can say where it belongs
    try:
        store = ObjectStore(owner.storage_url)
        store.check_identity(owner.storage_id)
        if not store.exists(launch_marker(owner.job_id, owner.attempt)):
            return True  # the job has been removed
        # The actor is gone: where the sequence ends is where the rest begins.
        segments = SegmentWriter.resume(
            store, log_dir(owner.job_id, owner.attempt, owner.rank), max_bytes=owner.max_log_bytes
        )
        return LogShipper(path / LOG_NAME, segments, max_bytes=owner.max_log_bytes).ship()
    except Exception as error:
        # Each storage has errors of its own, and it may come back.
        logger.warning("The rest of the log in %s could not be shipped, will try again: %s", path, error)
        return False


def _remove_all_but_log(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name not in (LOG_NAME, OWNER_NAME):
            shutil.rmtree(entry, ignore_errors=True)
