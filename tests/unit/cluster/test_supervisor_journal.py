"""The journal in a supervisor's memory. A failure means lost, doubled or late records, or memory that only grows."""

import asyncio
import errno
import logging
import threading

import pytest

from service.cluster import journal as journal_module
from service.cluster.journal import Journal
from service.domain.journal import Resumed

DEADLINE_S = 10.0


class _Writer:
    """Stands in for storage: fails as often as told, waits while told to."""

    def __init__(self):
        self.written = []
        self.num_failures = 0
        self.is_waiting = False
        self.open = threading.Event()
        self.open.set()

    def append(self, records):
        self.is_waiting = not self.open.is_set()
        assert self.open.wait(DEADLINE_S)
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(errno.ENOSPC, "full")
        self.written += [record.sequence for record in records]


@pytest.fixture
def writer():
    return _Writer()


@pytest.fixture(autouse=True)
def _quick_flush(monkeypatch):
    monkeypatch.setattr(journal_module, "FLUSH_INTERVAL_S", 0.001)


def _run(test):
    async def within_deadline():
        async with asyncio.timeout(DEADLINE_S):
            await test

    asyncio.run(within_deadline())


def _add(journal, *steps):
    for step in steps:
        journal.add(Resumed(step=step))


def _sequences(records):
    return [record.sequence for record in records]


async def _until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for happens in a thread or in private state
        await asyncio.sleep(0.001)


def test_records_are_numbered_from_one_without_gaps(writer):
    async def test():
        journal = Journal(writer)
        _add(journal, 10, 11, 12)
        found = await journal.read(0, 0)
        assert [(record.sequence, record.report.step) for record in found] == [(1, 10), (2, 11), (3, 12)]
        assert all(record.time.tzinfo is not None for record in found)
        assert _sequences(await journal.read(2, 0)) == [3]
        assert await journal.read(3, 0) == ()
        assert await journal.read(99, 0) == ()

    _run(test())


def test_a_reader_is_woken_by_the_next_record(writer):
    async def test():
        journal = Journal(writer)
        _add(journal, 1)
        readers = [asyncio.create_task(journal.read(1, DEADLINE_S)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(reader.done() for reader in readers)
        _add(journal, 2)
        for reader in readers:
            assert _sequences(await reader) == [2]

    _run(test())


def test_a_reader_that_waited_in_vain_gets_nothing(writer):
    async def test():
        assert await Journal(writer).read(0, 0.01) == ()

    _run(test())


def test_all_records_are_durable_in_order_when_flushing_ends(writer):
    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            for step in range(50):
                _add(journal, step)
                await asyncio.sleep(0)
        assert writer.written == list(range(1, 51))

    _run(test())


def test_the_last_record_is_durable_even_if_added_just_before_the_end(writer):
    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            writer.open.clear()
            _add(journal, 1)
            await _until(lambda: writer.is_waiting)  # in a thread, which cannot be cancelled
            _add(journal, 2)
            writer.open.set()
        assert writer.written == [1, 2]

    _run(test())


def test_records_are_durable_even_if_the_attempt_breaks_off(writer):
    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            _add(journal, 1, 2)
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        _run(test())
    assert writer.written == [1, 2]


def test_a_write_that_failed_is_tried_again_without_gap_or_double(writer, caplog):
    async def test():
        journal = Journal(writer)
        writer.num_failures = 3
        async with journal.flushing():
            _add(journal, 1, 2)
            await _until(lambda: writer.num_failures == 0)
            _add(journal, 3)
            # Meanwhile the collector reads from memory.
            assert _sequences(await journal.read(0, 0)) == [1, 2, 3]
        assert writer.written == [1, 2, 3]

    with caplog.at_level(logging.WARNING):
        _run(test())
    assert "could not be written" in caplog.text


def test_records_that_could_never_be_written_stay_readable(writer):
    async def test():
        journal = Journal(writer)
        writer.num_failures = 10**9
        with pytest.raises(OSError, match="full"):
            async with journal.flushing():
                _add(journal, 1)
        assert _sequences(await journal.read(0, 0)) == [1]
        _add(journal, 2)
        assert _sequences(await journal.read(0, 0)) == [1, 2]

    _run(test())


def test_what_was_stored_and_is_durable_leaves_memory(writer):
    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            _add(journal, *range(100))
            await _until(lambda: len(writer.written) == 100)
            await _until(lambda: journal._num_durable == 100)
            assert await journal.read(90, 0) != ()
            assert len(journal._records) == 10
            _add(journal, 100)
            assert _sequences(await journal.read(95, 0)) == [96, 97, 98, 99, 100, 101]
        assert writer.written == list(range(1, 102))

    _run(test())


def test_what_was_stored_but_is_not_durable_yet_stays(writer):
    """Or the durable journal would begin after a gap, and nothing is read past a gap."""

    async def test():
        journal = Journal(writer)
        writer.open.clear()
        async with journal.flushing():
            _add(journal, 1, 2, 3)
            assert await journal.read(3, 0) == ()
            assert len(journal._records) == 3
            writer.open.set()
        assert writer.written == [1, 2, 3]

    _run(test())


def test_a_reader_may_ask_again_for_what_it_did_not_store(writer):
    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            _add(journal, 1, 2)
            first = await journal.read(0, 0)
            await _until(lambda: writer.written == [1, 2])
            assert await journal.read(0, 0) == first

    _run(test())


def test_only_one_flush_runs_at_a_time(writer):
    concurrent, most = 0, 0
    append = writer.append

    def count(records):
        nonlocal concurrent, most
        concurrent += 1
        most = max(most, concurrent)
        append(records)
        concurrent -= 1

    writer.append = count

    async def test():
        journal = Journal(writer)
        async with journal.flushing():
            _add(journal, 1)
            await asyncio.gather(*(journal._flush() for _ in range(5)))
            _add(journal, 2)
        assert writer.written == [1, 2]
        assert most == 1

    _run(test())
