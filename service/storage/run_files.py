"""Run storage as the API and the scheduler see it."""

import time
from collections.abc import Iterator, Set

from service.domain.journal import JournalRecord
from service.domain.ports import LogPart
from service.storage.journal_file import read_journal
from service.storage.layout import UPLOAD_DIRS, checkpoints_dir, launch_marker, log_dir, seal_marker
from service.storage.manifest import MANIFEST_NAME
from service.storage.object_store import ObjectStore
from service.storage.segments import read_kept, sequence_range


class StoredRunFiles:
    """Implements ``service.domain.ports.RunFiles``.

    Args:
        store: run storage.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def size(self, path: str) -> int:
        """Return a file's size in bytes. Raises ``NotFound``."""
        return self._store.size(path)

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Return the bytes ``[start, stop)`` of a file. Raises ``NotFound``."""
        return self._store.read(path, start, stop)

    def log_size(self, job_id: str, attempt: int, rank: int) -> int:
        """Return the bytes logged by a rank so far, those that are no longer kept among them; 0 if none."""
        return sequence_range(self._store, log_dir(job_id, attempt, rank))[1]

    def read_log(self, job_id: str, attempt: int, rank: int, start: int, num_bytes: int) -> LogPart:
        """Return at most ``num_bytes`` of a rank's log from an offset on, or from the first later byte that is kept."""
        first, content = read_kept(self._store, log_dir(job_id, attempt, rank), start, num_bytes)
        return LogPart(start=first, content=content)

    def was_launched(self, job_id: str, attempt: int) -> bool:
        """Return whether a supervisor has taken the attempt's launch marker."""
        return self._store.exists(launch_marker(job_id, attempt))

    def prevent_launch(self, job_id: str, attempt: int) -> bool:
        """Take the launch marker, so that no supervisor ever will; False if one already has."""
        return self._store.create_exclusively(launch_marker(job_id, attempt), b"prevented")

    def journal(self, job_id: str, attempt: int, *, after: int) -> Iterator[JournalRecord]:
        """Yield the durable journal records after a sequence number, in order, up to the first that is torn."""
        return read_journal(self._store, job_id, attempt, after=after)

    def remove_checkpoint(self, path: str) -> None:
        """Remove a checkpoint's directory, its manifest first; nothing if it is not there."""
        self._store.remove(f"{path}/{MANIFEST_NAME}")
        self._store.remove(path)

    def seal(self, job_id: str, attempt: int) -> None:
        """Tell whatever still runs of an attempt that it is over."""
        self._store.write(seal_marker(job_id, attempt), b"")

    def remove_uncommitted(self, job_id: str, attempt: int, committed: Set[str]) -> None:
        """Remove what an attempt that is sealed left of checkpoints, but for the directories that were committed."""
        directory = checkpoints_dir(job_id, attempt)
        for name in self._store.names(directory):
            if f"{directory}/{name}" not in committed:
                self.remove_checkpoint(f"{directory}/{name}")

    def remove_partial_uploads(self, older_than_s: float) -> None:
        """Remove what is left of uploads that were cut short so many seconds ago; an object store has none."""
        if not self._store.is_local:
            return
        for directory in UPLOAD_DIRS:
            for path in self._store.local_path(directory).rglob(".*.partial"):
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink()
