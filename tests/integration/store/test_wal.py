"""SQLite's write-ahead log beside the writers. A failure means commits that wait for it, or a log without an end."""

import threading
import time

import pytest
import sqlalchemy as sa

from service.store import wal
from service.store.engine import Database

DEADLINE_S = 20.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "service.sqlite"


@pytest.fixture
def database(path, monkeypatch):
    monkeypatch.setattr(wal, "_PAUSE_S", 0.05)
    database = Database(f"sqlite:///{path}")
    with database.writing() as connection:
        connection.execute(sa.text("CREATE TABLE pieces (piece BLOB)"))
    yield database
    database.close()


def write(database, num_bytes):
    with database.writing() as connection:
        connection.execute(sa.text("INSERT INTO pieces VALUES (randomblob(:size))"), {"size": num_bytes})


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "checkpoints"]


def test_a_long_log_is_carried_into_the_database_and_a_short_one_waits(database, path, monkeypatch):
    write(database, 10_000)
    time.sleep(0.3)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", 100_000)
    write(database, 100_000)
    wait_until(lambda: path.stat().st_size > 100_000)


def test_what_is_written_meanwhile_is_carried_over_too(database, path, monkeypatch):
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", 1)
    for _ in range(50):
        write(database, 20_000)
    wait_until(lambda: path.stat().st_size > 50 * 20_000)


def test_the_thread_ends_with_the_connections_and_comes_back_with_the_next_commit(database, path, monkeypatch):
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", 1)
    write(database, 10_000)
    assert threads()
    database.close()
    assert not threads()
    database.close()
    size = path.stat().st_size
    write(database, 100_000)
    wait_until(lambda: path.stat().st_size > size + 90_000)


def test_a_log_that_cannot_be_carried_over_now_is_later(database, path, monkeypatch):
    monkeypatch.setattr(wal, "CHECKPOINT_BYTES", 1)
    connect = database.engine.raw_connection

    def refuse():
        if threading.current_thread() in threads():
            raise sa.exc.TimeoutError("no connection is free")
        return connect()

    monkeypatch.setattr(database.engine, "raw_connection", refuse)
    write(database, 100_000)
    time.sleep(0.3)
    monkeypatch.setattr(database.engine, "raw_connection", connect)
    write(database, 1)
    wait_until(lambda: path.stat().st_size > 100_000)
