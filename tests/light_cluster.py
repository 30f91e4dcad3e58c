"""A cluster without Ray whose attempts outlive the scheduler: files in run storage, which a real scheduler is given.

``python -m tests.light_cluster`` is the scheduler's process, as ``python -m service scheduler`` but for this cluster.
An attempt takes no processes: what it reports is written when it is launched, and seen bit by bit. A job's label
``step_s`` says how long a step takes; without it, all is there at once.
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.domain.job import CheckpointFile, Outcome, Reason
from service.domain.journal import (
    CheckpointWritten,
    Ended,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Resumed,
    Running,
    utc_now,
)
from service.domain.placement import Node, Resources
from service.domain.ports import JournalPage, Launch, SupervisorState
from service.linux import die_with_parent
from service.settings import Settings
from service.storage.journal_file import JournalWriter, read_journal
from service.storage.layout import checkpoint_dir, launch_marker
from service.storage.object_store import ObjectStore
from service.wiring import run_scheduler

NUM_CPUS = 64.0
# So few at once that a journal is taken in by several transactions.
PAGE = 3
NUM_FIRST_RECORDS = 4  # up to the one that says that it runs


class LightCluster:
    """Implements ``service.domain.ports.Cluster``.

    Args:
        directory: of run storage; the cluster keeps ``light/`` in it.
    """

    def __init__(self, directory: Path) -> None:
        self._storage = ObjectStore(str(directory))
        self._actors = directory / "light" / "actors"
        self._stops = directory / "light" / "stops"
        self._runs = directory / "light" / "runs"
        for folder in (self._actors, self._stops):
            folder.mkdir(parents=True, exist_ok=True)

    def nodes(self) -> tuple[Node, ...]:
        return (Node(id="light", address="127.0.0.1", total=Resources(cpus=NUM_CPUS, memory_bytes=2**40)),)

    def launch(self, launch: Launch) -> None:
        name = f"{launch.job_id}.{launch.attempt}"
        others = [path.name for path in self._actors.glob(f"{launch.job_id}.*") if path.name != name]
        with suppress(FileExistsError):
            pace = {"started_at": time.monotonic(), "step_s": _step_s(launch)}
            with (self._actors / name).open("x") as file:
                json.dump(pace, file)
        if self._storage.create_exclusively(launch_marker(launch.job_id, launch.attempt), b"light"):
            JournalWriter(self._storage, launch.job_id, launch.attempt).append(_records(launch))
            with self._runs.open("a") as file:
                file.write(f"{name} {'beside ' + others[0] if others else 'alone'}\n")

    def read(self, job_id: str, attempt: int, *, after: int) -> JournalPage:
        name = f"{job_id}.{attempt}"
        try:
            pace = json.loads((self._actors / name).read_text())
        except (FileNotFoundError, ValueError):
            return JournalPage(state=SupervisorState.GONE, records=())
        records = list(read_journal(self._storage, job_id, attempt, after=0))
        stop = self._stops / name
        if stop.exists():
            num_seen, reason = stop.read_text().split()
            records = [
                *records[: int(num_seen)],
                _end(int(num_seen) + 1, Outcome.STOPPED, Reason(reason), pace["step_s"]),
            ]
        elif pace["step_s"]:
            records = records[: _num_seen(pace)]
        return JournalPage(state=SupervisorState.ALIVE, records=tuple(records[after : after + PAGE]))

    def stop(self, job_id: str, attempt: int, reason: Reason) -> None:
        name = f"{job_id}.{attempt}"
        pace = json.loads((self._actors / name).read_text())
        with suppress(FileExistsError), (self._stops / name).open("x") as file:
            file.write(f"{_num_seen(pace)} {reason}")

    def close(self, job_id: str, attempt: int) -> None:
        (self._actors / f"{job_id}.{attempt}").unlink(missing_ok=True)

    def supervisors(self) -> tuple[str, ...]:
        return tuple(path.name for path in self._actors.iterdir())

    def close_all_but(self, attempts: Collection[tuple[str, int]], supervisors: Collection[str]) -> None:
        for name in supervisors:
            job_id, _, number = name.rpartition(".")
            if (job_id, int(number)) not in attempts:
                self.close(job_id, int(number))

    def runs(self) -> list[str]:
        """One line for each attempt that really began, in order: which, and beside which other one of its job."""
        return self._runs.read_text().splitlines() if self._runs.exists() else []


def _num_seen(pace: dict[str, float]) -> int:
    if not pace["step_s"]:
        return NUM_FIRST_RECORDS
    return NUM_FIRST_RECORDS + int((time.monotonic() - pace["started_at"]) / pace["step_s"])


def _records(launch: Launch) -> list[JournalRecord]:
    """All that an attempt has to tell, to its end; a step has one value of one metric."""
    num_steps = launch.spec.num_steps
    assert num_steps is not None
    path = checkpoint_dir(launch.job_id, launch.attempt, num_steps)
    reports = [
        Launched(supervisor_pid=1),
        Placed(node_ids=launch.node_ids, pids=tuple(range(len(launch.node_ids)))),
        Resumed(step=0),
        Running(num_steps=num_steps),
        *(Metrics.of(step, {"train/loss": 1.0 / step}) for step in range(1, num_steps + 1)),
        CheckpointWritten(
            step=num_steps,
            path=path,
            manifest_sha256="0" * 64,
            files=(CheckpointFile(name="model.safetensors", size_bytes=7, sha256="1" * 64),),
            metrics={},
        ),
    ]
    step_s = _step_s(launch)
    records = [
        JournalRecord(sequence=sequence, time=utc_now(), elapsed_s=_elapsed_s(sequence, step_s), report=report)
        for sequence, report in enumerate(reports, start=1)
    ]
    return [*records, _end(len(records) + 1, Outcome.SUCCEEDED, Reason.COMPLETED, step_s, step=num_steps)]


def _end(sequence: int, outcome: Outcome, reason: Reason, step_s: float, step: int = 0) -> JournalRecord:
    report = Ended(outcome=outcome, reason=reason, message="Ended.", step=step)
    return JournalRecord(sequence=sequence, time=utc_now(), elapsed_s=_elapsed_s(sequence, step_s), report=report)


def _step_s(launch: Launch) -> float:
    return float(launch.spec.labels.get("step_s", 0))


def _elapsed_s(sequence: int, step_s: float) -> float:
    return max(0, sequence - NUM_FIRST_RECORDS) * step_s


@contextmanager
def _connect(settings: Settings) -> Iterator[LightCluster]:
    yield LightCluster(Path(settings.storage))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int, required=True)
    die_with_parent(parser.parse_args().parent_pid, signal.SIGKILL)
    os.umask(0o077)
    run_scheduler(Settings(), _connect)
