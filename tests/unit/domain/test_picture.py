"""What the policy is shown. A failure means estimates that mislead it, or rows that it takes for something else."""

from dataclasses import replace
from datetime import timedelta

import pytest

from service.domain.job import AttemptStatus, JobStatus, Outcome, Reason
from service.domain.picture import Picture
from service.domain.ports import HeldBack
from service.domain.scheduling.estimate import Progress, remaining_s
from tests.unit.scheduler.examples import NOW, make_job, make_live


@pytest.fixture
def picture():
    return Picture(resize_interval_s=60.0, stop_grace_s=10.0)


def _at(live, step, **changes):
    return replace(live, attempt=live.attempt.model_copy(update={"step": step}), **changes)


def test_progress_tells_more_than_an_owner_expects_and_no_job_outlives_its_time_limit():
    progress = Progress(num_steps=50, in_s=100.0, num_left=150)
    assert remaining_s(ran_for_s=100.0, expected_s=120.0, timeout_s=None, progress=progress) == 300.0
    assert remaining_s(ran_for_s=100.0, expected_s=120.0, timeout_s=250.0, progress=progress) == 150.0
    early = replace(progress, in_s=1.0)
    assert remaining_s(ran_for_s=1.0, expected_s=120.0, timeout_s=None, progress=early) == 119.0
    assert remaining_s(ran_for_s=1.0, expected_s=None, timeout_s=None, progress=early) is None


def test_an_expectation_that_has_passed_is_put_off():
    assert remaining_s(ran_for_s=1000.0, expected_s=900.0, timeout_s=None) == 100.0
    assert remaining_s(ran_for_s=1000.0, expected_s=None, timeout_s=900.0) == 0.0


def test_the_end_of_a_running_job_is_told_from_the_steps_that_were_seen(picture):
    live = make_live(make_job("a", num_steps=1000, step=100), "n")
    (active,) = picture.active([_at(live, 100)], 0.0)
    assert active.remaining_s is None
    (active,) = picture.active([_at(live, 300)], 100.0)
    assert active.remaining_s == 350.0
    assert (active.ran_for_s, active.is_settled) == (100.0, True)
    # Another process counts anew.
    (active,) = Picture(resize_interval_s=60.0, stop_grace_s=10.0).active([_at(live, 300)], 100.0)
    assert (active.remaining_s, active.is_settled) == (None, False)


def test_what_a_process_did_not_see_it_may_take_from_the_stores_own_times(picture):
    live = make_live(make_job("a", num_steps=1000), "n")
    picture.recall([live], NOW + timedelta(seconds=100), 5.0)
    (active,) = picture.active([_at(live, 250)], 5.0)
    assert (active.ran_for_s, active.remaining_s) == (100.0, 300.0)


@pytest.mark.parametrize(
    "changes", [{"status": AttemptStatus.ENDED}, {"stop_reason": Reason.PREEMPTED}, {"stop_reason": Reason.TIMEOUT}]
)
def test_whoever_was_asked_to_stop_or_has_ended_is_stopping(picture, changes):
    live = make_live(make_job("a", workers={"min": 1, "max": 2}), "n", **changes)
    (active,) = picture.active([live], 0.0)
    assert (active.is_stopping, active.is_movable, active.remaining_s) == (True, False, 10.0)
    assert active.next_node_ids == ()


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({}, False),
        ({"stop_reason": Reason.PREEMPTED}, True),
        ({"stop_reason": Reason.RESIZED}, True),
        ({"stop_reason": Reason.SERVICE_STOPPED}, True),
        ({"stop_reason": Reason.PREEMPTED, "outcome": Outcome.SUCCEEDED}, False),
        ({"stop_reason": Reason.TIMEOUT}, False),
    ],
)
def test_some_that_stop_go_on_with_what_is_left(picture, changes, goes_on):
    live = make_live(make_job("a", workers={"min": 1, "max": 2}, num_steps=1000), "n", **changes)
    picture.active([_at(live, 0)], 0.0)
    picture.active([_at(live, 200)], 100.0)
    # On one worker; on two it takes half as long.
    assert [job.duration_s for job in picture.going_on([_at(live, 200)], 100.0)] == ([200.0] if goes_on else [])
    cancelled = replace(live, job=live.job.model_copy(update={"cancel_requested": True}))
    assert picture.going_on([cancelled], 100.0) == []


def test_only_one_that_is_resized_holds_other_places(picture):
    live = make_live(make_job("a", workers={"min": 1, "max": 2}), "n", target=("n", "m"))
    (active,) = picture.active([live], 0.0)
    assert (active.next_node_ids, active.num_held) == (("n", "m"), 2)
    paused = replace(live, attempt=live.attempt.model_copy(update={"stop_reason": Reason.PAUSE_REQUESTED}))
    assert picture.active([paused], 0.0)[0].next_node_ids == ()


def test_an_elastic_job_can_be_asked_once_all_its_ranks_run(picture):
    live = make_live(make_job("a", workers={"min": 1, "max": 2}), "n")
    assert picture.active([live], 0.0)[0].is_movable
    starting = replace(live, job=live.job.model_copy(update={"status": JobStatus.STARTING}))
    assert not picture.active([starting], 0.0)[0].is_movable


def test_a_job_may_be_stopped_for_others_as_often_as_it_says(picture):
    live = make_live(make_job("a", preemptions_used=4), "n")
    assert picture.active([live], 0.0)[0].preemptions_left == 6


def test_a_waiting_job_is_shown_as_it_was_until_it_changes(picture):
    job = make_job("a", workers={"min": 1, "max": 4})
    (first,) = picture.pending([job], {})
    (again,) = picture.pending([job], {})
    assert again is first
    (fewer,) = picture.pending([job.model_copy(update={"workers_wanted": 2})], {})
    assert (first.worlds, fewer.worlds) == ((4, 3, 2, 1), (2, 1))
    (held,) = picture.pending([job], {job.id: HeldBack(waits_for=("job-1", "job-2", "job-3", "job-4"))})
    assert held.obstacle == "Waits for the success of 4 job(s): job-1, job-2, job-3, …."
    (pausing,) = picture.pending([job.model_copy(update={"message": "Pauses."})], {job.id: HeldBack(retry_in_s=9.0)})
    assert pausing.obstacle == "Pauses."


def test_a_job_that_is_queued_again_needs_only_the_rest(picture):
    job = make_job("a", num_steps=100, step=40, running_s=80.0)
    (pending,) = picture.pending([job], {})
    assert pending.duration_s == 120.0
