"""The journal of a running attempt, in its supervisor: numbers records, makes them durable, hands them on."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from service.domain.journal import AnyReport, JournalRecord, utc_now
from service.storage.journal_file import JournalWriter

FLUSH_INTERVAL_S = 0.1

logger = logging.getLogger(__name__)


class Journal:
    """Records in memory, and behind them in run storage.

    A reader may see a record before it is durable. That loses nothing: what the reader has stored need not be read
    again, and nothing is ever read past a gap.

    Args:
        writer: makes records durable, in order.
    """

    def __init__(self, writer: JournalWriter) -> None:
        self._writer = writer
        self._began_at = time.monotonic()
        self._records: list[JournalRecord] = []
        self._first = 1
        self._num_durable = 0
        self._changed = asyncio.Event()
        self._flushing = asyncio.Lock()

    def add(self, report: AnyReport) -> None:
        """Append a report."""
        sequence = len(self._records) + self._first
        elapsed_s = time.monotonic() - self._began_at
        self._records.append(JournalRecord(sequence=sequence, time=utc_now(), elapsed_s=elapsed_s, report=report))
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int, wait_s: float) -> Sequence[JournalRecord]:
        """Return records after a sequence number; waits for some, up to ``wait_s`` seconds.

        Asking says that everything up to ``after`` is stored elsewhere; once durable here too it leaves memory.
        """
        self._forget(min(after, self._num_durable))
        changed = self._changed
        if not self._after(after):
            try:
                await asyncio.wait_for(changed.wait(), wait_s)
            except TimeoutError:
                return ()
        return self._after(after)

    @asynccontextmanager
    async def flushing(self) -> AsyncIterator[None]:
        """Make records durable in the background; all of them when the context ends."""
        task = asyncio.create_task(self._flush_forever())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._flush()

    async def _flush_forever(self) -> None:
        while True:
            try:
                await asyncio.shield(self._flush())
            except Exception as error:
                # Each storage has errors of its own, and it may come back; until then the records wait in memory,
                # where the collector reads them.
                logger.warning("The journal could not be written, will try again: %s", error)
            await asyncio.sleep(FLUSH_INTERVAL_S)

    async def _flush(self) -> None:
        async with self._flushing:
            records = self._after(self._num_durable)
            if records:
                await asyncio.to_thread(self._writer.append, records)
                self._num_durable = records[-1].sequence

    def _after(self, sequence: int) -> Sequence[JournalRecord]:
        return tuple(self._records[max(0, sequence + 1 - self._first) :])

    def _forget(self, sequence: int) -> None:
        if sequence >= self._first:
            del self._records[: sequence + 1 - self._first]
            self._first = sequence + 1
