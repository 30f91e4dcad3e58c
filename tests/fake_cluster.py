"""A cluster without machines: supervisors that report what a test has them report, and fail as it has them fail."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from service.domain.errors import Unavailable
from service.domain.job import CheckpointFile, Failure, Outcome, Reason
from service.domain.journal import (
    CheckpointWritten,
    Ended,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Report,
    Resumed,
    Running,
    utc_now,
)
from service.domain.placement import Node, Resources
from service.domain.ports import JournalPage, Launch, SupervisorState
from service.storage.journal_file import JournalWriter
from service.storage.layout import checkpoint_dir, launch_marker
from service.storage.object_store import ObjectStore


def make_node(name: str = "node-a", *, cpus: float = 4.0) -> Node:
    return Node(id=name, address="127.0.0.1", total=Resources(cpus=cpus, memory_bytes=2**40))


@dataclass(kw_only=True)
class FakeSupervisor:
    """One attempt's; its records are in its memory, and in run storage where they were durable."""

    launch: Launch
    journal: JournalWriter
    began_at: float = field(default_factory=time.monotonic)
    state: SupervisorState = SupervisorState.ALIVE
    records: list[JournalRecord] = field(default_factory=list)
    stop_reasons: list[Reason] = field(default_factory=list)


class FakeCluster:
    """Implements ``service.domain.ports.Cluster``.

    Attributes:
        alive: the nodes.
        is_unavailable: every call that may raises ``Unavailable``.
        loses_launches: a launch is accepted and comes to nothing.
        keeps_silent: a launch makes a supervisor that does nothing until it is launched again.
        stops_at_once: whoever is asked to stop does so without taking another step.
        launches, closed: what was asked for, in order.
    """

    def __init__(self, storage: ObjectStore, *, nodes: Sequence[Node] = (make_node(),)) -> None:
        self.alive = tuple(nodes)
        self.is_unavailable = False
        self.loses_launches = False
        self.keeps_silent = False
        self.stops_at_once = False
        self.launches: list[Launch] = []
        self.closed: list[tuple[str, int]] = []
        self._storage = storage
        self._supervisors: dict[tuple[str, int], FakeSupervisor] = {}

    # The port.

    def nodes(self) -> tuple[Node, ...]:
        self._check()
        return self.alive

    def launch(self, launch: Launch) -> None:
        self._check()
        self.launches.append(launch)
        key = (launch.job_id, launch.attempt)
        if self.loses_launches or self._has_started(key):
            return
        if self.keeps_silent:
            self.keeps_silent = False
            self._supervisors[key] = FakeSupervisor(launch=launch, journal=JournalWriter(self._storage, *key))
            return
        if self._storage.create_exclusively(launch_marker(*key), b"fake"):
            self._supervisors[key] = FakeSupervisor(launch=launch, journal=JournalWriter(self._storage, *key))
            self.report(*key, Launched(supervisor_pid=1))

    def read(self, job_id: str, attempt: int, *, after: int) -> JournalPage:
        supervisor = self._supervisors.get((job_id, attempt))
        if supervisor is None:
            return JournalPage(state=SupervisorState.GONE, records=())
        if supervisor.state is SupervisorState.UNREACHABLE:
            return JournalPage(state=SupervisorState.UNREACHABLE, records=())
        return JournalPage(state=supervisor.state, records=tuple(supervisor.records[after:]))

    def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        supervisor = self._supervisors.get((job_id, attempt))
        if supervisor is not None:
            supervisor.stop_reasons.append(reason)
            if self.stops_at_once and len(supervisor.stop_reasons) == 1:
                self.end(job_id, attempt, Outcome.STOPPED, reason)

    def close(self, job_id: str, attempt: int) -> None:
        self.closed.append((job_id, attempt))
        self._supervisors.pop((job_id, attempt), None)

    def supervisors(self) -> tuple[str, ...]:
        self._check()
        return tuple(f"{job_id}/{attempt}" for job_id, attempt in self._supervisors)

    def close_all_but(self, attempts: Collection[tuple[str, int]], supervisors: Collection[str]) -> None:
        self._check()
        for job_id, attempt in list(self._supervisors):
            if f"{job_id}/{attempt}" in supervisors and (job_id, attempt) not in attempts:
                self.close(job_id, attempt)

    def _has_started(self, key: tuple[str, int]) -> bool:
        return key in self._supervisors and bool(self._supervisors[key].records)

    # What a test makes happen, and sees.

    def supervised(self) -> tuple[tuple[str, int], ...]:
        """Job and attempt of every supervisor."""
        return tuple(self._supervisors)

    def supervisor(self, job_id: str, attempt: int) -> FakeSupervisor:
        return self._supervisors[job_id, attempt]

    def report(self, job_id: str, attempt: int, *reports: Report, durable: bool = True) -> None:
        """Have a supervisor take reports into its journal."""
        supervisor = self._supervisors[job_id, attempt]
        first = len(supervisor.records) + 1
        new = [
            JournalRecord(
                sequence=sequence, time=utc_now(), elapsed_s=time.monotonic() - supervisor.began_at, report=report
            )
            for sequence, report in enumerate(reports, start=first)
        ]
        supervisor.records += new
        if durable:
            supervisor.journal.append(new)

    def run(self, job_id: str, attempt: int, *reports: Report, resume: int = 0) -> None:
        """Have all ranks take a step, and report more."""
        node_ids = self._supervisors[job_id, attempt].launch.node_ids
        placed = Placed(node_ids=node_ids, pids=tuple(range(100, 100 + len(node_ids))))
        self.report(job_id, attempt, Resumed(step=resume), placed, Running(num_steps=100), *reports)

    def checkpoint(self, job_id: str, attempt: int, step: int) -> None:
        """Have a checkpoint written; its files are there, with no sense in them."""
        path = checkpoint_dir(job_id, attempt, step)
        self._storage.write(f"{path}/model.safetensors", b"weights")
        self._storage.write(f"{path}/manifest.json", b"{}")
        files = (CheckpointFile(name="model.safetensors", size_bytes=7, sha256="1" * 64),)
        written = CheckpointWritten(step=step, path=path, manifest_sha256="0" * 64, files=files, metrics={})
        self.report(job_id, attempt, Metrics.of(step, {"train/loss": 1.0}), written)

    def end(
        self,
        job_id: str,
        attempt: int,
        outcome: Outcome = Outcome.SUCCEEDED,
        reason: Reason = Reason.COMPLETED,
        *,
        failure: Failure | None = None,
    ) -> None:
        """Have an attempt say how it ended; its last record."""
        ended = Ended(outcome=outcome, reason=reason, message="Ended as told.", step=0, failure=failure)
        self.report(job_id, attempt, ended)

    def kill(self, job_id: str, attempt: int) -> None:
        """Let a supervisor die, with all that it had only in memory."""
        del self._supervisors[job_id, attempt]

    def lose_touch(self, job_id: str, attempt: int) -> None:
        self._supervisors[job_id, attempt].state = SupervisorState.UNREACHABLE

    def find(self, job_id: str, attempt: int) -> None:
        """Reach a supervisor again."""
        self._supervisors[job_id, attempt].state = SupervisorState.ALIVE

    def stop_reasons(self, job_id: str, attempt: int) -> list[Reason]:
        return self._supervisors[job_id, attempt].stop_reasons

    def launched(self) -> list[tuple[str, int]]:
        """Job and attempt of each launch that was asked for, in order."""
        return [(launch.job_id, launch.attempt) for launch in self.launches]

    def _check(self) -> None:
        if self.is_unavailable:
            raise Unavailable("The cluster does not answer.")
