"""What keeps jobs waiting: queues, owners, other jobs, deadlines. A failure names the rule that a store breaks."""

import pytest

from service.domain.errors import InvalidSpec, InvalidTransition, NotFound, StaleWrite
from service.domain.job import JobStatus, Outcome, Reason
from service.domain.journal import Launched, Metrics, Running
from service.domain.placement import Resources
from service.domain.ports import HeldBack
from service.domain.queue import Queue, Quota
from tests.contract.store_examples import lead, make_spec, records

RESEARCH = Queue(name="research", weight=2.5, quota=Quota(gpus=8, cpus=0.5), quota_per_owner=Quota(jobs=1), paused=True)


@pytest.fixture
def lease(store):
    return lead(store)


def _end(store, lease, job_id, outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED):
    attempt = store.create_attempt(lease, job_id, node_ids=["a"])
    store.seal_attempt(lease, job_id, attempt.number, outcome=outcome, reason=reason, failure=None)


def test_there_is_a_default_queue(store):
    assert store.queues() == (Queue(name="default"),)


def test_a_queue_is_made_and_changed(store):
    assert store.put_queue(RESEARCH)
    assert store.queues() == (Queue(name="default"), RESEARCH)
    changed = RESEARCH.model_copy(update={"weight": 1.0, "quota": Quota(), "paused": False})
    assert not store.put_queue(changed)
    assert store.queues()[1] == changed


def test_a_queue_is_removed_once_its_jobs_have_ended(store, lease):
    store.put_queue(RESEARCH)
    job, _ = store.submit(make_spec(queue="research"))
    with pytest.raises(InvalidTransition, match="research"):
        store.remove_queue("research")
    store.request_cancel(job.id)
    store.remove_queue("research")
    assert store.queues() == (Queue(name="default"),)
    assert store.get(job.id).spec.queue == "research"
    with pytest.raises(NotFound, match="research"):
        store.remove_queue("research")


def test_a_job_is_resumed_only_while_its_queue_is_there(store):
    store.put_queue(RESEARCH)
    job, _ = store.submit(make_spec(queue="research"))
    cancelled = store.request_cancel(job.id)
    store.remove_queue("research")
    with pytest.raises(InvalidTransition, match="Queue research is gone"):
        store.resume(job.id)
    assert store.get(job.id) == cancelled
    store.put_queue(RESEARCH)
    assert store.resume(job.id).status is JobStatus.QUEUED
    with pytest.raises(InvalidTransition, match="research"):
        store.remove_queue("research")


def test_the_default_queue_stays(store):
    with pytest.raises(InvalidTransition, match="default"):
        store.remove_queue("default")


def test_a_job_names_a_queue_that_there_is(store):
    with pytest.raises(InvalidSpec) as caught:
        store.submit(make_spec(queue="nowhere"))
    assert [problem.field for problem in caught.value.problems] == ["queue"]
    assert store.list_jobs().jobs == ()


def test_a_queue_tells_what_is_in_it(store, lease):
    store.put_queue(RESEARCH)
    jobs = [store.submit(make_spec(queue="research"))[0] for _ in range(3)]
    store.create_attempt(lease, jobs[0].id, node_ids=["a"])
    states = {state.queue.name: (state.num_queued, state.num_live) for state in store.queue_states()}
    assert states == {"default": (0, 0), "research": (2, 1)}


def test_usage_is_kept(store, lease):
    store.put_queue(RESEARCH)
    assert store.queue_usage() == {"default": 0.0, "research": 0.0}
    store.record_usage(lease, {"research": 12.5, "gone": 1.0})
    assert store.queue_usage() == {"default": 0.0, "research": 12.5}
    store.put_queue(RESEARCH)  # its settings are another matter
    assert [state.usage_s for state in store.queue_states()] == [0.0, 12.5]


def test_a_job_has_an_owner(store):
    job, _ = store.submit(make_spec(), owner="ada")
    assert (job.owner, store.get(job.id).owner) == ("ada", "ada")
    assert store.submit(make_spec())[0].owner == "default"


def test_a_held_job_waits_until_it_is_resumed(store, lease):
    job, _ = store.submit(make_spec(hold=True))
    assert (job.status, job.reason) == (JobStatus.PAUSED, Reason.HELD)
    assert store.queued_jobs() == ()
    assert store.events(job.id)[0].data == {"from": None, "to": "paused"}
    store.resume(job.id)
    assert [one.id for one in store.queued_jobs()] == [job.id]


def test_a_job_comes_after_others(store, lease):
    first, second = (store.submit(make_spec())[0] for _ in range(2))
    last, _ = store.submit(make_spec(after=[second.id, first.id]))
    assert store.held_back() == {last.id: HeldBack(waits_for=(first.id, second.id))}
    _end(store, lease, first.id)
    assert store.held_back() == {last.id: HeldBack(waits_for=(second.id,))}
    _end(store, lease, second.id)
    assert store.held_back() == {}
    assert store.fail_hopeless(lease) == ()


def test_a_job_after_one_that_fails_fails(store, lease):
    first, _ = store.submit(make_spec())
    last, _ = store.submit(make_spec(after=[first.id]))
    _end(store, lease, first.id, Outcome.FAILED, Reason.USER_ERROR)
    assert store.fail_hopeless(lease) == (last.id,)
    job = store.get(last.id)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.DEPENDENCY_FAILED)
    assert store.fail_hopeless(lease) == ()
    # Both may be mended.
    store.resume(first.id)
    store.resume(last.id)
    assert store.held_back() == {last.id: HeldBack(waits_for=(first.id,))}


def test_many_jobs_after_one_that_fails_fail_a_few_at_a_time(store, lease):
    first, _ = store.submit(make_spec())
    waiting = [future.result()[0].id for future in [store.submit_soon(make_spec(after=[first.id])) for _ in range(450)]]
    _end(store, lease, first.id, Outcome.FAILED, Reason.USER_ERROR)
    failed = []
    while some := store.fail_hopeless(lease):
        assert len(some) <= 200
        failed += some
    assert failed == waiting
    assert store.queued_jobs() == ()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_job_cannot_come_after_one_that_will_not_succeed(store, is_there):
    first, _ = store.submit(make_spec())
    store.request_cancel(first.id)
    other, _ = store.submit(make_spec())
    with pytest.raises(InvalidSpec) as caught:
        store.submit(make_spec(after=[other.id, first.id if is_there else "job-unknown"]))
    assert [problem.field for problem in caught.value.problems] == ["after.1"]


def test_a_dry_run_is_told_what_submitting_would_say(store, lease):
    first, second = (store.submit(make_spec())[0] for _ in range(2))
    spec = make_spec(after=[second.id, first.id])
    assert store.unfinished_before(make_spec()) == ()
    assert store.unfinished_before(spec) == (first.id, second.id)
    _end(store, lease, first.id)
    assert store.unfinished_before(spec) == (second.id,)
    store.request_cancel(second.id)
    for refused, field in ((spec, "after.0"), (make_spec(queue="nowhere"), "queue")):
        with pytest.raises(InvalidSpec) as caught:
            store.unfinished_before(refused)
        assert [problem.field for problem in caught.value.problems] == [field]
        with pytest.raises(InvalidSpec) as submitted:
            store.submit(refused)
        assert caught.value.problems == submitted.value.problems
    assert len(store.list_jobs().jobs) == 2


def test_a_job_that_does_not_start_in_time_fails(store, lease):
    late, _ = store.submit(make_spec(start_deadline_s=1e-6))
    other, _ = store.submit(make_spec(start_deadline_s=1000.0))
    assert store.fail_hopeless(lease) == (late.id,)
    assert (store.get(late.id).status, store.get(late.id).reason) == (JobStatus.FAILED, Reason.START_DEADLINE)
    assert store.get(other.id).status is JobStatus.QUEUED


def test_a_job_that_has_started_meets_its_deadline_whatever_becomes_of_it(store, lease):
    job, _ = store.submit(make_spec(start_deadline_s=1e-6))
    attempt = store.create_attempt(lease, job.id, node_ids=["a"])
    store.ingest(lease, job.id, 1, records(Launched(supervisor_pid=1), Running(num_steps=3)))
    store.seal_attempt(lease, job.id, attempt.number, outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=None)
    assert store.get(job.id).status is JobStatus.QUEUED
    assert store.fail_hopeless(lease) == ()


def test_a_preempted_job_is_queued_again_and_keeps_its_retries(store, lease):
    job, _ = store.submit(make_spec())
    store.create_attempt(lease, job.id, node_ids=["a"])
    store.mark_preempting(lease, job.id, 1, message="Asked to stop: for another.")
    assert store.attempts(job.id)[0].stop_reason is Reason.PREEMPTED
    assert store.get(job.id).status is JobStatus.STARTING
    sealed = store.seal_attempt(lease, job.id, 1, outcome=Outcome.STOPPED, reason=Reason.PREEMPTED, failure=None)
    assert (sealed.status, sealed.reason) == (JobStatus.QUEUED, Reason.PREEMPTED)
    assert (sealed.preemptions_used, sealed.retries_used) == (1, 0)
    assert store.attempts(job.id)[0].reason is Reason.PREEMPTED
    with pytest.raises(StaleWrite):
        store.mark_preempting(lease, job.id, 1, message="Too late.")


def test_what_an_owner_asks_outranks_a_preemption(store, lease):
    job, _ = store.submit(make_spec())
    store.create_attempt(lease, job.id, node_ids=["a"])
    store.request_cancel(job.id)
    store.mark_preempting(lease, job.id, 1, message="Asked to stop: for another.")
    assert store.attempts(job.id)[0].stop_reason is None
    other, _ = store.submit(make_spec())
    store.create_attempt(lease, other.id, node_ids=["a"])
    store.mark_preempting(lease, other.id, 1, message="Asked to stop: for another.")
    store.request_cancel(other.id)
    store.mark_stopping(lease, other.id, 1, Reason.CANCEL_REQUESTED)
    sealed = store.seal_attempt(
        lease, other.id, 1, outcome=Outcome.STOPPED, reason=Reason.CANCEL_REQUESTED, failure=None
    )
    assert (sealed.status, sealed.preemptions_used) == (JobStatus.CANCELLED, 0)


def test_an_attempt_knows_the_last_step_that_it_reported(store, lease):
    job, _ = store.submit(make_spec())
    store.create_attempt(lease, job.id, node_ids=["a"])
    assert store.attempts(job.id)[0].step is None
    first = records(Launched(supervisor_pid=1), Running(num_steps=9), *(Metrics.of(s, {"a": 1.0}) for s in (1, 2)))
    store.ingest(lease, job.id, 1, first)
    store.ingest(lease, job.id, 1, records(*(Metrics.of(s, {"a": 1.0}) for s in (3, 3)), first=len(first) + 1))
    assert store.attempts(job.id)[0].step == 3


@pytest.mark.parametrize(
    ("quota", "more", "exceeded"),
    [
        (Quota(), Resources(cpus=1e6, gpus=10**6, memory_bytes=10**15), None),
        (Quota(cpus=0.3), Resources(cpus=0.1), None),  # 3 × 0.1 are within 0.3
        (Quota(cpus=0.3), Resources(cpus=0.2), "cpus"),
        (Quota(gpus=8), Resources(gpus=1), "gpus"),
        (Quota(gpus=4), Resources(cpus=1), None),  # lowered meanwhile; no GPU is asked for
        (Quota(memory_bytes=10), Resources(memory_bytes=1), "memory_bytes"),
        (Quota(jobs=1), Resources(cpus=1), "jobs"),
    ],
)
def test_a_quota_names_the_limit_that_is_exceeded(quota, more, exceeded):
    held = Resources(cpus=0.2, gpus=8, memory_bytes=10)
    assert quota.first_exceeded(held, 1, more, 1) == exceeded


def test_one_more_worker_is_not_one_more_job():
    held, more = Resources(cpus=1), Resources(cpus=1)
    assert Quota(jobs=1).first_exceeded(held, 2, more, 0) is None
