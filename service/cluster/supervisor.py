"""What owns one attempt, in a supervisor's actor: its placement group, its ranks and its journal."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from service.cluster.attempt_end import RankFailure, judge
from service.cluster.gang import Gang
from service.cluster.journal import Journal
from service.cluster.launch_marker import take_launch_marker
from service.cluster.rank_end import RankEnd
from service.domain.errors import CorruptCheckpoint, ServiceError, UserCodeRefused
from service.domain.job import Checkpoint, Failure, Origin, Outcome, Reason
from service.domain.journal import (
    CheckpointQuarantined,
    CheckpointWritten,
    Ended,
    JournalRecord,
    Launched,
    Metrics,
    Resumed,
    Running,
    Warned,
)
from service.domain.ports import Launch
from service.domain.rank_protocol import Stepped
from service.domain.uploads import brings_something
from service.storage.checkpoints import fetch_checkpoint
from service.storage.journal_file import JournalWriter
from service.storage.object_store import ObjectStore

# After one rank failed, how long its peers may take to say what they saw, so that the cause is told from its effects.
PEER_REPORT_S = 2.0
KILL_TIMEOUT_S = 20.0
# How long a node that cannot be reached is waited for: until Ray calls it dead, its processes may train on. Ray needs
# about 65 s for it unless told otherwise.
VERDICT_TIMEOUT_S = 120.0
VERDICT_RETRY_S = 1.0

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Supervisor:
    """Runs one attempt from launch to end.

    Args:
        launch: what to run.
        name: of the actor, for the launch marker.

    Attributes:
        over: set once the attempt's ranks have been given back.
    """

    def __init__(self, launch: Launch, name: str) -> None:
        self.over = asyncio.Event()
        self._launch = launch
        self._name = name
        self._store = ObjectStore(launch.storage_url)
        self._journal = Journal(JournalWriter(self._store, launch.job_id, launch.attempt))
        self._gang = Gang(launch)
        self._clear: set[int] = set()
        self._is_running = False
        self._stepped: set[int] = set()
        self._step = 0
        self._stop_reason: Reason | None = None
        self._stop_asked = asyncio.Event()
        self._unavailable: set[int] = set()

    async def run(self) -> bool:
        """Run the attempt; returns after its last record is durable. False if another supervisor has it."""
        try:
            if not await self._take_launch_marker():
                return False
            await self._run()
        finally:
            self.over.set()
        return True

    async def _run(self) -> None:
        async with self._journal.flushing():
            self._journal.add(Launched(supervisor_pid=os.getpid()))
            try:
                ended = await self._run_gang()
            except TimeoutError:
                ended = self._launch_failed(f"not all of them had a process after {self._start_timeout_s:g} s")
            except UserCodeRefused as error:
                ended = self._refused(error)
            except (RayError, ServiceError, OSError) as error:
                ended = self._launch_failed(f"{type(error).__name__}: {error}")
            except Exception as error:
                # Without a last record the scheduler would wait for one forever: this supervisor still answers.
                logger.exception("The supervisor failed")
                message = f"The supervisor failed: {type(error).__name__}: {error}"
                ended = Ended(outcome=Outcome.LOST, reason=Reason.SUPERVISOR_LOST, message=message, step=self._step)
            try:
                await self._gang.release(self._clear)
            finally:
                self._journal.add(ended)

    async def _take_launch_marker(self) -> bool:
        """Take the attempt's launch marker; False if another supervisor has, or if storage refuses it."""
        try:
            await asyncio.to_thread(self._store.check_identity, self._launch.storage_id)
            return await asyncio.to_thread(
                take_launch_marker, self._store, self._launch.job_id, self._launch.attempt, self._name
            )
        except Exception:
            # Each storage has errors of its own; without an answer the attempt would be waited for for ever.
            logger.exception("The launch marker could not be written")
            return False

    async def read(self, after: int, wait_s: float) -> Sequence[JournalRecord]:
        """Return journal records after a sequence number; waits for some, up to ``wait_s`` seconds."""
        return await self._journal.read(after, wait_s)

    async def stop(self, reason: Reason) -> None:
        """Ask all ranks for a checkpoint and an end; they are killed after the grace."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stop_asked.set()

    async def report(self, rank: int, reports: Sequence[Stepped | Metrics | Warned | CheckpointWritten]) -> None:
        """Take what a rank reports into the journal."""
        for report in reports:
            if isinstance(report, Stepped):
                self._stepped.add(rank)
                if len(self._stepped) == len(self._launch.node_ids) and not self._is_running:
                    self._is_running = True
                    self._journal.add(Running(num_steps=report.num_steps))
                continue
            if isinstance(report, Metrics):
                self._step = max(self._step, report.step)
            self._journal.add(report)

    async def _run_gang(self) -> Ended:
        checkpoint = await self._choose_checkpoint()
        if checkpoint is None and self._launch.forked_from is not None:
            return self._cannot_begin(self._launch.forked_from)
        self._step = 0 if checkpoint is None else checkpoint.step
        self._journal.add(Resumed(step=self._step))
        starting = asyncio.create_task(self._gang.start(checkpoint, timeout_s=self._start_timeout_s))
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({starting, stop_asked}, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        stop_asked.cancel()
        if not starting.done():
            starting.cancel()
            if self._stop_reason is None:
                raise TimeoutError
            message = "Stopped before every rank had a process."
            return Ended(outcome=Outcome.STOPPED, reason=self._stop_reason, message=message, step=self._step)
        self._journal.add(starting.result())
        runs = {asyncio.create_task(_await(end)): rank for rank, end in enumerate(self._gang.run())}
        stopper = asyncio.create_task(self._stop_ranks_when_asked())
        ends: dict[int, RankEnd] = {}
        failures: list[RankFailure] = []
        pending = set(runs)
        while pending and not failures:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            self._collect(done, runs, ends, failures)
        if pending:
            done, pending = await asyncio.wait(pending, timeout=PEER_REPORT_S)
            self._collect(done, runs, ends, failures)
        if pending:
            self._gang.kill()
            done, pending = await asyncio.wait(pending, timeout=KILL_TIMEOUT_S)
            self._collect(done, runs, ends, failures)
        stopper.cancel()
        unheard = {runs[future] for future in pending} | self._unavailable
        failures += filter(None, await asyncio.gather(*map(self._await_verdict, unheard)))
        return judge(ends=ends, failures=failures, stop_reason=self._stop_reason, step=self._step)

    @property
    def _start_timeout_s(self) -> float:
        preparing_s = self._launch.prepare_timeout_s if brings_something(self._launch.spec) else 0.0
        return self._launch.start_timeout_s + preparing_s

    def _refused(self, error: UserCodeRefused) -> Ended:
        # As Ray hands it on it is an error of Ray's as well, whose own words are a traceback.
        message = str(error.cause if isinstance(error, RayTaskError) else error)
        failure = Failure(rank=None, error_type=UserCodeRefused.__name__, message=message)
        return Ended(
            outcome=Outcome.FAILED, reason=Reason.USER_ERROR, message=message, step=self._step, failure=failure
        )

    def _launch_failed(self, why: str) -> Ended:
        message = f"The ranks could not be started: {why}"
        return Ended(outcome=Outcome.LOST, reason=Reason.LAUNCH_FAILED, message=message, step=self._step)

    def _cannot_begin(self, origin: Origin) -> Ended:
        message = (
            f"The checkpoint of step {origin.step} of job {origin.job_id}, which this job was forked from, cannot be "
            "read, and it has none of its own: from the beginning it would be another job. Fork from another step."
        )
        return Ended(outcome=Outcome.FAILED, reason=Reason.CHECKPOINT_FAILED, message=message, step=origin.step)

    async def _choose_checkpoint(self) -> Checkpoint | None:
        with TemporaryDirectory() as scratch:
            for checkpoint in self._launch.checkpoints:
                try:
                    await asyncio.to_thread(fetch_checkpoint, self._store, checkpoint, Path(scratch))
                except CorruptCheckpoint as error:
                    self._journal.add(
                        CheckpointQuarantined(
                            step=checkpoint.step,
                            message=str(error),
                            job_id=checkpoint.job_id,
                            attempt=checkpoint.attempt,
                        )
                    )
                else:
                    return checkpoint
        return None

    async def _stop_ranks_when_asked(self) -> None:
        await self._stop_asked.wait()
        self._gang.stop()
        await asyncio.sleep(self._launch.stop_grace_s)
        self._gang.kill()

    def _collect(
        self,
        done: set[asyncio.Task[RankEnd]],
        runs: dict[asyncio.Task[RankEnd], int],
        ends: dict[int, RankEnd],
        failures: list[RankFailure],
    ) -> None:
        for future in done:
            rank = runs[future]
            error = future.exception()
            if error is None:
                ends[rank] = future.result()
                if ends[rank].is_clear:
                    self._clear.add(rank)
                if not ends[rank].is_clean:
                    failures.append(RankFailure.of_process(rank, ends[rank]))
            elif isinstance(error, ActorUnavailableError):
                self._unavailable.add(rank)
                failures.append(RankFailure.of_unreachable(rank, self._launch.node_ids[rank]))
            elif isinstance(error, RayActorError):
                failures.append(RankFailure.of_actor(rank, self._launch.node_ids[rank], _alive_node_ids()))
            else:
                failures.append(RankFailure.of_service(rank, error))

    async def _await_verdict(self, rank: int) -> RankFailure | None:
        """Wait until an actor that did not answer can be told to kill its process, or Ray calls it dead.

        Returns:
            What became of it; None if it has been reached.
        """
        deadline = time.monotonic() + VERDICT_TIMEOUT_S
        node_id = self._launch.node_ids[rank]
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(_await(self._gang.kill_rank(rank)), left_s)
            except ActorUnavailableError:
                await asyncio.sleep(VERDICT_RETRY_S)
            except RayActorError:
                return RankFailure.of_actor(rank, node_id, _alive_node_ids())
            except TimeoutError:
                break
            else:
                return None
        return RankFailure.of_unreachable(rank, node_id)


async def _await(reference: Awaitable[T]) -> T:
    return await reference


def _alive_node_ids() -> frozenset[str]:
    try:
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
    except (RayError, GetTimeoutError):
        return frozenset()
