"""Files below one root, on a directory and on an object store. A failure means torn, lost or misplaced bytes."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.domain.errors import NotFound, ServiceError, StorageError
from service.storage.object_store import ObjectStore


def test_what_was_written_is_read(store):
    store.write("a/b/c", b"first")
    store.write("a/b/c", b"second and longer")
    assert store.read("a/b/c") == b"second and longer"
    assert store.size("a/b/c") == 17
    assert store.exists("a/b/c")
    assert store.exists("a/b")


def test_an_empty_file_is_a_file(store):
    store.write("empty", b"")
    assert store.exists("empty")
    assert (store.read("empty"), store.size("empty")) == (b"", 0)


@pytest.mark.parametrize("start", range(7))
@pytest.mark.parametrize("stop", [*range(7), 100, None])
def test_a_range_is_what_slicing_gives(store, start, stop):
    store.write("f", b"01234")
    # A range that ends before it starts is empty, as with slices; none counts from the end.
    assert store.read("f", start, stop) == b"01234"[start:stop]


def test_what_is_not_there_is_not_found(store, tmp_path):
    store.write("other", b"")
    assert not store.exists("none")
    assert store.names("none") == []
    for act in (
        lambda: store.read("none"),
        lambda: store.size("none"),
        lambda: store.download("none", tmp_path / "copy"),
    ):
        with pytest.raises(NotFound, match="none"):
            act()


def test_names_are_those_of_one_level_in_order(store):
    for path in ("d/b", "d/a", "d/10", "d/9", "d/sub/x", "e"):
        store.write(path, b"")
    assert store.names("d") == ["10", "9", "a", "b", "sub"]
    assert store.names("d/sub") == ["x"]


def test_names_are_read_anew_each_time(store):
    store.write("d/a", b"")
    assert store.names("d") == ["a"]
    ObjectStore(store.url).write("d/b", b"")  # another process
    assert store.names("d") == ["a", "b"]
    assert store.names("nothing/yet") == []


def test_removing_takes_all_below_and_may_be_repeated(store):
    for path in ("d/a", "d/sub/x", "e"):
        store.write(path, b"")
    store.remove("d/a")
    assert store.names("d") == ["sub"]
    store.remove("d")
    assert not store.exists("d/sub/x")
    assert store.exists("e")
    store.remove("d")
    store.remove("never/there")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "a/..", "..", "/etc/passwd"])
def test_nothing_outside_the_root_is_reached(store, path):
    for act in (
        store.read,
        store.size,
        store.exists,
        store.names,
        store.remove,
        lambda path: store.write(path, b""),
        lambda path: store.create_exclusively(path, b""),
    ):
        with pytest.raises(AssertionError):
            act(path)


def test_a_file_is_created_once(store):
    assert store.create_exclusively("a/marker", b"first")
    assert not store.create_exclusively("a/marker", b"second")
    assert store.read("a/marker") == b"first"


@pytest.mark.parametrize("kind", ["local", "s3"])  # memory looks first and creates afterwards, in two steps
def test_of_racing_creators_one_wins(request, kind):
    store = request.getfixturevalue(f"{kind}_store")
    num_racers, num_rounds = 8, 20
    barrier = threading.Barrier(num_racers)

    def race(racer):
        won = []
        for round_number in range(num_rounds):
            barrier.wait(timeout=30)
            if store.create_exclusively(f"race/{round_number}/marker", str(racer).encode()):
                won.append(round_number)
        return won

    with ThreadPoolExecutor(num_racers) as pool:
        won_by = list(pool.map(race, range(num_racers)))
    assert sorted(number for won in won_by for number in won) == list(range(num_rounds))
    for racer, won in enumerate(won_by):
        for number in won:
            assert store.read(f"race/{number}/marker") == str(racer).encode()


def test_a_reader_sees_one_whole_version_while_another_is_written(local_store):
    versions = [bytes([letter]) * 300_000 for letter in b"abc"]
    local_store.write("f", versions[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for version in versions:
                local_store.write("f", version)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(100):
            assert local_store.read("f") in versions
    finally:
        stop.set()
        writer.join(timeout=30)
    assert local_store.names("") == ["f"]


class _Disk:
    """Stands in for ``os.write``: a disk that fills up after so many bytes."""

    def __init__(self, room_bytes, write=os.write):
        self.room_bytes = room_bytes
        self._write = write

    def __call__(self, descriptor, data):
        if self.room_bytes == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, data[: self.room_bytes])
        self.room_bytes -= written
        return written


@pytest.mark.parametrize("room_bytes", [0, 1, 4, 5])
def test_an_append_to_a_full_disk_leaves_no_torn_bytes(local_store, monkeypatch, room_bytes):
    local_store.append("log", b"before\n")
    with monkeypatch.context() as patch:
        patch.setattr("service.storage.object_store.os.write", _Disk(room_bytes))
        with pytest.raises(OSError, match="No space left"):
            local_store.append("log", b"second\n")
    assert local_store.read("log") == b"before\n"
    local_store.append("log", b"second\n")
    assert local_store.read("log") == b"before\nsecond\n"


def test_a_first_append_to_a_full_disk_leaves_nothing_to_misread(local_store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("service.storage.object_store.os.write", _Disk(3))
        with pytest.raises(OSError, match="No space left"):
            local_store.append("new/log", b"second\n")
    local_store.append("new/log", b"second\n")
    assert local_store.read("new/log") == b"second\n"


def test_an_append_that_could_not_be_synced_is_undone(local_store, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    local_store.append("log", b"before\n")
    with monkeypatch.context() as patch:
        patch.setattr("service.storage.object_store.os.fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            local_store.append("log", b"second\n")
    assert local_store.read("log") == b"before\n"


def test_an_append_survives_short_writes(local_store, monkeypatch):
    real = os.write
    monkeypatch.setattr("service.storage.object_store.os.write", lambda fd, data: real(fd, data[:3]))
    local_store.append("log", b"0123456789")
    assert local_store.read("log") == b"0123456789"


def test_a_write_that_fails_leaves_the_file_as_it_was(local_store, monkeypatch):
    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    local_store.write("f", b"before")
    source = Path(local_store.url) / "source"
    source.write_bytes(b"uploaded")
    with monkeypatch.context() as patch:
        patch.setattr("service.storage.object_store.os.fsync", fail)
        for act in (lambda: local_store.write("f", b"after"), lambda: local_store.upload(source, "f")):
            with pytest.raises(OSError, match="No space left"):
                act()
            assert local_store.read("f") == b"before"
    local_store.write("f", b"after")
    assert local_store.read("f") == b"after"


def test_durable_means_synced_file_before_directory(local_store, monkeypatch):
    synced = []
    real = os.fsync

    def record(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr("service.storage.object_store.os.fsync", record)
    local_store.write("d/f", b"x")
    assert synced == [".f.partial", "d"]
    synced.clear()
    local_store.append("d/log", b"x")
    local_store.append("d/log", b"y")
    assert synced == ["log", "d", "log"]
    synced.clear()
    local_store.create_exclusively("d/marker", b"")
    synced_file, synced_directory = synced
    assert synced_file.startswith(".marker.")  # what is linked is whole by then
    assert synced_directory == "d"


def test_files_go_up_and_come_down_whole(store, tmp_path):
    content = os.urandom((1 << 20) + 17)  # more than is copied at once
    (tmp_path / "source").write_bytes(content)
    store.upload(tmp_path / "source", "a/b")
    store.download("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert store.names("a") == ["b"]


def test_a_directory_is_local_however_it_is_written(tmp_path):
    for url in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
        store = ObjectStore(url)
        assert store.is_local
        assert store.local_path("a/b") == tmp_path / "a" / "b"
    assert not ObjectStore("memory://x").is_local


def test_storage_has_one_name_whoever_asks(store):
    name = store.identify()
    assert name == store.identify()
    store.check_identity(name)


def test_another_storage_under_the_same_path_is_noticed(tmp_path):
    service_sees, node_sees = ObjectStore(str(tmp_path / "shared")), ObjectStore(str(tmp_path / "local"))
    expected = service_sees.identify()
    with pytest.raises(StorageError, match="does not see"):
        node_sees.check_identity(expected)
    assert not (tmp_path / "local").exists(), "looking must not make it"
    node_sees.identify()
    with pytest.raises(StorageError, match="not the service's run storage"):
        node_sees.check_identity(expected)


def test_storage_says_why_it_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        ObjectStore(str(tmp_path / "file")).identify()
    assert isinstance(caught.value, ServiceError)
    assert str(tmp_path / "file") in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/runs", "sftp://host/runs", "https://host/runs", "none://x"])
def test_storage_that_knows_no_exclusive_creation_is_refused(url):
    with pytest.raises(StorageError, match="nothing keeps two processes from creating the same file") as caught:
        ObjectStore(url)
    assert "s3://" in str(caught.value)


def test_storage_that_forgets_to_be_exclusive_is_refused(memory_store, monkeypatch):
    pipe_file = memory_store._fs.pipe_file
    monkeypatch.setattr(memory_store._fs, "pipe_file", lambda path, data, **_: pipe_file(path, data))
    with pytest.raises(StorageError, match="created twice"):
        memory_store.identify()


def test_a_library_that_is_missing_is_named(monkeypatch):
    def fail(url, **_):
        raise ImportError("Please install it")

    monkeypatch.setattr("service.storage.object_store.url_to_fs", fail)
    with pytest.raises(StorageError, match=r"pip install 'syncbn\[s3\]'"):
        ObjectStore("s3://bucket/runs")


@pytest.mark.parametrize("act", ["write", "upload"])
def test_what_could_not_be_written_leaves_its_room_to_others(local_store, monkeypatch, act):
    source = Path(local_store.url).parent / "source"
    source.write_bytes(b"content")

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("service.storage.object_store.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        local_store.write("d/f", b"content") if act == "write" else local_store.upload(source, "d/f")
    assert local_store.names("d") == []
