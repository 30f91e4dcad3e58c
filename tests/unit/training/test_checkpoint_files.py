"""A checkpoint on disk. A failure means that what is read back is not what was written, or that damage passes."""

import random
import subprocess
import sys

import pytest
import torch

from service.domain.errors import CorruptCheckpoint
from service.domain.job import Checkpoint as CommittedCheckpoint
from service.domain.journal import utc_now
from service.storage.checkpoints import fetch_checkpoint, publish_checkpoint
from service.storage.manifest import verify_directory
from service.storage.object_store import ObjectStore
from service.training.checkpoints import FORMAT_VERSION, read_checkpoint, write_checkpoint
from service.training.errors import CheckpointFailed, CheckpointMismatch
from tests.small_disk import small_disk
from tests.unit.training.checkpoint_examples import Training, assert_same, frozen, rank_task

FILES = ["manifest.json", "model.safetensors", "training_state.pt"]


@pytest.fixture(scope="module")
def training():
    training = Training()
    for _ in range(3):
        training.step()
    return training


@pytest.fixture
def task(tmp_path):
    return rank_task(tmp_path / "staging")


def test_what_is_read_back_is_what_was_written(training, task):
    expected = frozen(vars(training.capture()) | {"model": dict(training.capture().model)})
    directory = write_checkpoint(training.capture(), task, {"train/loss": 0.1})
    assert_same(vars(read_checkpoint(directory, job_id="job")) | {"model": expected["model"]}, expected)
    model = read_checkpoint(directory, job_id="job").model
    assert model.keys() == expected["model"].keys()
    for name, value in model.items():
        assert_same(value, expected["model"][name], name)
    assert sorted(path.name for path in directory.iterdir()) == FILES


def test_the_training_state_says_its_version(training, task):
    state = torch.load(write_checkpoint(training.capture(), task, {}) / "training_state.pt", weights_only=True)
    assert (state["format_version"], state["step"], state["seed"]) == (FORMAT_VERSION, 3, task.spec.seed)


def test_version_1_is_read(training, task):
    directory = write_checkpoint(training.capture(), task, {})
    optimizer = training.optimizer.state_dict()
    torch.save({"format_version": 1, "step": 3, "seed": 0, "optimizer": optimizer}, directory / "training_state.pt")
    checkpoint = read_checkpoint(directory, job_id="job")
    assert (checkpoint.step, checkpoint.state) == (3, {})
    assert_same(checkpoint.optimizer, optimizer)


def test_a_later_version_is_refused(training, task):
    directory = write_checkpoint(training.capture(), task, {})
    torch.save({"format_version": FORMAT_VERSION + 1}, directory / "training_state.pt")
    with pytest.raises(CheckpointMismatch, match=f"format version {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}"):
        read_checkpoint(directory, job_id="job")


def test_another_job_s_is_refused(training, task):
    directory = write_checkpoint(training.capture(), task, {})
    with pytest.raises(CheckpointMismatch, match="step 3 of job, not of other"):
        read_checkpoint(directory, job_id="other")


def test_tensors_that_share_memory_are_written_each(task, training):
    checkpoint = training.capture()
    tied = torch.arange(6.0).reshape(2, 3)
    checkpoint.model["tied"], checkpoint.model["tied_too"], checkpoint.model["turned"] = tied, tied, tied.T
    model = read_checkpoint(write_checkpoint(checkpoint, task, {}), job_id="job").model
    assert torch.equal(model["tied"], tied)
    assert torch.equal(model["tied_too"], tied)
    assert torch.equal(model["turned"], tied.T)


def test_extra_files_become_part_of_it(training, task, tmp_path):
    extra = tmp_path / "exported"
    extra.mkdir()
    (extra / "model.onnx").write_bytes(b"graph")
    directory = write_checkpoint(training.capture(), task, {}, extra_dir=extra)
    assert (directory / "model.onnx").read_bytes() == b"graph"
    assert [file.name for file in verify_directory(directory).files] == ["model.onnx", *FILES[1:]]
    assert list(extra.iterdir()) == []


def _committed(report):
    return CommittedCheckpoint(
        job_id="job",
        attempt=2,
        step=report.step,
        path=report.path,
        manifest_sha256=report.manifest_sha256,
        files=report.files,
        metrics=report.metrics,
        created_at=utc_now(),
    )


@pytest.mark.parametrize(("kind", "num_flips"), [("local", 300), ("memory", 300), ("s3", 45)])
def test_no_flipped_bit_of_any_file_passes(training, task, tmp_path, request, kind, num_flips):
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('s3_server').bucket}/flips"
    else:
        url = {"local": str(tmp_path / "runs"), "memory": f"memory://{tmp_path}"}[kind]
    store = ObjectStore(url)
    committed = _committed(publish_checkpoint(store, "job", 2, 3, write_checkpoint(training.capture(), task, {})))
    whole = {name: store.read(f"{committed.path}/{name}") for name in FILES}
    chance = random.Random(0)
    num_detected = 0
    for flip in range(num_flips):
        name = FILES[flip % len(FILES)]
        damaged = bytearray(whole[name])
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        store.write(f"{committed.path}/{name}", bytes(damaged))
        try:
            fetch_checkpoint(store, committed, tmp_path / f"cache-{flip}")  # a node that never had it
        except CorruptCheckpoint:
            num_detected += 1
        store.write(f"{committed.path}/{name}", whole[name])
    assert num_detected == num_flips
    read_checkpoint(fetch_checkpoint(store, committed, tmp_path / "cache"), job_id="job")


@pytest.mark.parametrize("room_bytes", [4096, 53_248, 204_800])  # full in the model, and in the training state
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, room_bytes):
    with small_disk(tmp_path / "disk", room_bytes) as disk:
        training = Training(width=64)
        training.step()
        with pytest.raises(CheckpointFailed, match=r"step 1 could not be written below .*Check the free space"):
            write_checkpoint(training.capture(), rank_task(disk / "staging"), {})
        assert list((disk / "staging").iterdir()) == []


SAVER = """
import os, sys
from pathlib import Path
from service.training import checkpoints
from tests.unit.training.checkpoint_examples import Training, rank_task

real = os.fsync

def kill_at(num_syncs):
    left = [num_syncs]
    def sync(descriptor):
        real(descriptor)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
    return sync

for num_syncs in range(1, 6):
    pid = os.fork()  # this process has run no operation yet
    if pid == 0:
        os.fsync = kill_at(num_syncs)
        training = Training()
        training.step()
        checkpoints.write_checkpoint(training.capture(), rank_task(Path(sys.argv[1], str(num_syncs))), {})
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_kill_minus_9_in_the_middle_leaves_nothing_under_its_name(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], capture_output=True, text=True, timeout=60)
    # Synced are model, training state, manifest and directory; and then, once it has its name, the one above.
    assert done.stdout.split() == ["-9"] * 5, done.stdout + done.stderr
    for num_syncs in range(1, 5):
        (left,) = (tmp_path / str(num_syncs)).iterdir()
        assert left.name.startswith(".1-")
    read_checkpoint(tmp_path / "5" / "1", job_id="job")
    # The next one of the same step does not mind.
    training = Training()
    training.step()
    read_checkpoint(write_checkpoint(training.capture(), rank_task(tmp_path / "1"), {}), job_id="job")
