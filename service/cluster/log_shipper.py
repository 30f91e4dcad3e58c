"""Carries what a process appends to a local file into run storage, from a thread of its own."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter

_PIECE_BYTES = 1 << 20

SHIP_INTERVAL_S = 0.3
# How long the last of a log may take once its process is gone.
LAST_SHIP_TIMEOUT_S = 5.0

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

    def finish(self) -> None:
        """Ship the rest, within a time; what storage refuses until then is lost."""
        deadline = time.monotonic() + LAST_SHIP_TIMEOUT_S
        while time.monotonic() < deadline:
            self.submit_if_idle()
            assert self._last is not None
            done, _ = wait([self._last], timeout=SHIP_INTERVAL_S)
            if done and self._last.result():
                break
        self._thread.shutdown(wait=False)
