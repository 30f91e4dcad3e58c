"""Uploads in run storage and their way to a node. A failure means a node that uses what nobody uploaded, or the wrong
one to blame when it cannot."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.domain.errors import DiskFull, StorageError, UserCodeRefused
from service.domain.uploads import NewUpload, UploadKind
from service.storage.node_cache import NodeCache
from service.storage.object_store import ObjectStore
from service.storage.uploads import StoredUploads, bundle_path, dataset_dir, fetch_bundle, fetch_dataset
from tests.archives import HOSTILE, make_zip

BUNDLE = make_zip({"train.py": b"x = 1\n", "pkg/model.py": b"y = 2\n"})
DATA = b"PAR1....PAR1"


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    return ObjectStore(str(tmp_path / "runs") if request.param == "local" else f"memory://{tmp_path.name}")


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache", max_bytes=1 << 30)


def keep(store, kind, content, name="data.parquet"):
    sha256 = hashlib.sha256(content).hexdigest()
    new = NewUpload(kind=kind, sha256=sha256, name=name, size_bytes=len(content), entries=None, owner="token")
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        StoredUploads(store).keep(new, file)
    return sha256


def test_a_bundle_is_unpacked_once_and_shared(store, cache):
    sha256 = keep(store, UploadKind.BUNDLE, BUNDLE)
    assert store.read(bundle_path(sha256)) == BUNDLE
    first = fetch_bundle(store, sha256, cache)
    assert sorted(path.name for path in first.path.rglob("*.py")) == ["model.py", "train.py"]
    assert (first.path / "pkg" / "model.py").read_bytes() == b"y = 2\n"
    store.remove(bundle_path(sha256))
    second = fetch_bundle(store, sha256, cache)
    assert second.path == first.path
    first.close()
    second.close()


def test_a_file_of_data_has_its_name(store, cache):
    sha256 = keep(store, UploadKind.DATASET, DATA)
    with_name = fetch_dataset(store, sha256, cache)
    assert (with_name.path.name, with_name.path.read_bytes()) == ("data.parquet", DATA)
    # A local one is read where it is.
    assert (with_name.path == store.local_path(f"{dataset_dir(sha256)}/data.parquet")) if store.is_local else True
    with_name.close()


def test_what_is_not_there_is_the_jobs_fault_with_the_remedy(store, cache):
    with pytest.raises(UserCodeRefused, match="syncbn bundle"):
        fetch_bundle(store, "0" * 64, cache)
    with pytest.raises(UserCodeRefused, match="syncbn dataset"):
        fetch_dataset(store, "0" * 64, cache)


def test_a_bundle_that_got_past_the_checks_is_refused_on_the_node_too(store, cache, tmp_path):
    sha256 = keep(store, UploadKind.BUNDLE, HOSTILE["parent"][0])
    with pytest.raises(UserCodeRefused, match=r"\.\./evil\.py: leads out"):
        fetch_bundle(store, sha256, cache)
    assert not list(tmp_path.rglob("evil.py"))


def test_what_is_damaged_in_storage_is_not_used_and_not_the_jobs_fault(store, cache):
    bundle, data = keep(store, UploadKind.BUNDLE, BUNDLE), keep(store, UploadKind.DATASET, DATA)
    store.write(bundle_path(bundle), make_zip({"train.py": b"evil"}))
    store.write(f"{dataset_dir(data)}/data.parquet", b"PAR1...!PAR1")
    for fetch, sha256 in ((fetch_bundle, bundle), (fetch_dataset, data)):
        with pytest.raises(StorageError, match="is damaged"):
            fetch(store, sha256, cache)
    # Sending it again repairs it.
    keep(store, UploadKind.BUNDLE, BUNDLE)
    keep(store, UploadKind.DATASET, DATA)
    fetch_bundle(store, bundle, cache).close()
    fetch_dataset(store, data, cache).close()


def test_storage_that_refuses_is_said_so(store, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "upload", refuse)
    with pytest.raises(DiskFull, match="No space left"):
        keep(store, UploadKind.BUNDLE, BUNDLE)


def test_two_that_keep_the_same_at_once_both_succeed(tmp_path):
    store = ObjectStore(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        (sha256,) = set(pool.map(lambda _: keep(store, UploadKind.BUNDLE, BUNDLE), range(40)))
    assert store.names("bundles") == [f"{sha256}.zip"]
    assert store.read(bundle_path(sha256)) == BUNDLE
