"""Carries what a process appends to a local file into run storage."""

from pathlib import Path

from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter

_PIECE_BYTES = 1 << 20


class LogShipper:
    """Ships a growing local file, from its beginning.

    Args:
        path: the local file; it may not exist yet.
        store: run storage.
        directory: where the log's segments lie.
    """

    def __init__(self, path: Path, store: ObjectStore, directory: str) -> None:
        self._path = path
        self._segments = SegmentWriter(store, directory)
        self._shipped = 0

    def ship(self) -> None:
        """Ship what was added since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._shipped)
            while piece := file.read(_PIECE_BYTES):
                self._segments.append(piece)
                self._shipped += len(piece)
