"""A job's result does not depend on its number of workers, seen through REST.

A failure here, while the same comparison passes in tests/integration/training, points at the path around training:
the specification that reaches the ranks, or the metrics that come back.
"""

import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


# Two samples a rank on four workers, and a learning rate at which local statistics lead elsewhere.
EXACTNESS_JOB = {"batch": {"size": 8}, "optimizer": {"name": "sgd", "learning_rate": 0.1}}


def _losses(service: EmbeddedServiceProcess, **changes: object) -> list[float]:
    job_id = service.submit(digits_job(**EXACTNESS_JOB, **changes))
    assert service.wait_for_end(job_id)["status"] == "succeeded"
    series = service.series(job_id, "train/loss")
    assert series["steps"] == list(range(1, 51))
    return series["values"]


def test_50_float64_losses_are_equal_on_1_2_3_and_4_workers(service: EmbeddedServiceProcess) -> None:
    expected = _losses(service, workers=1)
    for workers in (2, 3, 4):
        losses = _losses(service, workers=workers)
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
        # Only the order of float64 sums differs: 1e-16 a sum, amplified over 50 steps of training.
        print(f"{workers} workers against 1: largest relative difference of 50 losses {worst:.1e}")
        assert worst <= 1e-11, f"{workers} workers: {worst:.1e}"


def test_local_batch_norm_differs_which_proves_that_the_comparison_can_fail(service: EmbeddedServiceProcess) -> None:
    expected = _losses(service, workers=1)
    losses = _losses(service, workers=4, norm={"kind": "local"})
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    print(f"local batch norm on 4 workers against 1: {worst:.2f}")
    assert worst > 1e-1
