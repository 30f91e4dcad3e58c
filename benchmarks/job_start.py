"""How long from submitting a job to its first training step, on the idle embedded service.

    python -m benchmarks.job_start --jobs 20 --workers 2

Starts a service of its own, submits one job after another, and takes the time from sending the request until the
job's `running` record: all ranks have joined the process group and taken a step. The first job is reported apart,
since it may wait for the forkserver to finish importing torch. Prints a table and writes JSON.
"""

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import results
from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job

TARGET_S = 4.0


def measure(service: EmbeddedServiceProcess, workers: int) -> float:
    spec = digits_job(workers=workers, steps=3, checkpoint={"every_steps": 1000})
    sent_at = datetime.now(UTC)
    job_id = service.submit(spec)
    service.wait_for_end(job_id)
    # The job's started_at is taken when the first step of all ranks is recorded; both clocks are this machine's.
    return (datetime.fromisoformat(service.job(job_id)["started_at"]) - sent_at).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        service = EmbeddedServiceProcess(Path(directory) / "data")
        serve_s = time.monotonic() - started
        try:
            first_s = measure(service, arguments.workers)
            times_s = sorted(measure(service, arguments.workers) for _ in range(arguments.jobs))
        finally:
            service.stop()
    p50, p99 = statistics.median(times_s), statistics.quantiles(times_s, n=100, method="inclusive")[98]
    figures = [
        ["service ready", f"{serve_s:.2f} s"],
        ["first job", f"{first_s:.2f} s"],
        [f"p50 of {arguments.jobs}", f"{p50:.2f} s"],
        [f"p99 of {arguments.jobs} (target ≤ {TARGET_S:g} s)", f"{p99:.2f} s"],
    ]
    report = results.table(["submit → first step of all ranks, idle embedded service", "time"], figures)
    seconds = {"serve_ready": serve_s, "first": first_s, "p50": p50, "p99": p99, "all": times_s}
    results.record("job_start", {"configuration": vars(arguments), "seconds": seconds}, report)


if __name__ == "__main__":
    main()
