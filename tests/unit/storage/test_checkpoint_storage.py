"""Checkpoints in run storage. A failure means that a damaged or half-written checkpoint passes for a whole one."""

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from service.domain.errors import CorruptCheckpoint
from service.domain.job import Checkpoint
from service.domain.journal import utc_now
from service.storage.checkpoints import FORGOTTEN_S, IN_USE_S, fetch_checkpoint, publish_checkpoint
from service.storage.manifest import MANIFEST_NAME, Manifest, describe_file, verify_directory, write_manifest
from service.storage.run_files import StoredRunFiles

MODEL, STATE = b"weights \x00\xff" * 3, b"state"


@pytest.fixture
def staged(tmp_path):
    """A checkpoint as a rank stages it."""
    directory = tmp_path / "staging" / "5"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(MODEL)
    (directory / "training_state.pt").write_bytes(STATE)
    write_manifest(
        directory,
        job_id="job",
        attempt=2,
        step=5,
        spec_sha256="0" * 64,
        world_size=3,
        metrics={"train/loss": 0.1 + 0.2},
        versions={"torch": "2.9"},
    )
    return directory


def _committed(report):
    return Checkpoint(
        job_id="job",
        attempt=2,
        step=report.step,
        path=report.path,
        manifest_sha256=report.manifest_sha256,
        files=report.files,
        metrics=report.metrics,
        created_at=utc_now(),
    )


@pytest.fixture
def published(store, staged):
    """The row of a checkpoint that lies in the store."""
    return _committed(publish_checkpoint(store, "job", 2, 5, staged))


def test_a_manifest_describes_every_file(staged):
    manifest = verify_directory(staged)
    assert [file.name for file in manifest.files] == ["model.safetensors", "training_state.pt"]
    assert [file.size_bytes for file in manifest.files] == [len(MODEL), len(STATE)]
    assert manifest.files[0] == describe_file(staged / "model.safetensors")
    assert (manifest.job_id, manifest.attempt, manifest.step, manifest.world_size) == ("job", 2, 5, 3)
    assert manifest.metrics == {"train/loss": 0.1 + 0.2}
    assert Manifest.model_validate_json((staged / MANIFEST_NAME).read_bytes()) == manifest


def test_publishing_reports_what_lies_in_the_store(store, staged):
    report = publish_checkpoint(store, "job", 2, 5, staged)
    assert report.path == "jobs/job/attempts/2/checkpoints/000000005"
    assert store.names(report.path) == sorted(file.name for file in report.files)
    assert {file.name for file in report.files} == {"model.safetensors", "training_state.pt", MANIFEST_NAME}
    for file in report.files:
        assert store.size(f"{report.path}/{file.name}") == file.size_bytes
    assert report.metrics == {"train/loss": 0.1 + 0.2}


def test_the_manifest_is_uploaded_last(store, staged, monkeypatch):
    uploaded = []
    upload = store.upload
    monkeypatch.setattr(store, "upload", lambda source, path: (uploaded.append(source.name), upload(source, path)))
    publish_checkpoint(store, "job", 2, 5, staged)
    assert uploaded[-1] == MANIFEST_NAME
    assert sorted(uploaded) == sorted(["model.safetensors", "training_state.pt", MANIFEST_NAME])


@pytest.mark.parametrize("num_uploads", [0, 1, 2])
def test_publishing_that_breaks_off_leaves_nothing(store, staged, monkeypatch, num_uploads):
    upload, left = store.upload, [num_uploads]

    def break_off(source, path):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "full")
        left[0] -= 1
        upload(source, path)

    with monkeypatch.context() as patch:
        patch.setattr(store, "upload", break_off)
        with pytest.raises(OSError, match="full"):
            publish_checkpoint(store, "job", 2, 5, staged)
    assert store.names("jobs/job/attempts/2/checkpoints/000000005") == [], "its room is not given back"
    publish_checkpoint(store, "job", 2, 5, staged)


def test_what_was_published_is_fetched_bit_by_bit(store, published, tmp_path):
    directory = fetch_checkpoint(store, published, tmp_path / "cache")
    assert (directory / "model.safetensors").read_bytes() == MODEL
    assert (directory / "training_state.pt").read_bytes() == STATE
    assert directory == fetch_checkpoint(store, published, tmp_path / "cache")


def _damages(content):
    """Every byte flipped, in its lowest and highest bit, and every truncation, and one byte too many."""
    for position in range(len(content)):
        for bit in (1, 128):
            flipped = bytearray(content)
            flipped[position] ^= bit
            yield bytes(flipped)
        yield content[:position]
    yield content + b"\n"


def _fetch(store, published, cache):
    """Fetch as a node does that never had it."""
    shutil.rmtree(cache, ignore_errors=True)
    return fetch_checkpoint(store, published, cache)


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", MANIFEST_NAME])
def test_no_damaged_byte_and_no_truncation_of_any_file_passes(local_store, memory_store, staged, tmp_path, name):
    local = _committed(publish_checkpoint(local_store, "job", 2, 5, staged))
    remote = _committed(publish_checkpoint(memory_store, "job", 2, 5, staged))
    content = (staged / name).read_bytes()
    path = local_store.local_path(f"{local.path}/{name}")
    for number, damaged in enumerate(_damages(content)):
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint):
            fetch_checkpoint(local_store, local, tmp_path / "cache")
        if number % 50 == 0:  # the same check behind a copy
            memory_store.write(f"{remote.path}/{name}", damaged)
            with pytest.raises(CorruptCheckpoint):
                _fetch(memory_store, remote, tmp_path / "cache")
    path.write_bytes(content)
    memory_store.write(f"{remote.path}/{name}", content)
    fetch_checkpoint(local_store, local, tmp_path / "cache")
    _fetch(memory_store, remote, tmp_path / "cache")


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt", MANIFEST_NAME])
def test_a_missing_file_is_noticed(store, published, tmp_path, name):
    store.remove(f"{published.path}/{name}")
    with pytest.raises(CorruptCheckpoint):
        fetch_checkpoint(store, published, tmp_path / "cache")


def test_a_checkpoint_that_is_gone_is_corrupt(store, published, tmp_path):
    store.remove(published.path)
    with pytest.raises(CorruptCheckpoint):
        fetch_checkpoint(store, published, tmp_path / "cache")


def test_a_whole_checkpoint_that_is_not_the_committed_one_is_refused(store, staged, published, tmp_path):
    (staged / "model.safetensors").write_bytes(b"other weights")
    write_manifest(
        staged,
        job_id="job",
        attempt=2,
        step=5,
        spec_sha256="0" * 64,
        world_size=3,
        metrics={},
        versions={},
    )
    publish_checkpoint(store, "job", 2, 5, staged)
    with pytest.raises(CorruptCheckpoint, match="not the one that was committed"):
        fetch_checkpoint(store, published, tmp_path / "cache")


@pytest.mark.parametrize("name", ["model.safetensors", MANIFEST_NAME])
def test_a_checkpoint_that_was_staged_damaged_is_not_published(store, staged, name):
    (staged / name).write_bytes((staged / name).read_bytes()[:-3])
    with pytest.raises(CorruptCheckpoint):
        publish_checkpoint(store, "job", 2, 5, staged)
    assert not store.exists("jobs")


def test_an_error_names_the_file_at_fault(staged):
    (staged / "model.safetensors").write_bytes(MODEL[:-1])
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors has {len(MODEL) - 1} bytes"):
        verify_directory(staged)
    (staged / "model.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors cannot be read"):
        verify_directory(staged)


def test_ranks_of_one_node_fetch_at_once(memory_store, staged, tmp_path, monkeypatch):
    published = _committed(publish_checkpoint(memory_store, "job", 2, 5, staged))
    num_ranks = 4
    barrier, one_at_a_time = threading.Barrier(num_ranks), threading.Lock()
    download = memory_store.download

    def together(path, target):
        if path.endswith(MANIFEST_NAME):
            # Whoever may download beside others does so with all of them.
            with suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=2)
        with one_at_a_time:  # the stand-in's readers of a file share its position
            download(path, target)

    monkeypatch.setattr(memory_store, "download", together)
    with ThreadPoolExecutor(num_ranks) as pool:
        fetches = [pool.submit(fetch_checkpoint, memory_store, published, tmp_path / "cache") for _ in range(num_ranks)]
        found = [fetch.result(timeout=30) for fetch in fetches]
    assert len(set(found)) == 1
    verify_directory(found[0])
    assert [path.name for path in (tmp_path / "cache" / "job").iterdir()] == [published.manifest_sha256]


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_anew(memory_store, staged, tmp_path):
    published = _committed(publish_checkpoint(memory_store, "job", 2, 5, staged))
    directory = fetch_checkpoint(memory_store, published, tmp_path / "cache")
    (directory / "model.safetensors").write_bytes(b"damaged")
    again = fetch_checkpoint(memory_store, published, tmp_path / "cache")
    assert (again / "model.safetensors").read_bytes() == MODEL


def test_a_download_that_breaks_off_leaves_nothing_in_the_cache(memory_store, staged, tmp_path, monkeypatch):
    published = _committed(publish_checkpoint(memory_store, "job", 2, 5, staged))

    def break_off(_path, target):
        target.write_bytes(b"half")
        raise OSError(errno.ECONNRESET, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(memory_store, "download", break_off)
        with pytest.raises(OSError, match="gone"):
            fetch_checkpoint(memory_store, published, tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*/*")) == []
    fetch_checkpoint(memory_store, published, tmp_path / "cache")


def test_removing_takes_the_manifest_first_and_may_be_repeated(store, published, monkeypatch):
    removed = []
    remove = store.remove
    monkeypatch.setattr(store, "remove", lambda path: (removed.append(path), remove(path)))
    store.write("jobs/job/attempts/2/checkpoints/000000006/model", b"another")
    files = StoredRunFiles(store)
    files.remove_checkpoint(published.path)
    assert removed[0] == f"{published.path}/{MANIFEST_NAME}"
    assert not store.exists(published.path)
    assert store.exists("jobs/job/attempts/2/checkpoints/000000006/model")
    files.remove_checkpoint(published.path)


def test_of_an_attempt_that_is_over_only_what_was_committed_stays(store, published):
    directory = published.path.rpartition("/")[0]
    for path in (f"{directory}/000000006/model", f"{directory}/000000007/{MANIFEST_NAME}"):
        store.write(path, b"never committed")
    store.write("jobs/job/attempts/3/checkpoints/000000008/model", b"of another")
    files = StoredRunFiles(store)
    files.remove_uncommitted("job", 2, {published.path})
    assert store.names(directory) == ["000000005"]
    assert store.exists(f"{published.path}/{MANIFEST_NAME}")
    assert store.exists("jobs/job/attempts/3/checkpoints/000000008/model")
    files.remove_uncommitted("job", 9, frozenset())


@pytest.fixture
def publish(memory_store, staged):
    """Publish the staged checkpoint as one of any job and step."""

    def publish(job_id, step):
        write_manifest(
            staged, job_id=job_id, attempt=2, step=step, spec_sha256="", world_size=3, metrics={}, versions={}
        )
        report = publish_checkpoint(memory_store, job_id, 2, step, staged)
        return _committed(report).model_copy(update={"job_id": job_id})

    return publish


def _copies(cache):
    return {path.parent.name: {copy.name for copy in path.parent.iterdir()} for path in cache.glob("*/*")}


def _age(cache, seconds):
    for path in cache.glob("*/*"):
        modified = path.stat().st_mtime - seconds
        os.utime(path, (modified, modified))


def test_a_node_keeps_the_two_newest_copies_of_a_job(memory_store, publish, tmp_path):
    cache = tmp_path / "cache"
    published = [publish("job", step) for step in range(5)]
    for checkpoint in published:
        fetch_checkpoint(memory_store, checkpoint, cache)
        _age(cache, IN_USE_S)
    assert _copies(cache) == {"job": {checkpoint.manifest_sha256 for checkpoint in published[-2:]}}


def test_a_copy_that_is_in_use_stays(memory_store, publish, tmp_path):
    cache = tmp_path / "cache"
    published = [publish("job", step) for step in range(4)]
    for checkpoint in published[:3]:
        fetch_checkpoint(memory_store, checkpoint, cache)
    _age(cache, IN_USE_S)
    fetch_checkpoint(memory_store, published[0], cache)  # the oldest is asked for once more
    fetch_checkpoint(memory_store, published[3], cache)
    assert _copies(cache) == {"job": {published[index].manifest_sha256 for index in (0, 3)}}
    # A gang of forks may begin at any number of steps at once.
    shutil.rmtree(cache)
    for checkpoint in published:
        fetch_checkpoint(memory_store, checkpoint, cache)
    assert len(_copies(cache)["job"]) == 4


def test_copies_of_jobs_that_are_gone_or_forgotten_are_dropped(memory_store, publish, tmp_path):
    cache = tmp_path / "cache"
    checkpoints = {job_id: publish(job_id, 1) for job_id in ("gone", "living", "next", "last")}
    fetch_checkpoint(memory_store, checkpoints["gone"], cache)
    fetch_checkpoint(memory_store, checkpoints["living"], cache)
    (cache / "gone" / "broken-off.partial").mkdir()
    _age(cache, IN_USE_S + 1)
    memory_store.remove("jobs/gone")
    fetch_checkpoint(memory_store, checkpoints["next"], cache)
    assert _copies(cache).keys() == {"living", "next"}
    assert not (cache / "gone").exists()
    _age(cache, FORGOTTEN_S)
    fetch_checkpoint(memory_store, checkpoints["last"], cache)
    assert _copies(cache).keys() == {"last"}


def test_old_copies_that_cannot_be_dropped_hold_nobody_up(memory_store, publish, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    fetch_checkpoint(memory_store, publish("other", 1), cache)

    def fail(_path):
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(memory_store, "exists", fail)
    fetch_checkpoint(memory_store, publish("job", 1), cache)
    assert _copies(cache).keys() == {"other", "job"}
