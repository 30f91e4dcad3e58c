import uuid

import fsspec
import pytest

from service.storage.object_store import ObjectStore


@pytest.fixture
def local_store(tmp_path):
    return ObjectStore(str(tmp_path / "runs"))


@pytest.fixture
def memory_store():
    """An object store as fsspec shows it: no append, no rename, whole files."""
    root = f"/{uuid.uuid4().hex}"
    yield ObjectStore(f"memory://{root}")
    files = fsspec.filesystem("memory")
    if files.exists(root):
        files.rm(root, recursive=True)


@pytest.fixture(params=["local", "memory"])
def store(request):
    return request.getfixturevalue(f"{request.param}_store")
