"""The jobs of a study: run them through the service, as many at once as there are cores, and read back what came."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from service.client.client import Client
from service.client.discovery import SERVICE_FILE, find_service
from service.domain.job import Job, JobStatus
from service.domain.spec import JobSpec, parse_spec
from service.linux import die_with_parent

READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0
RECONNECT_FOR_S = 120.0
OUTPUT = Path(__file__).parents[2] / "docs" / "studies"
NUM_CORES = os.cpu_count() or 1

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of a job: ``values[i]`` was reported at ``steps[i]``; what is not finite is left out."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The value of the last report."""
        return self.values[-1]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job that has ended, and its curves by name."""

    job: Job
    curves: Mapping[str, Curve]

    @property
    def succeeded(self) -> bool:
        """Whether it came to its end; a study that expects failures asks."""
        return self.job.status is JobStatus.SUCCEEDED


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read the options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="URL of a running service; else one is started for the study")
    parser.add_argument("--token", help="of that service; else SYNCBN_TOKEN, or what ./data has of a service here")
    parser.add_argument("--quick", action="store_true", help="few steps, to try the script; the figures mean nothing")
    parser.add_argument("--output", type=Path, help=f"folder for JSON and plot; by default {OUTPUT}, --quick: none")
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.quick:
        arguments.output = OUTPUT
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


@contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[Client]:
    """Yield a client of the service that was named, or of one with an empty data directory that ends with the study."""
    if arguments.server is not None:
        endpoint = find_service(data_dir=Path("data"), url=arguments.server, token=arguments.token)
        with Client(endpoint.url, endpoint.token, reconnect_for_s=RECONNECT_FOR_S) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="syncbn-study-") as folder, _serving(Path(folder) / "data") as data_dir:
        endpoint = find_service(data_dir=data_dir, environment={})
        with Client(endpoint.url, endpoint.token, reconnect_for_s=RECONNECT_FOR_S) as client:
            yield client


@contextmanager
def _serving(data_dir: Path) -> Iterator[Path]:
    data_dir.mkdir()
    log_path = data_dir / "serve.log"
    command = [sys.executable, "-m", "service.cli.main", "serve", "--data-dir", str(data_dir), "--gpus", "0"]
    with log_path.open("wb") as log:
        serve = subprocess.Popen(
            [*command, "--cpus", str(NUM_CORES)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Ctrl-C is the study's to handle, and the service does not outlive it.
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGTERM),
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (data_dir / SERVICE_FILE).exists():
            if serve.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"The service did not start:\n{log_path.read_text(errors='replace')}")
            time.sleep(0.1)
        yield data_dir
    finally:
        serve.send_signal(signal.SIGTERM)
        serve.wait(STOP_TIMEOUT_S)


def job(*, workers: int = 1, **fields: Any) -> JobSpec:  # noqa: ANN401 - the fields of a job
    """Return a job of a study: it shares the cores with others, and keeps its last checkpoint only."""
    shared: dict[str, Any] = {
        "workers": workers,
        # A job's ranks never ask for more than the machine has; what does not fit beside others waits in the queue.
        "resources": {"cpus_per_rank": min(1.0, NUM_CORES / workers)},
        "checkpoint": {"every_steps": 10**9, "keep_last": 1},
        "diagnostics": {"norm": False},
        "labels": {"purpose": "study"},
    }
    return parse_spec(shared | fields)


def given(specs: Mapping[str, JobSpec]) -> dict[str, Any]:
    """Return the fields of jobs that are not at their defaults, for a study's JSON."""
    return {name: spec.model_dump(mode="json", exclude_unset=True) for name, spec in specs.items()}


def run_jobs(
    client: Client, specs: Mapping[Key, JobSpec], *, metrics: Sequence[str], may_fail: bool = False
) -> dict[Key, Run]:
    """Submit jobs, wait until all have ended, and read their curves.

    Args:
        client: of the service, whose queue starts as many at once as it has room for.
        specs: the jobs, by whatever the study tells them apart by.
        metrics: names of the curves to read; those that a job does not have are left out.
        may_fail: whether a job that ends because its loss is not finite is a result; any other failure ends the study.
    """
    jobs = {key: client.submit(spec) for key, spec in specs.items()}
    runs = {}
    started = time.monotonic()
    for number, (key, submitted) in enumerate(jobs.items(), 1):
        ended = client.wait(submitted.id)
        diverged = ended.failure is not None and ended.failure.error_type == "NotFinite"
        if ended.status is not JobStatus.SUCCEEDED and not (may_fail and diverged):
            sys.exit(f"{ended.spec.name} ({key}): {ended.status}. {ended.message}")
        series = client.metrics(ended.id, names=metrics)
        curves = {}
        for name, one in series.items():
            finite = [(step, value) for step, value in zip(one.steps, one.values, strict=True) if value is not None]
            if finite:
                steps, values = zip(*finite, strict=True)
                curves[name] = Curve(steps=steps, values=values)
        runs[key] = Run(job=ended, curves=curves)
        _progress(f"{number} of {len(jobs)} jobs, {time.monotonic() - started:.0f} s")
    _progress("")
    return runs


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
