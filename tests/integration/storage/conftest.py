import uuid

import pytest

from service.storage.object_store import ObjectStore


@pytest.fixture
def s3_store(s3_server):
    return ObjectStore(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
