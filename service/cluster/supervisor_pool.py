"""The supervisors of a scheduler that wait for an attempt."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from service.cluster.names import NAMESPACE, new_supervisor_name
from service.cluster.supervisor_actor import RELEASE_TIMEOUT_S, SUPERVISOR_OPTIONS, Release, SupervisorActor

# After an attempt was launched, how long the machine is left to it before another supervisor is warmed up.
REFILL_AFTER_S = 1.0
# How long more of them than are to wait may wait for other attempts.
SURPLUS_S = 10.0
# How long one that was told to leave its attempt usually takes, at most; starting another takes much longer.
RETURN_S = 0.1
# One that takes much longer than it says to leave an attempt has hung.
PATIENCE_S = RELEASE_TIMEOUT_S + 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NamedSupervisor:
    """A supervisor's actor.

    Attributes:
        name: of the actor.
        actor: its handle.
    """

    name: str
    actor: Any


@dataclass(kw_only=True)
class _Waiting:
    """One without an attempt, since when, and a reference that fails when it dies."""

    supervisor: NamedSupervisor
    death: Any
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, supervisor: NamedSupervisor) -> "_Waiting":
        return cls(supervisor=supervisor, death=supervisor.actor.until_dead.remote())


@dataclass(frozen=True, kw_only=True)
class _Returning:
    """One that is asked to leave its attempt."""

    supervisor: NamedSupervisor
    answer: Any
    asked_at: float = field(default_factory=time.monotonic)


class SupervisorPool:
    """Used by one thread.

    The one that came back last is taken first, so that under any traffic those that are too many are left over.

    Args:
        size: how many are to wait.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: list[_Waiting] = []
        self._returning: list[_Returning] = []
        # Those of an earlier scheduler may be of an earlier version of the service; none of them gets an attempt.
        self._own: set[str] = set()
        self._changed_at = time.monotonic() - REFILL_AFTER_S

    @property
    def names(self) -> frozenset[str]:
        """Names of those that wait, or will soon."""
        return frozenset(supervisor.name for supervisor in self._all())

    def take(self) -> NamedSupervisor:
        """Return one that waits, or is just coming back, or else start one."""
        if not self._waiting and self._returning:
            patience_s = self._returning[-1].asked_at + RETURN_S - time.monotonic()
            ray.wait([entry.answer for entry in self._returning], timeout=max(0.0, patience_s))
        self._settle()
        self._changed_at = time.monotonic()
        return self._waiting.pop().supervisor if self._waiting else self._start()

    def give_back(self, supervisor: NamedSupervisor, job_id: str, attempt: int) -> None:
        """Take one back once it has left an attempt; if it cannot, it ends."""
        if supervisor.name in self.names:
            return  # it is here already: counted twice, it would be given away twice
        self._changed_at = time.monotonic()
        answer = supervisor.actor.release.remote(job_id, attempt)
        self._returning.append(_Returning(supervisor=supervisor, answer=answer))

    def keep_up(self) -> None:
        """Start one more, or end those that are too many; call it about once a second."""
        self._settle()
        unchanged_s = time.monotonic() - self._changed_at
        if len(self._waiting) + len(self._returning) < self._size and unchanged_s > REFILL_AFTER_S:
            self._waiting.insert(0, _Waiting.of(self._start()))  # not ready yet
        while len(self._waiting) > self._size and time.monotonic() - self._waiting[0].since > SURPLUS_S:
            self._end(self._waiting.pop(0).supervisor)

    def close(self) -> None:
        """End those that wait."""
        for supervisor in self._all():
            self._end(supervisor)
        self._waiting, self._returning = [], []

    def _all(self) -> list[NamedSupervisor]:
        return [entry.supervisor for entry in self._waiting] + [entry.supervisor for entry in self._returning]

    def _settle(self) -> None:
        """See who has come back, and who has died."""
        waiting, self._waiting = self._waiting, []
        for waits in waiting:
            if ray.wait([waits.death], timeout=0)[0]:
                self._end(waits.supervisor)  # dead already, or out of reach
            else:
                self._waiting.append(waits)
        returning, self._returning = self._returning, []
        for entry in returning:
            if ray.wait([entry.answer], timeout=0)[0]:
                state = _state(entry.answer)
                if state is Release.FREE and entry.supervisor.name in self._own:
                    self._waiting.append(_Waiting.of(entry.supervisor))
                elif state is not Release.ELSEWHERE:
                    self._end(entry.supervisor)
            elif time.monotonic() - entry.asked_at > PATIENCE_S:
                logger.warning("A supervisor does not leave its attempt and is ended")
                self._end(entry.supervisor)
            else:
                self._returning.append(entry)

    def _start(self) -> NamedSupervisor:
        name = new_supervisor_name()
        self._own.add(name)
        supervisor: Any = ray.remote(SupervisorActor).options(name=name, namespace=NAMESPACE, **SUPERVISOR_OPTIONS)
        return NamedSupervisor(name=name, actor=supervisor.remote(name))

    def _end(self, supervisor: NamedSupervisor) -> None:
        self._own.discard(supervisor.name)
        ray.kill(supervisor.actor)


def _state(answer: Any) -> Release:  # noqa: ANN401 - Ray's references are untyped
    try:
        return Release(ray.get(answer))
    except RayError:
        return Release.SPENT
