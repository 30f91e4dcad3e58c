"""API and schedulers as real processes without Ray, on a database that a test disturbs; started, killed and judged."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.domain.job import Job, JobStatus
from service.domain.ports import LeaseState
from service.scheduler.crash_points import CrashPoint
from service.store import SqlStore, migrate
from tests.light_cluster import LightCluster

ROOT = Path(__file__).parents[1]
TOKEN = "token-of-the-control-plane"
START_TIMEOUT_S = 30.0
# Of the leases in tests that wait for a takeover; long enough for a busy machine to renew in time.
TTL_S = 1.0
# What a takeover may take beyond the lease's life.
TAKEOVER_S = 5.0


def wait_until(condition: Callable[[], Any], timeout_s: float, describe: Callable[[], str]) -> float:
    """Return how long it took a condition to hold; fail if it does not within the time."""
    started_at = time.monotonic()
    while not condition():
        assert time.monotonic() < started_at + timeout_s, describe()
        time.sleep(0.01)
    return time.monotonic() - started_at


class ControlPlane:
    """A database, run storage, and the processes on them.

    Args:
        directory: for everything but, perhaps, the database.
        database_url: by default an SQLite file in the directory.
    """

    def __init__(self, directory: Path, database_url: str | None = None) -> None:
        self.directory = directory
        self.storage_dir = directory / "runs"
        self.database_url = database_url or f"sqlite:///{directory / 'service.sqlite'}"
        self._crash_file = directory / "crash_at"
        self._processes: list[subprocess.Popen[bytes]] = []
        migrate(self.database_url)
        self.store = SqlStore(self.database_url)
        self.cluster = LightCluster(self.storage_dir)
        # Held here, as `syncbn serve` holds it: requests that come while the API restarts wait in its backlog.
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """End every process."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
        self.store.close()
        self._listener.close()

    def pids(self) -> list[int]:
        """Of every process that was started, in order."""
        return [process.pid for process in self._processes]

    def client(self, timeout_s: float = 30.0) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        # Loading certificates, which nothing here uses, takes longer than a request.
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, verify=False)

    def start_api(self) -> subprocess.Popen[bytes]:
        """Start an API process; it need not answer yet."""
        descriptor = self._listener.fileno()
        command = ["-m", "service", "api", "--listen-fd", str(descriptor), "--parent-pid", str(os.getpid())]
        return self._start("api", command, {"SYNCBN_TOKEN": TOKEN}, pass_fds=[descriptor])

    def wait_for_api(self) -> float:
        """Wait until the API answers with the database behind it; how long that took."""

        def is_ready() -> bool:
            try:
                return httpx.get(f"{self.url}/readyz", timeout=1.0).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

        return wait_until(is_ready, START_TIMEOUT_S, lambda: f"the API is not ready:\n{self.log('api')}")

    def start_scheduler(
        self, name: str = "scheduler", *, ttl_s: float = TTL_S, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a scheduler on the light cluster."""
        command = ["-m", "tests.light_cluster", "--parent-pid", str(os.getpid())]
        own = {"SYNCBN_LEASE_TTL_S": str(ttl_s), "SYNCBN_CRASH_AT": str(self._crash_file)}
        return self._start(name, command, {**own, **(environment or {})})

    def arm(self, point: CrashPoint, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Have the scheduler that comes to a point next end or stop there."""
        partial = self._crash_file.with_suffix(".partial")
        partial.write_text(f"{point} {signal_number.name}")
        partial.replace(self._crash_file)

    def is_armed(self) -> bool:
        return self._crash_file.exists()

    def jobs_by_name(self) -> dict[str, list[str]]:
        """The ids of all jobs."""
        ids: dict[str, list[str]] = {}
        page = self.store.list_jobs(limit=500)
        while True:
            for job in page.jobs:
                ids.setdefault(job.spec.name, []).append(job.id)
            if page.next_cursor is None:
                return ids
            page = self.store.list_jobs(limit=500, cursor=page.next_cursor)

    def lease(self) -> LeaseState:
        return self.store.read_lease()

    def wait_for_leader(self, process: subprocess.Popen[bytes], timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until a process leads; how long that took."""
        return wait_until(
            lambda: f"/{process.pid}/" in (self.lease().holder or ""),
            timeout_s,
            lambda: f"{process.pid} does not lead: {self.lease()}\n{self.logs()}",
        )

    def wait_for_end(self, job_id: str, timeout_s: float = 30.0) -> Job:
        wait_until(
            lambda: self.store.get(job_id).status.is_terminal,
            timeout_s,
            lambda: f"{self.store.get(job_id)}\n{self.logs()}",
        )
        return self.store.get(job_id)

    def check_ran_once(self, job_id: str, *, num_steps: int) -> None:
        """Prove that a job has succeeded by one attempt, began once, and shows each of its steps once."""
        job = self.store.get(job_id)
        assert job.status is JobStatus.SUCCEEDED, f"{job}\n{self.logs()}"
        (attempt,) = self.store.attempts(job_id)
        assert attempt.number == 1
        assert [line for line in self.cluster.runs() if line.startswith(job_id)] == [f"{job_id}.1 alone"]
        points = self.store.metrics(job_id)
        assert [point.step for point in points] == list(range(1, num_steps + 1)), "each step is shown once"
        assert [one.step for one in self.store.checkpoints(job_id)] == [num_steps]
        positions = [event.position for event in self.store.events(job_id)]
        assert positions == sorted(set(positions))

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{self.log(path.stem)}" for path in sorted(self.directory.glob("*.log")))

    def _start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        own = {
            "PYTHONPATH": str(ROOT),
            "SYNCBN_DATA_DIR": str(self.directory),
            "SYNCBN_DATABASE_URL": self.database_url,
            "SYNCBN_STORAGE_URL": str(self.storage_dir),
        }
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                cwd=ROOT,
            )
        self._processes.append(process)
        return process


@contextmanager
def control_plane(directory: Path, database_url: str | None = None) -> Iterator[ControlPlane]:
    """A control plane that leaves no process behind."""
    directory.mkdir(exist_ok=True)
    plane = ControlPlane(directory, database_url)
    try:
        yield plane
    finally:
        plane.close()


def job_document(name: str = "light", *, num_steps: int = 5, **changes: Any) -> dict[str, Any]:
    """A job as a client sends it."""
    return {
        "name": name,
        "model": {"factory": "builtin:mlp"},
        "dataset": {"factory": "builtin:digits"},
        "batch": {"size": 16},
        "steps": num_steps,
        **changes,
    }


class Submitters:
    """Clients that submit jobs under idempotency keys, each until it is answered with the job.

    Args:
        plane: where to.
        count: how many jobs.
        num_clients: how many at once.
    """

    def __init__(self, plane: ControlPlane, count: int, num_clients: int = 8) -> None:
        self._plane = plane
        self._prefix = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._numbers = iter(range(count))
        self._count = count
        self._pool = ThreadPoolExecutor(num_clients)
        self._deadline = time.monotonic() + 120.0
        self.acknowledged: dict[str, str] = {}  # id by name
        self.answered_at: list[float] = []
        self.refusals: Counter[int] = Counter()
        self.broken = 0
        self._futures = [self._pool.submit(self._run) for _ in range(num_clients)]

    def wait(self) -> None:
        """Return when every job was acknowledged; raise what went wrong."""
        for future in self._futures:
            future.result(timeout=180)
        self._pool.shutdown()
        assert len(self.acknowledged) == self._count

    def kill_api(self, api: subprocess.Popen[bytes], after: Sequence[int]) -> subprocess.Popen[bytes]:
        """Kill and restart the API each time so many jobs were acknowledged; the one that runs then."""
        for number in after:
            wait_until(
                lambda number=number: len(self.acknowledged) >= number,  # type: ignore[misc]
                60.0,
                lambda: f"{len(self.acknowledged)} acknowledged:\n{self._plane.logs()}",
            )
            api.kill()
            api.wait(10)
            api = self._plane.start_api()
        return api

    def check_all_there_once(self) -> None:
        """Prove that there is one job for each that was acknowledged, and no other."""
        there = {name: ids for name, ids in self._plane.jobs_by_name().items() if name.startswith(self._prefix)}
        lost = self.acknowledged.keys() - there.keys()
        doubled = [name for name, ids in there.items() if len(ids) > 1]
        assert not lost, f"lost: {lost}"
        assert not doubled, f"doubled: {doubled}"
        assert there == {name: [job_id] for name, job_id in self.acknowledged.items()}

    def _run(self) -> None:
        with self._plane.client() as http:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                self._submit(http, f"{self._prefix}-{number}")

    def _submit(self, http: httpx.Client, name: str) -> None:
        while True:
            assert time.monotonic() < self._deadline, f"{name} was never acknowledged:\n{self._plane.logs()}"
            try:
                answer = http.post("/v1/jobs", json=job_document(name), headers={"Idempotency-Key": name})
            except httpx.TransportError:
                with self._lock:
                    self.broken += 1
                time.sleep(0.02)
                continue
            if answer.status_code == httpx.codes.CREATED:
                with self._lock:
                    self.acknowledged[name] = answer.json()["id"]
                    self.answered_at.append(time.monotonic())
                return
            assert answer.status_code in (503, 507), answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            with self._lock:
                self.refusals[answer.status_code] += 1
            time.sleep(0.1)
