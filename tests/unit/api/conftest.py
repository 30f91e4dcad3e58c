from collections.abc import Iterator

import httpx
import pytest

from tests.fakes import FakeService, running_services, service

__all__ = ["running_services", "service"]


@pytest.fixture
def api(service: FakeService) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {service.token}"}
    with httpx.Client(base_url=service.url, headers=headers, trust_env=False, verify=False) as client:
        yield client
