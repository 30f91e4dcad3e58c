"""What a reaper holds for a forkserver. A failure means a device that nobody uses and nobody gets."""

import fcntl
import os
import signal
import socket
import time

import pytest

from service.cluster.reaper import Reaper

DEADLINE_S = 20.0
# Above what a kernel gives out, so that no group has them.
NO_GROUPS = range(2**22 + 1, 2**22 + 101)


@pytest.fixture
def reaper():
    reaper = Reaper()
    yield reaper
    reaper.close()
    os.waitpid(reaper.pid, 0)


@pytest.fixture
def fence(tmp_path):
    """Makes a locked file, whose lock lasts as long as a copy of its descriptor."""

    def make(name):
        descriptor = os.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    return make


def is_held(path):
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_it_could_not_be_told_at_once_it_is_told_later(reaper, fence, tmp_path):
    for pgid in NO_GROUPS:
        descriptor = fence(str(pgid))
        while True:
            try:
                reaper.watch(pgid, descriptor)
            except BlockingIOError:
                continue
            break
        os.close(descriptor)
    assert all(is_held(path) for path in tmp_path.iterdir())
    reaper._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    os.kill(reaper.pid, signal.SIGSTOP)
    for pgid in NO_GROUPS:
        reaper.forget(pgid)
    with pytest.raises(BlockingIOError):
        reaper.watch(NO_GROUPS.stop, 0)
    os.kill(reaper.pid, signal.SIGCONT)

    def is_free():
        reaper.forget(NO_GROUPS.stop)  # whatever comes next
        return not any(is_held(path) for path in tmp_path.iterdir())

    wait_until(is_free)
