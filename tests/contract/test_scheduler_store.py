"""What the scheduler may expect of any ``SchedulerStore``. A failure names a promise that an implementation breaks."""

import random
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain.errors import LeaseLost, NotFound, StaleWrite
from service.domain.job import AttemptStatus, Failure, JobStatus, Outcome, Reason
from service.domain.journal import (
    CheckpointQuarantined,
    ExactnessFound,
    JournalRecord,
    Launched,
    Metrics,
    Placed,
    Resumed,
    Running,
    Warned,
)
from service.domain.placement import Node, Resources
from service.domain.ports import Lease, LeaseState
from service.domain.queue import Queue
from tests.contract.store_examples import (
    START,
    checkpoint,
    ended,
    feed_of,
    lead,
    loss,
    make_spec,
    records,
    run,
    start,
    steps,
)

FAILURE = Failure(rank=1, error_type="ValueError", message="no such class: 11", traceback="Traceback …")


def seal(store, lease, job, outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=None):
    return store.seal_attempt(lease, job.id, job.attempt, outcome=outcome, reason=reason, failure=failure)


# The lease


def test_nobody_leads_at_first(any_store):
    assert any_store.read_lease().holder is None


def test_a_lease_that_is_as_it_was_seen_is_taken_and_no_other(any_store):
    free = any_store.read_lease()
    first = any_store.take_lease("a", seen=free)
    assert any_store.take_lease("b", seen=free) is None
    held = any_store.read_lease()
    assert held == LeaseState(holder="a", epoch=first.epoch, num_renewals=0)
    assert any_store.read_lease() == held
    second = any_store.take_lease("b", seen=held)
    assert second.holder == "b"
    assert second.epoch > first.epoch
    assert any_store.take_lease("a", seen=held) is None


def test_a_renewal_shows_and_keeps_others_out_that_saw_less(any_store):
    lease = lead(any_store, "a")
    seen = any_store.read_lease()
    any_store.renew_lease(lease)
    assert any_store.read_lease() == replace(seen, num_renewals=seen.num_renewals + 1)
    assert any_store.take_lease("b", seen=seen) is None
    any_store.record_nodes(lease, [])


def test_a_released_lease_is_nobodys_and_its_epoch_never_comes_back(any_store):
    first = lead(any_store, "a")
    before = any_store.read_lease()
    any_store.release_lease(first)
    assert any_store.read_lease().holder is None
    assert any_store.take_lease("b", seen=before) is None
    second = lead(any_store, "b")
    assert second.epoch > first.epoch
    any_store.release_lease(first)  # late, by one who lost it: nothing
    assert any_store.read_lease().holder == "b"


def test_a_lease_that_was_lost_cannot_be_renewed(any_store):
    lost, released = lead(any_store, "a"), lead(any_store, "b")
    with pytest.raises(LeaseLost, match="a no longer leads"):
        any_store.renew_lease(lost)
    any_store.release_lease(released)
    with pytest.raises(LeaseLost):
        any_store.renew_lease(released)
    with pytest.raises(LeaseLost):
        any_store.record_nodes(released, [])


def test_every_write_needs_a_current_lease(store):
    stale = lead(store)
    job = run(store, stale, checkpoint(1))
    queued, _ = store.submit(make_spec())
    store.release_lease(stale)
    current = lead(store, "scheduler-2")
    forged = Lease(holder="scheduler-1", epoch=current.epoch)
    before = (store.get(job.id), store.get(queued.id), store.attempts(job.id), store.events(job.id))
    for lease in (stale, forged):
        for write in (
            lambda lease=lease: store.renew_lease(lease),
            lambda lease=lease: store.record_nodes(lease, []),
            lambda lease=lease: store.create_attempt(lease, queued.id, node_ids=["n"]),
            lambda lease=lease: store.set_message(lease, queued.id, "other"),
            lambda lease=lease: store.ingest(lease, job.id, 1, records(loss(2), first=5)),
            lambda lease=lease: store.mark_stopping(lease, job.id, 1, Reason.CANCEL_REQUESTED),
            lambda lease=lease: seal(store, lease, job),
            lambda lease=lease: store.mark_resizing(lease, job.id, 1, node_ids=["n"], message=""),
            lambda lease=lease: store.retire_checkpoint(lease, job.id, 1, 1),
            lambda lease=lease: store.forget_checkpoint(lease, job.id, 1, 1),
        ):
            with pytest.raises(LeaseLost, match="scheduler-1"):
                write()
    assert (store.get(job.id), store.get(queued.id), store.attempts(job.id), store.events(job.id)) == before
    assert len(store.checkpoints(job.id)) == 1
    assert store.cluster().observed_at is None


# The cluster


def test_the_nodes_are_those_that_were_seen_last(store):
    lease = lead(store)
    nodes = [
        Node(id="n1", address="10.0.0.1", total=Resources(cpus=1.5, gpus=2, memory_bytes=2**40)),
        Node(id="n2", address="10.0.0.2", total=Resources(cpus=4)),
    ]
    store.record_nodes(lease, nodes)
    seen = store.cluster()
    assert seen.nodes == tuple(nodes)
    store.record_nodes(lease, nodes[:1])
    assert store.cluster().nodes == (nodes[0],)
    assert store.cluster().observed_at >= seen.observed_at


# The queue


def test_the_queue_is_by_priority_then_first_come(store):
    lease = lead(store)
    ids = [store.submit(make_spec(priority=priority))[0].id for priority in (0, 5, -5, 5, 0)]
    assert [job.id for job in store.queued_jobs()] == [ids[place] for place in (1, 3, 0, 4, 2)]
    assert [job.id for job in store.queued_jobs(limit=2)] == [ids[1], ids[3]]
    started = start(store, lease, job=store.get(ids[1]))
    store.request_cancel(ids[3])
    assert [job.id for job in store.queued_jobs()] == [ids[place] for place in (0, 4, 2)]
    seal(store, lease, started)
    assert store.queued_jobs(limit=1)[0].id == ids[1]  # lost its worker, not its place


def test_a_long_queue_hides_no_other(store):
    store.put_queue(Queue(name="other"))
    long = [store.submit(make_spec(priority=5))[0].id for _ in range(3)]
    other = store.submit(make_spec(queue="other"))[0].id
    assert [job.id for job in store.queued_jobs(limit=2)] == [*long[:2], other]


def test_jobs_that_may_not_start_hide_none_that_may(store):
    lease = lead(store)
    first = store.submit(make_spec())[0].id
    start(store, lease, job=store.get(first))
    waits = [store.submit(make_spec(after=[first], priority=9))[0].id for _ in range(2)]
    free = store.submit(make_spec())[0].id
    assert [job.id for job in store.queued_jobs(limit=2)] == [waits[0], free]
    assert [job.id for job in store.queued_jobs(limit=3)] == [*waits, free]


def test_the_queue_is_read_as_it_is_by_now(store):
    job, _ = store.submit(make_spec())
    lease = lead(store)
    assert store.queued_jobs() == (job,)
    store.set_message(lease, job.id, "Waits for a larger cluster.")
    assert store.queued_jobs() == (store.get(job.id),)
    assert store.queued_jobs()[0].message == "Waits for a larger cluster."


def test_a_waiting_job_says_why(store):
    lease = lead(store)
    job, _ = store.submit(make_spec())
    store.set_message(lease, job.id, "needs 8 GPUs; 4 are free")
    assert store.get(job.id).message == "needs 8 GPUs; 4 are free"
    assert len(store.events(job.id)) == 1
    started = start(store, lease, job=job)
    store.set_message(lease, job.id, "late")
    assert store.get(job.id) == started


# Attempts


def test_an_attempt_starts_a_queued_job(store):
    lease = lead(store)
    job, _ = store.submit(make_spec())
    attempt = store.create_attempt(lease, job.id, node_ids=["n1", "n1", "n2"])
    assert store.attempts(job.id) == (attempt,)
    assert (attempt.number, attempt.status, attempt.world_size) == (1, AttemptStatus.CREATED, 3)
    assert attempt.node_ids == ("n1", "n1", "n2")
    assert (attempt.last_sequence, attempt.resumed_from_step, attempt.outcome) == (0, None, None)
    job = store.get(job.id)
    assert (job.status, job.reason, job.attempt) == (JobStatus.STARTING, Reason.ADMITTED, 1)
    assert job.started_at is None
    assert {event.kind for event in store.events(job.id, after=1)} >= {"status"}


def test_only_a_queued_job_starts(store):
    lease = lead(store)
    job = start(store, lease)
    assert store.create_attempt(lease, job.id, node_ids=["n"]) is None
    cancelled, _ = store.submit(make_spec())
    store.request_cancel(cancelled.id)
    assert store.create_attempt(lease, cancelled.id, node_ids=["n"]) is None
    with pytest.raises(NotFound):
        store.create_attempt(lease, "job-none", node_ids=["n"])


def test_live_attempts_are_those_that_were_not_sealed(store):
    lease = lead(store)
    store.submit(make_spec())
    starting, running, over = start(store, lease), run(store, lease), run(store, lease, ended())
    lost = run(store, lease)
    seal(store, lease, lost)
    live = store.live_attempts()
    assert [(entry.job.id, entry.attempt.status) for entry in live] == [
        (starting.id, AttemptStatus.CREATED),
        (running.id, AttemptStatus.RUNNING),
        (over.id, AttemptStatus.ENDED),
    ]
    assert all(entry.job == store.get(entry.job.id) for entry in live)
    assert all((entry.attempt,) == store.attempts(entry.job.id) for entry in live)


# The journal


def test_an_attempt_goes_through_its_statuses(store):
    lease = lead(store)
    job = start(store, lease)
    expected = [
        (Launched(supervisor_pid=7), AttemptStatus.LAUNCHED, JobStatus.STARTING),
        (Resumed(step=0), AttemptStatus.LAUNCHED, JobStatus.STARTING),
        (Placed(node_ids=("n1", "n2"), pids=(10, 11)), AttemptStatus.LAUNCHED, JobStatus.STARTING),
        (Running(num_steps=100), AttemptStatus.RUNNING, JobStatus.RUNNING),
        (ended(), AttemptStatus.ENDED, JobStatus.RUNNING),
    ]
    for sequence, (report, attempt_status, job_status) in enumerate(expected, start=1):
        store.ingest(lease, job.id, 1, records(report, first=sequence))
        (attempt,) = store.attempts(job.id)
        assert (attempt.status, store.get(job.id).status) == (attempt_status, job_status)
        assert attempt.last_sequence == sequence
    assert attempt.node_ids == ("n1", "n2")
    assert attempt.resumed_from_step == 0
    assert attempt.running_at == START + timedelta(seconds=4)
    assert attempt.ended_at == START + timedelta(seconds=5)
    assert (attempt.outcome, attempt.reason) == (Outcome.SUCCEEDED, Reason.COMPLETED)
    job = store.get(job.id)
    assert (job.reason, job.num_steps) == (Reason.ALL_RANKS_STEPPED, 100)
    assert job.started_at == attempt.running_at


def test_running_does_not_undo_stopping(store):
    lease = lead(store)
    job = start(store, lease)
    store.mark_stopping(lease, job.id, 1, Reason.CANCEL_REQUESTED)
    store.ingest(lease, job.id, 1, records(Launched(supervisor_pid=7), Resumed(step=0), Running(num_steps=100)))
    assert store.get(job.id).status is JobStatus.STOPPING
    assert store.attempts(job.id)[0].status is AttemptStatus.RUNNING


def test_known_records_are_skipped(store):
    lease = lead(store)
    job = run(store, lease, loss(1))
    before = feed_of(store, job.id)
    reports = [Launched(supervisor_pid=1), Resumed(step=0), Running(num_steps=100), loss(1), loss(2)]
    store.ingest(lease, job.id, 1, records(*reports[:4]))
    assert feed_of(store, job.id) == before
    store.ingest(lease, job.id, 1, records(*reports[2:], first=3))
    assert steps(store.metrics(job.id)) == [1, 2]
    store.ingest(lease, job.id, 1, [])
    assert store.attempts(job.id)[0].last_sequence == 5


def test_a_gap_is_refused_and_nothing_is_taken(store):
    lease = lead(store)
    job = run(store, lease)
    before = (store.get(job.id), feed_of(store, job.id), store.attempts(job.id))
    with pytest.raises(ValueError, match="5"):
        store.ingest(lease, job.id, 1, records(loss(1), first=5))
    with pytest.raises(ValueError, match="6"):
        store.ingest(lease, job.id, 1, [*records(loss(1), first=4), *records(loss(2), first=6)])
    assert (store.get(job.id), feed_of(store, job.id), store.attempts(job.id)) == before


def test_only_the_current_attempt_is_taken_from(store):
    lease = lead(store)
    job = run(store, lease)
    seal(store, lease, job)
    start(store, lease, job=job)
    before = (store.get(job.id), feed_of(store, job.id), store.attempts(job.id))
    for number in (0, 1, 3):
        with pytest.raises(StaleWrite):
            store.ingest(lease, job.id, number, records(loss(9), first=4))
        with pytest.raises(StaleWrite):
            store.mark_stopping(lease, job.id, number, Reason.CANCEL_REQUESTED)
        with pytest.raises(StaleWrite):
            store.mark_resizing(lease, job.id, number, node_ids=["n"], message="")
    assert (store.get(job.id), feed_of(store, job.id), store.attempts(job.id)) == before


def test_nothing_is_taken_from_a_sealed_attempt(store):
    lease = lead(store)
    job = run(store, lease)
    seal(store, lease, job)
    with pytest.raises(StaleWrite):
        store.ingest(lease, job.id, 1, records(loss(1), first=4))
    assert store.metrics(job.id) == ()


def test_the_step_of_a_job_follows_its_reports(store):
    lease = lead(store)
    job = run(store, lease, loss(1), loss(7))
    assert job.step == 7
    store.ingest(lease, job.id, 1, records(Metrics.of(5, {"eval/accuracy": 1.0}), first=6))
    assert store.get(job.id).step == 7  # an evaluation that finished late
    store.ingest(lease, job.id, 1, records(checkpoint(8), ended(step=9), first=7))
    assert store.get(job.id).step == 9


def test_resuming_supersedes_what_came_after(store):
    lease = lead(store)
    job = run(store, lease, *(loss(step) for step in range(1, 4)), checkpoint(3), loss(4), checkpoint(4), loss(5))
    seal(store, lease, job)
    assert store.get(job.id).step == 5
    job = start(store, lease, job=job)
    store.ingest(lease, job.id, 2, records(Launched(supervisor_pid=2)))
    assert steps(store.metrics(job.id)) == [1, 2, 3, 4, 5]
    store.ingest(lease, job.id, 2, records(Resumed(step=3), first=2))
    assert store.get(job.id).step == 3
    assert steps(store.metrics(job.id)) == [1, 2, 3]
    assert steps(store.checkpoints(job.id)) == [3]
    assert store.attempts(job.id)[1].resumed_from_step == 3
    store.ingest(lease, job.id, 2, records(loss(4, 2.0), checkpoint(4, attempt=2), first=3))
    assert [(point.step, point.attempt, point.value) for point in store.metrics(job.id, after_step=3)] == [(4, 2, 2.0)]
    assert [(found.step, found.attempt) for found in store.checkpoints(job.id)] == [(3, 1), (4, 2)]


def test_of_a_step_that_was_reported_twice_the_later_report_counts(store):
    lease = lead(store)
    job = run(store, lease, Metrics.of(3, {"train/loss": 1.0, "train/lr": 0.1}), checkpoint(3))
    seal(store, lease, job)
    run(store, lease, loss(3, 2.0), checkpoint(3, attempt=2), job=job, resume=3)
    points = [(point.name, point.attempt, point.value) for point in store.metrics(job.id)]
    assert points == [("train/loss", 2, 2.0), ("train/lr", 1, 0.1)]
    assert [(found.step, found.attempt) for found in store.checkpoints(job.id)] == [(3, 2)]


def test_training_and_evaluation_of_one_step_both_count(store):
    job = run(store, lead(store), loss(5), Metrics.of(5, {"eval/accuracy": 0.5}))
    assert [point.name for point in store.metrics(job.id)] == ["eval/accuracy", "train/loss"]


def test_a_quarantined_checkpoint_is_neither_listed_nor_resumed_from(store):
    lease = lead(store)
    job = run(store, lease, checkpoint(1), checkpoint(2), checkpoint(3))
    assert steps(store.resumable_checkpoints(job.id)) == [3, 2, 1]
    seal(store, lease, job)
    start(store, lease, job=job)
    torn = CheckpointQuarantined(step=3, message="model.safetensors: SHA-256 differs")
    store.ingest(lease, job.id, 2, records(Launched(supervisor_pid=1), torn, Resumed(step=2)))
    assert steps(store.resumable_checkpoints(job.id)) == [2, 1]
    assert steps(store.checkpoints(job.id)) == [1, 2]
    event = next(event for event in store.events(job.id) if event.kind == "checkpoint_quarantined")
    assert (event.message, event.data["step"], event.attempt) == (torn.message, 3, 2)
    store.ingest(lease, job.id, 2, records(checkpoint(3, attempt=2), first=4))
    assert [(found.step, found.attempt) for found in store.resumable_checkpoints(job.id)] == [(3, 2), (2, 1), (1, 1)]


def test_a_forgotten_checkpoint_is_gone(store):
    lease = lead(store)
    job = run(store, lease, checkpoint(1), checkpoint(2))
    store.forget_checkpoint(lease, job.id, 1, 1)
    store.forget_checkpoint(lease, job.id, 1, 1)
    store.forget_checkpoint(lease, job.id, 2, 2)
    assert steps(store.resumable_checkpoints(job.id)) == [2]


def test_a_warning_is_an_event(store):
    job = run(store, lead(store), Warned(message="rank 3 is slow\0", rank=3))
    event = store.events(job.id)[-1]
    assert (event.kind, event.data["rank"]) == ("warning", 3)
    assert event.message.startswith("rank 3 is slow")


def test_a_job_says_what_makes_it_depend_on_its_workers(store):
    lease = lead(store)
    inexact = ExactnessFound(exact=False, reasons=("norm.kind is local.",))
    job = run(store, lease, inexact)
    found = store.get(job.id)
    assert found.exact is False
    assert "norm.kind is local." in found.exactness
    event = store.events(job.id)[-1]
    assert (event.kind, event.data) == ("exactness", {"exact": False, "reasons": ["norm.kind is local."]})
    store.ingest(lease, job.id, 1, records(ExactnessFound(exact=True, reasons=()), first=5))
    assert store.get(job.id).exact is True


# Stopping and sealing


@pytest.mark.parametrize("reason", [Reason.CANCEL_REQUESTED, Reason.TIMEOUT])
def test_an_attempt_that_is_asked_to_stop_has_a_stopping_job(store, reason):
    lease = lead(store)
    job = run(store, lease)
    store.mark_stopping(lease, job.id, 1, reason)
    job = store.get(job.id)
    assert (job.status, job.reason) == (JobStatus.STOPPING, reason)
    assert store.attempts(job.id)[0].stop_reason is reason
    assert store.events(job.id)[-1].data == {"from": "running", "to": "stopping"}
    events = store.events(job.id)
    store.mark_stopping(lease, job.id, 1, reason)
    assert (store.get(job.id), store.events(job.id)) == (job, events)


def test_a_service_that_stops_leaves_the_job_running_and_then_queued(store):
    lease = lead(store)
    job = run(store, lease, loss(4), checkpoint(4))
    store.mark_stopping(lease, job.id, 1, Reason.SERVICE_STOPPED)
    assert store.get(job.id).status is JobStatus.RUNNING
    assert store.attempts(job.id)[0].stop_reason is Reason.SERVICE_STOPPED
    job = seal(store, lease, job, Outcome.STOPPED, Reason.SERVICE_STOPPED)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.QUEUED, Reason.SERVICE_STOPPED, 0)


def test_success(store):
    lease = lead(store)
    job = run(store, lease, ended(step=100))
    done = seal(store, lease, job, Outcome.SUCCEEDED, Reason.COMPLETED)
    assert done == store.get(job.id)
    assert (done.status, done.reason, done.failure) == (JobStatus.SUCCEEDED, Reason.COMPLETED, None)
    assert done.ended_at is not None
    (attempt,) = store.attempts(job.id)
    assert attempt.status is AttemptStatus.SEALED
    assert attempt.ended_at == START + timedelta(seconds=4)  # as it said itself
    assert store.events(job.id)[-1].data == {"from": "running", "to": "succeeded"}


@pytest.mark.parametrize("journalled", [True, False])
def test_a_failed_job_carries_the_failure_of_its_attempt(store, journalled):
    lease = lead(store)
    last = [ended(Outcome.FAILED, Reason.USER_ERROR, failure=FAILURE)] if journalled else []
    job = run(store, lease, *last)
    job = seal(store, lease, job, Outcome.FAILED, Reason.USER_ERROR, FAILURE)
    assert (job.status, job.reason, job.failure) == (JobStatus.FAILED, Reason.USER_ERROR, FAILURE)
    assert FAILURE.message in job.message
    assert store.attempts(job.id)[0].failure == FAILURE
    assert store.get(job.id) == job


def test_sealing_twice_changes_nothing(store):
    lease = lead(store)
    job = run(store, lease)
    sealed = seal(store, lease, job)
    before = (feed_of(store, job.id), store.attempts(job.id))
    again = store.seal_attempt(lease, job.id, 1, outcome=Outcome.FAILED, reason=Reason.USER_ERROR, failure=FAILURE)
    assert again == sealed
    assert (feed_of(store, job.id), store.attempts(job.id)) == before


def test_a_lost_attempt_is_retried_within_the_budget(store):
    lease = lead(store)
    job, _ = store.submit(make_spec(retry={"budget": 1}))
    job = seal(store, lease, run(store, lease, job=job), Outcome.LOST, Reason.NODE_LOST, FAILURE)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.QUEUED, Reason.NODE_LOST, 1)
    assert job.ended_at is None
    job = seal(store, lease, run(store, lease, job=job), Outcome.LOST, Reason.RANK_LOST, FAILURE)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED, 1)
    assert job.failure == FAILURE
    assert [attempt.reason for attempt in store.attempts(job.id)] == [Reason.NODE_LOST, Reason.RANK_LOST]


def test_a_second_retry_is_held_back_for_its_pause(store):
    lease = lead(store)
    job, _ = store.submit(make_spec(retry={"budget": 3, "backoff_s": 1000.0}))
    job = seal(store, lease, run(store, lease, job=job), Outcome.LOST, Reason.RANK_LOST, FAILURE)
    assert (job.not_before, job.message) == (
        None,
        "Attempt 1 ended (rank_lost). Waits to be placed for retry 1 of 3.",
    )
    assert store.held_back() == {}
    job = seal(store, lease, run(store, lease, job=job), Outcome.LOST, Reason.NODE_LOST, FAILURE)
    assert job.message == "Waits 1000 s before retry 2 of 3 (node_lost)."
    assert store.get(job.id).not_before is not None
    # To within what a busy machine takes between two calls.
    assert 900 < store.held_back()[job.id].retry_in_s <= 1000
    told = [event for event in store.events(job.id) if event.kind == "retry"]
    assert [event.reason for event in told] == [Reason.RANK_LOST, Reason.NODE_LOST]
    assert told[1].data == {"retry": 2, "budget": 3, "pause_s": 1000.0}
    assert told[1].message == job.message
    # What its owner asks for does not wait.
    assert store.request_pause(job.id).status is JobStatus.PAUSED
    assert store.get(job.id).not_before is None
    assert store.resume(job.id).not_before is None
    assert store.held_back() == {}


def _fail_at(store, lease, job, step, reason=Reason.RANK_LOST):
    attempt = store.create_attempt(lease, job.id, node_ids=["a"])
    reports = [Launched(supervisor_pid=1), Running(num_steps=100), loss(step)]
    store.ingest(lease, job.id, attempt.number, records(*reports))
    return store.seal_attempt(lease, job.id, attempt.number, outcome=Outcome.LOST, reason=reason, failure=FAILURE)


def test_a_job_that_fails_three_times_running_at_one_step_is_not_tried_again(store):
    lease = lead(store)
    job, _ = store.submit(make_spec(retry={"budget": 100, "backoff_s": 0.0}))
    for step, reason in ((9, Reason.RANK_LOST), (7, Reason.RANK_LOST), (7, Reason.RANK_LOST)):
        job = _fail_at(store, lease, job, step, reason)
    assert [attempt.step for attempt in store.attempts(job.id)] == [9, 7, 7]
    job = _fail_at(store, lease, job, 7, Reason.NODE_LOST)  # no failure of the job's own: says nothing
    assert (job.status, job.reason) == (JobStatus.QUEUED, Reason.NODE_LOST)
    job = _fail_at(store, lease, job, 7)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.FAILED, Reason.REPEATED_FAILURE, 4)
    assert job.failure == FAILURE
    # Once resumed, it is counted anew.
    store.resume(job.id)
    for _ in range(2):
        job = _fail_at(store, lease, job, 7)
        assert (job.status, job.reason) == (JobStatus.QUEUED, Reason.RANK_LOST)
    job = _fail_at(store, lease, job, 7)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.REPEATED_FAILURE)


def test_a_job_that_is_stopping_is_cancelled_whatever_ends_its_attempt(store):
    lease = lead(store)
    for outcome in (Outcome.STOPPED, Outcome.LOST, Outcome.FAILED):
        job = run(store, lease)
        store.request_cancel(job.id)
        store.mark_stopping(lease, job.id, 1, Reason.CANCEL_REQUESTED)
        job = seal(store, lease, job, outcome, Reason.RANK_LOST)
        assert (job.status, job.reason, job.cancel_requested) == (JobStatus.CANCELLED, Reason.CANCELLED, False)


@pytest.mark.parametrize("status", [JobStatus.STARTING, JobStatus.RUNNING])
def test_a_cancel_that_no_one_acted_on_yet_is_not_run_again(store, status):
    lease = lead(store)
    job = start(store, lease) if status is JobStatus.STARTING else run(store, lease)
    store.request_cancel(job.id)
    job = seal(store, lease, job)
    assert (job.status, job.cancel_requested) == (JobStatus.CANCELLED, False)
    changes = [event.data for event in store.events(job.id) if event.kind == "status"]
    assert changes[-2:] == [{"from": status, "to": "stopping"}, {"from": "stopping", "to": "cancelled"}]


def test_success_comes_before_a_cancel_that_was_too_late(store):
    lease = lead(store)
    job = run(store, lease)
    store.request_cancel(job.id)
    job = seal(store, lease, job, Outcome.SUCCEEDED, Reason.COMPLETED)
    assert (job.status, job.cancel_requested) == (JobStatus.SUCCEEDED, False)


def test_running_time_is_summed_over_attempts(store):
    lease = lead(store)
    job = run(store, lease, loss(1), ended(Outcome.LOST, Reason.RANK_LOST))  # running at second 3, ended at 5
    job = seal(store, lease, job)
    assert job.running_s == 2.0
    first_started = job.started_at
    assert first_started == START + timedelta(seconds=3)
    job = start(store, lease, job=job)
    job = seal(store, lease, job)  # never ran
    assert job.running_s == 2.0
    job = run(store, lease, loss(1), loss(2), loss(3), ended(Outcome.STOPPED, Reason.TIMEOUT), job=job)  # 3 to 7
    store.mark_stopping(lease, job.id, 3, Reason.TIMEOUT)
    job = seal(store, lease, job, Outcome.STOPPED, Reason.TIMEOUT)
    assert (job.status, job.reason) == (JobStatus.FAILED, Reason.TIMEOUT)
    assert job.running_s == 6.0
    assert job.started_at == first_started


def test_an_attempt_that_the_job_does_not_have_cannot_be_sealed(store):
    lease = lead(store)
    job = start(store, lease)
    with pytest.raises(StaleWrite):
        store.seal_attempt(lease, job.id, 2, outcome=Outcome.LOST, reason=Reason.RANK_LOST, failure=None)
    assert store.get(job.id) == job


# All of it together


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), checkpoint_every=st.integers(1, 5), num_attempts=st.integers(1, 4))
def test_every_step_is_shown_once_whatever_is_lost_and_repeated(store, seed, checkpoint_every, num_attempts):
    """Attempts that die anywhere, journals that arrive in pieces, again and late: against a dict as the truth."""
    draw = random.Random(seed)
    lease = lead(store)
    job, _ = store.submit(make_spec(retry={"budget": num_attempts}))
    truth: dict[tuple[str, int], float] = {}
    follower: dict[tuple[str, int], float] = {}
    position = 0
    for number in range(1, num_attempts + 1):
        start(store, lease, job=job)
        # It starts at any checkpoint it may resume from, or at the beginning.
        at = draw.choice([0, *steps(store.resumable_checkpoints(job.id))])
        truth = {key: value for key, value in truth.items() if key[1] <= at}
        reports = [Launched(supervisor_pid=1), Resumed(step=at), Running(num_steps=100)]
        for step in range(at + draw.choice([0, 1]), at + draw.randrange(2, 9)):  # some report their first step again
            values = {"train/loss": number + step / 1000}
            if draw.random() < 0.3:
                values["eval/accuracy"] = number + step / 1000
            names = list(values)
            parts = [values] if draw.random() < 0.5 else [{name: values[name]} for name in names]
            reports += [Metrics.of(step, part) for part in parts]
            truth |= {(name, step): value for name, value in values.items()}
            if step % checkpoint_every == 0:
                reports.append(checkpoint(step, attempt=number))
        journal: list[JournalRecord] = records(*reports)
        taken = 0
        while taken < len(journal):
            upto = draw.randint(taken + 1, len(journal))
            store.ingest(lease, job.id, number, journal[draw.randint(0, taken) : upto])  # begins with known ones
            taken = upto
            if draw.random() < 0.5:
                position = follow(store, job.id, position, follower)
        if number < num_attempts:
            # Each of another kind: the same failure three times on one step would be the job's last.
            reason = (Reason.RANK_LOST, Reason.NODE_LOST, Reason.COLLECTIVE_FAILED)[number - 1]
            store.seal_attempt(lease, job.id, number, outcome=Outcome.LOST, reason=reason, failure=None)
            with pytest.raises(StaleWrite):
                store.ingest(lease, job.id, number, journal)
    shown = [((point.name, point.step), point.value) for point in store.metrics(job.id)]
    assert len(shown) == len(truth)
    assert dict(shown) == truth
    assert store.get(job.id).step == max(step for _, step in truth)
    follow(store, job.id, position, follower)
    assert follower == truth


def follow(store, job_id, position, seen):
    """Read a feed to its end as a client does: what comes is shown, what a resume takes back is removed."""
    while (page := feed_of(store, job_id, after=position, limit=3)).position != position:
        for item in sorted([*page.events, *page.points], key=lambda item: item.position):
            if hasattr(item, "name"):
                seen[item.name, item.step] = item.value
            elif item.kind == "resumed":
                for key in [key for key in seen if key[1] > item.data["step"]]:
                    del seen[key]
        position = page.position
    return position
