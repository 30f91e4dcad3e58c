"""What the owner of a job may ask any ``JobStore`` for. A failure names a wish that is lost, doubled or misheard."""

import pytest

from service.domain.errors import IdempotencyConflict, InvalidTransition, NotFound
from service.domain.job import JobStatus, Origin, Outcome, Reason
from service.domain.journal import CheckpointQuarantined, Launched, Resumed
from service.domain.ports import IdempotencyKey
from tests.contract.store_examples import checkpoint, lead, loss, make_spec, records, run, start, steps

ELASTIC = {"min": 1, "max": 4}


def _key(action, key="k", body="a"):
    return IdempotencyKey(owner="me", route=f"POST /v1/jobs/x/{action}", key=key, body_sha256=body * 64)


def _seal(store, lease, job, outcome=Outcome.STOPPED, reason=Reason.PAUSE_REQUESTED, **more):
    return store.seal_attempt(lease, job.id, job.attempt, outcome=outcome, reason=reason, failure=None, **more)


def _paused(store):
    job, _ = store.submit(make_spec())
    return store.request_pause(job.id)


# Pausing and resuming


def test_a_queued_job_is_paused_at_once_and_leaves_the_queue(store):
    job = _paused(store)
    assert (job.status, job.reason, job.pause_requested) == (JobStatus.PAUSED, Reason.PAUSED, False)
    assert store.queued_jobs() == ()
    events = store.events(job.id)
    assert store.request_pause(job.id) == job
    assert store.events(job.id) == events


@pytest.mark.parametrize("status", [JobStatus.STARTING, JobStatus.RUNNING])
def test_a_job_with_an_attempt_is_asked_to_pause(store, status):
    lease = lead(store)
    job = start(store, lease) if status is JobStatus.STARTING else run(store, lease)
    job = store.request_pause(job.id)
    assert (job.status, job.pause_requested) == (status, True)
    assert store.events(job.id)[-1].kind == "pause_requested"
    events = store.events(job.id)
    assert store.request_pause(job.id) == job
    store.mark_stopping(lease, job.id, 1, Reason.PAUSE_REQUESTED)
    assert store.request_pause(job.id).status is JobStatus.STOPPING
    assert len(store.events(job.id)) == len(events) + 1
    job = _seal(store, lease, job)
    assert (job.status, job.reason, job.pause_requested, job.ended_at) == (
        JobStatus.PAUSED,
        Reason.PAUSED,
        False,
        None,
    )


def test_a_pause_that_no_one_acted_on_yet_counts(store):
    lease = lead(store)
    job = run(store, lease, loss(4), checkpoint(4))
    store.request_pause(job.id)
    job = _seal(store, lease, job, Outcome.LOST, Reason.RANK_LOST)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.PAUSED, Reason.PAUSED, 0)
    changes = [event.data for event in store.events(job.id) if event.kind == "status"]
    assert changes[-2:] == [{"from": "running", "to": "stopping"}, {"from": "stopping", "to": "paused"}]


def test_a_job_that_has_ended_or_is_about_to_is_not_paused(store):
    lease = lead(store)
    cancelled, _ = store.submit(make_spec())
    store.request_cancel(cancelled.id)
    stopping = run(store, lease)
    store.request_cancel(stopping.id)
    late = run(store, lease)
    store.mark_stopping(lease, late.id, 1, Reason.TIMEOUT)
    done = run(store, lease)
    _seal(store, lease, done, Outcome.SUCCEEDED, Reason.COMPLETED)
    for job in (cancelled, stopping, late, done):
        before = store.get(job.id)
        with pytest.raises(InvalidTransition, match=job.id):
            store.request_pause(job.id)
        assert store.get(job.id) == before


def test_a_cancel_outranks_a_pause(store):
    lease = lead(store)
    assert store.request_cancel(_paused(store).id).status is JobStatus.CANCELLED
    job = run(store, lease)
    store.request_pause(job.id)
    store.mark_stopping(lease, job.id, 1, Reason.PAUSE_REQUESTED)
    assert store.request_cancel(job.id).cancel_requested
    job = _seal(store, lease, job)
    assert (job.status, job.reason, job.pause_requested) == (JobStatus.CANCELLED, Reason.CANCELLED, False)


def test_what_stopped_before_it_was_done_is_resumed_with_its_retries_anew(store):
    lease = lead(store)
    cancelled, _ = store.submit(make_spec())
    store.request_cancel(cancelled.id)
    failed, _ = store.submit(make_spec(retry={"budget": 1}))
    for _ in range(2):
        failed = _seal(store, lease, run(store, lease, job=failed), Outcome.LOST, Reason.RANK_LOST)
    assert (failed.status, failed.retries_used) == (JobStatus.FAILED, 1)
    for job in (_paused(store), cancelled, failed):
        job = store.resume(job.id)
        assert (job.status, job.reason, job.retries_used) == (JobStatus.QUEUED, Reason.RESUMED, 0)
        assert (job.failure, job.ended_at) == (None, None)
        assert store.events(job.id)[-1].data["to"] == "queued"
        assert job.id in {queued.id for queued in store.queued_jobs()}
        assert start(store, lease, job=job).status is JobStatus.STARTING


def test_what_is_done_or_goes_on_is_not_resumed(store):
    lease = lead(store)
    done = run(store, lease)
    _seal(store, lease, done, Outcome.SUCCEEDED, Reason.COMPLETED)
    with pytest.raises(InvalidTransition, match="Fork it with more steps"):
        store.resume(done.id)
    pausing = run(store, lease)
    store.request_pause(pausing.id)
    with pytest.raises(InvalidTransition, match="Wait until it has stopped"):
        store.resume(pausing.id)
    queued, _ = store.submit(make_spec())
    with pytest.raises(InvalidTransition, match="queued"):
        store.resume(queued.id)


def test_time_that_was_up_is_given_again_and_time_that_was_not_is_kept(store):
    lease = lead(store)
    job = run(store, lease, loss(1), loss(2))
    store.mark_stopping(lease, job.id, 1, Reason.TIMEOUT)
    assert _seal(store, lease, job, Outcome.STOPPED, Reason.TIMEOUT).running_s == 2.0
    assert store.resume(job.id).running_s == 0.0
    other = run(store, lease, loss(1), loss(2))
    store.request_pause(other.id)
    _seal(store, lease, other)
    assert store.resume(other.id).running_s == 2.0


# Resizing


def test_a_resize_is_noted_and_is_pending_while_an_attempt_has_another_number(store):
    lease = lead(store)
    queued, _ = store.submit(make_spec(workers=ELASTIC))
    job = store.request_resize(queued.id, 2)
    assert (job.workers_wanted, job.resize_requested) == (2, False)
    start(store, lease, job=job, num_ranks=2)
    assert store.request_resize(job.id, 3).resize_requested
    assert store.events(job.id)[-1].data == {"workers": 3}
    assert not store.request_resize(job.id, 2).resize_requested
    store.request_resize(job.id, 3)
    _seal(store, lease, job.model_copy(update={"attempt": 1}), Outcome.LOST, Reason.RANK_LOST)
    job = start(store, lease, job=job, num_ranks=3)
    assert (job.workers_wanted, job.resize_requested) == (3, False)


def test_a_job_that_has_ended_or_is_about_to_is_not_resized(store):
    lease = lead(store)
    cancelled, _ = store.submit(make_spec(workers=ELASTIC))
    store.request_cancel(cancelled.id)
    stopping = run(store, lease, job=store.submit(make_spec(workers=ELASTIC))[0])
    store.mark_stopping(lease, stopping.id, 1, Reason.CANCEL_REQUESTED)
    for job in (cancelled, stopping):
        with pytest.raises(InvalidTransition, match=job.id):
            store.request_resize(job.id, 2)
    paused = _paused(store)
    assert store.request_resize(paused.id, 2).workers_wanted == 2


def test_a_resized_job_goes_on_in_one_transaction(store):
    lease = lead(store)
    job = run(store, lease, loss(4), checkpoint(4), job=store.submit(make_spec(workers=ELASTIC))[0])
    store.mark_resizing(lease, job.id, 1, node_ids=["n1", "n2", "n2"], message="More room.")
    (attempt,) = store.attempts(job.id)
    assert (attempt.stop_reason, attempt.target_node_ids) == (Reason.RESIZED, ("n1", "n2", "n2"))
    assert store.get(job.id).status is JobStatus.RUNNING
    event = store.events(job.id)[-1]
    assert (event.kind, event.reason, event.message) == ("stop_requested", Reason.RESIZED, "More room.")
    job = _seal(store, lease, job, reason=Reason.RESIZED, next_node_ids=attempt.target_node_ids)
    assert (job.status, job.reason, job.attempt) == (JobStatus.STARTING, Reason.RESIZED, 2)
    assert job.retries_used == 0
    (live,) = store.live_attempts()
    assert (live.attempt.number, live.attempt.node_ids, live.attempt.stop_reason) == (2, ("n1", "n2", "n2"), None)
    again = store.seal_attempt(
        lease, job.id, 1, outcome=Outcome.STOPPED, reason=Reason.RESIZED, failure=None, next_node_ids=["n1"]
    )
    assert again == job
    assert len(store.attempts(job.id)) == 2


def test_without_places_a_resized_job_is_queued_and_costs_no_retry(store):
    lease = lead(store)
    job = run(store, lease, job=store.submit(make_spec(workers=ELASTIC, retry={"budget": 0}))[0])
    store.mark_resizing(lease, job.id, 1, node_ids=["n1"], message="")
    job = _seal(store, lease, job, reason=Reason.RESIZED)
    assert (job.status, job.reason, job.retries_used) == (JobStatus.QUEUED, Reason.RESIZED, 0)


def test_only_a_running_job_of_which_nothing_else_is_wanted_is_resized(store):
    lease = lead(store)
    starting = start(store, lease)
    cancelling, pausing, stopping = (run(store, lease) for _ in range(3))
    store.request_cancel(cancelling.id)
    store.request_pause(pausing.id)
    store.mark_stopping(lease, stopping.id, 1, Reason.SERVICE_STOPPED)
    for job in (starting, cancelling, pausing, stopping):
        before = (store.get(job.id), store.attempts(job.id), store.events(job.id))
        store.mark_resizing(lease, job.id, 1, node_ids=["n"], message="")
        assert (store.get(job.id), store.attempts(job.id), store.events(job.id)) == before


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (Reason.CANCEL_REQUESTED, JobStatus.CANCELLED),
        (Reason.PAUSE_REQUESTED, JobStatus.PAUSED),
        (Reason.TIMEOUT, JobStatus.FAILED),
    ],
)
def test_a_later_reason_to_stop_takes_the_place_of_a_resize(store, reason, expected):
    lease = lead(store)
    job = run(store, lease)
    store.mark_resizing(lease, job.id, 1, node_ids=["n"], message="")
    if reason is Reason.PAUSE_REQUESTED:
        store.request_pause(job.id)
    store.mark_stopping(lease, job.id, 1, reason)
    assert store.attempts(job.id)[0].stop_reason is reason
    assert store.get(job.id).status is JobStatus.STOPPING
    # The attempt ends with the reason that it was told first.
    assert _seal(store, lease, job, reason=Reason.RESIZED).status is expected


# Forks and their checkpoints


def test_a_fork_is_a_queued_job_that_knows_where_it_begins(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10), checkpoint(20))
    origin = Origin(job_id=parent.id, attempt=1, step=10)
    fork, created = store.fork(make_spec(name="fork", labels={"a": "b"}), origin)
    assert created
    assert fork == store.get(fork.id)
    assert (fork.status, fork.reason, fork.forked_from, fork.step) == (JobStatus.QUEUED, Reason.FORKED, origin, 10)
    assert store.list_jobs(labels=[("a", "b")]).jobs == (fork,)
    assert [event.reason for event in store.events(fork.id)] == [Reason.FORKED]
    assert store.events(parent.id)[-1].data == {"job_id": fork.id}
    assert store.checkpoints(fork.id) == ()
    (found,) = store.resumable_checkpoints(fork.id)
    assert (found.job_id, found.attempt, found.step) == (parent.id, 1, 10)
    # After its own it may still fall back on its parent's, for as long as that is there.
    run(store, lease, checkpoint(11), job=fork, resume=10)
    found = [(one.job_id, one.step) for one in store.resumable_checkpoints(fork.id)]
    assert found == [(fork.id, 11), (parent.id, 10)]
    store.forget_checkpoint(lease, parent.id, 1, 10)
    assert [(one.job_id, one.step) for one in store.resumable_checkpoints(fork.id)] == [(fork.id, 11)]


def test_only_a_checkpoint_that_counts_is_forked_from(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10), checkpoint(20))
    store.retire_checkpoint(lease, parent.id, 1, 10)
    for attempt, step in ((1, 10), (1, 30), (2, 20)):
        with pytest.raises(NotFound, match=str(step)):
            store.fork(make_spec(), Origin(job_id=parent.id, attempt=attempt, step=step))
    with pytest.raises(NotFound, match="job-none"):
        store.fork(make_spec(), Origin(job_id="job-none", attempt=1, step=20))
    assert len(store.list_jobs().jobs) == 1


def test_a_checkpoint_is_not_removable_until_every_fork_of_it_has_its_own(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10), checkpoint(20))
    origin = Origin(job_id=parent.id, attempt=1, step=10)
    forks = [store.fork(make_spec(), origin)[0] for _ in range(2)]
    store.retire_checkpoint(lease, parent.id, 1, 10)
    assert steps(store.checkpoints(parent.id)) == [20]
    for fork in forks:
        assert store.removable_checkpoints(parent.id) == store.removable_checkpoints() == ()
        assert steps(store.resumable_checkpoints(fork.id)) == [10]
        run(store, lease, checkpoint(11), job=fork, resume=10)
    assert steps(store.removable_checkpoints(parent.id)) == [10]


def test_a_fork_that_has_ended_needs_its_parents_checkpoint_no_more(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10), checkpoint(20))
    fork, _ = store.fork(make_spec(), Origin(job_id=parent.id, attempt=1, step=10))
    store.retire_checkpoint(lease, parent.id, 1, 10)
    store.request_pause(fork.id)
    assert store.removable_checkpoints() == ()
    store.request_cancel(fork.id)
    assert [(one.job_id, one.step) for one in store.removable_checkpoints()] == [(parent.id, 10)]
    store.resume(fork.id)
    assert store.removable_checkpoints() == (), "it is there yet"


def test_a_damaged_origin_is_not_taken_for_the_forks_own(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10), checkpoint(20))
    origin = Origin(job_id=parent.id, attempt=1, step=20)
    fork, _ = store.fork(make_spec(), origin)
    fork = run(store, lease, checkpoint(20), job=fork)
    _seal(store, lease, fork, Outcome.LOST, Reason.RANK_LOST)
    start(store, lease, job=fork)
    torn = CheckpointQuarantined(step=20, message="a file differs", job_id=parent.id, attempt=1)
    store.ingest(lease, fork.id, 2, records(Launched(supervisor_pid=1), torn))
    assert steps(store.checkpoints(fork.id)) == [20]
    assert steps(store.checkpoints(parent.id)) == [10]
    assert [one.job_id for one in store.resumable_checkpoints(fork.id)] == [fork.id]
    assert store.events(fork.id)[-1].data == {"step": 20, "job_id": parent.id}


def test_what_is_removable_is_found_over_all_jobs(store):
    lease = lead(store)
    jobs = [run(store, lease, checkpoint(10), checkpoint(20)) for _ in range(2)]
    for job in jobs:
        store.retire_checkpoint(lease, job.id, 1, 10)
    found = [(one.job_id, one.step) for one in store.removable_checkpoints()]
    assert found == [(job.id, 10) for job in jobs]
    assert [one.job_id for one in store.removable_checkpoints(jobs[1].id)] == [jobs[1].id]


def test_the_paths_of_an_attempt_are_those_of_all_its_rows(store):
    lease = lead(store)
    job = run(store, lease, checkpoint(10), checkpoint(20))
    paths = {one.path for one in store.checkpoints(job.id)}
    store.retire_checkpoint(lease, job.id, 1, 10)
    assert store.committed_paths(job.id, 1) == paths
    assert store.committed_paths(job.id, 2) == frozenset()
    store.forget_checkpoint(lease, job.id, 1, 10)
    assert len(store.committed_paths(job.id, 1)) == 1


def test_what_counts_no_more_is_removable_unless_a_fork_needs_it(store):
    lease = lead(store)
    job = run(store, lease, *(checkpoint(step) for step in (10, 20, 30, 40)))
    fork, _ = store.fork(make_spec(), Origin(job_id=job.id, attempt=1, step=20))
    _seal(store, lease, job, Outcome.LOST, Reason.RANK_LOST)
    start(store, lease, job=job)
    torn = CheckpointQuarantined(step=40, message="a file differs")
    store.ingest(lease, job.id, 2, records(Launched(supervisor_pid=1), torn, Resumed(step=10)))
    assert steps(store.checkpoints(job.id)) == [10]
    assert [(one.attempt, one.step) for one in store.removable_checkpoints(job.id)] == [(1, 30), (1, 40)]
    (kept,) = store.resumable_checkpoints(fork.id)
    assert (kept.job_id, kept.step) == (job.id, 20)
    store.forget_checkpoint(lease, job.id, 1, 30)
    assert steps(store.removable_checkpoints(job.id)) == [40]


# Repeated requests


def test_a_wish_with_a_key_is_heard_once(store):
    job = store.submit(make_spec(workers=ELASTIC))[0]
    store.request_pause(job.id, key=_key("pause"))
    store.resume(job.id, key=_key("resume"))
    # The answers were lost, and all of it is asked again.
    events = store.events(job.id)
    assert store.request_pause(job.id, key=_key("pause")).status is JobStatus.QUEUED
    assert store.resume(job.id, key=_key("resume")).status is JobStatus.QUEUED
    store.request_cancel(job.id, key=_key("cancel"))
    store.resume(job.id)
    assert store.request_cancel(job.id, key=_key("cancel")).status is JobStatus.QUEUED
    store.request_resize(job.id, 2, key=_key("resize"))
    store.request_resize(job.id, 3)
    assert store.request_resize(job.id, 2, key=_key("resize")).workers_wanted == 3
    with pytest.raises(IdempotencyConflict):
        store.request_resize(job.id, 4, key=_key("resize", body="b"))
    assert len(store.events(job.id)) == len(events) + 4


def test_a_refused_wish_does_not_use_its_key_up(store):
    job = store.submit(make_spec())[0]
    with pytest.raises(InvalidTransition):
        store.resume(job.id, key=_key("resume"))
    assert store.replayed(_key("resume")) is None
    store.request_pause(job.id)
    assert store.resume(job.id, key=_key("resume")).status is JobStatus.QUEUED
    assert store.replayed(_key("resume")).id == job.id
    with pytest.raises(IdempotencyConflict):
        store.replayed(_key("resume", body="b"))


def test_a_fork_with_a_key_is_made_once(store):
    lease = lead(store)
    parent = run(store, lease, checkpoint(10))
    origin = Origin(job_id=parent.id, attempt=1, step=10)
    fork, created = store.fork(make_spec(), origin, key=_key("fork"))
    again, created_again = store.fork(make_spec(), origin, key=_key("fork"))
    assert (created, created_again, again) == (True, False, fork)
    assert store.replayed(_key("fork")) == fork
    assert len(store.list_jobs().jobs) == 2


def test_nobody_asks_anything_of_a_job_that_does_not_exist(store):
    for ask in (
        store.request_pause,
        store.resume,
        lambda job_id: store.request_resize(job_id, 1),
        store.removable_checkpoints,
        store.resumable_checkpoints,
    ):
        with pytest.raises(NotFound, match="job-none"):
            ask("job-none")
