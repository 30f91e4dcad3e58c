"""Growing, shrinking, pausing and forking, one iteration at a time.

A failure means a job that loses its place or a retry by being resized, a wish that is lost in a race or with the
scheduler, or a checkpoint that is gone while it is needed.
"""

import pytest

from service.domain.errors import InvalidTransition, NotFound
from service.domain.job import AttemptStatus, Failure, JobStatus, Origin, Outcome, Reason
from service.domain.journal import CheckpointQuarantined, Metrics, Resumed
from service.scheduler import sweeper
from service.storage.layout import checkpoint_dir
from tests.fake_cluster import make_node

ELASTIC = {"min": 1, "max": 4}
NEVER_S = 1e9


def _worlds(house, job_id):
    return [attempt.world_size for attempt in house.store.attempts(job_id)]


def _yield_to_resize(house, scheduler, job_id, number, *, step):
    """Have an attempt that was asked to stop do so, after a checkpoint."""
    assert set(house.cluster.stop_reasons(job_id, number)) == {Reason.RESIZED}
    house.cluster.checkpoint(job_id, number, step)
    house.cluster.end(job_id, number, Outcome.STOPPED, Reason.RESIZED)
    scheduler.step()


@pytest.fixture
def grown(house, scheduler):
    """A job that runs on 4 workers, and its id."""
    return house.start(scheduler, workers=ELASTIC)


def test_a_job_grows_when_there_is_room_and_keeps_its_place(house, scheduler):
    other = house.start(scheduler, workers=3)
    job_id = house.start(scheduler, workers=ELASTIC)
    assert _worlds(house, job_id) == [1]
    house.cluster.end(other, 1)
    scheduler.step()  # seals it, and finds that there is room
    scheduler.step()
    assert house.store.get(job_id).status is JobStatus.RUNNING
    late = house.submit(workers=2)
    scheduler.step()
    assert house.store.get(late).status is JobStatus.QUEUED, "the room is held"
    _yield_to_resize(house, scheduler, job_id, 1, step=7)
    assert house.status(job_id) == (JobStatus.STARTING, Reason.RESIZED)
    assert _worlds(house, job_id) == [1, 4]
    assert (job_id, 1) in house.cluster.closed
    scheduler.step()
    launch = house.cluster.launches[-1]
    assert (launch.job_id, launch.attempt, launch.node_ids) == (job_id, 2, ("node-a",) * 4)
    assert [checkpoint.step for checkpoint in launch.checkpoints] == [7]
    job = house.store.get(job_id)
    assert job.retries_used == 0
    house.cluster.run(job_id, 2, resume=7)
    scheduler.step()
    assert house.store.get(job_id).status is JobStatus.RUNNING


def test_a_job_shrinks_for_the_first_in_line_and_grows_again_after_it(house, scheduler, grown):
    waiting = house.submit(workers=3)
    scheduler.step()
    scheduler.step()
    assert house.store.get(waiting).status is JobStatus.QUEUED
    _yield_to_resize(house, scheduler, grown, 1, step=5)
    assert _worlds(house, grown) == [4, 1]
    assert house.store.get(waiting).status is JobStatus.STARTING
    scheduler.step()
    house.cluster.run(grown, 2, resume=5)
    house.cluster.run(waiting, 1)
    scheduler.step()
    house.cluster.end(waiting, 1)
    for _ in range(2):
        scheduler.step()
    _yield_to_resize(house, scheduler, grown, 2, step=9)
    assert _worlds(house, grown) == [4, 1, 4]


def test_a_job_is_not_interrupted_for_growing_before_its_interval_is_over(house):
    scheduler = house.scheduler(resize_interval_s=NEVER_S)
    other = house.start(scheduler, workers=3)
    job_id = house.start(scheduler, workers=ELASTIC)
    house.cluster.end(other, 1)
    for _ in range(5):
        scheduler.step()
    assert house.cluster.stop_reasons(job_id, 1) == []
    house.store.request_resize(job_id, 3)
    for _ in range(2):
        scheduler.step()
    assert set(house.cluster.stop_reasons(job_id, 1)) == {Reason.RESIZED}, "its owner asked"


def test_a_job_that_has_not_taken_a_step_is_not_resized(house, scheduler):
    job_id = house.submit(workers=ELASTIC)
    scheduler.step()
    house.submit(workers=2)
    for _ in range(3):
        scheduler.step()
    assert house.cluster.stop_reasons(job_id, 1) == []


def test_the_owner_resizes_a_job_there_and_back(house):
    scheduler = house.scheduler(resize_interval_s=NEVER_S)
    job_id = house.start(scheduler, workers=ELASTIC)
    for number, (workers, step) in enumerate([(2, 10), (3, 20)], 1):
        house.store.request_resize(job_id, workers)
        assert house.store.get(job_id).resize_requested
        for _ in range(2):
            scheduler.step()
        _yield_to_resize(house, scheduler, job_id, number, step=step)
        assert not house.store.get(job_id).resize_requested
        scheduler.step()
        house.cluster.run(job_id, number + 1, resume=step)
        scheduler.step()
    assert _worlds(house, job_id) == [4, 2, 3]
    assert house.store.get(job_id).retries_used == 0


def test_a_wish_for_fewer_workers_outlives_a_lost_attempt(house, scheduler, grown):
    house.store.request_resize(grown, 2)
    house.cluster.end(grown, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert _worlds(house, grown) == [4, 2]
    assert not house.store.get(grown).resize_requested


@pytest.mark.parametrize("when", ["marked", "ended", "sealed"])
def test_a_resize_goes_on_whenever_the_scheduler_dies(house, scheduler, grown, when):
    waiting = house.submit(workers=2)
    scheduler.step()  # marks
    if when != "marked":
        scheduler.step()
        house.cluster.checkpoint(grown, 1, 5)
        house.cluster.end(grown, 1, Outcome.STOPPED, Reason.RESIZED)
    lease = house.lease()
    if when == "ended":  # and dies before it could seal
        (live,) = house.store.live_attempts()
        page = house.cluster.read(grown, 1, after=live.attempt.last_sequence)
        house.store.ingest(lease, grown, 1, page.records)
    if when == "sealed":  # and dies before it could launch
        (live,) = house.store.live_attempts()
        page = house.cluster.read(grown, 1, after=live.attempt.last_sequence)
        house.store.ingest(lease, grown, 1, page.records)
        house.store.seal_attempt(
            lease,
            grown,
            1,
            outcome=Outcome.STOPPED,
            reason=Reason.RESIZED,
            failure=None,
            next_node_ids=live.attempt.target_node_ids,
        )
    house.store.release_lease(lease)
    second = house.scheduler("second")
    second.step()
    if when == "marked":
        assert set(house.cluster.stop_reasons(grown, 1)) == {Reason.RESIZED}
        house.cluster.checkpoint(grown, 1, 5)
        house.cluster.end(grown, 1, Outcome.STOPPED, Reason.RESIZED)
    for _ in range(3):
        second.step()
    assert _worlds(house, grown) == [4, 2]
    assert house.cluster.launched().count((grown, 2)) == 1
    assert house.store.get(waiting).status is JobStatus.STARTING
    assert house.store.get(grown).retries_used == 0


def test_a_job_whose_new_places_are_gone_is_queued_without_costing_a_retry(house, scheduler):
    house.cluster.alive = (make_node("node-a", cpus=1), make_node("node-b", cpus=1))
    job_id = house.start(scheduler, workers={"min": 1, "max": 2})
    house.store.request_resize(job_id, 1)
    for _ in range(2):
        scheduler.step()
    (target,) = house.store.attempts(job_id)[0].target_node_ids
    house.cluster.alive = tuple(node for node in house.cluster.alive if node.id != target)
    house.cluster.checkpoint(job_id, 1, 5)
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.RESIZED)
    scheduler.step()
    reasons = [event.reason for event in house.store.events(job_id) if event.data.get("to") == "queued"]
    assert reasons == [Reason.SUBMITTED, Reason.RESIZED]
    # And starts again in the same iteration, where there is room.
    assert house.status(job_id) == (JobStatus.STARTING, Reason.ADMITTED)
    assert house.store.get(job_id).retries_used == 0


def test_a_job_that_lost_a_node_goes_on_with_as_many_workers_as_fit(house, scheduler):
    house.cluster.alive = (make_node("node-a", cpus=2), make_node("node-b", cpus=2))
    job_id = house.start(scheduler, workers=ELASTIC)
    house.cluster.checkpoint(job_id, 1, 5)
    house.cluster.alive = (make_node("node-a", cpus=2),)
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.NODE_LOST)
    scheduler.step()
    assert _worlds(house, job_id) == [4, 2]
    assert house.cluster.launches[-1].node_ids == ("node-a", "node-a")
    assert house.store.get(job_id).retries_used == 1


def test_an_attempt_that_dies_while_it_is_resized_goes_on_from_its_last_checkpoint(house, scheduler, grown):
    house.cluster.checkpoint(grown, 1, 5)
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    house.cluster.kill(grown, 1)
    for _ in range(2):
        scheduler.step()
    assert _worlds(house, grown) == [4, 2]
    assert [checkpoint.step for checkpoint in house.cluster.launches[-1].checkpoints] == [5]
    assert house.store.get(grown).retries_used == 0


def test_an_error_of_the_users_during_a_resize_fails_the_job(house, scheduler, grown):
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    failure = Failure(rank=0, error_type="ValueError", message="bad")
    house.cluster.end(grown, 1, Outcome.FAILED, Reason.USER_ERROR, failure=failure)
    scheduler.step()
    assert house.status(grown) == (JobStatus.FAILED, Reason.USER_ERROR)


def test_a_job_that_is_done_before_it_is_resized_is_done(house, scheduler, grown):
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    house.cluster.end(grown, 1)
    scheduler.step()
    assert house.status(grown) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert not house.store.get(grown).resize_requested


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        ("request_cancel", (JobStatus.CANCELLED, Reason.CANCELLED)),
        ("request_pause", (JobStatus.PAUSED, Reason.PAUSED)),
    ],
)
@pytest.mark.parametrize("seen_before_the_end", [True, False])
def test_a_wish_that_comes_during_a_resize_outranks_it(house, scheduler, grown, ask, expected, seen_before_the_end):
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    getattr(house.store, ask)(grown)
    if seen_before_the_end:
        scheduler.step()
        assert house.store.get(grown).status is JobStatus.STOPPING
    house.cluster.checkpoint(grown, 1, 5)
    house.cluster.end(grown, 1, Outcome.STOPPED, Reason.RESIZED)
    for _ in range(3):
        scheduler.step()
    assert house.status(grown) == expected
    assert _worlds(house, grown) == [4]
    assert house.store.live_attempts() == ()


def test_a_job_that_is_stopping_is_not_resized(house, scheduler, grown):
    house.store.request_cancel(grown)
    with pytest.raises(InvalidTransition, match="about to stop"):
        house.store.request_resize(grown, 2)
    scheduler.step()
    with pytest.raises(InvalidTransition, match="about to stop"):
        house.store.request_resize(grown, 2)
    house.cluster.end(grown, 1, Outcome.STOPPED, Reason.CANCEL_REQUESTED)
    scheduler.step()
    with pytest.raises(InvalidTransition, match="cancelled"):
        house.store.request_resize(grown, 2)


def test_a_service_that_stops_during_a_resize_starts_nothing_new(house, scheduler, grown):
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    house.cluster.checkpoint(grown, 1, 5)
    house.cluster.end(grown, 1, Outcome.STOPPED, Reason.RESIZED)
    scheduler.stop_all(deadline_s=10.0)
    assert house.status(grown) == (JobStatus.QUEUED, Reason.RESIZED)
    house.scheduler("second").step()
    assert _worlds(house, grown) == [4, 2]


# Pausing


def test_a_running_job_pauses_after_a_checkpoint_and_goes_on_from_it(house, scheduler):
    job_id = house.start(scheduler, retry={"budget": 1})
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    house.cluster.run(job_id, 2)
    scheduler.step()
    assert house.store.get(job_id).retries_used == 1
    house.store.request_pause(job_id)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.STOPPING, Reason.PAUSE_REQUESTED)
    assert set(house.cluster.stop_reasons(job_id, 2)) == {Reason.PAUSE_REQUESTED}
    house.cluster.checkpoint(job_id, 2, 7)
    house.cluster.end(job_id, 2, Outcome.STOPPED, Reason.PAUSE_REQUESTED)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.PAUSED, Reason.PAUSED)
    for _ in range(3):
        scheduler.step()
    assert len(house.store.attempts(job_id)) == 2, "a paused job waits for its owner"
    resumed = house.store.resume(job_id)
    assert (resumed.status, resumed.reason, resumed.retries_used) == (JobStatus.QUEUED, Reason.RESUMED, 0)
    scheduler.step()
    assert [checkpoint.step for checkpoint in house.cluster.launches[-1].checkpoints] == [7]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_job_that_is_lost_while_it_pauses_is_paused(house, scheduler, is_running):
    job_id = house.submit()
    scheduler.step()
    if is_running:
        house.cluster.run(job_id, 1)
        scheduler.step()
    house.store.request_pause(job_id)
    scheduler.step()
    house.cluster.kill(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.PAUSED, Reason.PAUSED)
    assert house.store.get(job_id).retries_used == 0


def test_a_cancel_that_comes_while_a_job_pauses_counts(house, scheduler):
    job_id = house.start(scheduler)
    house.store.request_pause(job_id)
    scheduler.step()
    house.store.request_cancel(job_id)
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.PAUSE_REQUESTED)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)


def test_an_orderly_stop_keeps_a_pause(house, scheduler):
    job_id = house.start(scheduler)
    house.store.request_pause(job_id)
    house.cluster.stops_at_once = True
    scheduler.stop_all(deadline_s=10.0)
    assert house.status(job_id) == (JobStatus.PAUSED, Reason.PAUSED)


def test_a_job_whose_time_was_up_gets_it_again_when_it_is_resumed(house, scheduler):
    job_id = house.start(scheduler, timeout_s=0.001)
    scheduler.step()  # counts from when it hears of it
    scheduler.step()
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.TIMEOUT)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.TIMEOUT)
    job = house.store.resume(job_id)
    assert (job.running_s, job.failure, job.ended_at) == (0.0, None, None)
    scheduler.step()
    assert house.store.get(job_id).status is JobStatus.STARTING


# Forks and the checkpoints they need


def _fork(house, parent, step, **changes):
    spec = house.store.get(parent).spec.model_copy(update={"steps": 1000, **changes})
    attempt = next(one.attempt for one in house.store.checkpoints(parent) if one.step == step)
    return house.store.fork(spec, Origin(job_id=parent, attempt=attempt, step=step))[0].id


def test_a_fork_begins_at_the_checkpoint_of_its_parent_and_goes_on_with_its_own(house, scheduler):
    parent = house.start(scheduler)
    for step in (10, 20):
        house.cluster.checkpoint(parent, 1, step)
    scheduler.step()
    fork = _fork(house, parent, 10)
    assert house.store.get(fork).step == 10
    scheduler.step()
    launch = house.cluster.launches[-1]
    (checkpoint,) = launch.checkpoints
    assert (launch.job_id, checkpoint.job_id, checkpoint.step) == (fork, parent, 10)
    assert checkpoint.path == checkpoint_dir(parent, 1, 10)
    assert launch.forked_from == Origin(job_id=parent, attempt=1, step=10)
    house.cluster.run(fork, 1, Metrics.of(11, {"train/loss": 0.5}), resume=10)
    house.cluster.end(fork, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert house.cluster.launches[-1].checkpoints == (checkpoint,), "it has none of its own yet"
    house.cluster.run(fork, 2, Metrics.of(11, {"train/loss": 0.5}), resume=10)
    house.cluster.checkpoint(fork, 2, 12)
    house.cluster.end(fork, 2, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    offered = [(one.job_id, one.step) for one in house.cluster.launches[-1].checkpoints]
    assert offered == [(fork, 12), (parent, 10)], "its own first"
    assert [point.step for point in house.store.metrics(fork)] == [11, 12]


def test_a_checkpoint_that_a_fork_needs_is_kept_until_it_has_one_of_its_own(house, scheduler):
    parent = house.start(scheduler, checkpoint={"keep_last": 1})
    house.cluster.checkpoint(parent, 1, 10)
    scheduler.step()
    fork = _fork(house, parent, 10)
    for step in (20, 30):
        house.cluster.checkpoint(parent, 1, step)
        scheduler.step()
    assert [checkpoint.step for checkpoint in house.store.checkpoints(parent)] == [30]
    assert house.storage.exists(checkpoint_dir(parent, 1, 10))
    # The parent goes back to before it, so that it counts no more there; the fork still needs its files.
    house.cluster.end(parent, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    house.cluster.report(parent, 2, Resumed(step=0))
    scheduler.step()
    assert house.store.checkpoints(parent) == ()
    assert house.storage.exists(checkpoint_dir(parent, 1, 10))
    assert not house.storage.exists(checkpoint_dir(parent, 1, 30))
    house.cluster.run(fork, 1, resume=10)
    house.cluster.checkpoint(fork, 1, 11)
    scheduler.step()
    assert not house.storage.exists(checkpoint_dir(parent, 1, 10))
    assert house.store.removable_checkpoints(parent) == ()


def test_what_a_fork_kept_of_a_parent_that_has_ended_goes_with_the_forks_need(house, scheduler, monkeypatch):
    parent = house.start(scheduler, checkpoint={"keep_last": 1})
    for step in (10, 20):
        house.cluster.checkpoint(parent, 1, step)
        scheduler.step()
        if step == 10:
            forks = [_fork(house, parent, 10) for _ in range(2)]
    house.cluster.end(parent, 1)
    scheduler.step()
    assert house.storage.exists(checkpoint_dir(parent, 1, 10))
    house.cluster.run(forks[0], 1, resume=10)
    house.cluster.checkpoint(forks[0], 1, 11)
    scheduler.step()
    assert house.storage.exists(checkpoint_dir(parent, 1, 10)), "the other one needs it"
    # That one never writes any; and nobody follows it when it is cancelled while it waits.
    house.store.request_pause(forks[1])
    house.cluster.end(forks[1], 1, Outcome.STOPPED, Reason.PAUSE_REQUESTED)
    scheduler.step()
    assert house.store.request_cancel(forks[1]).status is JobStatus.CANCELLED
    monkeypatch.setattr(sweeper, "SWEEP_INTERVAL_S", 0.0)
    scheduler.step()
    assert not house.storage.exists(checkpoint_dir(parent, 1, 10))
    assert [checkpoint.step for checkpoint in house.store.checkpoints(parent)] == [20]


def test_a_checkpoint_that_is_removed_cannot_be_forked_from(house, scheduler):
    parent = house.start(scheduler, checkpoint={"keep_last": 1})
    for step in (10, 20):
        house.cluster.checkpoint(parent, 1, step)
    scheduler.step()
    spec = house.store.get(parent).spec
    with pytest.raises(NotFound, match="step 10"):
        house.store.fork(spec, Origin(job_id=parent, attempt=1, step=10))


def test_the_files_of_superseded_and_quarantined_checkpoints_go(house, scheduler):
    job_id = house.start(scheduler)
    for step in (10, 20, 30):
        house.cluster.checkpoint(job_id, 1, step)
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    house.cluster.report(job_id, 2, CheckpointQuarantined(step=30, message="a file differs"), Resumed(step=10))
    scheduler.step()
    exists = {step: house.storage.exists(checkpoint_dir(job_id, 1, step)) for step in (10, 20, 30)}
    assert exists == {10: True, 20: False, 30: False}
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [10]


def test_what_was_not_removed_because_the_scheduler_died_is_removed_later(house, scheduler, monkeypatch):
    job_id = house.start(scheduler, checkpoint={"keep_last": 1})

    def refuse(path):
        raise OSError("the storage is away")

    with monkeypatch.context() as patched:
        patched.setattr(house.files, "remove_checkpoint", refuse)
        for step in (10, 20):
            house.cluster.checkpoint(job_id, 1, step)
        scheduler.step()
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [20]
    assert house.storage.exists(checkpoint_dir(job_id, 1, 10))
    house.cluster.end(job_id, 1)
    house.scheduler().step()
    assert house.store.get(job_id).status is JobStatus.SUCCEEDED
    assert not house.storage.exists(checkpoint_dir(job_id, 1, 10))


def test_the_attempts_of_a_resized_job_tell_its_story(house, scheduler, grown):
    house.store.request_resize(grown, 2)
    for _ in range(2):
        scheduler.step()
    _yield_to_resize(house, scheduler, grown, 1, step=5)
    first, second = house.store.attempts(grown)
    assert (first.status, first.outcome, first.reason) == (AttemptStatus.SEALED, Outcome.STOPPED, Reason.RESIZED)
    assert (second.status, second.world_size) == (AttemptStatus.CREATED, 2)
    changes = [(event.data["from"], event.data["to"]) for event in house.store.events(grown) if event.kind == "status"]
    assert changes[-1] == ("running", "starting")
