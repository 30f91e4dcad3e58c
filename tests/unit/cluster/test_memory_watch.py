"""Watching a process's memory. A failure means a rank that takes its neighbours' memory, or an end without a name."""

import os
import signal
import subprocess
import sys

import pytest

from service.cluster import memory_watch
from service.cluster.memory_watch import MemoryWatch

MIB = 1 << 20
# A process with a helper: each holds so many MiB, in pages of its own or shared by both, once it is told to.
HOLDER = """
import mmap, os, sys
def touch(area, num_bytes):
    for offset in range(0, num_bytes, 4096):
        area[offset] = 1
    return area
own, helper, shared = (int(value) << 20 for value in sys.argv[1:])
common = mmap.mmap(-1, max(1, shared))
kept = [touch(bytearray(own), own)]
told, tell = os.pipe()
if helper or shared:
    if os.fork() == 0:
        kept.append(touch(bytearray(helper), helper))
        touch(common, shared)
        os.write(tell, b"x")
        sys.stdin.read()
        os._exit(0)
    os.read(told, 1)
touch(common, shared)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold():
    processes = []

    def hold(own=0, helper=0, shared=0):
        command = [sys.executable, "-c", HOLDER, str(own), str(helper), str(shared)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        processes.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process.pid

    yield hold
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(autouse=True)
def look_for_helpers_at_every_look(monkeypatch):
    monkeypatch.setattr(memory_watch, "_FIND_INTERVAL_S", 0.0)


def test_a_process_that_uses_more_than_it_may_is_named(hold):
    watch = MemoryWatch(hold(own=200), 150 * MIB)
    assert watch.look()
    assert not watch.look()  # once
    said = watch.explain(-signal.SIGKILL, None)
    assert said.startswith("used 0.2")
    assert "of the 0.15 GiB it may have (resources.memory_bytes_per_rank): lower batch.max_per_rank" in said


def test_helpers_count_too(hold):
    pid = hold(own=80, helper=80)
    assert not MemoryWatch(pid, 250 * MIB).look()
    assert MemoryWatch(pid, 120 * MIB).look()


def test_what_is_shared_counts_once(hold):
    pid = hold(shared=150)
    assert not MemoryWatch(pid, 220 * MIB).look()
    assert MemoryWatch(pid, 120 * MIB).look()


def test_without_a_limit_nothing_is_too_much(hold):
    watch = MemoryWatch(hold(own=50), None)
    assert not watch.look()
    assert watch.explain(-signal.SIGKILL, None) == ""


def test_a_process_that_is_gone_uses_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    watch = MemoryWatch(process.pid, MIB)
    assert not watch.look()
    assert watch.explain(0, None) == ""


@pytest.mark.parametrize(
    ("exit_status", "error_type", "is_named"),
    [
        (-signal.SIGKILL, None, True),
        (1, "DatasetError", True),
        (-signal.SIGSEGV, None, False),
        (1, "ValueError", False),
    ],
)
def test_the_kernel_s_kills_are_named(monkeypatch, tmp_path, exit_status, error_type, is_named):
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 3\noom_kill 3\noom_group_kill 0\n")
    monkeypatch.setattr(memory_watch, "_kernel_counter", lambda: counter)
    watch = MemoryWatch(os.getpid(), None)
    watch.look()
    assert watch.explain(exit_status, error_type) == ""  # those were before
    counter.write_text("low 0\noom 4\noom_kill 4\noom_group_kill 0\n")
    watch.look()
    assert bool(watch.explain(exit_status, error_type)) == is_named
    monkeypatch.setattr(memory_watch, "_KERNEL_WINDOW_S", 0.0)
    watch.look()
    assert watch.explain(exit_status, error_type) == "", "another's, some time ago"


def test_this_machine_counts_what_its_kernel_ends():
    counter = memory_watch._kernel_counter()
    assert counter is None or "oom_kill" in counter.read_text()
