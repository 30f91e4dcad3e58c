"""Follows one attempt: takes its journal into the store, asks it to stop, and seals it when it is over."""

import logging
import time
from collections.abc import Sequence, Set

from service.domain.job import Attempt, AttemptStatus, Failure, Job, Outcome, Reason
from service.domain.journal import CheckpointWritten, Ended, JournalRecord, Resumed
from service.domain.keeping import to_remove
from service.domain.ports import (
    UPLOAD_TIMEOUT_S,
    Cluster,
    Lease,
    LiveAttempt,
    RunFiles,
    SchedulerStore,
    SupervisorState,
)
from service.scheduler.crash_points import CrashPoint, reach
from service.scheduler.launches import LaunchFactory
from service.scheduler.sweeper import Sweeper

# A stop request may be lost with a supervisor's connection; asking again does no harm.
STOP_REPEAT_S = 2.0
# A launch may be lost with the scheduler that asked for it, after the actor was made and before it was told to run.
LAUNCH_REPEAT_S = 2.0
# How much longer than the grace an attempt that was asked to stop may take to say that it has ended: its processes are
# gone by then, and what it still does is to upload its last checkpoint.
STOP_OVERTIME_S = UPLOAD_TIMEOUT_S + 60.0

logger = logging.getLogger(__name__)


class AttemptFollower:
    """Carries what happens to attempts into the store, and what the store asks for to the attempts.

    Args:
        store: rows.
        cluster: supervisors.
        files: durable journals.
        sweeper: told which checkpoints may have become removable.
        make_launch: builds the launch of a live attempt.
        launch_timeout_s: how long a supervisor may take to show that it runs.
    """

    def __init__(
        self,
        *,
        store: SchedulerStore,
        cluster: Cluster,
        files: RunFiles,
        sweeper: Sweeper,
        make_launch: LaunchFactory,
        launch_timeout_s: float,
    ) -> None:
        self._store = store
        self._cluster = cluster
        self._files = files
        self._sweeper = sweeper
        self._make_launch = make_launch
        self._launch_timeout_s = launch_timeout_s
        self._stop_grace_s = make_launch.stop_grace_s
        # All by the monotonic clock of this process.
        self._launched_at: dict[tuple[str, int], float] = {}
        self._unlaunched_since: dict[tuple[str, int], float] = {}
        self._heard: dict[tuple[str, int], tuple[int, float]] = {}
        self._stop_asked_at: dict[tuple[str, int], float] = {}
        self._stop_first_asked_at: dict[tuple[str, int], float] = {}
        self._usable_nodes: Set[str] = frozenset()

    def use_nodes(self, node_ids: Set[str]) -> None:
        """Say on which nodes a job that is resized may go on; on none of them while the service stops."""
        self._usable_nodes = node_ids

    def launch(self, job: Job, attempt: Attempt) -> None:
        """Ask for the supervisor of an attempt, which has a row by now."""
        launch = self._make_launch(job, attempt)
        reach(CrashPoint.BEFORE_LAUNCH)
        self._cluster.launch(launch)
        reach(CrashPoint.AFTER_LAUNCH)

    def follow(self, lease: Lease, live: LiveAttempt) -> None:
        """Do what there is to do for one attempt, without waiting for it."""
        job_id, number = live.job.id, live.attempt.number
        if live.attempt.status is AttemptStatus.ENDED:
            assert live.attempt.outcome is not None
            assert live.attempt.reason is not None
            self._seal(lease, live, live.attempt.outcome, live.attempt.reason, live.attempt.failure)
            return
        page = self._cluster.read(job_id, number, after=live.attempt.last_sequence)
        if page.records:
            if self._take(lease, live, page.records):
                return
        elif page.state is SupervisorState.GONE:
            self._follow_without_supervisor(lease, live)
            return
        elif live.attempt.status is AttemptStatus.CREATED:
            self._launched_at.setdefault((job_id, number), time.monotonic())  # by whoever made the attempt
            if self._launch_again(lease, live):
                return
        # Also after records: a quick job has some at every look.
        self._ask_to_stop(lease, live)

    def _launch_again(self, lease: Lease, live: LiveAttempt) -> bool:
        """Repeat a launch that nothing has been heard of, now and then; in the end give the attempt up.

        A supervisor that runs already is not disturbed; and of two, only one takes the launch marker.

        Returns:
            Whether the attempt was given up.
        """
        key = (live.job.id, live.attempt.number)
        now = time.monotonic()
        waited_s = now - self._unlaunched_since.setdefault(key, now)  # another leader counts anew
        if key in self._launched_at and now - self._launched_at[key] <= LAUNCH_REPEAT_S:
            return False
        self._launched_at[key] = now
        if waited_s < self._launch_timeout_s:
            self.launch(live.job, live.attempt)
            return False
        if not self._files.prevent_launch(*key):
            return False  # it runs, and will be heard of
        failure = Failure(error_type="LaunchFailed", message="The supervisor of the attempt did not start.")
        self._seal_lost(lease, live, Reason.LAUNCH_FAILED, failure)
        return True

    def _take(self, lease: Lease, live: LiveAttempt, records: Sequence[JournalRecord]) -> bool:
        """Store records; True if they end the attempt, which is then sealed."""
        reach(CrashPoint.BEFORE_RECORD)
        self._store.ingest(lease, live.job.id, live.attempt.number, records)
        reach(CrashPoint.AFTER_RECORD)
        for record in records:
            if isinstance(record.report, Ended):
                self._seal(lease, live, record.report.outcome, record.report.reason, record.report.failure)
                return True
        if any(isinstance(record.report, CheckpointWritten | Resumed) for record in records):
            self._retire_checkpoints(lease, live.job)
        return False

    def _follow_without_supervisor(self, lease: Lease, live: LiveAttempt) -> None:
        job_id, number = live.job.id, live.attempt.number
        if self._files.was_launched(job_id, number):
            if self._cluster.read(job_id, number, after=live.attempt.last_sequence).state is not SupervisorState.GONE:
                return  # it was launched after the look that did not find it
            records = tuple(self._files.journal(job_id, number, after=live.attempt.last_sequence))
            if not records or not self._take(lease, live, records):
                failure = Failure(error_type="SupervisorDied", message="The supervisor of the attempt died.")
                self._seal_lost(lease, live, Reason.SUPERVISOR_LOST, failure)
        else:
            self._launch_again(lease, live)

    def _ask_to_stop(self, lease: Lease, live: LiveAttempt) -> None:
        job_id, number = live.job.id, live.attempt.number
        reason = live.attempt.stop_reason
        if reason in (None, Reason.RESIZED, Reason.PREEMPTED):
            stronger = self._why_stop(live)
            if stronger is not None:
                self._store.mark_stopping(lease, job_id, number, stronger)
            reason = stronger or reason
        if reason is None:
            return
        first_asked = self._stop_first_asked_at.setdefault((job_id, number), time.monotonic())
        if time.monotonic() - first_asked > self._stop_grace_s + STOP_OVERTIME_S:
            # Storage or the supervisor hangs. Sealed, the attempt can commit nothing more, whatever is left of it.
            logger.error("%s attempt %d did not stop in time and is given up", job_id, number)
            self._seal(lease, live, Outcome.STOPPED, reason, None)
            return
        last_asked = self._stop_asked_at.get((job_id, number))
        if last_asked is None or time.monotonic() - last_asked > STOP_REPEAT_S:
            self._stop_asked_at[job_id, number] = time.monotonic()
            self._cluster.stop(job_id, number, reason)

    def _seal_lost(self, lease: Lease, live: LiveAttempt, reason: Reason, failure: Failure) -> None:
        if live.attempt.stop_reason is None:
            self._seal(lease, live, Outcome.LOST, reason, failure)
        else:
            # It was asked to stop and has, if not as it should: what was asked for counts.
            self._seal(lease, live, Outcome.STOPPED, live.attempt.stop_reason, None)

    def _seal(self, lease: Lease, live: LiveAttempt, outcome: Outcome, reason: Reason, failure: Failure | None) -> None:
        job_id, number = live.job.id, live.attempt.number
        reach(CrashPoint.BEFORE_RESULT)
        job = self._store.seal_attempt(
            lease,
            job_id,
            number,
            outcome=outcome,
            reason=reason,
            failure=failure,
            next_node_ids=self._next_places(live),
        )
        reach(CrashPoint.AFTER_RESULT)
        logger.info("%s attempt %d ended: %s (%s); the job is %s", job_id, number, outcome, reason, job.status)
        self._cluster.close(job_id, number)
        for times in (self._launched_at, self._unlaunched_since, self._stop_asked_at, self._stop_first_asked_at):
            times.pop((job_id, number), None)
        self._heard.pop((job_id, number), None)
        self._sweeper.sweep_attempt(job_id, number)
        self._retire_checkpoints(lease, job)

    def _why_stop(self, live: LiveAttempt) -> Reason | None:
        if live.job.cancel_requested:
            return Reason.CANCEL_REQUESTED
        timeout_s = live.job.spec.timeout_s
        if timeout_s is not None and live.attempt.running_at is not None and self._running_s(live) > timeout_s:
            return Reason.TIMEOUT
        return Reason.PAUSE_REQUESTED if live.job.pause_requested else None

    def _running_s(self, live: LiveAttempt) -> float:
        """Return for how long a job has run: as its attempts told, and as long as this process has heard nothing since.

        No time of day takes part, so that a clock that jumps ends no job.
        """
        key, now = (live.job.id, live.attempt.number), time.monotonic()
        sequence, heard_at = self._heard.get(key, (None, now))
        if sequence != live.attempt.last_sequence:
            heard_at = now
            self._heard[key] = (live.attempt.last_sequence, now)
        return live.job.running_s + live.attempt.ran_s + now - heard_at

    def _next_places(self, live: LiveAttempt) -> tuple[str, ...] | None:
        """Return where a job goes on that is being resized; None if it is not, or if a node of these is gone."""
        target = live.attempt.target_node_ids
        if live.attempt.stop_reason is not Reason.RESIZED or target is None:
            return None
        return target if self._usable_nodes >= set(target) else None

    def _retire_checkpoints(self, lease: Lease, job: Job) -> None:
        """Take off the list what the job's policy does not keep; the files go once nobody needs them."""
        listed = self._store.checkpoints(job.id)
        for checkpoint in to_remove(listed, job.spec.checkpoint):
            self._store.retire_checkpoint(lease, job.id, checkpoint.attempt, checkpoint.step)
        self._sweeper.sweep_job(job.id)
        if job.forked_from is not None:
            self._sweeper.sweep_job(job.forked_from.job_id)  # it may need that checkpoint no more
