"""A rank's directory on its node. A failure means a full disk, files that vanish under a living rank, or lost logs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from service.cluster import rank_directory
from service.cluster.rank_directory import AbandonedDirectories, RankDirectory, RankOwner, clear_work_dir
from service.storage.layout import launch_marker, log_dir
from service.storage.object_store import ObjectStore
from service.storage.segments import read_sequence

HOLDER = """
import sys, time
from pathlib import Path
from service.cluster.log_shipper import LogShipper
from service.cluster.rank_directory import RankDirectory, RankOwner
from service.storage.layout import log_dir
from service.storage.object_store import ObjectStore
from service.storage.segments import SegmentWriter
owner = RankOwner.model_validate_json(sys.argv[2])
directory = RankDirectory(Path(sys.argv[1]), owner)
(directory.path / "staging").mkdir()
(directory.path / "staging" / "weights").write_bytes(b"1")
directory.log_path.write_bytes(b"shipped\\n")
LogShipper(directory.log_path, SegmentWriter(ObjectStore(owner.storage_url), log_dir("job", 1, 0))).ship()
with directory.log_path.open("ab") as log:
    log.write(b"Traceback: the last words\\n")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(str(tmp_path / "runs"))
    store.create_exclusively(launch_marker("job", 1), b"17")
    return store


@pytest.fixture
def make_owner(store):
    def make(**changes):
        fields = {"job_id": "job", "attempt": 1, "rank": 0, "max_log_bytes": 1 << 20}
        return RankOwner(storage_url=store.url, storage_id=store.identify(), **(fields | changes))

    return make


@pytest.fixture
def abandoned(monkeypatch):
    monkeypatch.setattr(rank_directory, "FIRST_PAUSE_S", 0.0)
    return AbandonedDirectories()


@pytest.fixture
def work_dir(tmp_path):
    return tmp_path / "node"


@pytest.fixture
def holder(work_dir, make_owner):
    command = [sys.executable, "-c", HOLDER, str(work_dir), make_owner().model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def kill(holder):
    def kill():
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()

    return kill


def shipped(store):
    return read_sequence(store, log_dir("job", 1, 0), 0)


def test_what_a_killed_actor_left_is_removed_and_what_a_living_one_holds_is_not(abandoned, work_dir, make_owner, kill):
    ours = RankDirectory(work_dir, make_owner(attempt=2, rank=1))
    ours.log_path.write_text("line")
    abandoned.clear(work_dir)
    assert (work_dir / "job" / "1" / "rank-0" / "staging" / "weights").exists()
    kill()
    abandoned.clear(work_dir)
    assert not (work_dir / "job" / "1" / "rank-0").exists()
    assert ours.log_path.read_text() == "line"
    ours.remove()
    assert not ours.path.exists()


def test_the_last_words_of_a_rank_whose_actor_was_killed_are_shipped_once(abandoned, work_dir, store, kill):
    abandoned.clear(work_dir)
    assert shipped(store) == b"shipped\n"  # its actor lives: what is new is the actor's to ship
    kill()
    abandoned.clear(work_dir)
    abandoned.clear(work_dir)
    assert shipped(store) == b"shipped\nTraceback: the last words\n"


def test_a_log_that_storage_does_not_take_now_stays_for_later(abandoned, work_dir, store, kill, monkeypatch):
    kill()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "append", lambda *_: (_ for _ in ()).throw(OSError("full")))
        abandoned.clear(work_dir)
        clear_work_dir(work_dir)
    left = work_dir / "job" / "1" / "rank-0"
    assert not (left / "staging").exists()
    abandoned.clear(work_dir)
    assert not left.exists()
    assert shipped(store) == b"shipped\nTraceback: the last words\n"


def test_a_log_that_storage_refuses_is_offered_less_and_less_often(abandoned, work_dir, store, kill, monkeypatch):
    kill()
    offers = []

    def refuse(_store, key, _data):
        offers.append(key)
        raise OSError("full")

    monkeypatch.setattr(rank_directory, "FIRST_PAUSE_S", 10.0)
    monkeypatch.setattr(rank_directory, "LONGEST_PAUSE_S", 30.0)
    monkeypatch.setattr(ObjectStore, "append", refuse)
    began = time.monotonic()
    for passed_s, num_offers in ((0, 1), (9, 1), (11, 2), (30, 2), (32, 3), (61, 3), (63, 4), (92, 4), (94, 5)):
        monkeypatch.setattr(rank_directory.time, "monotonic", lambda now=began + passed_s: now)
        abandoned.clear(work_dir)
        assert len(offers) == num_offers, passed_s
    assert (work_dir / "job" / "1" / "rank-0" / "output.log").exists()


def test_nothing_is_shipped_to_another_storage_under_the_same_name(abandoned, work_dir, store, kill):
    kill()
    identity = store.read("storage-id")
    store.write("storage-id", b"another")
    abandoned.clear(work_dir)
    assert shipped(store) == b"shipped\n"
    store.write("storage-id", identity)
    abandoned.clear(work_dir)
    assert shipped(store) == b"shipped\nTraceback: the last words\n"


def test_the_log_of_a_job_that_was_removed_goes_with_it(abandoned, work_dir, store, kill):
    kill()
    store.remove("jobs/job")
    abandoned.clear(work_dir)
    assert not (work_dir / "job" / "1" / "rank-0").exists()
    assert not store.exists("jobs/job")


def test_a_directory_that_says_nothing_of_its_owner_is_removed(abandoned, work_dir):
    (work_dir / "job" / "1" / "rank-0").mkdir(parents=True)
    abandoned.clear(work_dir)
    assert not (work_dir / "job" / "1" / "rank-0").exists()


def test_what_is_no_rank_s_is_left_alone(abandoned, work_dir, make_owner):
    for path in ("checkpoints/job/copy", "forkserver.log"):
        (work_dir / path).mkdir(parents=True)
    held = RankDirectory(work_dir, make_owner())
    held.remove()
    abandoned.clear(work_dir)
    assert (work_dir / "checkpoints" / "job" / "copy").exists()
    assert (work_dir / "forkserver.log").exists()


def test_a_rank_s_directory_is_one_s_alone(work_dir, make_owner):
    first = RankDirectory(work_dir, make_owner())
    first.log_path.write_text("line")
    with pytest.raises(OSError, match="not empty"):
        RankDirectory(work_dir, make_owner())
