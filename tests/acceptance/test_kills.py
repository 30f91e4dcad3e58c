"""`kill -9` in the middle of a job costs at most a checkpoint interval, and changes nothing in the result.

A failure says which process's death is not survived: the service's own (API, scheduler) or one of the attempt's
(supervisor, training process).
"""

import os
import signal
import time

import pytest
from safetensors import safe_open

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, is_alive

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NUM_STEPS = 120
KILL_AT_STEP = 33


@pytest.fixture(scope="module")
def undisturbed(service: EmbeddedServiceProcess) -> dict[str, bytes]:
    job_id = service.submit(digits_job(steps=NUM_STEPS))
    assert service.wait_for_end(job_id)["status"] == "succeeded"
    return _weights(service, job_id)


def _weights(service: EmbeddedServiceProcess, job_id: str) -> dict[str, bytes]:
    path = service.checkpoint_file(job_id, NUM_STEPS, "model.safetensors")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("victim", ["api", "scheduler", "supervisor", "training"])
def test_kill_minus_9(service: EmbeddedServiceProcess, undisturbed: dict[str, bytes], victim: str) -> None:
    job_id = service.submit(digits_job(steps=NUM_STEPS))
    service.wait_for_step(job_id, KILL_AT_STEP)
    training_pids = service.training_pids(job_id)
    supervisor_pid = service.supervisor_pid(job_id)
    pid = {
        "api": lambda: service.child_pid("api"),
        "scheduler": lambda: service.child_pid("scheduler"),
        "supervisor": lambda: supervisor_pid,
        "training": lambda: training_pids[1],
    }[victim]()
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()

    if victim in ("supervisor", "training"):
        while any(map(is_alive, training_pids)):
            assert time.monotonic() - killed_at < 5.0, "processes of the dead attempt live on"
            time.sleep(0.02)
    assert service.wait_for_end(job_id)["status"] == "succeeded"
    attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    if victim in ("api", "scheduler"):
        assert len(attempts) == 1, "a healthy attempt was disturbed"
    else:
        assert len(attempts) == 2
        assert attempts[1]["resumed_from_step"] >= KILL_AT_STEP - KILL_AT_STEP % 10 - 10
    steps = service.series(job_id, "train/loss")["steps"]
    assert steps == list(range(1, NUM_STEPS + 1)), "each step is shown exactly once"
    # The same world, and a bucket layout that a resume does not change: the same bits.
    assert _weights(service, job_id) == undisturbed
    assert not any(map(is_alive, training_pids)), "training processes live on after the job's end"
