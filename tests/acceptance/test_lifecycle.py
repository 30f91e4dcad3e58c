"""The life of a service and its jobs: stop and restart, side by side, killed without warning, Ctrl-C.

These tests start services of their own, since they break them.
"""

import os
import signal
from collections.abc import Callable

import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, marked_processes, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("clean_machine")]

StartService = Callable[[], EmbeddedServiceProcess]


def test_an_orderly_stop_requeues_what_runs_and_the_next_start_finishes_it(start_service: StartService) -> None:
    first = start_service()
    job_id = first.submit(digits_job(steps=150))
    first.wait_for_step(job_id, 15)
    assert first.stop(signal.SIGTERM) == 0

    second = start_service()
    assert second.token == first.token
    job = second.wait_for_end(job_id)
    attempts = second.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    steps = second.series(job_id, "train/loss")["steps"]
    assert second.stop() == 0
    assert job["status"] == "succeeded"
    assert job["retries_used"] == 0
    assert attempts[0]["reason"] == "service_stopped"
    assert attempts[1]["resumed_from_step"] >= 15, "the stop asked for a checkpoint first"
    assert steps == list(range(1, 151))


def test_kill_minus_9_of_serve_takes_everything_with_it_and_loses_nothing(start_service: StartService) -> None:
    first = start_service()
    job_id = first.submit(digits_job(steps=150))
    first.wait_for_step(job_id, 15)
    first.http.close()
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    wait_until(lambda: not marked_processes(first.marker), 10, lambda: str(marked_processes(first.marker)))

    second = start_service()
    job = second.wait_for_end(job_id)
    steps = second.series(job_id, "train/loss")["steps"]
    assert second.stop() == 0
    assert job["status"] == "succeeded"
    assert steps == list(range(1, 151))


def test_two_services_run_side_by_side(start_service: StartService, service: EmbeddedServiceProcess) -> None:
    other = start_service()
    jobs = [(running, running.submit(digits_job(steps=20))) for running in (service, other)]
    statuses = [running.wait_for_end(job_id)["status"] for running, job_id in jobs]
    foreign = other.http.get(f"/v1/jobs/{jobs[0][1]}").status_code
    assert other.stop() == 0
    assert statuses == ["succeeded", "succeeded"]
    assert foreign == 404
