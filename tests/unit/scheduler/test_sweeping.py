"""What goes from run storage, and when. A failure means a disk that fills up, or a lease lost over slow files."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.domain.job import JobStatus, Outcome, Reason
from service.scheduler import sweeper
from service.storage.layout import checkpoint_dir, seal_marker
from tests.fakes import wait_for


def _exist(house, job_id, *steps):
    return [house.storage.exists(checkpoint_dir(job_id, 1, step)) for step in steps]


def test_what_was_never_committed_goes_when_its_attempt_is_sealed(house, scheduler):
    job_id = house.start(scheduler)
    house.cluster.checkpoint(job_id, 1, 10)
    scheduler.step()
    # Killed in the middle of an upload, and between an upload and its record.
    house.storage.write(f"{checkpoint_dir(job_id, 1, 20)}/model.safetensors", b"half")
    house.storage.write(f"{checkpoint_dir(job_id, 1, 30)}/manifest.json", b"{}")
    scheduler.step()
    assert _exist(house, job_id, 10, 20, 30) == [True, True, True], "it may be about to be committed"
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert _exist(house, job_id, 10, 20, 30) == [True, False, False]
    assert house.storage.exists(seal_marker(job_id, 1)), "whatever still runs of it could store more"
    assert house.store.get(job_id).attempt == 2


@pytest.fixture
def refuse(house, monkeypatch):
    """Let run storage not give up the checkpoint of step 10 until told so."""
    remove, refused = house.files.remove_checkpoint, [True]

    def remove_some(path):
        if path.endswith("0010") and refused[0]:
            raise OSError("the storage is away")
        remove(path)

    monkeypatch.setattr(house.files, "remove_checkpoint", remove_some)
    return refused


def test_one_that_cannot_be_removed_does_not_hold_up_the_others_and_is_taken_up_again(
    house, scheduler, refuse, monkeypatch, caplog
):
    job_id = house.start(scheduler, checkpoint={"keep_last": 1})
    for step in (10, 20, 30):
        house.cluster.checkpoint(job_id, 1, step)
    scheduler.step()
    assert _exist(house, job_id, 10, 20, 30) == [True, False, True]
    assert "000000010: OSError: the storage is away" in caplog.text
    assert "could not be followed" not in caplog.text
    house.cluster.end(job_id, 1)
    scheduler.step()
    assert house.store.get(job_id).status is JobStatus.SUCCEEDED
    refuse[0] = False
    monkeypatch.setattr(sweeper, "SWEEP_INTERVAL_S", 0.0)
    scheduler.step()
    assert _exist(house, job_id, 10, 20, 30) == [False, False, True]
    assert house.store.removable_checkpoints() == ()


def test_the_loop_does_not_wait_for_files(house, monkeypatch):
    monkeypatch.setattr(sweeper, "ThreadPoolExecutor", ThreadPoolExecutor)
    remove, may_go = house.files.remove_checkpoint, threading.Event()

    def remove_slowly(path):
        assert may_go.wait(30)
        remove(path)

    monkeypatch.setattr(house.files, "remove_checkpoint", remove_slowly)
    scheduler = house.scheduler()
    job_id = house.start(scheduler, checkpoint={"keep_last": 1})
    try:
        for step in (10, 20, 30):
            house.cluster.checkpoint(job_id, 1, step)
        scheduler.step()
        assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [30]
        assert [one.step for one in house.store.removable_checkpoints(job_id)] == [10, 20], "rows go last"
    finally:
        may_go.set()
    wait_for(lambda: scheduler.step() and not house.store.removable_checkpoints(job_id))
    assert _exist(house, job_id, 10, 20, 30) == [False, False, True]


def test_uploads_that_were_cut_short_go_once_they_are_old(house):
    kept = ["bundles/aa.zip", "bundles/.bb.zip.1.partial", "datasets/cc/data.npz"]
    old = ["bundles/.aa.zip.2.partial", "datasets/cc/.data.npz.3.partial"]
    for path in (*kept, *old):
        house.storage.write(path, b"x")
    long_ago = time.time() - sweeper.PARTIAL_UPLOADS_AGE_S - 60
    for path in (*old, kept[0], kept[2]):
        os.utime(house.storage.local_path(path), (long_ago, long_ago))
    house.scheduler().step()
    assert [house.storage.exists(path) for path in (*kept, *old)] == [True] * 3 + [False] * 2
