"""`kill -9` in the middle of a job costs at most a checkpoint interval, and changes nothing in the result.

A failure says which process's death is not survived: one of the service's own or one of the attempt's.
"""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, is_alive, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# Long enough that whoever takes the victim's place is seen at work before the job's end.
NUM_STEPS = 1500
KILL_AT_STEP = 33
SERVICE = ("api", "scheduler")
ATTEMPT = ("supervisor", "rank actor", "training", "forkserver", "node agent")


@pytest.fixture(scope="module")
def undisturbed(service: EmbeddedServiceProcess) -> dict[str, bytes]:
    job_id = service.submit(digits_job(steps=NUM_STEPS, checkpoint={"every_steps": 20}))
    assert service.wait_for_end(job_id)["status"] == "succeeded"
    return _weights(service, job_id)


def _weights(service: EmbeddedServiceProcess, job_id: str) -> dict[str, bytes]:
    path = service.checkpoint_file(job_id, NUM_STEPS, "model.safetensors")
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("victim", [*SERVICE, *ATTEMPT])
def test_kill_minus_9(service: EmbeddedServiceProcess, undisturbed: dict[str, bytes], victim: str) -> None:
    job_id = service.submit(digits_job(steps=NUM_STEPS, checkpoint={"every_steps": 20}))
    service.wait_for_step(job_id, KILL_AT_STEP)
    training_pids = service.training_pids(job_id)
    find = {
        "api": lambda: service.child_pid("api"),
        "scheduler": lambda: service.child_pid("scheduler"),
        "supervisor": lambda: service.supervisor_pid(job_id),
        "rank actor": lambda: service.rank_actor_pid(job_id),
        "training": lambda: training_pids[1],
        "forkserver": lambda: psutil.Process(training_pids[0]).ppid(),
        "node agent": lambda: psutil.Process(psutil.Process(training_pids[0]).ppid()).ppid(),
    }
    os.kill(find[victim](), signal.SIGKILL)
    killed_at = time.monotonic()

    if victim in ATTEMPT:
        while any(map(is_alive, training_pids)):
            assert time.monotonic() - killed_at < 5.0, "processes of the dead attempt live on"
            time.sleep(0.02)
    at_kill = service.job(job_id)["step"]
    wait_until(lambda: service.job(job_id)["step"] > at_kill + 40, 60, service.all_logs)
    assert service.job(job_id)["status"] == "running", "the job was over before anything took the victim's place"
    assert service.wait_for_end(job_id)["status"] == "succeeded"

    attempts = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    if victim in SERVICE:
        assert len(attempts) == 1, "a healthy attempt was disturbed"
    else:
        assert [attempt["reason"] for attempt in attempts[:1]] != ["completed"]
        assert len(attempts) == 2, attempts
        assert attempts[1]["resumed_from_step"] >= 20, "more than a checkpoint interval was lost"
    steps = service.series(job_id, "train/loss")["steps"]
    assert steps == list(range(1, NUM_STEPS + 1)), "each step is shown exactly once"
    # The same world, and a bucket layout that a resume does not change: the same bits.
    assert _weights(service, job_id) == undisturbed
    assert not any(map(is_alive, training_pids)), "training processes live on after the job's end"


def test_what_a_rank_printed_last_outlives_its_actor(service: EmbeddedServiceProcess) -> None:
    job_id = service.submit(digits_job(steps=NUM_STEPS, retry={"budget": 0}))
    service.wait_for_step(job_id, 1)
    actor = service.rank_actor_pid(job_id)
    os.kill(actor, signal.SIGSTOP)  # it ships nothing more
    for log in service.data_dir.glob(f"node/*/{job_id}/1/rank-*/output.log"):
        with log.open("ab") as file:
            file.write(f"last words of {log.parent.name}\n".encode())
    os.kill(actor, signal.SIGKILL)
    assert service.wait_for_end(job_id)["status"] == "failed"

    def found() -> list[str]:
        answer = service.get(f"/v1/jobs/{job_id}/logs/search?q=last words")
        return [f"{match['rank']}: {match['text']}" for match in answer["matches"]]

    expected = ["0: last words of rank-0", "1: last words of rank-1"]
    wait_until(lambda: found() == expected, 15, lambda: f"{found()}\n{service.all_logs()}")
    wait_until(lambda: not list(service.data_dir.glob(f"node/*/{job_id}/1/rank-*")), 15, service.all_logs)


def test_a_rank_that_uses_more_memory_than_it_may_is_ended_and_named(service: EmbeddedServiceProcess) -> None:
    too_little = {"memory_bytes_per_rank": 64 << 20}  # torch alone takes more
    job_id = service.submit(digits_job(steps=NUM_STEPS, resources=too_little, retry={"budget": 0}))
    job = service.wait_for_end(job_id)
    assert (job["status"], job["reason"]) == ("failed", "retries_exhausted"), job
    assert job["failure"]["error_type"] == "OutOfMemory"
    expected = rf"Rank {job['failure']['rank']} used \d\.\d+ GiB of the 0\.06 GiB it may have \(resources\."
    assert re.match(expected, job["failure"]["message"]), job
    (attempt,) = service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
    assert attempt["reason"] == "out_of_memory"


def test_the_kernel_would_end_training_first(service: EmbeddedServiceProcess) -> None:
    job_id = service.submit(digits_job(steps=2000))
    service.wait_for_step(job_id, 1)
    training_pids = set(service.training_pids(job_id))
    marks = {
        process.pid: int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in service.processes()
    }
    service.http.post(f"/v1/jobs/{job_id}/cancel")
    service.wait_for_end(job_id)
    assert {marks[pid] for pid in training_pids} == {1000}
    others = {}
    for pid, mark in marks.items():
        with suppress(psutil.NoSuchProcess):  # ended with the job, reaped or not yet
            others[psutil.Process(pid).cmdline()[0]] = mark
    assert max(others.values()) < 1000, others
