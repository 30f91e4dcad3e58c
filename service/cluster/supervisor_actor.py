"""The detached actor in which supervisors live: it waits, warm, for an attempt, and then for the next."""

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from service.cluster.supervisor import Supervisor
from service.domain.job import Reason
from service.domain.journal import CheckpointWritten, JournalRecord, Metrics, Warned
from service.domain.ports import Launch
from service.domain.rank_protocol import Stepped

# How long what an attempt that has ended still writes may take.
RELEASE_TIMEOUT_S = 5.0
# Whatever a long life gathers in a process goes with it.
MAX_ATTEMPTS = 200
# Every rank of an attempt may report at once, and every node waits for its end.
SUPERVISOR_OPTIONS: dict[str, Any] = {
    "lifetime": "detached",
    "num_cpus": 0,
    "max_restarts": 0,
    "max_concurrency": 10_000,
}


class Release(StrEnum):
    """What has become of a supervisor that was told to leave an attempt."""

    FREE = "free"
    ELSEWHERE = "elsewhere"  # it has another attempt
    SPENT = "spent"  # something is left of the attempt, or it has had enough of them


class SupervisorActor:
    """Supervises one attempt at a time. Whatever it is asked names the attempt that is meant.

    Args:
        name: of this actor.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._attempt: tuple[str, int] | None = None
        self._supervisor: Supervisor | None = None
        self._run: asyncio.Task[bool] | None = None
        self._num_attempts = 0

    async def assign(self, launch: Launch) -> None:
        """Run an attempt, unless another supervisor has it; asking again has no second effect."""
        if self._supervisor is not None:
            return
        self._attempt = (launch.job_id, launch.attempt)
        self._supervisor = Supervisor(launch, self._name)
        self._run = asyncio.create_task(self._supervisor.run())
        self._num_attempts += 1
        if not await self._run:
            self._supervisor = self._attempt = None

    async def read(self, job_id: str, attempt: int, after: int, wait_s: float) -> Sequence[JournalRecord] | None:
        """Return an attempt's records after a sequence number; waits for some. None: it is not supervised here."""
        supervisor = self._of(job_id, attempt)
        return None if supervisor is None else await supervisor.read(after, wait_s)

    async def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        """Ask an attempt for a checkpoint and an end."""
        if supervisor := self._of(job_id, attempt):
            await supervisor.stop(reason)

    async def report(
        self, job_id: str, attempt: int, rank: int, reports: Sequence[Stepped | Metrics | Warned | CheckpointWritten]
    ) -> None:
        """Take what a rank reports."""
        if supervisor := self._of(job_id, attempt):
            await supervisor.report(rank, reports)

    async def until_over(self, job_id: str, attempt: int) -> None:
        """Return once an attempt has given its ranks back; whoever has asked also learns of this actor's death."""
        if supervisor := self._of(job_id, attempt):
            await supervisor.over.wait()

    async def until_dead(self) -> None:
        """Never return; so whoever has asked learns of this actor's death."""
        await asyncio.Event().wait()

    async def release(self, job_id: str, attempt: int) -> Release:
        """Leave an attempt whose end has been recorded, and say whether another may follow."""
        if self._of(job_id, attempt) is not None:
            assert self._run is not None
            done, _ = await asyncio.wait({self._run}, timeout=RELEASE_TIMEOUT_S)
            if not done or self._run.exception() is not None:
                return Release.SPENT
            self._supervisor = self._attempt = None
        if self._supervisor is not None:
            return Release.ELSEWHERE
        return Release.FREE if self._num_attempts < MAX_ATTEMPTS else Release.SPENT

    def _of(self, job_id: str, attempt: int) -> Supervisor | None:
        return self._supervisor if self._attempt == (job_id, attempt) else None
