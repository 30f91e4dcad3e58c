"""`syncbn serve` as a real process, and what a test needs to know of its processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0
# Inherited by every descendant, Ray's and ours; for training processes the service is told to pass it on.
MARKER = "TEST_SERVICE_MARKER"


class ServiceUnderTest:
    """A service that runs, through its API and its files.

    Args:
        data_dir: with its run storage and the output of its processes.
        marker: in the environment of all its processes.
    """

    def __init__(self, data_dir: Path, marker: str) -> None:
        self.data_dir = data_dir
        self.marker = marker

    def connect(self, url: str, token: str) -> None:
        """Talk to its API from now on."""
        self.url = url
        self.token = token
        self.http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=10.0,
            transport=httpx.HTTPTransport(retries=5),
        )

    def all_logs(self) -> str:
        paths = [*self.data_dir.parent.glob(f"{self.data_dir.name}.out"), *sorted(self.data_dir.glob("logs/*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in paths)

    def get(self, path: str) -> Any:
        """GET with patience for an API that is being restarted."""
        deadline = time.monotonic() + 20
        while True:
            try:
                response = self.http.get(path)
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
                continue
            response.raise_for_status()
            return response.json()

    def submit(self, spec: dict[str, Any]) -> str:
        response = self.http.post("/v1/jobs", json=spec)
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def job(self, job_id: str) -> Any:
        return self.get(f"/v1/jobs/{job_id}")

    def wait_for_step(self, job_id: str, step: int, timeout_s: float = 60.0) -> None:
        wait_until(
            lambda: self.job(job_id)["step"] >= step,
            timeout_s,
            lambda: f"step {step} not reached: {self.job(job_id)}\n{self.all_logs()}",
        )

    def wait_for_end(self, job_id: str, timeout_s: float = 90.0) -> Any:
        wait_until(
            lambda: self.job(job_id)["status"] in ("succeeded", "failed", "cancelled"),
            timeout_s,
            lambda: f"not ended: {self.job(job_id)}\n{self.all_logs()}",
        )
        return self.job(job_id)

    def series(self, job_id: str, name: str) -> dict[str, list[Any]]:
        series: dict[str, list[Any]] = self.get(f"/v1/jobs/{job_id}/metrics")["series"][name]
        return series

    def events(self, job_id: str, kind: str) -> list[Any]:
        page = self.get(f"/v1/jobs/{job_id}/events")
        return [event for event in page["events"] if event["kind"] == kind]

    def training_pids(self, job_id: str, attempt: int = 1) -> list[int]:
        placed = [event for event in self.events(job_id, "placed") if event["attempt"] == attempt]
        return list(placed[0]["data"]["pids"])

    def supervisor_pid(self, job_id: str, attempt: int = 1) -> int:
        launched = [event for event in self.events(job_id, "launched") if event["attempt"] == attempt]
        return int(launched[0]["data"]["supervisor_pid"])

    def rank_actor_pid(self, job_id: str) -> int:
        """One of those that hold the job's directory on this node; others wait for a job."""
        holds = f"/node/.*/{job_id}/[0-9]+/rank-[0-9]+$"
        return min(process.pid for process in self.processes() if _has_open(process.pid, holds))

    def checkpoint_file(self, job_id: str, step: int, name: str) -> Path:
        checkpoints = self.get(f"/v1/jobs/{job_id}/checkpoints")["checkpoints"]
        path = next(entry["path"] for entry in checkpoints if entry["step"] == step)
        return self.data_dir / "runs" / path / name

    def processes(self) -> list[psutil.Process]:
        """Every process that inherited this service's environment, wherever it hangs in the tree."""
        return marked_processes(self.marker)


class EmbeddedServiceProcess(ServiceUnderTest):
    """One `syncbn serve`, with a data directory of its own.

    Args:
        data_dir: kept between two of them to test a restart.
        environment: added to this process's own.
    """

    def __init__(self, data_dir: Path, *, num_cpus: int = 8, environment: dict[str, str] | None = None) -> None:
        super().__init__(data_dir, uuid.uuid4().hex)
        self.output = data_dir.with_name(data_dir.name + ".out")
        command = [sys.executable, "-m", "service.cli.main", "serve"]
        command += ["--data-dir", str(data_dir), "--cpus", str(num_cpus), "--gpus", "0"]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=os.environ | {MARKER: self.marker, "SYNCBN_PASS_ENVIRONMENT": MARKER} | (environment or {}),
                start_new_session=True,
            )
        wait_until(self._is_ready, READY_TIMEOUT_S, lambda: f"not ready:\n{self.all_logs()}")
        url = json.loads((data_dir / "service.json").read_text())["url"]
        self.connect(url, (data_dir / "token").read_text().strip())

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}:\n{self.all_logs()}"
        try:
            # One that was killed leaves its file behind.
            return bool(json.loads((self.data_dir / "service.json").read_text())["pid"] == self.process.pid)
        except FileNotFoundError:
            return False

    def child_pid(self, role: str) -> int:
        """The process id of the `api` or the `scheduler`."""
        for child in psutil.Process(self.process.pid).children():
            if child.cmdline()[1:4] == ["-m", "service", role]:
                return child.pid
        raise AssertionError(f"no {role} process")

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        status = self.process.wait(STOP_TIMEOUT_S)
        if status == 0:
            session = Path((self.data_dir / "ray-session").read_text())
            assert not session.exists(), f"Ray's session is left in {session}"
        wait_until(lambda: not self.processes(), 10, lambda: f"left behind: {self.processes()}")
        return status


def _has_open(pid: int, pattern: str) -> bool:
    paths = []
    with suppress(FileNotFoundError):  # it has ended, or closed one
        paths = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    return any(re.search(pattern, path) for path in paths)


def marked_processes(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float, describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def digits_job(**changes: Any) -> dict[str, Any]:
    """A small, exact job on the real digits; float64, so that whole runs can be compared."""
    job: dict[str, Any] = {
        "name": "acceptance",
        "model": {"factory": "builtin:small-resnet", "args": {"width": 4}},
        "dataset": {"factory": "builtin:digits"},
        "batch": {"size": 16},
        "workers": 2,
        "steps": 50,
        "optimizer": {"name": "sgd", "learning_rate": 0.05},
        "precision": "float64",
        "checkpoint": {"every_steps": 10},
    }
    return job | changes
