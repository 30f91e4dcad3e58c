"""What clients see of a control plane while its database is away: every kind of request, again and again."""

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

import httpx

from tests.control_plane import ControlPlane, job_document

RECOVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An answer that is an error."""

    headers: dict[str, str]
    body: str


@dataclass(kw_only=True)
class Seen:
    """The answers to one kind of request.

    Attributes:
        statuses: how many of each.
        longest_s: the longest time that one took.
        problems: an answer of each status that is a problem.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    longest_s: float = 0.0
    problems: dict[int, Problem] = field(default_factory=dict)


@dataclass(kw_only=True)
class Answers:
    """To each kind of request."""

    health: Seen = field(default_factory=Seen)
    reads: Seen = field(default_factory=Seen)
    writes: Seen = field(default_factory=Seen)


class Traffic:
    """Asks for health, reads and writes, each with clients of its own, until it is stopped.

    Args:
        plane: whom.
        num_writers: submit at once, under a key each; one that is refused repeats it.
        num_readers: list jobs.
    """

    def __init__(self, plane: ControlPlane, *, num_writers: int, num_readers: int = 2) -> None:
        self._plane = plane
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._numbers = count()
        self._pool = ThreadPoolExecutor(1 + num_readers + num_writers)
        self._answers = Answers()
        self.acknowledged: dict[str, str] = {}  # id by name
        self.last_created_at = 0.0
        self._futures = [self._pool.submit(self._ask, "health", "/healthz")]
        self._futures += [self._pool.submit(self._ask, "reads", "/v1/jobs?limit=5") for _ in range(num_readers)]
        self._futures += [self._pool.submit(self._write) for _ in range(num_writers)]

    def forget(self) -> None:
        """Begin the statistics anew."""
        with self._lock:
            self._answers = Answers()

    def seen(self) -> "Answers":
        """What was answered since."""
        with self._lock:
            return copy.deepcopy(self._answers)

    def wait_for_write(self, timeout_s: float = RECOVERY_S) -> float:
        """Wait for the next job that is acknowledged; how long it took."""
        began_at = time.monotonic()
        while self.last_created_at <= began_at:
            assert time.monotonic() < began_at + timeout_s, f"no write succeeds:\n{self._plane.logs()}"
            time.sleep(0.01)
        return time.monotonic() - began_at

    def stop(self) -> None:
        """Stop, and raise whatever went wrong in a client."""
        self._stopped.set()
        for future in self._futures:
            future.result(timeout=60)
        self._pool.shutdown()

    def check_nothing_lost(self) -> None:
        """Prove that what was acknowledged is there, once."""
        there = self._plane.jobs_by_name()
        for name, job_id in self.acknowledged.items():
            assert there.get(name) == [job_id], (name, job_id, there.get(name))

    def _ask(self, kind: str, path: str) -> None:
        with self._plane.client() as http:
            while not self._stopped.wait(0.05):
                self._note(kind, lambda: http.get(path))

    def _write(self) -> None:
        with self._plane.client() as http:
            while not self._stopped.is_set():
                name = f"traffic-{next(self._numbers)}"
                answer = None
                while answer is None or answer.status_code != httpx.codes.CREATED:
                    if self._stopped.is_set() and answer is not None:
                        return
                    answer = self._note(
                        "writes",
                        lambda name=name: http.post(
                            "/v1/jobs", json=job_document(name), headers={"Idempotency-Key": name}
                        ),
                    )
                    time.sleep(0.01 if answer.is_success else 0.25)
                with self._lock:
                    self.acknowledged[name] = answer.json()["id"]
                    self.last_created_at = time.monotonic()

    def _note(self, kind: str, ask: Callable[[], httpx.Response]) -> httpx.Response:
        began_at = time.monotonic()
        answer = ask()
        with self._lock:
            seen: Seen = getattr(self._answers, kind)
            seen.statuses[answer.status_code] += 1
            seen.longest_s = max(seen.longest_s, time.monotonic() - began_at)
            if answer.is_error:
                seen.problems[answer.status_code] = Problem(headers=dict(answer.headers), body=answer.text)
        return answer


def check_problem(answer: Problem, status: int, name: str) -> None:
    """Prove that an answer is a problem document that says when to come back."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    problem = json.loads(answer.body)
    assert problem["type"] == f"urn:syncbn:problem:{name}"
    assert problem["status"] == status
    assert problem["detail"]
