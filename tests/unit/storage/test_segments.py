"""Growing sequences as segments, and the journal on top. A failure means lost, doubled or reordered log or journal."""

import errno
import os
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain.journal import JournalRecord, Metrics, Resumed, Warned, utc_now
from service.storage import segments
from service.storage.journal_file import JournalWriter, read_journal
from service.storage.layout import journal_dir, log_dir
from service.storage.run_files import StoredRunFiles
from service.storage.segments import SegmentWriter, read_kept, read_sequence, sequence_range

# The store is shared by the examples; each has a directory of its own.
_shared_store = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@_shared_store
@given(
    pieces=st.lists(st.binary(max_size=12), max_size=12),
    segment_bytes=st.integers(1, 20),
    start=st.integers(0, 80),
    stop=st.one_of(st.none(), st.integers(0, 80)),
)
def test_any_range_of_any_pieces_is_what_slicing_gives(quick_store, pieces, segment_bytes, start, stop):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SEGMENT_BYTES", segment_bytes)
        directory = uuid.uuid4().hex
        writer = SegmentWriter(quick_store, directory)
        for piece in pieces:
            writer.append(piece)
        whole = b"".join(pieces)
        assert sequence_range(quick_store, directory) == (0, len(whole))
        assert read_sequence(quick_store, directory, 0) == whole
        assert read_sequence(quick_store, directory, start, stop) == whole[start:stop]


def test_a_sequence_that_was_never_written_is_empty(store):
    assert sequence_range(store, "none") == (0, 0)
    assert read_sequence(store, "none", 0) == b""
    SegmentWriter(store, "none").append(b"")
    assert not store.exists("none")


def test_a_full_segment_is_followed_by_the_next(local_store, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 10)
    writer = SegmentWriter(local_store, "d")
    for piece in (b"12345", b"67890", b"abc", b"defghijkl", b"mn"):
        writer.append(piece)
    assert local_store.names("d") == ["000000000000000", "000000000000010", "000000000000022"]
    assert read_sequence(local_store, "d", 9, 23) == b"0abcdefghijklm"


def test_each_piece_is_a_file_of_its_own_in_an_object_store(memory_store):
    writer = SegmentWriter(memory_store, "d")
    for piece in (b"12345", b"6", b"789"):
        writer.append(piece)
    assert memory_store.names("d") == ["000000000000000", "000000000000005", "000000000000006"]


@_shared_store
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    max_pieces=st.integers(2, 5),
    joined_bytes=st.integers(4, 60),
    max_bytes=st.one_of(st.none(), st.integers(8, 120)),
    resumed_after=st.integers(0, 40),
)
def test_joined_dropped_and_resumed_the_newest_bytes_stay_where_they_were(
    quick_store, pieces, max_pieces, joined_bytes, max_bytes, resumed_after
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MAX_PIECES", max_pieces)
        patch.setattr(segments, "JOINED_BYTES", joined_bytes)
        patch.setattr(segments, "SEGMENT_BYTES", 16)
        directory, whole = uuid.uuid4().hex, b""
        writer = SegmentWriter(quick_store, directory, max_bytes=max_bytes)
        for index, size in enumerate(pieces):
            if index == resumed_after:
                writer = SegmentWriter.resume(quick_store, directory, max_bytes=max_bytes)
            data = bytes((len(whole) + place) % 251 for place in range(size))
            whole += data
            writer.append(data)
            first, end = sequence_range(quick_store, directory)
            assert end == writer.size == len(whole)
            assert read_kept(quick_store, directory, 0) == (first, whole[first:])
            # To within a segment, and one of them there always is.
            largest = max(16 + 9, joined_bytes + 9 * max_pieces)
            assert first == 0 if max_bytes is None else end - first <= max_bytes + largest


def test_small_pieces_in_an_object_store_are_joined(memory_store, monkeypatch):
    monkeypatch.setattr(segments, "MAX_PIECES", 4)
    monkeypatch.setattr(segments, "JOINED_BYTES", 100)
    writer = SegmentWriter(memory_store, "d")
    for number in range(100):
        writer.append(b"line %02d\n" % number)
        assert len(memory_store.names("d")) <= 8 * (number + 1) // 100 + 1 + 5
    assert read_sequence(memory_store, "d", 0) == b"".join(b"line %02d\n" % number for number in range(100))


def test_a_reader_that_listed_pieces_before_they_were_joined_misses_none(memory_store, monkeypatch):
    monkeypatch.setattr(segments, "MAX_PIECES", 4)
    writer = SegmentWriter(memory_store, "d")
    for _ in range(4):
        writer.append(b"0123456789")
    read, is_joined = memory_store.read, []

    def join_meanwhile(path, start=0, stop=None):
        if path.endswith("10") and not is_joined:
            is_joined.append(True)
            writer.append(b"0123456789")
        return read(path, start, stop)

    monkeypatch.setattr(memory_store, "read", join_meanwhile)
    assert read_kept(memory_store, "d", 0) == (0, b"0123456789" * 5)
    assert memory_store.names("d") == ["000000000000000", "000000000000040"]


@pytest.mark.parametrize("refused", ["write", "remove_file"])
def test_what_cannot_be_tidied_up_now_is_later_and_nothing_is_doubled(memory_store, monkeypatch, refused):
    monkeypatch.setattr(segments, "MAX_PIECES", 3)
    writer = SegmentWriter(memory_store, "d")
    usual = getattr(memory_store, refused)

    def refuse(path, *data):
        if refused == "remove_file" or memory_store.exists(path):
            raise OSError(errno.EACCES, "not now")
        usual(path, *data)

    with monkeypatch.context() as patch:
        patch.setattr(memory_store, refused, refuse)
        for _ in range(5):
            writer.append(b"abc")
    assert len(memory_store.names("d")) == 5
    assert read_sequence(memory_store, "d", 0) == b"abc" * 5
    writer.append(b"abc")
    assert len(memory_store.names("d")) <= 3
    assert read_sequence(memory_store, "d", 0) == b"abc" * 6


def test_what_is_left_out_is_read_over(local_store):
    writer = SegmentWriter(local_store, "d", max_bytes=20)
    writer.append(b"0123456789")
    writer.skip_to(15)
    writer.append(b"56789")
    assert sequence_range(local_store, "d") == (0, 20)
    assert read_kept(local_store, "d", 5) == (5, b"56789")
    assert read_kept(local_store, "d", 10) == (15, b"56789")
    writer.append(b"0")
    assert read_kept(local_store, "d", 0) == (15, b"567890")


def test_a_piece_that_was_refused_may_be_tried_again(store, monkeypatch):
    writer = SegmentWriter(store, "d")
    writer.append(b"first,")
    with monkeypatch.context() as patch:

        def refuse(*_):
            raise OSError(errno.ENOSPC, "full")

        patch.setattr(store, "append", refuse)
        patch.setattr(store, "write", refuse)
        with pytest.raises(OSError, match="full"):
            writer.append(b"second,")
    writer.append(b"second,")
    writer.append(b"third")
    assert read_sequence(store, "d", 0) == b"first,second,third"


def test_what_is_no_segment_is_left_out(store):
    SegmentWriter(store, "d").append(b"text")
    store.write("d/.000000000000004.partial", b"torn")
    store.write("d/notes", b"other")
    assert read_sequence(store, "d", 0) == b"text"


def _records(*steps, first=1):
    return [
        JournalRecord(sequence=sequence, time=utc_now(), report=Resumed(step=step))
        for sequence, step in enumerate(steps, start=first)
    ]


def test_a_journal_is_read_back_from_any_point(store):
    writer = JournalWriter(store, "job", 2)
    records = _records(*range(7))
    records[3] = JournalRecord(sequence=4, time=utc_now(), report=Warned(message="two\nlines, naïve"))
    writer.append(records[:1])
    writer.append(records[1:5])
    writer.append([])
    writer.append(records[5:])
    for after in range(9):
        assert list(read_journal(store, "job", 2, after=after)) == records[after:]
    assert list(read_journal(store, "job", 1, after=0)) == []
    assert list(read_journal(store, "other", 2, after=0)) == []


def test_a_journal_is_read_to_its_last_whole_line_wherever_it_was_torn(local_store):
    records = _records(1, 2)
    lines = [record.model_dump_json().encode() for record in records]
    whole = b"\n".join(lines) + b"\n"
    for length in range(len(whole) + 1):
        local_store.write(f"{journal_dir('job', 1)}/{0:015d}", whole[:length])
        found = list(read_journal(local_store, "job", 1, after=0))
        # A line is whole once its closing brace is there, with or without the end of line.
        assert found == records[: (length >= len(lines[0])) + (length >= len(whole) - 1)]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_nothing_is_read_past_a_gap(store, missing):
    records = _records(0, 1, 2, 3)
    JournalWriter(store, "job", 1).append(record for record in records if record.sequence != missing)
    assert list(read_journal(store, "job", 1, after=0)) == records[: missing - 1]


def test_nothing_is_read_past_a_line_that_is_none(store):
    records = _records(0, 1, 2)
    writer = SegmentWriter(store, journal_dir("job", 1))
    writer.append(records[0].model_dump_json().encode() + b"\n")
    writer.append(b'{"sequence": 2, "time": "2026-01-01T00:00:00Z", "report": {"kind": "of the future"}}\n')
    writer.append(records[2].model_dump_json().encode() + b"\n")
    assert list(read_journal(store, "job", 1, after=0)) == records[:1]


def test_a_doubled_record_is_no_reason_to_go_on(store):
    records = _records(0, 1)
    JournalWriter(store, "job", 1).append([records[0], records[0], records[1]])
    assert list(read_journal(store, "job", 1, after=0)) == records[:1]


def test_run_files_are_found_where_the_cluster_writes_them(store):
    files = StoredRunFiles(store)
    assert not files.was_launched("job", 1)
    assert (files.log_size("job", 1, 0), files.read_log("job", 1, 0, 0, 100).content) == (0, b"")
    assert list(files.journal("job", 1, after=0)) == []
    store.create_exclusively("jobs/job/attempts/1/launched", b"17")
    assert files.was_launched("job", 1)
    assert not files.was_launched("job", 11)
    logs = SegmentWriter(store, log_dir("job", 1, 0))
    logs.append(b"hello ")
    logs.append(b"world\n")
    assert files.log_size("job", 1, 0) == 12
    assert files.read_log("job", 1, 0, 3, 5).content == b"lo wo"
    assert files.log_size("job", 1, 10) == files.log_size("job", 2, 0) == 0
    records = _records(0, 1, 2)
    JournalWriter(store, "job", 1).append(records)
    assert list(files.journal("job", 1, after=1)) == records[1:]
    path = "jobs/job/attempts/1/checkpoints/000000001"
    store.write(f"{path}/model", b"12345")
    assert (files.size(f"{path}/model"), files.read(f"{path}/model", 1, 3)) == (5, b"23")


def test_a_log_is_read_while_it_grows(local_store, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 7)
    writer, files = SegmentWriter(local_store, log_dir("job", 1, 0)), StoredRunFiles(local_store)
    seen = b""
    for number in range(20):
        writer.append(f"line {number}\n".encode())
        seen += files.read_log("job", 1, 0, len(seen), files.log_size("job", 1, 0)).content
    assert seen == b"".join(f"line {number}\n".encode() for number in range(20))


@pytest.mark.parametrize("num_syncs", [0, 1])  # of the file, then of its directory
def test_a_flush_that_failed_is_repeated_without_doubling_anything(local_store, monkeypatch, num_syncs):
    writer = JournalWriter(local_store, "job", 1)
    records = _records(0, 1, 2)
    sync, left = os.fsync, [num_syncs]

    def fail(descriptor):
        if left[0] == 0:
            raise OSError(errno.EIO, "a bad disk")
        left[0] -= 1
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("service.storage.object_store.os.fsync", fail)
        with pytest.raises(OSError, match="a bad disk"):
            writer.append(records[:2])
    writer.append(records)
    assert list(read_journal(local_store, "job", 1, after=0)) == records


def test_metrics_in_a_journal_keep_every_bit(local_store):
    record = JournalRecord(sequence=1, time=utc_now(), report=Metrics.of(1, {"a": 0.1 + 0.2, "b": float("nan")}))
    JournalWriter(local_store, "job", 1).append([record])
    assert list(read_journal(local_store, "job", 1, after=0)) == [record]
