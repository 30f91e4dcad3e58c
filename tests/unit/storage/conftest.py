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


@pytest.fixture
def s3_store(s3_server):
    """Real requests to a server on a loopback port; a prefix of its own."""
    return ObjectStore(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "memory", "s3"])
def store(request):
    return request.getfixturevalue(f"{request.param}_store")


@pytest.fixture(params=["local", "memory"])
def quick_store(request):
    """For tests of hundreds of examples."""
    return request.getfixturevalue(f"{request.param}_store")
