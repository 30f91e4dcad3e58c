"""Carries what a process appends to a local file into run storage."""

import logging
from pathlib import Path

from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter

_PIECE_BYTES = 1 << 20

logger = logging.getLogger(__name__)


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

    def ship(self) -> bool:
        """Ship what was added since the last call; False if storage refused some, which the next one tries again."""
        if not self._path.exists():
            return True
        with self._path.open("rb") as file:
            file.seek(self._shipped)
            while piece := file.read(_PIECE_BYTES):
                try:
                    self._segments.append(piece)
                except Exception as error:
                    # Each storage has errors of its own; a log that cannot be shipped is no reason to end a rank.
                    logger.warning("A log could not be shipped, will try again: %s", error)
                    return False
                self._shipped += len(piece)
        return True
