"""Leading, handing over and stopping. A failure means two leaders, none, or a stop that costs work or retries."""

import time

import pytest

from service.domain.errors import LeaseLost, Unavailable
from service.domain.job import JobStatus, Outcome, Reason
from service.domain.journal import Metrics
from service.scheduler import leadership, loop
from tests.contract.store_examples import is_led, lead
from tests.fake_cluster import make_node

DEADLINE_S = 10.0


def _step_until(scheduler, condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        scheduler.step()


class _BrokenStore:
    """Notes the calls on the way to a store, and breaks those that it is told to."""

    def __init__(self, store):
        self._store = store
        self.calls = []
        self.errors = {}

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def call(*args, **options):
            self.calls.append(name)
            errors = self.errors.get(name)
            if errors:
                raise errors.pop(0)
            return method(*args, **options)

        return call


def test_nothing_to_do_is_no_reason_to_hurry(house, scheduler):
    assert not scheduler.step()
    house.submit()
    assert scheduler.step()


def test_priority_comes_first_and_then_who_came_first(house, scheduler):
    house.cluster.alive = (make_node(cpus=1),)
    jobs = {name: house.submit(name=name, priority=priority) for name, priority in (("a", 0), ("b", 5), ("c", 5))}
    for name in ("b", "c", "a"):
        scheduler.step()
        assert house.store.get(jobs[name]).status is JobStatus.STARTING
        house.cluster.end(jobs[name], 1)
        scheduler.step()
    assert [job_id for job_id, _ in house.cluster.launched()] == [jobs["b"], jobs["c"], jobs["a"]]


def test_whoever_waits_is_told_why(house, scheduler):
    running = house.submit(name="running", workers=3)
    first = house.submit(name="first", workers=2)
    behind = house.submit(name="behind")
    huge = house.submit(name="huge", workers=16)
    scheduler.step()
    scheduler.step()
    assert house.store.get(running).status is JobStatus.STARTING
    assert house.store.get(first).message == "Needs 2 × (1 CPU) at once; 1 free. 1st in queue default."
    assert house.store.get(behind).message == (
        "Needs 1 × (1 CPU) at once; 1 free, held for jobs ahead of it. 2nd in queue default."
    )
    assert house.store.get(huge).message.startswith("Waits for a larger cluster: ")


def test_waiting_costs_no_writes_once_it_was_said(house):
    store = _BrokenStore(house.store)
    scheduler = house.scheduler(store=store)
    house.submit(workers=9)
    house.submit(workers=16)
    scheduler.step()
    assert store.calls.count("set_message") == 2
    scheduler.step()
    assert store.calls.count("set_message") == 2
    house.cluster.alive = (make_node(cpus=12),)
    scheduler.step()
    scheduler.step()
    assert len(house.cluster.launches) == 1


def test_the_nodes_are_recorded_as_they_come_and_go(house, scheduler):
    scheduler.step()
    assert [node.id for node in house.store.cluster().nodes] == ["node-a"]
    house.cluster.alive = (make_node("node-b"), make_node("node-c"))
    scheduler.step()
    assert [node.id for node in house.store.cluster().nodes] == ["node-b", "node-c"]


def test_the_nodes_are_not_asked_for_at_every_iteration(house, scheduler, monkeypatch):
    monkeypatch.setattr(loop, "NODES_INTERVAL_S", 1000.0)
    scheduler.step()
    house.cluster.alive = ()
    scheduler.step()
    assert [node.id for node in house.store.cluster().nodes] == ["node-a"]


def test_of_two_schedulers_one_leads(house):
    first, second = house.scheduler("first"), house.scheduler("second")
    job_id = house.submit()
    assert first.step()
    assert not second.step()
    assert not second.step()
    assert house.cluster.launched() == [(job_id, 1)]


def test_the_other_takes_over_once_the_lease_has_ended(house):
    first = house.scheduler("first", lease_ttl_s=0.3)
    second = house.scheduler("second", lease_ttl_s=0.3)
    job_id = house.start(first)
    assert not second.step()
    house.cluster.report(job_id, 1, Metrics.of(1, {"train/loss": 0.5}))
    # The first falls silent; the second goes on where it stopped, without a second launch.
    _step_until(second, lambda: house.store.metrics(job_id))
    assert not first.step()
    house.cluster.end(job_id, 1)
    second.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert house.cluster.launched() == [(job_id, 1)]


def test_a_leader_that_was_away_too_long_writes_nothing_and_steps_back(house, caplog):
    first = house.scheduler("first", lease_ttl_s=60.0)
    second = house.scheduler("second")
    first.step()
    house.store.release_lease(house.lease())
    lead(house.store, "second")
    job_id = house.submit()
    assert not first.step()  # believes that it still leads, and is refused
    assert "went to another" in caplog.text
    assert house.store.get(job_id).status is JobStatus.QUEUED
    assert house.cluster.launches == []
    second.step()
    assert house.cluster.launched() == [(job_id, 1)]


def test_a_lease_is_renewed_while_there_is_nothing_to_do(house):
    store, ttl_s = _BrokenStore(house.store), 1.0
    first = house.scheduler("first", store=store, lease_ttl_s=ttl_s)
    second = house.scheduler("second", lease_ttl_s=ttl_s)
    started_at = time.monotonic()
    while time.monotonic() - started_at < 1.4 * ttl_s:
        first.step()
        second.step()
    elapsed_s = time.monotonic() - started_at
    assert house.lease().holder == "first"
    # Three times in its life, not at every iteration.
    assert store.calls.count("renew_lease") <= elapsed_s / (ttl_s / leadership.RENEWALS_PER_TTL)


def test_supervisors_that_a_dead_leader_forgot_are_closed(house):
    first = house.scheduler("first")
    job_id, other = house.start(first), house.start(first)
    lease = house.lease()
    house.store.seal_attempt(
        lease, job_id, 1, outcome=Outcome.FAILED, reason=Reason.USER_ERROR, failure=None
    )  # and dies before it could close
    house.store.release_lease(lease)
    assert set(house.cluster.supervised()) == {(job_id, 1), (other, 1)}
    house.scheduler("second").step()
    assert house.cluster.supervised() == ((other, 1),)


def test_forgotten_supervisors_are_closed_even_if_the_cluster_did_not_answer_at_first(house):
    first = house.scheduler("first")
    job_id = house.start(first)
    lease = house.lease()
    house.store.seal_attempt(lease, job_id, 1, outcome=Outcome.FAILED, reason=Reason.USER_ERROR, failure=None)
    house.store.release_lease(lease)
    second = house.scheduler("second")
    house.cluster.is_unavailable = True
    second.step()
    house.cluster.is_unavailable = False
    second.step()
    assert house.cluster.supervised() == ()


def test_an_orderly_stop_queues_again_without_costing_a_retry(house, scheduler):
    running, starting = house.start(scheduler), house.submit()
    scheduler.step()
    queued = house.submit(workers=3)
    house.cluster.stops_at_once = True
    scheduler.stop_all(deadline_s=DEADLINE_S)
    for job_id in (running, starting):
        assert house.status(job_id) == (JobStatus.QUEUED, Reason.SERVICE_STOPPED)
        assert house.store.get(job_id).retries_used == 0
    assert house.store.get(queued).status is JobStatus.QUEUED
    assert house.cluster.supervised() == ()
    # The lease is free at once, and everything goes on from there.
    second = house.scheduler("second")
    second.step()
    assert house.cluster.launched()[-2:] == [(running, 2), (starting, 2)]


def test_an_orderly_stop_keeps_a_cancel(house, scheduler):
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    house.cluster.stops_at_once = True
    scheduler.stop_all(deadline_s=DEADLINE_S)
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)


def test_an_orderly_stop_that_a_supervisor_does_not_heed_ends_in_time(house, scheduler):
    job_id = house.start(scheduler)
    started_at = time.monotonic()
    scheduler.stop_all(deadline_s=0.3)
    assert time.monotonic() - started_at < DEADLINE_S
    assert house.store.get(job_id).status is JobStatus.RUNNING
    assert set(house.cluster.stop_reasons(job_id, 1)) == {Reason.SERVICE_STOPPED}
    assert not is_led(house.store)


def test_what_the_stop_of_the_service_killed_costs_no_retry_either(house, scheduler):
    job_id = house.start(scheduler)
    scheduler.stop_all(deadline_s=0.1)
    house.cluster.kill(job_id, 1)  # the grace was over
    second = house.scheduler("second")
    second.step()
    assert house.store.get(job_id).retries_used == 0
    assert house.cluster.launched()[-1] == (job_id, 2)


def test_an_orderly_stop_survives_a_database_that_stumbles(house):
    store = _BrokenStore(house.store)
    scheduler = house.scheduler(store=store)
    job_id = house.start(scheduler)
    house.cluster.stops_at_once = True
    for method in ("live_attempts", "mark_stopping", "seal_attempt"):
        store.errors[method] = [Unavailable("busy")]
    scheduler.stop_all(deadline_s=DEADLINE_S)
    assert house.status(job_id) == (JobStatus.QUEUED, Reason.SERVICE_STOPPED)
    assert not is_led(house.store)


def test_an_orderly_stop_without_the_lease_is_the_other_schedulers_business(house, scheduler):
    job_id = house.start(scheduler)
    house.store.release_lease(house.lease())
    lead(house.store, "second")
    scheduler.stop_all(deadline_s=DEADLINE_S)
    assert house.store.get(job_id).status is JobStatus.RUNNING
    assert house.cluster.stop_reasons(job_id, 1) == []
    assert house.lease().holder == "second"


def test_an_orderly_stop_takes_a_lease_again_that_only_ran_out(house):
    store = _BrokenStore(house.store)
    scheduler = house.scheduler(store=store)
    job_id = house.start(scheduler)
    house.cluster.stops_at_once = True
    store.errors["mark_stopping"] = [LeaseLost("it was not renewed in time")]
    scheduler.stop_all(deadline_s=DEADLINE_S)
    assert house.status(job_id) == (JobStatus.QUEUED, Reason.SERVICE_STOPPED)


def test_a_scheduler_that_never_led_stops_at_once(house):
    leader, other = house.scheduler("first"), house.scheduler("second")
    job_id = house.start(leader)
    other.step()
    other.stop_all(deadline_s=DEADLINE_S)
    assert house.cluster.stop_reasons(job_id, 1) == []
    assert house.lease().holder == "first"


def test_the_loop_waits_longer_when_there_is_nothing_to_do(house, scheduler):
    waits = []
    house.submit()

    def wait(timeout_s):
        waits.append(timeout_s)
        if len(waits) == 1:
            house.cluster.end(house.cluster.launches[0].job_id, 1)

    scheduler.run(wait, lambda: len(waits) == 3)
    assert waits == [loop.BUSY_INTERVAL_S, loop.BUSY_INTERVAL_S, loop.IDLE_INTERVAL_S]


@pytest.mark.parametrize("num_jobs", [20])
def test_many_jobs_come_through_on_little_room(house, scheduler, num_jobs):
    jobs = [house.submit(name=f"job {number}", workers=1 + number % 4) for number in range(num_jobs)]
    ended = set()
    deadline = time.monotonic() + DEADLINE_S
    while len(ended) < num_jobs:
        assert time.monotonic() < deadline
        scheduler.step()
        live = house.store.live_attempts()
        assert sum(entry.attempt.world_size for entry in live) <= 4
        for entry in live[:1]:
            house.cluster.run(entry.job.id, 1)
            house.cluster.end(entry.job.id, 1)
            ended.add(entry.job.id)
    scheduler.step()
    assert {house.store.get(job_id).status for job_id in jobs} == {JobStatus.SUCCEEDED}
    assert [job_id for job_id, _ in house.cluster.launched()] == jobs
