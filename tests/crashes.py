"""Schedulers that die at named points of a job's life, one after another; the next one takes over."""

import signal
import subprocess
import time

from service.scheduler.crash_points import CrashPoint
from tests.control_plane import TAKEOVER_S, TTL_S, ControlPlane, wait_until

NUM_STEPS = 5


class Succession:
    """A leading scheduler and the next one.

    Args:
        plane: theirs.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._num_started = 0
        self.leader = self._start()
        plane.wait_for_leader(self.leader)
        self.next = self._start()
        self.takeovers_s: list[float] = []

    def crash_at(self, *points: CrashPoint) -> None:
        """Have one leader after another die when it gets to its point; the job that brings it there is submitted."""
        for point, following in zip(points, (*points[1:], None), strict=True):
            self._crash_at(point, following)

    def _crash_at(self, point: CrashPoint, following: CrashPoint | None) -> None:
        plane = self._plane
        self._wait_for_crash(point)
        killed_at = time.monotonic()
        if following is not None:  # before the next one leads, and may come to it at once
            plane.arm(following)
        limit_s = TTL_S + TAKEOVER_S
        plane.wait_for_leader(self.next, limit_s)
        self.takeovers_s.append(time.monotonic() - killed_at)
        self.leader, self.next = self.next, self._start()

    def _wait_for_crash(self, point: CrashPoint) -> None:
        plane, leader = self._plane, self.leader
        wait_until(lambda: leader.poll() is not None, 30.0, lambda: f"{point} was not reached:\n{plane.logs()}")
        assert leader.returncode == -signal.SIGKILL, plane.logs()

    def describe(self) -> str:
        """How many takeovers there were, and how long they took."""
        times = sorted(self.takeovers_s)
        return f"{len(times)} takeovers, median {times[len(times) // 2]:.1f} s, longest {times[-1]:.1f} s"

    def _start(self) -> subprocess.Popen[bytes]:
        self._num_started += 1
        return self._plane.start_scheduler(f"scheduler-{self._num_started}")
