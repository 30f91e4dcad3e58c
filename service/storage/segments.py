"""A growing byte sequence kept as numbered segments, each named by the offset of its first byte.

On a local file system a segment is appended to until it is full; an object store takes each piece as a segment of
its own. One process writes a sequence; many may read it meanwhile.
"""

from service.storage.object_store import ObjectStore

SEGMENT_BYTES = 4 << 20


class SegmentWriter:
    """Appends to a sequence that nobody wrote before.

    Args:
        store: where the segments lie.
        directory: their directory.
    """

    def __init__(self, store: ObjectStore, directory: str) -> None:
        self._store = store
        self._directory = directory
        self._segment_start = 0
        self._size = 0

    def append(self, data: bytes) -> None:
        """Make ``data`` durable at the end of the sequence."""
        if not data:
            return
        if self._store.is_local:
            if self._size - self._segment_start >= SEGMENT_BYTES:
                self._segment_start = self._size
            self._store.append(_segment(self._directory, self._segment_start), data)
        else:
            self._store.write(_segment(self._directory, self._size), data)
        self._size += len(data)


def sequence_size(store: ObjectStore, directory: str) -> int:
    """Return the bytes of a sequence so far; 0 if there is none."""
    starts = _starts(store, directory)
    return starts[-1] + store.size(_segment(directory, starts[-1])) if starts else 0


def read_sequence(store: ObjectStore, directory: str, start: int, stop: int | None = None) -> bytes:
    """Return the bytes ``[start, stop)`` of a sequence, as far as they exist."""
    starts = _starts(store, directory)
    pieces = []
    for index, first in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else None
        if (end is not None and end <= start) or (stop is not None and first >= stop):
            continue
        pieces.append(
            store.read(_segment(directory, first), max(0, start - first), None if stop is None else stop - first)
        )
    return b"".join(pieces)


def _segment(directory: str, start: int) -> str:
    return f"{directory}/{start:015d}"


def _starts(store: ObjectStore, directory: str) -> list[int]:
    return [int(name) for name in store.names(directory) if name.isdecimal()]
