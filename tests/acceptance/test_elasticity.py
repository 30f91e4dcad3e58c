"""Jobs that are resized, paused, resumed and forked while they train, through REST.

A failure of a comparison, while those of test_exactness pass, points at what is carried over a checkpoint; any other at
the way from the wish to the next attempt.
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

STEPS = 160
JOB: dict[str, Any] = {
    "workers": {"min": 1, "max": 4},
    "steps": STEPS,
    "optimizer": {"name": "sgd", "learning_rate": 0.02},
    "checkpoint": {"every_steps": 20, "keep_last": 100},
}
# Only the order of float64 sums differs: 1e-16 a sum, amplified over the steps of training.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def undisturbed(service: EmbeddedServiceProcess) -> dict[str, torch.Tensor]:
    """The final weights of the same job on one worker that nobody disturbs."""
    job_id = service.submit(digits_job(**JOB | {"workers": 1}))
    return _final_weights(service, job_id)


def test_a_job_that_is_resized_twice_ends_with_the_same_weights(
    service: EmbeddedServiceProcess, undisturbed: dict[str, torch.Tensor]
) -> None:
    job_id = service.submit(digits_job(**JOB))
    _wait_for_world(service, job_id, 4)
    for workers in (2, 3):
        assert _ask(service, job_id, "resize", {"workers": workers})["resize_requested"]
        _wait_for_world(service, job_id, workers)
    assert _difference(_final_weights(service, job_id), undisturbed) <= TOLERANCE
    attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [4, 2, 3]
    assert [attempt["reason"] for attempt in attempts] == ["resized", "resized", "completed"]
    job = service.job(job_id)
    assert (job["status"], job["retries_used"]) == ("succeeded", 0)
    assert service.series(job_id, "train/loss")["steps"] == list(range(1, STEPS + 1))


def test_a_job_that_was_paused_and_resumed_ends_with_the_same_weights(
    service: EmbeddedServiceProcess, undisturbed: dict[str, torch.Tensor]
) -> None:
    job_id = service.submit(digits_job(**JOB | {"workers": 2}))
    service.wait_for_step(job_id, 15)
    _ask(service, job_id, "pause")
    _wait_for_status(service, job_id, "paused")
    step = service.job(job_id)["step"]
    assert 15 <= step < STEPS
    assert service.get(f"/v1/jobs/{job_id}/checkpoints")["checkpoints"][-1]["step"] == step
    assert _ask(service, job_id, "resume")["status"] == "queued"
    assert _difference(_final_weights(service, job_id), undisturbed) <= TOLERANCE
    assert service.get(f"/v1/jobs/{job_id}/attempts")["attempts"][-1]["resumed_from_step"] == step


def test_a_fork_of_a_step_goes_on_where_its_parent_was_and_elsewhere_with_another_rate(
    service: EmbeddedServiceProcess, undisturbed: dict[str, torch.Tensor]
) -> None:
    parent = service.submit(digits_job(**JOB | {"workers": 2}))
    service.wait_for_end(parent)
    same = _ask(service, parent, "fork", {"step": 40, "changes": {"workers": 3}})
    other = _ask(service, parent, "fork", {"step": 40, "changes": {"optimizer.learning_rate": 0.001}})
    assert same["forked_from"]["step"] == 40
    assert _difference(_final_weights(service, same["id"]), undisturbed) <= TOLERANCE
    assert service.series(same["id"], "train/loss")["steps"] == list(range(41, STEPS + 1))
    # The comparison can fail.
    assert _difference(_final_weights(service, other["id"]), undisturbed) > 1e-3
    # What is done goes on only with more to do.
    refused = service.http.post(f"/v1/jobs/{parent}/resume")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:syncbn:problem:invalid-transition")


def _ask(service: EmbeddedServiceProcess, job_id: str, action: str, body: object = None) -> Any:
    response = service.http.post(f"/v1/jobs/{job_id}/{action}", json=body)
    assert response.is_success, response.text
    return response.json()


def _wait_for_world(service: EmbeddedServiceProcess, job_id: str, workers: int) -> None:
    def runs() -> bool:
        attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
        return bool(attempts) and attempts[-1]["world_size"] == workers and attempts[-1]["running_at"] is not None

    wait_until(runs, 60, lambda: f"not on {workers} workers: {service.job(job_id)}\n{service.all_logs()}")


def _wait_for_status(service: EmbeddedServiceProcess, job_id: str, status: str) -> None:
    wait_until(lambda: service.job(job_id)["status"] == status, 60, lambda: f"not {status}: {service.job(job_id)}")


def _final_weights(service: EmbeddedServiceProcess, job_id: str) -> dict[str, torch.Tensor]:
    job = service.wait_for_end(job_id)
    assert job["status"] == "succeeded", f"{job}\n{service.all_logs()}"
    return load_file(service.checkpoint_file(job_id, STEPS, "model.safetensors"))


def _difference(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight or a running statistic, relative to the largest of its tensor."""
    assert weights.keys() == expected.keys()
    worst = max(
        float((weights[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
        if expected[name].is_floating_point()
    )
    print(f"largest relative difference of the final weights: {worst:.1e}")
    return worst
