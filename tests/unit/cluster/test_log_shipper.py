"""Shipping of a growing log. A failure means lines that a user never sees, or sees twice, or a disk that fills up."""

import errno
import os
import subprocess
import sys

import pytest

from service.cluster import log_shipper
from service.cluster.log_shipper import LogShipper
from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter, read_kept, read_sequence


@pytest.fixture
def store(tmp_path):
    return ObjectStore(str(tmp_path / "runs"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output.log"


def test_a_log_is_shipped_as_it_grows(store, path):
    shipper = LogShipper(path, SegmentWriter(store, "logs"))
    shipper.ship()  # before there is a file
    assert not store.exists("logs")
    with path.open("ab", buffering=0) as log:
        for number in range(5):
            log.write(f"line {number}\n".encode())
            shipper.ship()
            shipper.ship()  # nothing new
            assert read_sequence(store, "logs", 0) == path.read_bytes()


def test_a_log_larger_than_a_piece_is_shipped_whole(store, path, monkeypatch):
    monkeypatch.setattr(log_shipper, "_PIECE_BYTES", 7)
    path.write_bytes(bytes(range(256)) * 3)
    LogShipper(path, SegmentWriter(store, "logs")).ship()
    assert read_sequence(store, "logs", 0) == path.read_bytes()


def test_what_could_not_be_shipped_is_shipped_next_time(store, path, monkeypatch):
    monkeypatch.setattr(log_shipper, "_PIECE_BYTES", 4)
    shipper = LogShipper(path, SegmentWriter(store, "logs"))
    path.write_bytes(b"0123456789")
    append, left = store.append, [1]

    def fill_up(directory, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "full")
        left[0] -= 1
        append(directory, data)

    with monkeypatch.context() as patch:
        patch.setattr(store, "append", fill_up)
        shipper.ship()
    assert read_sequence(store, "logs", 0) == b"0123"
    shipper.ship()
    assert read_sequence(store, "logs", 0) == b"0123456789"


WRITER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for number in range(0, int(sys.argv[2]), 100):
    os.write(log, b"".join(b"line %09d of a rank that prints\\n" % (number + one) for one in range(100)))
"""
NUM_LINES = 500_000
LINE_BYTES = 37


def test_a_fast_writer_s_file_takes_little_room_and_no_line_is_lost_or_doubled(store, path):
    shipper = LogShipper(path, SegmentWriter(store, "logs"))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(NUM_LINES)])
    try:
        while writer.poll() is None:
            assert shipper.ship()
    finally:
        writer.kill()
        writer.wait()
    assert shipper.ship()
    assert path.stat().st_size == NUM_LINES * LINE_BYTES  # the writer's end of it is where it was
    # Given back in portions of a megabyte, after a piece of one.
    assert path.stat().st_blocks * 512 <= 3 << 20
    expected = b"".join(b"line %09d of a rank that prints\n" % number for number in range(NUM_LINES))
    assert read_sequence(store, "logs", 0) == expected


def test_where_there_are_no_holes_the_file_grows_and_nothing_else_changes(store, path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(log_shipper, "punch_hole", refuse)
    path.write_bytes(os.urandom(3 << 20))
    shipper = LogShipper(path, SegmentWriter(store, "logs"))
    assert shipper.ship()
    assert read_sequence(store, "logs", 0) == path.read_bytes()


def test_a_backlog_longer_than_what_is_kept_loses_its_oldest_part(store, path, monkeypatch):
    monkeypatch.setattr(log_shipper, "_FREE_BYTES", 1 << 16)
    written = os.urandom(1 << 20)
    path.write_bytes(written[: 1 << 18])
    max_bytes = 1 << 19
    shipper = LogShipper(path, SegmentWriter(store, "logs", max_bytes=max_bytes), max_bytes=max_bytes)
    assert shipper.ship()
    with path.open("ab") as log:
        log.write(written[1 << 18 :])
    assert shipper.ship()
    start, kept = read_kept(store, "logs", 1 << 19)
    assert written[start:] == kept
    assert max_bytes // 2 < len(kept) <= max_bytes
    assert path.stat().st_blocks * 512 <= 1 << 17


def test_what_was_read_last_is_not_taken_for_the_end(store, path, monkeypatch):
    """A pass that was under way when the process ended may have looked before its last line was there."""
    path.write_bytes(b"first\n")
    shipper = LogShipper(path, SegmentWriter(store, "logs"))
    ship, passes = shipper.ship, []

    def ship_before_the_last_line():
        is_shipped = ship()
        if not passes:
            path.write_bytes(b"first\nlast\n")
        passes.append(is_shipped)
        return is_shipped

    monkeypatch.setattr(shipper, "ship", ship_before_the_last_line)
    thread = log_shipper.ShippingThread(shipper)
    thread.submit_if_idle()
    assert thread.finish()
    assert read_sequence(store, "logs", 0) == b"first\nlast\n"


def test_finishing_says_that_storage_did_not_take_the_rest(store, path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(log_shipper, "LAST_SHIP_TIMEOUT_S", 0.05)
    monkeypatch.setattr(store, "append", refuse)
    path.write_bytes(b"line\n")
    assert not log_shipper.ShippingThread(LogShipper(path, SegmentWriter(store, "logs"))).finish()
