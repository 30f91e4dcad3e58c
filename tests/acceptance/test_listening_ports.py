"""Nothing of the embedded service listens beyond loopback, while it trains too."""

import psutil
import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_every_listening_port_is_on_loopback(service: EmbeddedServiceProcess) -> None:
    job_id = service.submit(digits_job(steps=2000, workers=3))
    service.wait_for_step(job_id, 3)
    pids = {process.pid for process in service.processes()}
    assert set(service.training_pids(job_id)) <= pids
    listening = [
        connection
        for connection in psutil.net_connections(kind="inet")
        if connection.pid in pids and connection.status == psutil.CONN_LISTEN
    ]
    service.http.post(f"/v1/jobs/{job_id}/cancel")
    assert len(listening) >= 4, "Ray, the API and gloo listen"
    assert {connection.laddr.ip for connection in listening} <= LOOPBACK, listening
    assert service.wait_for_end(job_id)["status"] == "cancelled"
