"""Faults of the execution plane, injected into a service that runs, and what is owed for each.

The quick tests take one of each kind, the soak many.
"""

import os
import signal
import time
from typing import Any

import psutil

from tests.acceptance.api_watch import ApiWatch
from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, is_alive, wait_until

COLLECTIVE_TIMEOUT_S = 5.0
# Of a service whose ranks wait only a moment for each other.
IMPATIENT = {"SYNCBN_COLLECTIVE_TIMEOUT_S": str(COLLECTIVE_TIMEOUT_S)}
# To hear what the peers saw, to look at the silent one, to kill it and to write it all down.
NAMING_S = 5.0
RECOVERY_S = 90.0


def stop_a_rank(service: EmbeddedServiceProcess, *, num_workers: int, victim: int, num_steps: int) -> float:
    """SIGSTOP one rank; it is named and killed in time, and the job goes on to its end.

    Returns:
        How long it took to name it, in seconds.
    """
    job_id = service.submit(digits_job(steps=num_steps, workers=num_workers))
    service.wait_for_step(job_id, 15)
    pids = service.training_pids(job_id)
    os.kill(pids[victim], signal.SIGSTOP)
    stopped_at = time.monotonic()
    wait_until(lambda: _attempts(service, job_id)[0]["ended_at"] is not None, 60, service.all_logs)
    noticed_s = time.monotonic() - stopped_at
    print(f"rank {victim} of {num_workers}: named {noticed_s:.1f} s after SIGSTOP")
    attempt = _attempts(service, job_id)[0]
    assert attempt["reason"] == "rank_lost", attempt
    assert attempt["failure"]["rank"] == victim, attempt
    assert attempt["failure"]["error_type"] == "RankSilent"
    assert "(state T)" in attempt["failure"]["message"]
    assert noticed_s < COLLECTIVE_TIMEOUT_S + NAMING_S
    assert not any(map(is_alive, pids))
    _assert_goes_on_to_its_end(service, job_id, num_steps)
    return noticed_s


def kill_a_part_of_ray(service: EmbeddedServiceProcess, *, victim: str, num_steps: int) -> tuple[float, int]:
    """`kill -9` of one of Ray's own processes: the API answers, nothing runs twice, the job goes on.

    Args:
        service: that runs.
        victim: ``gcs_server``, ``raylet``, or ``ray`` for the command that watches over both.
        num_steps: of the job; enough that it still runs when the fault comes.

    Returns:
        How long it was until the job ran again, in seconds, and how often the API answered.
    """
    job_id = service.submit(digits_job(steps=num_steps))
    service.wait_for_step(job_id, 15)
    kept = {service.process.pid, service.child_pid("api")}
    old = [process for process in service.processes() if process.pid not in kept]
    with ApiWatch(service.url, service.token, ["/healthz", f"/v1/jobs/{job_id}"]) as watch:
        os.kill(_part_of_ray(service, victim), signal.SIGKILL)
        killed_at = time.monotonic()
        wait_until(lambda: len(_attempts(service, job_id)) > 1, RECOVERY_S, service.all_logs)
        left = [process for process in old if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"the next attempt begins beside processes of the old cluster: {left}"
        wait_until(lambda: _attempts(service, job_id)[1]["status"] != "created", RECOVERY_S, service.all_logs)
        wait_until(
            lambda: service.job(job_id)["status"] in ("running", "succeeded", "failed"), RECOVERY_S, service.all_logs
        )
        recovered_s = time.monotonic() - killed_at
        _assert_goes_on_to_its_end(service, job_id, num_steps)
    print(
        f"{victim}: running again {recovered_s:.1f} s after its death; the API answered {watch.num_answers} times, "
        f"the slowest in {watch.longest_s:.3f} s"
    )
    assert watch.failures == []
    assert recovered_s < RECOVERY_S
    attempts = _attempts(service, job_id)
    assert len(attempts) == 2, attempts
    assert attempts[1]["resumed_from_step"] >= 10, "more than a checkpoint interval was lost"
    return recovered_s, watch.num_answers


def _part_of_ray(service: EmbeddedServiceProcess, name: str) -> int:
    for process in service.processes():
        command = process.cmdline()
        if name == "ray" and "ray.scripts.scripts" in command[:3]:  # not its guard, which has it later
            return process.pid
        if command and command[0].endswith(f"/{name}"):
            return process.pid
    raise AssertionError(f"no {name} among {service.processes()}")


def _assert_goes_on_to_its_end(service: EmbeddedServiceProcess, job_id: str, num_steps: int) -> None:
    assert service.wait_for_end(job_id)["status"] == "succeeded", service.job(job_id)
    assert service.series(job_id, "train/loss")["steps"] == list(range(1, num_steps + 1)), "not each step exactly once"


def _attempts(service: EmbeddedServiceProcess, job_id: str) -> list[Any]:
    attempts: list[Any] = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    return attempts
