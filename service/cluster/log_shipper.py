"""Carries what a process appends to a local file into run storage, from a thread of its own."""

import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from service.linux import punch_hole
from service.storage.segments import SegmentWriter

_PIECE_BYTES = 1 << 20
# Room of what was shipped is given back in portions; a file system gives back whole blocks.
_FREE_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 16

SHIP_INTERVAL_S = 0.3
# How long the last of a log may take once its process is gone.
LAST_SHIP_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class LogShipper:
    """Ships a growing local file, and gives back the room on disk of what was shipped.

    Offsets in the file and in the sequence are the same: the file keeps its size and gets a hole at its beginning, so
    whoever appends to it notices nothing, and no byte is lost or doubled between a read and a truncation.

    Args:
        path: the local file; it may not exist yet.
        segments: where it goes on in run storage.
        max_bytes: most bytes kept there. A longer backlog, because storage was away or the process prints faster than
            it can be shipped, loses its oldest part, as it would there. None: nothing is lost.
    """

    def __init__(self, path: Path, segments: SegmentWriter, *, max_bytes: int | None = None) -> None:
        self._path = path
        self._segments = segments
        self._max_bytes = max_bytes
        self._freed = 0
        self._can_free = True

    def ship(self) -> bool:
        """Ship what was added since the last call; False if storage refused some, which the next one tries again."""
        if not self._path.exists():
            return True
        with self._path.open("rb+", buffering=0) as file:  # writable, to punch holes
            while True:
                self._skip_excess(file.fileno())
                piece = os.pread(file.fileno(), _PIECE_BYTES, self._segments.size)
                if not piece:
                    return True
                try:
                    self._segments.append(piece)
                except Exception as error:
                    # Each storage has errors of its own; a log that cannot be shipped is no reason to end a rank.
                    logger.warning("A log could not be shipped, will try again: %s", error)
                    return False
                self._free(file.fileno())

    def _skip_excess(self, descriptor: int) -> None:
        if self._max_bytes is None:
            return
        backlog_bytes = os.fstat(descriptor).st_size - self._segments.size
        if backlog_bytes > self._max_bytes:
            left_out_bytes = backlog_bytes - self._max_bytes * 3 // 4  # not a little of every piece that follows
            logger.warning("%d bytes of a log were left out: more than is kept waited to be shipped", left_out_bytes)
            self._segments.skip_to(self._segments.size + left_out_bytes)
            self._free(descriptor)

    def _free(self, descriptor: int) -> None:
        end = self._segments.size // _BLOCK_BYTES * _BLOCK_BYTES
        if not self._can_free or end - self._freed < _FREE_BYTES:
            return
        try:
            punch_hole(descriptor, self._freed, end - self._freed)
        except OSError as error:
            logger.warning("%s keeps the room of what was shipped: its file system has no holes: %s", self._path, error)
            self._can_free = False
        self._freed = end


class ShippingThread:
    """Ships from a thread of its own: storage that stalls must not stall what the process reports.

    Args:
        shipper: what it calls.
    """

    def __init__(self, shipper: LogShipper) -> None:
        self._shipper = shipper
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ship")
        self._last: Future[bool] | None = None

    def submit_if_idle(self) -> None:
        """Ship what is new, unless shipping is under way."""
        if self._last is None or self._last.done():
            self._last = self._thread.submit(self._shipper.ship)

    def finish(self) -> bool:
        """Ship the rest, within a time; False if storage did not take all of it until then."""
        deadline = time.monotonic() + LAST_SHIP_TIMEOUT_S
        if self._last is not None:
            wait([self._last], timeout=LAST_SHIP_TIMEOUT_S)  # what it has read may be older than the last line
        is_shipped = False
        while not is_shipped and time.monotonic() < deadline:
            self.submit_if_idle()
            assert self._last is not None
            done, _ = wait([self._last], timeout=SHIP_INTERVAL_S)
            is_shipped = bool(done) and self._last.result()
        self._thread.shutdown(wait=False)
        return is_shipped
