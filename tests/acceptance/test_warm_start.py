"""Supervisors and rank actors that wait for jobs. A failure means jobs that start cold, or processes that pile up."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

NUM_SUPERVISORS, NUM_RANKS = 1, 2
# As Ray names processes: those that are ready, and one that starts.
SUPERVISOR, RANK, STARTS = "ray::SupervisorActor", "ray::RankActor", ".__init__"
# What waits beyond these numbers does so for 10 s.
TIMEOUT_S = 40.0


def _pids(service: EmbeddedServiceProcess, beginning: str) -> set[int]:
    found = set()
    for process in service.processes():
        try:
            command = "".join(process.cmdline())
            if command.startswith(beginning) and not command.startswith(beginning + STARTS):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def _wait_until_at_rest(service: EmbeddedServiceProcess) -> None:
    def counts() -> tuple[int, int]:
        return len(_pids(service, SUPERVISOR)), len(_pids(service, RANK))

    wait_until(lambda: counts() == (NUM_SUPERVISORS, NUM_RANKS), TIMEOUT_S, lambda: f"{counts()}\n{service.all_logs()}")


def test_a_job_is_run_by_processes_that_waited_and_none_of_them_pile_up(service: EmbeddedServiceProcess) -> None:
    for _ in range(2):
        _wait_until_at_rest(service)
        waited = _pids(service, SUPERVISOR) | _pids(service, RANK)
        job_id = service.submit(digits_job(steps=300))
        service.wait_for_step(job_id, 1)
        assert service.supervisor_pid(job_id) in waited
        assert service.rank_actor_pid(job_id) in waited
        assert service.wait_for_end(job_id)["status"] == "succeeded"
    _wait_until_at_rest(service)


def test_what_died_while_it_waited_is_replaced(service: EmbeddedServiceProcess) -> None:
    _wait_until_at_rest(service)
    killed = _pids(service, SUPERVISOR) | _pids(service, RANK)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in killed), TIMEOUT_S, service.all_logs)
    job_id = service.submit(digits_job())
    assert service.wait_for_end(job_id)["status"] == "succeeded"
    _wait_until_at_rest(service)


def test_a_new_scheduler_ends_what_waited_for_the_one_before(service: EmbeddedServiceProcess) -> None:
    _wait_until_at_rest(service)
    waited = _pids(service, SUPERVISOR)
    os.kill(service.child_pid("scheduler"), signal.SIGKILL)
    wait_until(lambda: not waited & _pids(service, SUPERVISOR), TIMEOUT_S, service.all_logs)
    _wait_until_at_rest(service)


def test_nothing_that_waits_computes(service: EmbeddedServiceProcess) -> None:
    _wait_until_at_rest(service)
    waiting = [psutil.Process(pid) for pid in _pids(service, SUPERVISOR) | _pids(service, RANK)]
    before = [_cpu_s(process) for process in waiting]
    psutil.cpu_percent(interval=3.0)
    spent_s = [_cpu_s(process) - earlier for process, earlier in zip(waiting, before, strict=True)]
    # Ray's own threads take about 0.005 s in each second; a loop of ours that does not wait would take 3 s.
    assert max(spent_s) < 0.3, spent_s


def _cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))
