"""The scheduler's loop: claim the lease, observe, decide, apply; one iteration at a time."""

import logging
import time
from collections.abc import Callable, Sequence

from service.domain.errors import LeaseLost, Unavailable
from service.domain.job import Job, Reason
from service.domain.picture import Picture
from service.domain.placement import Node
from service.domain.ports import Cluster, Lease, LiveAttempt, RunFiles, SchedulerStore
from service.domain.scheduling import Decision, Reservation, Wait, decide
from service.scheduler.crash_points import CrashPoint, reach
from service.scheduler.follower import AttemptFollower
from service.scheduler.launches import LaunchFactory
from service.scheduler.leadership import Leadership
from service.scheduler.sweeper import Sweeper
from service.scheduler.usage import Usage

BUSY_INTERVAL_S = 0.05
IDLE_INTERVAL_S = 0.5
NODES_INTERVAL_S = 1.0
# Where more jobs than that wait in one queue, the others wait unseen until some have started.
MAX_QUEUED = 10_000
# A decision on more jobs than that is followed by a pause of so many times what it took.
NUM_FEW_JOBS = 500
DECISION_PAUSE = 3.0
TELLING_S = 0.1

logger = logging.getLogger(__name__)


class Scheduler:
    """Runs jobs; of several, the one that holds the lease does.

    Args:
        leadership: says whether this one leads.
        store: rows.
        cluster: supervisors and nodes.
        files: run storage.
        make_launch: builds launches.
        launch_timeout_s: how long a supervisor may take to show that it runs.
        resize_interval_s: how long an elastic job runs before it is interrupted to give it more workers.
    """

    def __init__(
        self,
        *,
        leadership: Leadership,
        store: SchedulerStore,
        cluster: Cluster,
        files: RunFiles,
        make_launch: LaunchFactory,
        launch_timeout_s: float,
        resize_interval_s: float,
    ) -> None:
        self._leadership = leadership
        self._store = store
        self._cluster = cluster
        self._closed_forgotten_in_epoch: int | None = None
        self._nodes: tuple[Node, ...] = ()
        self._troubles: dict[str, str] = {}
        self._picture = Picture(resize_interval_s=resize_interval_s, stop_grace_s=make_launch.stop_grace_s)
        self._usage = Usage(store)
        self._reservations: tuple[Reservation, ...] = ()
        self._next_decision_s = 0.0
        self._told_until = 0
        self._nodes_at: float | None = None
        self._sweeper = Sweeper(store, files)
        self._follower = AttemptFollower(
            store=store,
            cluster=cluster,
            files=files,
            sweeper=self._sweeper,
            make_launch=make_launch,
            launch_timeout_s=launch_timeout_s,
        )

    def run(self, wait: Callable[[float], None], should_stop: Callable[[], bool]) -> None:
        """Run until asked to stop, then stop what runs, in order.

        Args:
            wait: returns after so many seconds, or earlier when there is news.
            should_stop: polled between iterations.
        """
        while not should_stop():
            wait(BUSY_INTERVAL_S if self.step() else IDLE_INTERVAL_S)

    def step(self, *, admitting: bool = True) -> bool:
        """Do one iteration; never waits long.

        Args:
            admitting: whether queued jobs may start.

        Returns:
            Whether this scheduler leads and attempts are live, so that the next iteration should come soon.
        """
        try:
            lease = self._leadership.claim()
            if lease is None:
                return False
            if self._closed_forgotten_in_epoch != lease.epoch:
                self._close_forgotten()
                self._closed_forgotten_in_epoch = lease.epoch
            self._observe_nodes(lease)
            self._follower.use_nodes({node.id for node in self._nodes} if admitting else frozenset())
            num_live = self._follow_all()
            self._sweeper.step(lease)
            if not admitting:
                return num_live > 0
            num_started = self._decide(lease)
            return num_live + num_started > 0
        except LeaseLost as error:
            logger.warning("The lease went to another scheduler: %s", error)
            self._leadership.forget()
        except Unavailable as error:
            logger.warning("Waiting for the database or the cluster: %s", error)
            # What was sealed, as it may turn out, by a transaction whose answer was lost, has a supervisor to close.
            self._closed_forgotten_in_epoch = None
        return False

    def stop_all(self, *, deadline_s: float) -> None:
        """Ask what runs for a checkpoint and an end, so that it is queued again; then give up the lease.

        Args:
            deadline_s: how long to wait for it.
        """
        deadline = time.monotonic() + deadline_s
        while (lease := self._leadership.lease) is not None and time.monotonic() < deadline:
            if self._is_stopped(lease):
                break
            time.sleep(BUSY_INTERVAL_S)
        self._sweeper.close()
        try:
            self._leadership.release()
        except Unavailable as error:
            logger.warning("The lease could not be given up, and ends by itself: %s", error)

    def _is_stopped(self, lease: Lease) -> bool:
        """Ask whatever was not asked to stop yet; True if nothing runs any more, or another scheduler leads."""
        try:
            live = self._store.live_attempts()
            for entry in live:
                if entry.attempt.stop_reason is None:
                    self._store.mark_stopping(lease, entry.job.id, entry.attempt.number, Reason.SERVICE_STOPPED)
        except LeaseLost:
            self._leadership.forget()
            self.step(admitting=False)  # goes on if it still is ours
            return self._leadership.lease is None
        except Unavailable as error:
            logger.warning("Waiting for the database: %s", error)
            return False
        if live:
            self.step(admitting=False)
        return not live

    def _close_forgotten(self) -> None:
        """Close supervisors whose attempts were sealed by a leader that died before it could."""
        # In this order: an attempt has its row before it has a supervisor, so whoever supervises now and has no live
        # row later is forgotten, even if this process was stopped in between and another leads by now.
        supervisors = self._cluster.supervisors()
        live = {(entry.job.id, entry.attempt.number) for entry in self._store.live_attempts()}
        self._cluster.close_all_but(live, supervisors)

    def _observe_nodes(self, lease: Lease) -> None:
        now = time.monotonic()
        if self._nodes_at is not None and now - self._nodes_at < NODES_INTERVAL_S:
            return
        self._nodes = self._cluster.nodes()
        self._nodes_at = now
        self._store.record_nodes(lease, self._nodes)

    def _follow_all(self) -> int:
        live = self._store.live_attempts()
        for entry in live:
            lease = self._leadership.keep()  # many of them take longer than a lease lasts
            try:
                self._follower.follow(lease, entry)
            except (LeaseLost, Unavailable):
                raise
            except Exception as error:
                # One job's trouble, whatever it is, is not another's. It is told once, and tried again.
                told = f"{type(error).__name__}: {error}"
                if self._troubles.get(entry.job.id) != told:
                    self._troubles[entry.job.id] = told
                    logger.exception("%s attempt %d could not be followed", entry.job.id, entry.attempt.number)
            else:
                self._troubles.pop(entry.job.id, None)
        return len(live)

    def _decide(self, lease: Lease) -> int:
        """Have jobs start, stop, shrink and grow as the policy says, and tell those that wait why; the starts' number.

        With many thousands of jobs this takes a while, and then it is not done at every iteration, so that what runs
        is followed all the same.
        """
        began_s = time.monotonic()
        if began_s < self._next_decision_s:
            return 0
        self._store.fail_hopeless(lease)
        live = self._store.live_attempts()
        active = self._picture.active(live, began_s)
        usage_s = self._usage.accrue(lease, active, self._nodes, began_s)
        queued = self._store.queued_jobs(limit=MAX_QUEUED)
        self._leadership.keep()  # the first look at a long queue takes a while
        if not queued and not any(job.is_movable for job in active):
            self._reservations = ()
            return 0
        decision = decide(
            self._picture.pending(queued, self._store.held_back()),
            active,
            self._nodes,
            queues=self._store.queues(),
            usage_s=usage_s,
            reservations=self._reservations,
            now_s=began_s,
        )
        self._reservations = decision.reservations
        self._apply(decision, queued, live, self._leadership.keep())
        took_s = time.monotonic() - began_s
        if len(queued) > NUM_FEW_JOBS:
            self._next_decision_s = time.monotonic() + DECISION_PAUSE * took_s
        return len(decision.starts)

    def _apply(self, decision: Decision, queued: Sequence[Job], live: Sequence[LiveAttempt], lease: Lease) -> None:
        jobs = {job.id: job for job in queued}
        numbers = {entry.job.id: entry.attempt.number for entry in live}
        for start in decision.starts:
            reach(CrashPoint.BEFORE_CLAIM)
            attempt = self._store.create_attempt(self._leadership.keep(), start.job_id, node_ids=start.node_ids)
            reach(CrashPoint.AFTER_CLAIM)
            if attempt is not None:
                self._follower.launch(jobs[start.job_id], attempt)
        for preemption in decision.preemptions:
            number = numbers[preemption.job_id]
            self._store.mark_preempting(lease, preemption.job_id, number, message=preemption.message)
        for resize in decision.resizes:
            self._store.mark_resizing(
                lease, resize.job_id, numbers[resize.job_id], node_ids=resize.node_ids, message=resize.message
            )
        self._tell([wait for wait in decision.waits if wait.message != jobs[wait.job_id].message], lease)

    def _tell(self, news: Sequence[Wait], lease: Lease) -> None:
        """Tell jobs why they wait, for a moment: each is a transaction. Those that are not reached come first next."""
        until_s = time.monotonic() + TELLING_S
        first = self._told_until % len(news) if news else 0
        for num_told, wait in enumerate((*news[first:], *news[:first]), start=1):
            self._store.set_message(lease, wait.job_id, wait.message)
            if time.monotonic() > until_s:
                self._told_until = first + num_told
                return
        self._told_until = 0
