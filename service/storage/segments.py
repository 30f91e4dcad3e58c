"""A growing byte sequence kept as numbered segments, each named by the offset of its first byte.

On a local file system a segment is appended to until it is full. An object store takes each piece as a segment of its
own; once there are many small ones they are joined, so that a day of small pieces is not a hundred thousand objects. A
sequence may be bounded: its oldest segments go, and offsets stay what they were.

One process writes a sequence; many may read it meanwhile. A segment counts up to where the next one begins, so a
reader sees the same bytes before, while and after some are joined; one that is gone since it was listed is listed anew.
"""

import logging
from itertools import pairwise

from service.domain.errors import NotFound, StorageError
from service.storage.object_store import ObjectStore

SEGMENT_BYTES = 4 << 20
# On an object store: so many small pieces become one segment, up to so large; their writer keeps as much in memory.
MAX_PIECES = 64
JOINED_BYTES = 1 << 20
# A reader that misses segments lists them again; they are not joined or dropped so often within one read.
_MAX_LISTINGS = 10

logger = logging.getLogger(__name__)


class SegmentWriter:
    """Appends to a sequence.

    Args:
        store: where the segments lie.
        directory: their directory.
        max_bytes: most bytes that are kept, to within a segment; None: all.

    Attributes:
        size: bytes of the sequence so far, those that were dropped among them.
    """

    size: int

    def __init__(self, store: ObjectStore, directory: str, *, max_bytes: int | None = None) -> None:
        self._store = store
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = SEGMENT_BYTES if max_bytes is None else max(1, min(SEGMENT_BYTES, max_bytes // 8))
        self.size = 0
        self._starts: list[int] = []
        self._has_skipped = False
        # Of an object store: what lies from here on in segments that may still be joined, one entry each.
        self._pieces_start = 0
        self._pieces: list[bytes] = []
        self._superfluous: list[int] = []

    @classmethod
    def resume(cls, store: ObjectStore, directory: str, *, max_bytes: int | None = None) -> "SegmentWriter":
        """Go on with a sequence whose writer is gone; arguments as for a new one."""
        writer = cls(store, directory, max_bytes=max_bytes)
        writer.size = writer._pieces_start = sequence_range(store, directory)[1]
        writer._starts = _starts(store, directory)
        return writer

    def append(self, data: bytes) -> None:
        """Make ``data`` durable at the end of the sequence.

        What has to be joined or dropped besides is tried again with the next piece if storage refuses it now.
        """
        if not data:
            return
        if self._store.is_local:
            is_full = not self._starts or self._has_skipped or self.size - self._starts[-1] >= self._segment_bytes
            start = self.size if is_full else self._starts[-1]
            self._store.append(_segment(self._directory, start), data)
        else:
            start = self.size
            self._store.write(_segment(self._directory, start), data)
            self._pieces.append(data)
        if not self._starts or start != self._starts[-1]:
            self._starts.append(start)
        self._has_skipped = False
        self.size += len(data)
        try:
            self._tidy()
        except Exception as error:
            # Each storage has errors of its own; the data is safe, and calling this a failure would double it.
            logger.warning("Segments of %s could not be tidied up, will try again: %s", self._directory, error)

    def skip_to(self, offset: int) -> None:
        """Leave out what would lie before an offset; the sequence goes on there."""
        assert offset >= self.size
        self.size = self._pieces_start = offset
        self._pieces = []
        self._has_skipped = True

    def _tidy(self) -> None:
        self._drop_oldest()
        self._join_pieces()
        # The oldest first: what is left at any time is a sequence.
        while self._superfluous:
            self._store.remove_file(_segment(self._directory, self._superfluous[0]))
            del self._superfluous[0]

    def _drop_oldest(self) -> None:
        while self._max_bytes is not None and len(self._starts) > 1 and self.size - self._starts[0] > self._max_bytes:
            self._superfluous.append(self._starts.pop(0))
        if self._pieces and self._pieces_start < self._starts[0]:
            self._only_last_piece()

    def _join_pieces(self) -> None:
        # The last one stays as it is: its end is that of the sequence, whatever of the others is still listed.
        joinable = self._pieces[:-1]
        num_bytes = sum(map(len, joinable))
        if len(joinable) < MAX_PIECES and num_bytes < JOINED_BYTES:
            return
        if len(joinable) > 1:
            joined = b"".join(joinable)
            self._store.write(_segment(self._directory, self._pieces_start), joined)
            end = self._pieces_start + num_bytes
            self._superfluous += [start for start in self._starts if self._pieces_start < start < end]
            self._starts = [start for start in self._starts if not self._pieces_start < start < end]
            self._pieces = [joined, self._pieces[-1]]
        if num_bytes >= JOINED_BYTES:
            self._only_last_piece()

    def _only_last_piece(self) -> None:
        self._pieces = self._pieces[-1:]
        self._pieces_start = self.size - len(self._pieces[0])


def sequence_range(store: ObjectStore, directory: str) -> tuple[int, int]:
    """Return the offset of the first byte that is kept of a sequence, and its size so far; zeros if there is none."""
    for _ in range(_MAX_LISTINGS):
        starts = _starts(store, directory)
        if not starts:
            return 0, 0
        try:
            return starts[0], starts[-1] + store.size(_segment(directory, starts[-1]))
        except NotFound:
            continue
    raise _changes_too_fast(directory)


def read_sequence(store: ObjectStore, directory: str, start: int, stop: int | None = None) -> bytes:
    """Return the bytes ``[start, stop)`` of a sequence that is kept whole, as far as they exist."""
    return read_kept(store, directory, start, None if stop is None else max(0, stop - start))[1]


def read_kept(store: ObjectStore, directory: str, start: int, num_bytes: int | None = None) -> tuple[int, bytes]:
    """Return bytes of a sequence from an offset on, or from the first later one that is kept.

    Args:
        store: where it lies.
        directory: of the sequence.
        start: offset of the first byte.
        num_bytes: most bytes; None: all there are.

    Returns:
        The offset of the first byte returned, and the bytes, which have no gap.
    """
    position, pieces, num_read = start, list[bytes](), 0
    for _ in range(_MAX_LISTINGS):
        starts = _starts(store, directory)
        try:
            for first, following in pairwise([*starts, None]):
                assert first is not None
                if num_bytes is not None and num_read >= num_bytes:
                    break
                if following is not None and following <= position:
                    continue
                if first > position:
                    if pieces:
                        break
                    position = first
                stop = None if num_bytes is None else position - first + num_bytes - num_read
                if following is not None:
                    stop = following - first if stop is None else min(stop, following - first)
                piece = store.read(_segment(directory, first), position - first, stop)
                if piece:
                    pieces.append(piece)
                    position += len(piece)
                    num_read += len(piece)
        except NotFound:
            continue
        return position - num_read, b"".join(pieces)
    raise _changes_too_fast(directory)


def _changes_too_fast(directory: str) -> StorageError:
    return StorageError(f"What lies at {directory} in run storage changes faster than it can be read. Try again.")


def _segment(directory: str, start: int) -> str:
    return f"{directory}/{start:015d}"


def _starts(store: ObjectStore, directory: str) -> list[int]:
    return [int(name) for name in store.names(directory) if name.isdecimal()]
