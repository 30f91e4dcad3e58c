"""Shipping of a growing log. A failure means lines that a user never sees, or sees twice."""

import errno

import pytest

from service.cluster import log_shipper
from service.cluster.log_shipper import LogShipper
from service.cluster.names import node_agent_name, parse_supervisor_name, supervisor_name
from service.storage.object_store import ObjectStore
from service.storage.segments import read_sequence


@pytest.fixture
def store(tmp_path):
    return ObjectStore(str(tmp_path / "runs"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output.log"


def test_a_log_is_shipped_as_it_grows(store, path):
    shipper = LogShipper(path, store, "logs")
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
    LogShipper(path, store, "logs").ship()
    assert read_sequence(store, "logs", 0) == path.read_bytes()


def test_what_could_not_be_shipped_is_shipped_next_time(store, path, monkeypatch):
    monkeypatch.setattr(log_shipper, "_PIECE_BYTES", 4)
    shipper = LogShipper(path, store, "logs")
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


def test_the_name_of_a_supervisor_says_whose_it_is():
    assert parse_supervisor_name(supervisor_name("job-01", 12)) == ("job-01", 12)
    assert parse_supervisor_name(supervisor_name("a/b", 3)) == ("a/b", 3)
    for name in (node_agent_name("abc"), "", "supervisor", "supervisor/x", "supervisor/x/-1", "other/x/1"):
        assert parse_supervisor_name(name) is None
