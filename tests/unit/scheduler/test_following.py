"""What becomes of attempts, one iteration at a time. A failure means a lost job, a wrong end, or work done twice."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from service.domain.errors import StorageError, Unavailable
from service.domain.job import AttemptStatus, Failure, JobStatus, Outcome, Reason
from service.domain.journal import CheckpointQuarantined, Ended, Metrics, Resumed, Warned
from service.domain.ports import UPLOAD_TIMEOUT_S, SupervisorState
from service.scheduler import follower
from service.storage.layout import checkpoint_dir, journal_dir
from tests.fake_cluster import make_node


def _attempts(house, job_id):
    return [(attempt.status, attempt.outcome, attempt.reason) for attempt in house.store.attempts(job_id)]


def test_a_job_goes_from_the_queue_to_its_end(house, scheduler):
    job_id = house.submit(workers=2)
    assert scheduler.step()
    assert house.status(job_id) == (JobStatus.STARTING, Reason.ADMITTED)
    (launch,) = house.cluster.launches
    assert (launch.job_id, launch.attempt, launch.node_ids) == (job_id, 1, ("node-a", "node-a"))
    assert (launch.spec, launch.storage_url) == (house.store.get(job_id).spec, house.storage.url)
    assert (launch.collective_timeout_s, launch.start_timeout_s, launch.stop_grace_s) == (1.0, 2.0, 3.0)
    scheduler.step()
    assert house.store.attempts(job_id)[0].status is AttemptStatus.LAUNCHED
    assert house.store.get(job_id).status is JobStatus.STARTING  # not running before every rank has stepped
    house.cluster.run(job_id, 1, Metrics.of(1, {"train/loss": 0.5}))
    scheduler.step()
    assert house.status(job_id) == (JobStatus.RUNNING, Reason.ALL_RANKS_STEPPED)
    assert [point.value for point in house.store.metrics(job_id)] == [0.5]
    house.cluster.end(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert house.cluster.closed == [(job_id, 1)]
    assert not scheduler.step()
    assert house.cluster.launched() == [(job_id, 1)]


def test_an_attempt_that_says_all_at_once_is_followed_to_its_end(house, scheduler):
    job_id = house.submit()
    scheduler.step()
    house.cluster.run(job_id, 1)
    house.cluster.checkpoint(job_id, 1, 100)
    house.cluster.end(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [100]


def test_what_arrives_after_the_last_record_changes_nothing(house, scheduler):
    job_id = house.start(scheduler)
    house.cluster.end(job_id, 1)
    house.cluster.report(job_id, 1, Warned(message="late"))
    scheduler.step()
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert house.cluster.closed == [(job_id, 1)]


def test_an_end_that_was_stored_but_not_sealed_is_sealed_by_the_next(house, scheduler):
    job_id = house.start(scheduler)
    lease = house.lease()
    house.cluster.end(job_id, 1)
    (live,) = house.store.live_attempts()
    page = house.cluster.read(job_id, 1, after=live.attempt.last_sequence)
    house.store.ingest(lease, job_id, 1, page.records)
    house.store.release_lease(lease)  # and dies
    house.scheduler("second").step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert (job_id, 1) in house.cluster.closed


def test_an_error_of_the_users_fails_the_job_at_once(house, scheduler):
    job_id = house.start(scheduler)
    failure = Failure(rank=1, error_type="ValueError", message="bad", traceback="…")
    house.cluster.end(job_id, 1, Outcome.FAILED, Reason.USER_ERROR, failure=failure)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.USER_ERROR)
    job = house.store.get(job_id)
    assert (job.failure, job.retries_used) == (failure, 0)
    scheduler.step()
    assert len(house.store.attempts(job_id)) == 1


def test_a_launch_that_came_to_nothing_is_repeated_exactly_once(house, scheduler):
    """The scheduler dies between the row and the launch."""
    job_id = house.submit()
    house.cluster.loses_launches = True
    scheduler.step()
    assert house.store.attempts(job_id)[0].status is AttemptStatus.CREATED
    house.cluster.loses_launches = False
    house.cluster.launches.clear()
    house.store.release_lease(house.lease())
    second = house.scheduler("second")
    for _ in range(3):
        second.step()
    assert house.cluster.launched() == [(job_id, 1)]
    house.cluster.run(job_id, 1)
    second.step()
    assert house.store.get(job_id).status is JobStatus.RUNNING
    assert len(house.store.attempts(job_id)) == 1


def test_a_supervisor_that_never_shows_up_is_given_up_after_the_timeout(house, scheduler):
    job_id = house.submit(retry={"budget": 0})
    house.cluster.loses_launches = True
    scheduler.step()
    for _ in range(3):
        scheduler.step()
    assert house.store.get(job_id).status is JobStatus.STARTING
    house.scheduler(launch_timeout_s=0.0).step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)
    assert house.store.get(job_id).failure.error_type == "LaunchFailed"


@pytest.mark.parametrize(
    ("outcome", "reason", "expected"),
    [
        (Outcome.SUCCEEDED, Reason.COMPLETED, (JobStatus.SUCCEEDED, Reason.COMPLETED)),
        (Outcome.FAILED, Reason.USER_ERROR, (JobStatus.FAILED, Reason.USER_ERROR)),
    ],
)
def test_a_supervisor_that_died_after_its_last_record_was_durable_lost_nothing(
    house, scheduler, outcome, reason, expected
):
    job_id = house.start(scheduler)
    house.cluster.checkpoint(job_id, 1, 50)
    house.cluster.end(job_id, 1, outcome, reason)
    house.cluster.kill(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == expected
    assert house.store.get(job_id).retries_used == 0
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [50]


def test_a_supervisor_that_died_half_way_costs_a_retry_and_keeps_what_was_durable(house, scheduler):
    job_id = house.start(scheduler)
    house.cluster.checkpoint(job_id, 1, 50)
    house.cluster.report(job_id, 1, Metrics.of(51, {"train/loss": 0.1}), durable=False)
    house.cluster.kill(job_id, 1)
    scheduler.step()
    job = house.store.get(job_id)
    assert job.retries_used == 1
    assert _attempts(house, job_id)[0] == (AttemptStatus.SEALED, Outcome.LOST, Reason.SUPERVISOR_LOST)
    assert (job.status, job.attempt) == (JobStatus.STARTING, 2)  # queued, and placed again at once
    assert [checkpoint.step for checkpoint in house.cluster.launches[-1].checkpoints] == [50]
    house.cluster.run(job_id, 2, Metrics.of(51, {"train/loss": 0.2}), resume=50)
    scheduler.step()
    assert [(point.step, point.value) for point in house.store.metrics(job_id)] == [(50, 1.0), (51, 0.2)]
    house.cluster.end(job_id, 2)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)


def test_a_supervisor_that_died_before_its_first_durable_record_costs_a_retry(house, scheduler):
    job_id = house.submit()
    scheduler.step()
    house.cluster.kill(job_id, 1)
    house.storage.remove(journal_dir(job_id, 1))
    scheduler.step()
    assert _attempts(house, job_id)[0] == (AttemptStatus.SEALED, Outcome.LOST, Reason.SUPERVISOR_LOST)
    assert house.cluster.launched() == [(job_id, 1), (job_id, 2)]


def test_what_was_read_from_memory_before_the_supervisor_died_is_not_read_again(house, scheduler):
    job_id = house.start(scheduler, retry={"budget": 0})
    house.cluster.report(job_id, 1, Metrics.of(1, {"train/loss": 0.5}), durable=False)
    scheduler.step()
    house.cluster.kill(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)
    assert [point.value for point in house.store.metrics(job_id)] == [0.5]


def test_a_lost_attempt_is_retried_up_to_the_budget(house, scheduler):
    job_id = house.submit(retry={"budget": 2})
    failure = Failure(rank=0, error_type="SIGKILL", message="Rank 0 was killed.")
    for number in (1, 2, 3):
        scheduler.step()
        assert house.store.get(job_id).attempt == number
        house.cluster.run(job_id, number, Metrics.of(number, {"train/loss": 0.5}))
        house.cluster.end(job_id, number, Outcome.LOST, Reason.RANK_LOST, failure=failure)
        scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)
    job = house.store.get(job_id)
    assert (job.retries_used, job.failure) == (2, failure)
    scheduler.step()
    assert house.cluster.launched() == [(job_id, number) for number in (1, 2, 3)]


def test_a_retry_waits_for_its_pause_and_says_so(house, scheduler):
    job_id = house.start(scheduler, retry={"budget": 3, "backoff_s": 3600.0})
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert house.store.get(job_id).attempt == 2, "the first retry waits for nothing"
    house.cluster.run(job_id, 2)
    house.cluster.end(job_id, 2, Outcome.LOST, Reason.NODE_LOST)
    for _ in range(3):
        scheduler.step()
    job = house.store.get(job_id)
    assert (job.status, job.reason, job.attempt) == (JobStatus.QUEUED, Reason.NODE_LOST, 2)
    assert job.message == "Waits 3600 s before retry 2 of 3 (node_lost)."
    other = house.submit()
    scheduler.step()
    assert house.store.get(other).attempt == 1, "its place is another's meanwhile"


def test_a_job_that_fails_three_times_in_one_way_is_not_tried_again(house, scheduler):
    job_id = house.submit(retry={"budget": 100})
    failure = Failure(rank=1, error_type="SIGSEGV", message="Rank 1 was killed by SIGSEGV.")
    for number in (1, 2, 3):
        scheduler.step()
        house.cluster.run(job_id, number, Metrics.of(17, {"train/loss": 0.5}))
        house.cluster.end(job_id, number, Outcome.LOST, Reason.RANK_LOST, failure=failure)
        scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.REPEATED_FAILURE)
    assert house.store.get(job_id).failure == failure


def test_an_unreachable_supervisor_is_not_dead(house, scheduler):
    job_id = house.start(scheduler)
    house.cluster.lose_touch(job_id, 1)
    for _ in range(5):
        scheduler.step()
    assert house.store.get(job_id).status is JobStatus.RUNNING
    assert house.cluster.closed == []
    assert house.cluster.launched() == [(job_id, 1)]
    house.cluster.end(job_id, 1)
    house.cluster.find(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)


def test_a_queued_job_is_cancelled_and_never_starts(house, scheduler):
    job_id = house.submit(workers=5)
    scheduler.step()
    house.store.request_cancel(job_id)
    house.cluster.alive = (make_node(cpus=8),)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)
    assert house.cluster.launches == []


@pytest.mark.parametrize("is_running", [False, True])
def test_a_cancel_stops_the_attempt_and_then_the_job(house, scheduler, is_running):
    job_id = house.submit()
    scheduler.step()
    if is_running:
        house.cluster.run(job_id, 1)
    scheduler.step()
    house.store.request_cancel(job_id)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.STOPPING, Reason.CANCEL_REQUESTED)
    assert set(house.cluster.stop_reasons(job_id, 1)) == {Reason.CANCEL_REQUESTED}
    house.cluster.checkpoint(job_id, 1, 7)
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.CANCEL_REQUESTED)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [7]
    scheduler.step()
    assert house.cluster.launched() == [(job_id, 1)]


def test_a_cancel_before_the_supervisor_shows_up_is_not_forgotten(house, scheduler):
    job_id = house.submit()
    house.cluster.loses_launches = True
    scheduler.step()
    house.store.request_cancel(job_id)
    house.cluster.loses_launches = False
    house.cluster.stops_at_once = True
    for _ in range(4):
        scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)


def test_a_job_that_never_falls_silent_is_still_stopped(house, scheduler):
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    for step in range(1, 4):
        house.cluster.report(job_id, 1, Metrics.of(step, {"train/loss": 0.5}))
        scheduler.step()
    assert Reason.CANCEL_REQUESTED in house.cluster.stop_reasons(job_id, 1)
    assert len(house.store.metrics(job_id)) == 3


def test_a_stop_request_is_repeated_and_only_its_first_reason_counts(house, scheduler):
    job_id = house.start(scheduler, timeout_s=0.001)
    house.store.request_cancel(job_id)
    for _ in range(3):
        scheduler.step()
    reasons = house.cluster.stop_reasons(job_id, 1)
    assert len(reasons) >= 3
    assert len(set(reasons)) == 1


def test_a_stop_request_is_not_repeated_at_every_iteration(house, scheduler, monkeypatch):
    monkeypatch.setattr("service.scheduler.follower.STOP_REPEAT_S", 1000.0)
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    for _ in range(5):
        scheduler.step()
    assert house.cluster.stop_reasons(job_id, 1) == [Reason.CANCEL_REQUESTED]


def test_a_job_that_is_killed_while_it_is_cancelled_is_cancelled(house, scheduler):
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    scheduler.step()
    house.cluster.kill(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)


def test_the_time_of_day_ends_no_job(house, scheduler, monkeypatch):
    job_id = house.start(scheduler, timeout_s=1800)
    for offset in (timedelta(hours=1), timedelta(hours=-1)):
        monkeypatch.setattr("tests.fake_cluster.utc_now", lambda offset=offset: datetime.now(UTC) + offset)
        house.cluster.report(job_id, 1, Metrics.of(1, {"train/loss": 0.5}))
        for _ in range(3):
            scheduler.step()
    assert house.cluster.stop_reasons(job_id, 1) == []
    house.cluster.end(job_id, 1)
    scheduler.step()
    # What the test itself took, by a clock that does not jump.
    assert 0.0 < house.store.get(job_id).running_s < 60.0


def test_another_leader_goes_on_counting_where_the_attempt_was(house, monkeypatch):
    first = house.scheduler("first")
    job_id = house.start(first, timeout_s=1800)
    house.cluster.supervisor(job_id, 1).began_at -= 1795.0
    house.cluster.report(job_id, 1, Metrics.of(1, {"train/loss": 0.5}))
    first.step()
    house.store.release_lease(house.lease())
    second = house.scheduler("second")
    second.step()
    assert house.cluster.stop_reasons(job_id, 1) == []
    house.cluster.supervisor(job_id, 1).began_at -= 10.0
    house.cluster.report(job_id, 1, Metrics.of(2, {"train/loss": 0.5}))
    second.step()
    second.step()
    assert set(house.cluster.stop_reasons(job_id, 1)) == {Reason.TIMEOUT}


def test_a_job_that_takes_too_long_fails_with_its_last_checkpoint(house, scheduler):
    job_id = house.start(scheduler, timeout_s=0.001)
    scheduler.step()  # counts from when it hears of it
    scheduler.step()
    assert house.status(job_id) == (JobStatus.STOPPING, Reason.TIMEOUT)
    assert set(house.cluster.stop_reasons(job_id, 1)) == {Reason.TIMEOUT}
    house.cluster.checkpoint(job_id, 1, 7)
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.TIMEOUT)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.TIMEOUT)
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [7]


def test_a_job_that_is_killed_when_its_time_is_up_has_timed_out(house, scheduler):
    job_id = house.start(scheduler, timeout_s=0.001)
    scheduler.step()  # counts from when it hears of it
    scheduler.step()
    house.cluster.kill(job_id, 1)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.TIMEOUT)


def test_time_in_the_queue_and_while_starting_does_not_count(house, scheduler):
    job_id = house.submit(timeout_s=0.001)
    for _ in range(3):
        scheduler.step()
    assert house.store.get(job_id).status is JobStatus.STARTING
    assert house.cluster.stop_reasons(job_id, 1) == []


def test_only_the_last_checkpoints_are_kept_and_rows_go_before_files(house, scheduler, monkeypatch):
    job_id = house.start(scheduler, checkpoint={"every_steps": 10, "keep_last": 2})
    remove = house.files.remove_checkpoint

    def remove_unlisted(path):
        assert path not in {checkpoint.path for checkpoint in house.store.checkpoints(job_id)}
        assert house.storage.exists(path)
        remove(path)

    monkeypatch.setattr(house.files, "remove_checkpoint", remove_unlisted)
    for step in (10, 20, 30, 40):
        house.cluster.checkpoint(job_id, 1, step)
        if step != 30:  # two arrive together
            scheduler.step()
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [30, 40]
    for step in (10, 20, 30, 40):
        assert house.storage.exists(checkpoint_dir(job_id, 1, step)) == (step >= 30)


def test_checkpoints_of_earlier_attempts_are_kept_and_removed_alike(house, scheduler):
    job_id = house.start(scheduler, checkpoint={"keep_last": 2})
    for step in (10, 20):
        house.cluster.checkpoint(job_id, 1, step)
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert [checkpoint.step for checkpoint in house.cluster.launches[-1].checkpoints] == [20, 10]
    house.cluster.run(job_id, 2, resume=20)
    house.cluster.checkpoint(job_id, 2, 30)
    scheduler.step()
    found = [(checkpoint.attempt, checkpoint.step) for checkpoint in house.store.checkpoints(job_id)]
    assert found == [(1, 20), (2, 30)]
    assert not house.storage.exists(checkpoint_dir(job_id, 1, 10))


def test_a_quarantined_checkpoint_is_not_offered_again(house, scheduler):
    job_id = house.start(scheduler)
    for step in (10, 20):
        house.cluster.checkpoint(job_id, 1, step)
    house.cluster.end(job_id, 1, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    house.cluster.report(job_id, 2, CheckpointQuarantined(step=20, message="a file differs"), Resumed(step=10))
    house.cluster.end(job_id, 2, Outcome.LOST, Reason.RANK_LOST)
    scheduler.step()
    assert [checkpoint.step for checkpoint in house.cluster.launches[-1].checkpoints] == [10]


def test_trouble_with_the_files_of_one_job_does_not_stop_the_others(house, caplog):
    troubled = house.submit(name="troubled")
    healthy = house.submit(name="healthy")
    errors = iter([StorageError("refused"), PermissionError(13, "refused"), ValueError("what is this?")])

    class Files:
        """Refuses to say anything about one job."""

        def __getattr__(self, name):
            return getattr(house.files, name)

        def was_launched(self, job_id, attempt):
            if job_id == troubled:
                raise next(errors)
            return house.files.was_launched(job_id, attempt)

    scheduler = house.scheduler(files=Files())
    scheduler.step()
    house.cluster.kill(troubled, 1)
    house.cluster.run(healthy, 1)
    later = house.submit(name="later")
    assert scheduler.step()
    assert house.store.get(healthy).status is JobStatus.RUNNING
    assert house.store.get(later).status is JobStatus.STARTING
    scheduler.step()
    house.cluster.end(healthy, 1)
    scheduler.step()
    assert house.store.get(healthy).status is JobStatus.SUCCEEDED
    assert f"{troubled} attempt 1 could not be followed" in caplog.text


def test_a_journal_with_a_gap_does_not_stop_the_others(house, scheduler, caplog):
    troubled = house.start(scheduler)
    healthy = house.start(scheduler)
    supervisor = house.cluster._supervisors[troubled, 1]
    # As after a restored database: the supervisor has forgotten what the database had stored once.
    skipped = supervisor.records[-1].model_copy(update={"sequence": 99})
    supervisor.records.append(skipped)
    house.cluster.end(healthy, 1)
    scheduler.step()
    assert house.store.get(healthy).status is JobStatus.SUCCEEDED
    assert "could not be followed" in caplog.text


def test_a_database_that_does_not_answer_is_waited_for(house, caplog):
    job_id = house.submit()

    class Store:
        """Does not answer while told not to."""

        answers = True

        def __getattr__(self, name):
            if not self.answers:
                raise Unavailable("The database does not answer.")
            return getattr(house.store, name)

    store = Store()
    scheduler = house.scheduler(store=store)
    scheduler.step()
    house.cluster.run(job_id, 1)
    house.cluster.end(job_id, 1)
    store.answers = False
    assert not scheduler.step()
    store.answers = True
    scheduler.step()
    assert house.status(job_id) == (JobStatus.SUCCEEDED, Reason.COMPLETED)
    assert "Waiting for the database or the cluster" in caplog.text


def test_a_cluster_that_does_not_answer_is_waited_for(house, scheduler):
    job_id = house.submit()
    house.cluster.is_unavailable = True
    assert not scheduler.step()
    assert house.store.get(job_id).status is JobStatus.QUEUED
    house.cluster.is_unavailable = False
    scheduler.step()
    assert house.cluster.launched() == [(job_id, 1)]


def test_the_last_record_counts_even_if_it_is_all_there_is(house, scheduler):
    job_id = house.submit(retry={"budget": 0})
    scheduler.step()
    message = "The ranks could not be started: no room"
    house.cluster.report(job_id, 1, Ended(outcome=Outcome.LOST, reason=Reason.LAUNCH_FAILED, message=message, step=0))
    scheduler.step()
    assert house.status(job_id) == (JobStatus.FAILED, Reason.RETRIES_EXHAUSTED)
    assert message in house.store.get(job_id).message


def test_a_supervisor_that_was_made_but_never_told_to_run_is_told_again(house, scheduler, monkeypatch):
    # Its scheduler died between the two.
    monkeypatch.setattr(follower, "LAUNCH_REPEAT_S", 0.0)
    job_id = house.submit()
    house.cluster.keeps_silent = True
    scheduler.step()
    assert len(house.cluster.launches) == 1
    successor = house.scheduler()
    for _ in range(3):
        successor.step()
    assert len(house.cluster.launches) == 2
    assert {(launch.job_id, launch.attempt) for launch in house.cluster.launches} == {(job_id, 1)}


@pytest.mark.parametrize("is_reachable", [True, False])
def test_a_supervisor_that_never_begins_is_given_up_after_the_timeout(house, scheduler, monkeypatch, is_reachable):
    """Ray may take an actor and never start it, and then says for ever that it is on its way."""
    monkeypatch.setattr(follower, "LAUNCH_REPEAT_S", 0.0)
    job_id = house.submit(retry={"budget": 0})
    house.cluster.keeps_silent = True
    scheduler.step()
    if not is_reachable:
        house.cluster.lose_touch(job_id, 1)
    for _ in range(3):
        house.cluster.loses_launches = True
        scheduler.step()
    assert house.store.get(job_id).status is JobStatus.STARTING
    impatient = house.scheduler(launch_timeout_s=0.0)
    impatient.step()
    assert house.store.get(job_id).failure.error_type == "LaunchFailed"
    assert not house.files.prevent_launch(job_id, 1)  # nobody can begin it now


def test_a_supervisor_that_has_begun_is_heard_of_however_late(house, scheduler, monkeypatch):
    monkeypatch.setattr(follower, "LAUNCH_REPEAT_S", 0.0)
    job_id = house.submit()
    scheduler.step()
    house.cluster.lose_touch(job_id, 1)
    impatient = house.scheduler(launch_timeout_s=0.0)
    for _ in range(3):
        impatient.step()
    assert house.store.get(job_id).status is JobStatus.STARTING
    house.cluster.find(job_id, 1)
    house.cluster.run(job_id, 1)
    impatient.step()
    assert house.store.get(job_id).status is JobStatus.RUNNING


def test_a_running_attempt_that_says_nothing_is_not_launched_again(house, scheduler, monkeypatch):
    monkeypatch.setattr(follower, "LAUNCH_REPEAT_S", 0.0)
    house.start(scheduler)
    for _ in range(3):
        scheduler.step()
    assert len(house.cluster.launches) == 1


@pytest.mark.parametrize("state", [SupervisorState.ALIVE, SupervisorState.UNREACHABLE])
def test_an_attempt_that_does_not_stop_is_given_up_in_the_end(house, scheduler, monkeypatch, state):
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    house.cluster.supervisor(job_id, 1).state = state
    scheduler.step()
    assert house.status(job_id)[0] is JobStatus.STOPPING
    scheduler.step()
    assert house.status(job_id)[0] is JobStatus.STOPPING, "within its grace it is waited for"
    monkeypatch.setattr(follower, "STOP_OVERTIME_S", -100.0)
    scheduler.step()
    assert house.status(job_id) == (JobStatus.CANCELLED, Reason.CANCELLED)
    assert (job_id, 1) in house.cluster.closed


def test_the_last_checkpoint_may_take_as_long_as_its_upload(house, scheduler, monkeypatch):
    job_id = house.start(scheduler)
    house.store.request_cancel(job_id)
    scheduler.step()
    began = time.monotonic()
    grace_s = house.cluster.launches[-1].stop_grace_s
    monkeypatch.setattr(follower.time, "monotonic", lambda: began + grace_s + UPLOAD_TIMEOUT_S)
    scheduler.step()
    assert house.status(job_id)[0] is JobStatus.STOPPING
    house.cluster.checkpoint(job_id, 1, 7)
    house.cluster.end(job_id, 1, Outcome.STOPPED, Reason.CANCEL_REQUESTED)
    scheduler.step()
    assert house.status(job_id)[0] is JobStatus.CANCELLED
    assert [checkpoint.step for checkpoint in house.store.checkpoints(job_id)] == [7]


def test_launches_that_come_to_nothing_are_not_repeated_at_every_look(house, scheduler):
    # Each would start a process.
    house.submit()
    house.cluster.loses_launches = True
    for _ in range(10):
        scheduler.step()
    assert len(house.cluster.launches) == 2, "when it was admitted, and once since, within the interval"
