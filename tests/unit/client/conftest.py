from collections.abc import Iterator

import pytest

from service.client.client import Client
from tests.fakes import FakeService, running_services, service

__all__ = ["running_services", "service"]


@pytest.fixture
def client(service: FakeService) -> Iterator[Client]:
    with Client(service.url, service.token, retry_for_s=5, reconnect_for_s=10) as client:
        yield client
