"""`kill -9` of every process of an attempt, twenty times each, at random moments of starting and training.

The job's code starts a helper in each rank that is tied to nobody, and its data comes through loading workers: both are
to end with their rank, whatever was killed.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, wait_until
from tests.archives import make_zip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

NUM_KILLS = 20
NUM_STEPS = 400
ORPHANS_S = 10.0
# Every other one after the launch of an attempt, so while its ranks start; the others after its first step.
LATEST_KILL_S = 1.5
CODE = {
    "brought.py": b"""
import math, subprocess
from torch import nn

def network(input_shape, num_outputs):
    subprocess.Popen(["sleep", "100000"])
    width = math.prod(input_shape)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_outputs)
    )
"""
}


@pytest.fixture(scope="module")
def stormy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServiceProcess]:
    running = EmbeddedServiceProcess(tmp_path_factory.mktemp("stormy") / "data")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def job(stormy: EmbeddedServiceProcess) -> dict[str, Any]:
    answer = stormy.http.post("/v1/bundles", content=make_zip(CODE))
    assert answer.status_code in (200, 201), answer.text
    return digits_job(
        model={"factory": "brought:network"},
        code={"bundle": answer.json()["sha256"]},
        loading={"workers": 1},
        steps=NUM_STEPS,
        retry={"budget": 1000, "backoff_s": 0},
    )


@pytest.fixture(scope="module")
def undisturbed(stormy: EmbeddedServiceProcess, job: dict[str, Any]) -> dict[str, bytes]:
    job_id = stormy.submit(job)
    assert stormy.wait_for_end(job_id)["status"] == "succeeded", stormy.job(job_id)
    return _weights(stormy, job_id)


@pytest.mark.parametrize("victim", ["supervisor", "rank actor", "training", "forkserver", "node agent"])
def test_a_storm(
    stormy: EmbeddedServiceProcess,
    job: dict[str, Any],
    undisturbed: dict[str, bytes],
    victim: str,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("owed", f"retried; 0 orphans {ORPHANS_S:g} s after each kill; the undisturbed run's weights")
    draw = random.Random(victim)  # the same moments in every soak, as far as the machine's pace allows
    num_kills, num_lost, num_jobs, num_processes, longest_s = 0, 0, 0, 0, 0.0
    while num_kills < NUM_KILLS:
        job_id = stormy.submit(job)
        num_jobs += 1
        attempt = 1
        while num_kills < NUM_KILLS:
            statuses = ("launched", "running") if num_kills % 2 else ("running",)
            attempt = _next_attempt(stormy, job_id, attempt, statuses)
            if not attempt:
                break
            time.sleep(draw.uniform(0, LATEST_KILL_S))
            pid = _find(stormy, job_id, attempt, victim)
            if pid is None:
                continue  # the attempt is over, or has no such process yet
            doomed = _processes_of_ranks(stormy)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed_at = time.monotonic()
            num_kills += 1
            num_processes += len(doomed)
            wait_until(
                lambda processes=doomed: not any(map(_runs, processes)),
                ORPHANS_S,
                lambda processes=doomed: f"orphans: {[process for process in processes if _runs(process)]}",
            )
            longest_s = max(longest_s, time.monotonic() - killed_at)
            if doomed:
                attempt += 1  # this one is lost
        assert stormy.wait_for_end(job_id, 240)["status"] == "succeeded", stormy.job(job_id)
        num_lost += len(stormy.get(f"/v1/jobs/{job_id}/attempts")["attempts"]) - 1
        steps = stormy.series(job_id, "train/loss")["steps"]
        assert steps == list(range(1, NUM_STEPS + 1)), "not each step exactly once"
        assert _weights(stormy, job_id) == undisturbed
    wait_until(lambda: not _processes_of_ranks(stormy), ORPHANS_S, lambda: str(_processes_of_ranks(stormy)))
    # One that came before the ranks needed their forkserver disturbs nothing, nor does one at the very end.
    assert num_lost >= NUM_KILLS // 3, "hardly an attempt was disturbed"
    record_property(
        "seen",
        f"{num_kills} kills in {num_jobs} jobs, {num_lost} attempts lost; {num_processes} processes of ranks ended, "
        f"the last {longest_s:.1f} s after the kill; same bits",
    )


def _next_attempt(service: EmbeddedServiceProcess, job_id: str, number: int, statuses: tuple[str, ...]) -> int:
    """Wait until an attempt of at least this number is so far; 0 if the job ends without one."""
    deadline = time.monotonic() + 120  # a forkserver may have to import torch first, on a busy machine
    while time.monotonic() < deadline:
        attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
        if attempts and attempts[-1]["number"] >= number and attempts[-1]["status"] in statuses:
            return int(attempts[-1]["number"])
        if service.job(job_id)["status"] in ("succeeded", "failed", "cancelled"):
            return 0
        time.sleep(0.02)
    raise AssertionError(f"no attempt {number}: {service.job(job_id)}\n{service.all_logs()}")


def _find(service: EmbeddedServiceProcess, job_id: str, attempt: int, victim: str) -> int | None:
    if victim == "supervisor":
        return service.supervisor_pid(job_id, attempt)
    if victim == "rank actor":
        with suppress(ValueError):  # none has a directory of the job
            return service.rank_actor_pid(job_id)
        return None
    for process in service.processes():
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if victim == "node agent" and title.startswith("ray::NodeAgent"):
                return process.pid
            # Its children have its command line, and names of their own.
            is_own = not process.name().startswith("syncbn-")
            if victim == "forkserver" and is_own and "service.cluster.forkserver" in title:
                return process.pid
            if victim == "training" and process.name() == "syncbn-rank-1":
                return process.pid
    return None


def _processes_of_ranks(service: EmbeddedServiceProcess) -> list[psutil.Process]:
    """Training processes and all that they have started, by the session that each of them leads."""
    processes = service.processes()
    leaders = set()
    for process in processes:
        with suppress(psutil.Error):
            if process.name().startswith("syncbn-rank-"):
                leaders.add(process.pid)
    found = []
    for process in processes:
        with suppress(psutil.Error, ProcessLookupError):
            if process.name() == "sleep" or os.getsid(process.pid) in leaders:
                found.append(process)
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _weights(service: EmbeddedServiceProcess, job_id: str) -> dict[str, bytes]:
    path = service.checkpoint_file(job_id, NUM_STEPS, "model.safetensors")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a dict
