"""Schedulers that die at every named point in the life of a job that trains on real ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from service.scheduler.crash_points import CrashPoint
from service.store import SqlStore
from tests.acceptance.embedded_service import EmbeddedServiceProcess, digits_job, is_alive, wait_until
from tests.control_plane import TAKEOVER_S

TTL_S = 1.0
NUM_STEPS = 60
# Beside the one that the service itself keeps running: one for each death, since a new one takes seconds to join Ray.
NUM_OTHERS = len(CrashPoint)


class CrashingSchedulers:
    """An embedded service with schedulers beside its own, on the same database and the same Ray.

    Args:
        data_dir: of the service.
    """

    def __init__(self, data_dir: Path) -> None:
        self._crash_file = data_dir.with_name("crash_at")
        environment = {"SYNCBN_CRASH_AT": str(self._crash_file), "SYNCBN_LEASE_TTL_S": str(TTL_S)}
        self.service = EmbeddedServiceProcess(data_dir, environment=environment)
        self._store = SqlStore(f"sqlite:///{data_dir / 'service.sqlite'}")
        self._environment = psutil.Process(self.service.child_pid("scheduler")).environ()
        self._logs = data_dir / "logs"
        self._others: list[subprocess.Popen[bytes]] = []
        self.takeovers_s: list[float] = []

    def close(self) -> None:
        """End the schedulers, then the service."""
        for process in self._others:
            process.kill()
            process.wait(10)
        self._store.close()
        self.service.stop()

    def run_job(self) -> None:
        """Have a leader die at each point of one job's life, and prove that it is trained once and to its end."""
        self._line_up()
        points = list(CrashPoint)
        self._arm(points[0])
        job_id = self.service.submit(digits_job(steps=NUM_STEPS))
        for following in (*points[1:], None):
            self._crash(following)
        job = self.service.wait_for_end(job_id)
        assert job["status"] == "succeeded", f"{job}\n{self.service.all_logs()}"
        (attempt,) = self.service.get(f"/v1/jobs/{job_id}/attempts")["attempts"]
        assert attempt["number"] == 1
        assert len(self.service.events(job_id, "launched")) == 1
        assert len(self.service.events(job_id, "placed")) == 1
        assert self.service.series(job_id, "train/loss")["steps"] == list(range(1, NUM_STEPS + 1))
        wait_until(
            lambda: not any(map(is_alive, [*self.service.training_pids(job_id), self.service.supervisor_pid(job_id)])),
            20.0,
            lambda: f"a supervisor or a rank outlives its job:\n{self.service.all_logs()}",
        )

    def _crash(self, following: CrashPoint | None) -> None:
        """Wait for a leader's death at the point that was armed last, and for another one to lead."""
        wait_until(lambda: not self._crash_file.exists(), 40.0, lambda: f"not reached:\n{self.service.all_logs()}")
        epoch, killed_at = self._store.read_lease().epoch, time.monotonic()
        if following is not None:
            self._arm(following)
        wait_until(
            lambda: self._store.read_lease().epoch > epoch,
            TTL_S + TAKEOVER_S,
            lambda: f"nobody takes over:\n{self.service.all_logs()}",
        )
        self.takeovers_s.append(time.monotonic() - killed_at)

    def _line_up(self) -> None:
        """Start a scheduler for each that has died, and wait until all stand by."""
        for process in [process for process in self._others if process.poll() is not None]:
            assert process.returncode == -signal.SIGKILL, self.service.all_logs()
            self._others.remove(process)
        self._others += [self._start() for _ in range(NUM_OTHERS - len(self._others))]
        wait_until(
            lambda: all("Standing by" in self._log(process.pid).read_text() for process in self._others),
            90.0,
            lambda: f"not all of them stand by:\n{self.service.all_logs()}",
        )

    def _arm(self, point: CrashPoint) -> None:
        partial = self._crash_file.with_suffix(".partial")
        partial.write_text(f"{point} SIGKILL")
        partial.replace(self._crash_file)

    def _start(self) -> subprocess.Popen[bytes]:
        beginning = self._logs / "starting.log"
        with beginning.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "service", "scheduler", "--parent-pid", str(os.getpid())],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        beginning.rename(self._log(process.pid))
        return process

    def _log(self, pid: int) -> Path:
        return self._logs / f"scheduler-{pid}.log"
