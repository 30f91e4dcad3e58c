"""What tests of several packages share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[object]:
    """An S3 server with an empty bucket, to which the environment of this process leads."""
    from tests.s3 import S3Server  # a second that others need not spend

    server = S3Server()
    server.make_bucket(server.bucket)
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    yield server
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.close()
