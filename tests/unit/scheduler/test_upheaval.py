"""Jobs, nodes, schedulers and wishes that come and go at random, against what must hold at any time.

A failure names a seed; what broke is over-commitment, a job that is run twice or below its fewest workers, or one that
never comes to an end.
"""

import random
from collections import Counter

import pytest

from service.domain.elasticity import exact_worlds
from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import AttemptStatus, JobStatus, Origin, Outcome, Reason
from service.domain.journal import Resumed
from service.domain.ports import SupervisorState
from service.scheduler import sweeper
from tests.fake_cluster import make_node

NODES = (make_node("node-a", cpus=3), make_node("node-b", cpus=2), make_node("node-c", cpus=2))
WORKERS = (1, 2, 3, {"min": 1, "max": 4}, {"min": 2, "max": 6}, {"min": 1, "max": 2})
REASONS_TO_END = (
    (Outcome.SUCCEEDED, Reason.COMPLETED),
    (Outcome.LOST, Reason.RANK_LOST),
    (Outcome.FAILED, Reason.USER_ERROR),
)


class Upheaval:
    """A house in which anything may happen at any time."""

    def __init__(self, house, seed):
        self.house = house
        self.random = random.Random(seed)
        house.cluster.alive = NODES
        self.scheduler = house.scheduler()
        self.jobs = []
        self.steps = Counter()
        self.num_schedulers = 1

    def happen(self):
        """Let one thing happen, and look that all is well."""
        event = self.random.choice(
            [self.submit, self.wish, self.wish, self.progress, self.progress, self.progress, self.end, self.trouble]
        )
        event()
        self.scheduler.step()
        self.check()

    def submit(self):
        if len(self.jobs) < 12:
            self.jobs.append(
                self.house.submit(
                    workers=self.random.choice(WORKERS),
                    priority=self.random.choice((0, 0, 1)),
                    retry={"budget": 1000},
                    checkpoint={"keep_last": 1},
                )
            )

    def wish(self):
        if not self.jobs:
            return
        job = self.house.store.get(self.random.choice(self.jobs))
        store = self.house.store
        ask = self.random.choice(
            [
                lambda: store.request_pause(job.id),
                lambda: store.resume(job.id),
                lambda: store.request_resize(job.id, self.random.choice(exact_worlds(job.spec))),
                lambda: store.request_cancel(job.id) if self.random.random() < 0.2 else None,
                lambda: self.fork(job),
            ]
        )
        try:
            ask()
        except (InvalidTransition, NotFound):
            return  # not in this state

    def fork(self, job):
        checkpoints = self.house.store.checkpoints(job.id)
        if checkpoints and len(self.jobs) < 12:
            chosen = self.random.choice(checkpoints)
            origin = Origin(job_id=job.id, attempt=chosen.attempt, step=chosen.step)
            self.jobs.append(self.house.store.fork(job.spec, origin)[0].id)

    def progress(self):
        """Let an attempt begin, or write a checkpoint; one that was asked to stop does so."""
        for entry in self.reachable():
            key = (entry.job.id, entry.attempt.number)
            supervisor = self.house.cluster.supervisor(*key)
            if entry.attempt.status is AttemptStatus.LAUNCHED:
                offered = supervisor.launch.checkpoints
                assert all(self.house.storage.exists(one.path) for one in offered[:1]), "it is offered what is gone"
                if not offered and entry.job.forked_from is not None:
                    reasons = {event.reason for event in self.house.store.events(entry.job.id)}
                    assert Reason.RESUMED in reasons, "only a fork that had ended loses where it begins"
                    self.house.cluster.end(*key, Outcome.FAILED, Reason.CHECKPOINT_FAILED)
                    continue
                self.house.cluster.run(*key, resume=offered[0].step if offered else 0)
            elif entry.attempt.status is AttemptStatus.RUNNING:
                self.steps[entry.job.id] = max(self.steps[entry.job.id], entry.job.step) + 1
                self.house.cluster.checkpoint(*key, self.steps[entry.job.id])
                if supervisor.stop_reasons:
                    self.house.cluster.end(*key, Outcome.STOPPED, supervisor.stop_reasons[0])

    def end(self):
        entries = self.reachable()
        if entries:
            entry = self.random.choice(entries)
            key = (entry.job.id, entry.attempt.number)
            if self.random.random() < 0.5:
                outcome, reason = self.random.choice(REASONS_TO_END)
                if entry.attempt.status is AttemptStatus.LAUNCHED:
                    self.house.cluster.report(*key, Resumed(step=entry.job.step if entry.job.forked_from else 0))
                self.house.cluster.end(*key, outcome, reason)
            else:
                self.house.cluster.kill(*key)

    def trouble(self):
        """Let a node come or go, or the scheduler die."""
        if self.random.random() < 0.5:
            self.num_schedulers += 1
            self.house.store.release_lease(self.house.lease())
            self.scheduler = self.house.scheduler(f"scheduler-{self.num_schedulers}")
            return
        self.house.cluster.alive = tuple(node for node in NODES if self.random.random() < 0.7)
        alive = {node.id for node in self.house.cluster.alive}
        for entry in self.reachable():
            if not alive.issuperset(entry.attempt.node_ids):
                self.house.cluster.end(entry.job.id, entry.attempt.number, Outcome.LOST, Reason.NODE_LOST)

    def reachable(self):
        """Attempts whose supervisors are there and have not ended."""
        found = []
        for entry in self.house.store.live_attempts():
            key = (entry.job.id, entry.attempt.number)
            if (
                entry.attempt.status in (AttemptStatus.LAUNCHED, AttemptStatus.RUNNING)
                and key in self.house.cluster._supervisors
            ):
                supervisor = self.house.cluster.supervisor(*key)
                if supervisor.state is SupervisorState.ALIVE and supervisor.records[-1].report.kind != "ended":
                    found.append(entry)
        return found

    def check(self):
        live = self.house.store.live_attempts()
        assert len({entry.job.id for entry in live}) == len(live), "a job runs twice"
        held = Counter()
        for entry in live:
            attempt = entry.attempt
            following = attempt.target_node_ids if attempt.stop_reason is Reason.RESIZED else ()
            held += Counter(attempt.node_ids) | Counter(following)
            assert entry.attempt.world_size in exact_worlds(entry.job.spec)
            assert entry.job.status in (JobStatus.STARTING, JobStatus.RUNNING, JobStatus.STOPPING)
        for node in NODES:
            assert held[node.id] <= node.total.cpus, f"{node.id} is over-committed"
        alive = {(entry.job.id, entry.attempt.number) for entry in live}
        assert set(self.house.cluster.supervised()) <= alive, "a supervisor was forgotten"

    def settle(self):
        """Let everything come to its end."""
        self.house.cluster.alive = NODES
        for _ in range(400):
            jobs = [self.house.store.get(job_id) for job_id in self.jobs]
            if all(job.status.is_terminal for job in jobs):
                return
            for job in jobs:
                if job.status is JobStatus.PAUSED:
                    self.house.store.resume(job.id)
            self.progress()
            for entry in self.reachable():
                if entry.attempt.status is AttemptStatus.RUNNING and self.random.random() < 0.3:
                    self.house.cluster.end(entry.job.id, entry.attempt.number)
            self.scheduler.step()
            self.check()
        raise AssertionError(f"never at rest: {jobs}")


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_everything_holds_and_comes_to_an_end(house, caplog, monkeypatch, seed):
    monkeypatch.setattr(sweeper, "SWEEP_INTERVAL_S", 0.0)
    upheaval = Upheaval(house, seed)
    for _ in range(100):
        upheaval.happen()
    upheaval.settle()
    assert "could not be followed" not in caplog.text
    reasons = {attempt.reason for job_id in upheaval.jobs for attempt in house.store.attempts(job_id)}
    assert Reason.RESIZED in reasons, "the seed shows nothing"
    # What is left in storage is what is listed, or what a fork that never got a checkpoint of its own begins at.
    for job_id in upheaval.jobs:
        assert house.store.removable_checkpoints(job_id) == ()
