"""Status changes and retry decisions, alone. A failure means a job that ends wrongly or never."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import InvalidTransition, ServiceError
from service.domain.job import TRANSITIONS, JobStatus, Outcome, Reason, check_transition
from service.domain.retry import MAX_BACKOFF_S, Ending, NextStep, after_attempt, pause_before
from service.domain.spec import RetrySpec

LIVE = (JobStatus.STARTING, JobStatus.RUNNING, JobStatus.STOPPING)


def test_every_status_has_a_row_and_terminal_ones_are_left_only_by_resuming():
    assert set(TRANSITIONS) == set(JobStatus)
    for status in JobStatus:
        assert status.is_terminal <= (TRANSITIONS[status] <= {JobStatus.QUEUED})
    assert not TRANSITIONS[JobStatus.SUCCEEDED]


def test_every_status_is_reached_from_queued():
    reached, frontier = set(), {JobStatus.QUEUED}
    while frontier:
        reached |= frontier
        frontier = {after for status in frontier for after in TRANSITIONS[status]} - reached
    assert reached == set(JobStatus)


@pytest.mark.parametrize(("before", "after"), list(product(JobStatus, JobStatus)))
def test_a_change_is_refused_unless_the_table_has_it(before, after):
    if after in TRANSITIONS[before]:
        check_transition(before, after)
    else:
        with pytest.raises(InvalidTransition, match=f"{before} cannot become {after}") as caught:
            check_transition(before, after)
        assert isinstance(caught.value, ServiceError)


def _decide(
    outcome, reason, status=JobStatus.RUNNING, *, stop_reason=None, used=0, budget=3, is_placed=False, endings=()
):
    return after_attempt(
        outcome=outcome,
        reason=reason,
        status=status,
        stop_reason=stop_reason,
        retries_used=used,
        retry=RetrySpec(budget=budget),
        endings=endings,
        is_placed=is_placed,
    )


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.LOST, Outcome.FAILED])
def test_a_job_whose_time_is_up_fails_however_its_attempt_ended(outcome):
    following = _decide(outcome, Reason.USER_ERROR, JobStatus.STOPPING, stop_reason=Reason.TIMEOUT)
    assert (following.status, following.reason) == (JobStatus.FAILED, Reason.TIMEOUT)
    done = _decide(Outcome.SUCCEEDED, Reason.COMPLETED, JobStatus.STOPPING, stop_reason=Reason.TIMEOUT)
    assert done.status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("outcome", "reason", "status", "expected"),
    [
        (Outcome.SUCCEEDED, Reason.COMPLETED, JobStatus.RUNNING, (JobStatus.SUCCEEDED, Reason.COMPLETED, False)),
        (Outcome.SUCCEEDED, Reason.COMPLETED, JobStatus.STARTING, (JobStatus.SUCCEEDED, Reason.COMPLETED, False)),
        # Asked to stop just as it finished: what is done is done.
        (Outcome.SUCCEEDED, Reason.COMPLETED, JobStatus.STOPPING, (JobStatus.SUCCEEDED, Reason.COMPLETED, False)),
        (Outcome.FAILED, Reason.USER_ERROR, JobStatus.RUNNING, (JobStatus.FAILED, Reason.USER_ERROR, False)),
        (Outcome.FAILED, Reason.USER_ERROR, JobStatus.STARTING, (JobStatus.FAILED, Reason.USER_ERROR, False)),
        (Outcome.FAILED, Reason.USER_ERROR, JobStatus.STOPPING, (JobStatus.CANCELLED, Reason.CANCELLED, False)),
        (Outcome.STOPPED, Reason.CANCEL_REQUESTED, JobStatus.STOPPING, (JobStatus.CANCELLED, Reason.CANCELLED, False)),
        # A cancel that came while the service was stopping.
        (Outcome.STOPPED, Reason.SERVICE_STOPPED, JobStatus.STOPPING, (JobStatus.CANCELLED, Reason.CANCELLED, False)),
        (Outcome.STOPPED, Reason.SERVICE_STOPPED, JobStatus.RUNNING, (JobStatus.QUEUED, Reason.SERVICE_STOPPED, False)),
        (
            Outcome.STOPPED,
            Reason.SERVICE_STOPPED,
            JobStatus.STARTING,
            (JobStatus.QUEUED, Reason.SERVICE_STOPPED, False),
        ),
        (Outcome.LOST, Reason.RANK_LOST, JobStatus.RUNNING, (JobStatus.QUEUED, Reason.RANK_LOST, True)),
        (Outcome.LOST, Reason.NODE_LOST, JobStatus.STARTING, (JobStatus.QUEUED, Reason.NODE_LOST, True)),
        (Outcome.LOST, Reason.RANK_LOST, JobStatus.STOPPING, (JobStatus.CANCELLED, Reason.CANCELLED, False)),
    ],
)
def test_what_follows_an_attempt(outcome, reason, status, expected):
    following = _decide(outcome, reason, status)
    assert (following.status, following.reason, following.costs_retry) == expected


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (Outcome.STOPPED, (JobStatus.PAUSED, Reason.PAUSED)),
        # From the last checkpoint; being lost on the way costs nothing.
        (Outcome.LOST, (JobStatus.PAUSED, Reason.PAUSED)),
        (Outcome.SUCCEEDED, (JobStatus.SUCCEEDED, Reason.COMPLETED)),
        # It would fail again when it is resumed: its owner should know now.
        (Outcome.FAILED, (JobStatus.FAILED, Reason.USER_ERROR)),
    ],
)
def test_what_becomes_of_a_job_that_was_asked_to_pause(outcome, expected):
    reason = {Outcome.SUCCEEDED: Reason.COMPLETED, Outcome.FAILED: Reason.USER_ERROR}.get(outcome, Reason.RANK_LOST)
    following = _decide(outcome, reason, JobStatus.STOPPING, stop_reason=Reason.PAUSE_REQUESTED)
    assert (following.status, following.reason, following.costs_retry) == (*expected, False)


@pytest.mark.parametrize("is_placed", [True, False])
def test_a_job_that_was_stopped_to_be_resized_goes_on_where_its_places_are_held(is_placed):
    following = _decide(
        Outcome.STOPPED, Reason.RESIZED, stop_reason=Reason.RESIZED, used=3, budget=3, is_placed=is_placed
    )
    status = JobStatus.STARTING if is_placed else JobStatus.QUEUED
    assert following == NextStep(status=status, reason=Reason.RESIZED)


@pytest.mark.parametrize("is_placed", [True, False])
def test_an_error_of_the_users_is_not_hidden_by_a_resize(is_placed):
    following = _decide(Outcome.FAILED, Reason.USER_ERROR, stop_reason=Reason.RESIZED, is_placed=is_placed)
    assert following == NextStep(status=JobStatus.FAILED, reason=Reason.USER_ERROR)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_lost_attempt_is_retried_up_to_the_budget_and_not_once_more(budget):
    for used in range(budget):
        following = _decide(Outcome.LOST, Reason.RANK_LOST, used=used, budget=budget)
        pause_s = pause_before(used + 1, RetrySpec().backoff_s)
        assert following == NextStep(
            status=JobStatus.QUEUED, reason=Reason.RANK_LOST, costs_retry=True, pause_s=pause_s
        )
    exhausted = NextStep(status=JobStatus.FAILED, reason=Reason.RETRIES_EXHAUSTED)
    assert _decide(Outcome.LOST, Reason.RANK_LOST, used=budget, budget=budget) == exhausted


def test_retries_wait_ever_longer_up_to_a_bound():
    assert [pause_before(number, 5.0) for number in range(1, 10)] == [0, 5, 10, 20, 40, 80, 160, 300, 300]
    assert [pause_before(number, 3600.0) for number in (1, 2, 3)] == [0, 3600, 3600]  # as its user wants it
    assert {pause_before(number, 0.0) for number in (1, 2, 1000)} == {0}
    assert pause_before(10**6, 5.0) == MAX_BACKOFF_S


SAME = Ending(reason=Reason.RANK_LOST, error_type="SIGSEGV", step=17)


@pytest.mark.parametrize(
    ("endings", "is_repeated"),
    [
        ([SAME] * 2, False),
        ([SAME] * 3, True),
        ([SAME] * 4, True),
        ([replace(SAME, step=16), SAME, SAME, SAME], True),
        ([SAME, replace(SAME, step=18), SAME, SAME], False),
        ([SAME, SAME, replace(SAME, step=18)], False),
        ([SAME, SAME, replace(SAME, error_type="SIGKILL")], False),
        ([SAME, SAME, replace(SAME, reason=Reason.OUT_OF_MEMORY)], False),
        ([replace(SAME, step=None)] * 3, True),
        # What the cluster or the service did says nothing of the job, and does not part what does.
        ([SAME, Ending(reason=Reason.PREEMPTED, error_type=None, step=3), SAME, SAME], True),
        ([SAME, SAME, SAME, Ending(reason=Reason.NODE_LOST, error_type="NodeDied", step=17)], False),
        ([Ending(reason=Reason.NODE_LOST, error_type="NodeDied", step=17)] * 5, False),
        ([Ending(reason=Reason.RANK_LOST, error_type="ActorDied", step=17)] * 5, False),
        ([Ending(reason=Reason.LAUNCH_FAILED, error_type=None, step=0)] * 5, False),
        ([Ending(reason=Reason.CHECKPOINT_FAILED, error_type="OSError", step=20)] * 5, False),
    ],
)
def test_a_job_that_fails_three_times_running_in_one_way_at_one_step_stops(endings, is_repeated):
    following = _decide(Outcome.LOST, endings[-1].reason, used=len(endings) - 1, budget=100, endings=endings)
    if is_repeated:
        assert following == NextStep(status=JobStatus.FAILED, reason=Reason.REPEATED_FAILURE)
    else:
        assert (following.status, following.reason, following.costs_retry) == (
            JobStatus.QUEUED,
            endings[-1].reason,
            True,
        )


def test_a_repeated_failure_is_told_even_where_no_retry_is_left():
    following = _decide(Outcome.LOST, Reason.RANK_LOST, used=2, budget=2, endings=[SAME] * 3)
    assert following.reason is Reason.REPEATED_FAILURE


ENDS = st.sampled_from(
    [
        (Outcome.STOPPED, Reason.SERVICE_STOPPED),
        (Outcome.STOPPED, Reason.RESIZED),
        (Outcome.STOPPED, Reason.PREEMPTED),
        (Outcome.FAILED, Reason.USER_ERROR),
        *((Outcome.LOST, reason) for reason in (Reason.NODE_LOST, Reason.RANK_LOST, Reason.OUT_OF_MEMORY)),
    ]
)


@given(
    budget=st.integers(0, 4),
    backoff_s=st.floats(0, 3600),
    ends=st.lists(st.tuples(ENDS, st.integers(0, 2), st.booleans()), max_size=40),
)
def test_a_job_has_no_more_attempts_than_its_retries_and_what_others_did_allow(budget, backoff_s, ends):
    retry = RetrySpec(budget=budget, backoff_s=backoff_s)
    used, num_free, num_attempts, endings, pauses = 0, 0, 0, [], []
    for (outcome, reason), step, is_placed in ends:
        num_attempts += 1
        endings.append(Ending(reason=reason, error_type="SomeError", step=step))
        following = after_attempt(
            outcome=outcome,
            reason=reason,
            status=JobStatus.RUNNING,
            stop_reason=reason if outcome is Outcome.STOPPED else None,
            retries_used=used,
            retry=retry,
            endings=endings,
            is_placed=is_placed,
        )
        used += following.costs_retry
        if following.costs_retry:
            pauses.append(following.pause_s)
        else:
            assert following.pause_s == 0
        if following.status is JobStatus.FAILED:
            assert (outcome, reason) == (Outcome.FAILED, Reason.USER_ERROR) or following.reason in (
                Reason.RETRIES_EXHAUSTED,
                Reason.REPEATED_FAILURE,
            )
            break
        num_free += outcome is Outcome.STOPPED
    assert num_attempts <= 1 + budget + num_free
    assert used <= budget
    assert pauses == sorted(pauses)
    assert all(pause_s <= max(MAX_BACKOFF_S, backoff_s) for pause_s in pauses)


def test_a_stopped_service_queues_again_whatever_the_budget():
    following = _decide(Outcome.STOPPED, Reason.SERVICE_STOPPED, used=5, budget=0)
    assert following == NextStep(status=JobStatus.QUEUED, reason=Reason.SERVICE_STOPPED)


def test_every_decision_is_a_change_that_the_table_has():
    stop_reasons = [None, Reason.CANCEL_REQUESTED, Reason.PAUSE_REQUESTED, Reason.TIMEOUT, Reason.RESIZED]
    for outcome, reason, status, (used, budget), stop_reason, is_placed in product(
        Outcome, Reason, LIVE, [(0, 0), (0, 1), (1, 1)], stop_reasons, [False, True]
    ):
        if status is JobStatus.STOPPING and stop_reason in (None, Reason.RESIZED):
            stop_reason = Reason.CANCEL_REQUESTED  # what else makes a job stop
        following = _decide(
            outcome, reason, status, used=used, budget=budget, stop_reason=stop_reason, is_placed=is_placed
        )
        check_transition(status, following.status)
        assert following.costs_retry <= (following.status is JobStatus.QUEUED)
