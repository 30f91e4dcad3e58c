"""Removes from run storage what no row needs any more, beside the scheduler's loop."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from service.domain.job import Checkpoint
from service.domain.ports import Lease, RunFiles, SchedulerStore

# How often all jobs are looked through for what was cut short, refused, or needed by a fork that has ended since.
SWEEP_INTERVAL_S = 60.0
PARTIAL_UPLOADS_INTERVAL_S = 3600.0
# No upload takes so long.
PARTIAL_UPLOADS_AGE_S = 86_400.0

logger = logging.getLogger(__name__)


class Sweeper:
    """Removes files in a thread, since that may take longer than a lease lasts; rows are dropped by the loop.

    The row of a checkpoint goes last: whatever is cut short, or refused by run storage, is taken up again.

    Args:
        store: says what nobody needs.
        files: run storage.
    """

    def __init__(self, store: SchedulerStore, files: RunFiles) -> None:
        self._store = store
        self._files = files
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sweeper")
        self._removals: dict[tuple[str, int, int], Future[None]] = {}
        self._swept_at: float | None = None
        self._swept_uploads_at: float | None = None

    def step(self, lease: Lease) -> None:
        """Drop the rows whose files are gone; now and then, look at all jobs. Does not wait for any file."""
        now = time.monotonic()
        if self._swept_at is None or now - self._swept_at >= SWEEP_INTERVAL_S:
            self._swept_at = now
            self._remove(self._store.removable_checkpoints())
        if self._swept_uploads_at is None or now - self._swept_uploads_at >= PARTIAL_UPLOADS_INTERVAL_S:
            self._swept_uploads_at = now
            self._begin("uploads cut short", partial(self._files.remove_partial_uploads, PARTIAL_UPLOADS_AGE_S))
        for key in [key for key, removal in self._removals.items() if removal.done()]:
            if self._removals.pop(key).exception() is None:
                self._store.forget_checkpoint(lease, *key)

    def sweep_job(self, job_id: str) -> None:
        """Begin to remove the files of those checkpoints of a job that nobody needs."""
        self._remove(self._store.removable_checkpoints(job_id))

    def sweep_attempt(self, job_id: str, attempt: int) -> None:
        """Begin to close run storage to an attempt that is sealed, which may train on behind a network that is cut.

        Then what it left of checkpoints that never were committed is removed.
        """
        committed = self._store.committed_paths(job_id, attempt)
        self._begin(f"the seal of {job_id} attempt {attempt}", partial(self._files.seal, job_id, attempt))
        self._begin(
            f"checkpoints of {job_id} attempt {attempt}",
            partial(self._files.remove_uncommitted, job_id, attempt, committed),
        )

    def close(self) -> None:
        """Leave what has not begun to whoever leads next."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _remove(self, checkpoints: Sequence[Checkpoint]) -> None:
        for checkpoint in checkpoints:
            key = (checkpoint.job_id, checkpoint.attempt, checkpoint.step)
            if key not in self._removals:
                self._removals[key] = self._begin(
                    checkpoint.path, partial(self._files.remove_checkpoint, checkpoint.path)
                )

    def _begin(self, what: str, remove: Callable[[], None]) -> Future[None]:
        return self._thread.submit(_tell_of_trouble, what, remove)


def _tell_of_trouble(what: str, remove: Callable[[], None]) -> None:
    try:
        remove()
    except Exception as error:
        logger.warning("Run storage did not let go of %s: %s: %s", what, type(error).__name__, error)
        raise
