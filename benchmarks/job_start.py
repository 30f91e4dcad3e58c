"""How long from submitting a job to its first training step, and from a rank's death to the next one.

    pip install --no-deps --target /tmp/ray-train pandas python-dateutil six  # what Ray Train needs beside our own
    python -m benchmarks.job_start --ray-train-packages /tmp/ray-train

Starts an embedded service of its own and measures, on jobs of two ranks on the built-in digits:

- submit: from sending the request until the job's `running` record, when all ranks have joined the process group and
  taken a step; on the idle service, with a pause after each job, and one job right after another;
- restart: from `kill -9` of a rank's training process until the `running` record of the next attempt. Each job is
  killed once, when it has trained for three seconds, and writes a checkpoint every 20 steps.

Ray Train runs in between, in a Ray of its own that is up and at rest: from `TorchTrainer.fit()` to the first step of
the slowest rank, and from the kill of a worker to the first step of the slowest rank of the next attempt. Model, data,
layers, batch and optimizer are the same, its workers have the same threads, and its checkpoints are plain files on a
local disk, which costs it less than `ray.train.report`. Without the packages Ray Train is left out.

Prints a table and writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL
from typing import Any

from benchmarks import results
from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, wait_until

TARGET_P50_S, TARGET_P99_S, TARGET_RESTART_S, TARGET_RATIO = 0.6, 1.5, 3.0, 10.0
# Between the announcement of the service and the first job that counts, for what is started in the background.
SETTLE_S = 5.0
RUN_BEFORE_KILL_S = 3.0
RAY_TRAIN_TIMEOUT_S = 900.0


def start_job(service: EmbeddedServiceProcess, workers: int) -> float:
    """Return the seconds that a job took to its first step."""
    spec = digits_job(workers=workers, steps=3, checkpoint={"every_steps": 1000})
    sent_at = datetime.now(UTC)
    job_id = service.submit(spec)
    service.wait_for_end(job_id)
    # The job's started_at is the time of the record that all ranks have taken a step; both clocks are this machine's.
    return (datetime.fromisoformat(service.job(job_id)["started_at"]) - sent_at).total_seconds()


def restart_job(service: EmbeddedServiceProcess, workers: int) -> float:
    """Return the seconds that a job took from the death of its last rank to the next step of all."""
    job_id = service.submit(digits_job(workers=workers, steps=10**6, checkpoint={"every_steps": 20}))
    service.wait_for_step(job_id, 1)
    time.sleep(RUN_BEFORE_KILL_S)
    pid = service.training_pids(job_id)[-1]
    killed_at = datetime.now(UTC)
    os.kill(pid, SIGKILL)
    wait_until(lambda: bool(_running(service, job_id, attempt=2)), 60, lambda: str(service.job(job_id)))
    time_s = (datetime.fromisoformat(_running(service, job_id, attempt=2)[0]["time"]) - killed_at).total_seconds()
    service.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    service.wait_for_end(job_id)
    return time_s


def _running(service: EmbeddedServiceProcess, job_id: str, *, attempt: int) -> list[Any]:
    return [
        event
        for event in service.events(job_id, "status")
        if event["attempt"] == attempt and event["data"].get("to") == "running"
    ]


def ray_train(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Measure Ray Train; None without its packages."""
    if arguments.ray_train_packages is None or not arguments.ray_train_starts:
        return None
    command = [sys.executable, "-m", "benchmarks.ray_train_job", "--workers", str(arguments.workers)]
    command += ["--starts", str(arguments.ray_train_starts), "--kills", str(arguments.ray_train_kills)]
    command += ["--pause-s", str(arguments.pause_s), "--spec", json.dumps(digits_job(workers=arguments.workers))]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", "."), str(arguments.ray_train_packages)])
    environment = os.environ | {"PYTHONPATH": path, "RAY_TRAIN_V2_ENABLED": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=RAY_TRAIN_TIMEOUT_S, check=True)
    measured: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return measured


def percentile(times_s: Sequence[float], percent: int) -> float:
    if percent == 100 or len(times_s) == 1:
        return max(times_s)
    return statistics.quantiles(times_s, n=100, method="inclusive")[percent - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50, help="with a pause after each; as many follow without one")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause-s", type=float, default=1.0)
    parser.add_argument("--ray-train-packages", type=Path, help="a directory with pandas")
    parser.add_argument("--ray-train-starts", type=int, default=6)
    parser.add_argument("--ray-train-kills", type=int, default=10)
    arguments = parser.parse_args()
    idle: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        service = EmbeddedServiceProcess(Path(directory) / "data")
        serve_s = time.monotonic() - started
        try:
            first_s = start_job(service, arguments.workers)
            time.sleep(SETTLE_S)
            for number in range(arguments.jobs):
                if number == arguments.jobs // 2:
                    peer = ray_train(arguments)
                idle.append(start_job(service, arguments.workers))
                time.sleep(arguments.pause_s)
            in_a_row = [start_job(service, arguments.workers) for _ in range(arguments.jobs)]
            restarts = [restart_job(service, arguments.workers) for _ in range(arguments.kills)]
        finally:
            service.stop()
    report(arguments, serve_s, first_s, idle, in_a_row, restarts, peer)


def report(
    arguments: argparse.Namespace,
    serve_s: float,
    first_s: float,
    idle: list[float],
    in_a_row: list[float],
    restarts: list[float],
    peer: dict[str, Any] | None,
) -> None:
    peer = peer or {"starts_s": [], "restarts_s": []}
    figures = [
        ["service ready", f"{serve_s:.2f} s", "", ""],
        ["submit of the first job at once → first step of all ranks", f"{first_s:.2f} s", "", ""],
        _row(f"submit → first step, idle, p50 (target ≤ {TARGET_P50_S:g} s)", idle, peer["starts_s"], 50),
        _row(f"submit → first step, idle, p99 (target ≤ {TARGET_P99_S:g} s)", idle, peer["starts_s"], 99),
        _row("submit → first step, one right after another, p50", in_a_row, [], 50),
        _row("submit → first step, one right after another, p99", in_a_row, [], 99),
        _row(f"kill -9 → next step, p50 (target ≤ {TARGET_RESTART_S:g} s)", restarts, peer["restarts_s"], 50),
        _row("kill -9 → next step, longest", restarts, peer["restarts_s"], 100),
    ]
    text = results.table([f"{arguments.workers} ranks, digits", "syncbn", "Ray Train", "ratio"], figures)
    if peer["starts_s"]:
        counts = f"{len(peer['starts_s'])} runs and {len(peer['restarts_s'])} kills"
        text += f"\n\nOf syncbn {len(idle)} jobs, as many in a row, and {len(restarts)} kills; of Ray Train {counts}."
    else:
        text += "\n\nRay Train was left out: see benchmarks/job_start.py for the packages that it needs."
    seconds = {"serve_ready": serve_s, "first": first_s, "idle": idle, "in_a_row": in_a_row, "restarts": restarts}
    configuration = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    results.record("job_start", {"configuration": configuration, "seconds": seconds, "ray_train_seconds": peer}, text)


def _row(title: str, ours: list[float], theirs: list[float], percent: int) -> list[str]:
    if not ours:
        return [title, "", "", ""]
    own = percentile(ours, percent)
    if not theirs:
        return [title, f"{own:.2f} s", "", ""]
    other = percentile(theirs, percent)
    return [title, f"{own:.2f} s", f"{other:.2f} s", f"{other / own:.1f}"]


if __name__ == "__main__":
    main()
