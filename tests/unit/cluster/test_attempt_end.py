"""Judging how an attempt ended, alone. A failure means a wrong retry, or a user who is told an effect as the cause."""

import signal
from itertools import permutations

import pytest

from service.cluster.attempt_end import RankFailure, judge
from service.cluster.rank_end import RankEnd
from service.domain.job import Outcome, Reason
from service.domain.rank_protocol import Errored


def _end(*, exit_status=0, step=None, stopped=False, cause=None, killed_in=None, out_of_memory=""):
    error = None
    if cause is not None:
        error = Errored(cause=cause, error_type="SomeError", message=f"a {cause} problem", traceback="Traceback …")
    return RankEnd(
        exit_status=exit_status,
        step=step,
        stopped=stopped,
        error=error,
        killed_in_state=killed_in,
        out_of_memory=out_of_memory,
    )


CLEAN = _end(step=7)


def _judge(ends, *, stop_reason=None, step=5, order=None, more=()):
    failures = [RankFailure.of_process(rank, ends[rank]) for rank in order or ends if not ends[rank].is_clean]
    return judge(ends=ends, failures=[*failures, *more], stop_reason=stop_reason, step=step)


@pytest.mark.parametrize(
    ("end", "is_clean"),
    [
        (_end(step=7), True),
        (_end(step=0, stopped=True), True),
        (_end(), False),  # it left without a word
        (_end(step=7, exit_status=1), False),
        (_end(step=7, exit_status=-9), False),
        (_end(step=7, cause="checkpoint"), False),
    ],
)
def test_a_rank_is_clean_only_if_it_said_so_and_left_so(end, is_clean):
    assert end.is_clean == is_clean


def test_a_rank_that_ran_out_of_memory_is_named_with_the_remedy():
    for end in (_end(exit_status=1, cause="memory"), _end(exit_status=-9, out_of_memory="used too much: lower it.")):
        message = RankFailure.of_process(3, end).failure.message
        assert message.startswith("Rank 3 ")
        assert "lower" in message


def test_all_done_is_success():
    ended = _judge({0: CLEAN, 1: CLEAN})
    assert (ended.outcome, ended.reason, ended.step, ended.failure) == (Outcome.SUCCEEDED, Reason.COMPLETED, 7, None)


def test_the_step_is_the_last_that_anybody_reported():
    assert _judge({0: _end(step=4), 1: _end(step=4)}, step=6).step == 6
    assert _judge({0: _end(exit_status=1)}, step=6).step == 6


@pytest.mark.parametrize("reason", [Reason.CANCEL_REQUESTED, Reason.TIMEOUT, Reason.SERVICE_STOPPED])
def test_a_stop_that_was_asked_for_is_a_stop(reason):
    ended = _judge({0: _end(step=6, stopped=True), 1: _end(step=6, stopped=True)}, stop_reason=reason)
    assert (ended.outcome, ended.reason, ended.step, ended.failure) == (Outcome.STOPPED, reason, 6, None)


def test_a_stop_that_came_too_late_is_success():
    assert _judge({0: CLEAN, 1: CLEAN}, stop_reason=Reason.CANCEL_REQUESTED).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("end", "outcome", "reason", "error_type"),
    [
        (_end(exit_status=1, cause="user"), Outcome.FAILED, Reason.USER_ERROR, "SomeError"),
        (_end(exit_status=1, cause="checkpoint"), Outcome.LOST, Reason.CHECKPOINT_FAILED, "SomeError"),
        (_end(exit_status=1, cause="collective"), Outcome.LOST, Reason.COLLECTIVE_FAILED, "SomeError"),
        (_end(exit_status=1, cause="memory"), Outcome.LOST, Reason.OUT_OF_MEMORY, "SomeError"),
        (_end(exit_status=-9, out_of_memory="used too much."), Outcome.LOST, Reason.OUT_OF_MEMORY, "OutOfMemory"),
        # A process that read samples for it was ended.
        (
            _end(exit_status=1, cause="user", out_of_memory="was ended by the kernel."),
            Outcome.LOST,
            Reason.OUT_OF_MEMORY,
            "OutOfMemory",
        ),
        # Said why, and was then killed: what it said counts.
        (_end(exit_status=-9, cause="user"), Outcome.FAILED, Reason.USER_ERROR, "SomeError"),
        (_end(exit_status=-signal.SIGKILL), Outcome.LOST, Reason.RANK_LOST, "SIGKILL"),
        (_end(exit_status=-signal.SIGSEGV), Outcome.LOST, Reason.RANK_LOST, "SIGSEGV"),
        (_end(exit_status=-(signal.SIGRTMIN + 5)), Outcome.LOST, Reason.RANK_LOST, f"signal {signal.SIGRTMIN + 5}"),
        (_end(exit_status=3), Outcome.LOST, Reason.RANK_LOST, "SystemExit"),
        (_end(exit_status=0), Outcome.LOST, Reason.RANK_LOST, "SystemExit"),
        (_end(step=7, cause="checkpoint"), Outcome.LOST, Reason.CHECKPOINT_FAILED, "SomeError"),
    ],
)
def test_one_failure_is_the_attempts(end, outcome, reason, error_type):
    ended = _judge({0: CLEAN, 1: end})
    assert (ended.outcome, ended.reason) == (outcome, reason)
    assert (ended.failure.rank, ended.failure.error_type) == (1, error_type)
    assert ended.message == ended.failure.message
    assert "1" in ended.message or end.error is not None


def test_a_kill_without_a_killer_is_explained_as_lack_of_memory():
    assert "out of memory" in _judge({0: _end(exit_status=-9)}).message
    assert "out of memory" not in _judge({0: _end(exit_status=-15)}).message


def test_a_traceback_is_kept_and_an_empty_one_is_none():
    assert _judge({0: _end(exit_status=1, cause="user")}).failure.traceback == "Traceback …"
    silent = Errored(cause="checkpoint", error_type="OSError", message="full", traceback="")
    end = RankEnd(exit_status=0, step=7, stopped=False, error=silent)
    assert _judge({0: end}).failure.traceback is None


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (_end(exit_status=-9), Reason.RANK_LOST),
        (_end(exit_status=1, cause="user"), Reason.USER_ERROR),
        (_end(exit_status=1, cause="checkpoint"), Reason.CHECKPOINT_FAILED),
    ],
)
def test_the_cause_is_told_from_its_effects_whoever_was_noticed_first(order, cause, reason):
    effect = _end(exit_status=1, cause="collective")
    ended = _judge({0: effect, 1: cause, 2: effect}, order=order)
    assert (ended.reason, ended.failure.rank) == (reason, 1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_an_error_that_would_come_again_outweighs_a_lost_rank(order):
    # Retrying would only meet it again, at the price of a retry.
    ends = {0: _end(exit_status=-9), 1: _end(exit_status=1, cause="user"), 2: _end(exit_status=1, cause="collective")}
    ended = _judge(ends, order=order)
    assert (ended.outcome, ended.failure.rank) == (Outcome.FAILED, 1)


def test_of_equals_the_first_that_was_noticed_counts():
    ends = {0: _end(exit_status=-9), 1: _end(exit_status=-11)}
    assert _judge(ends, order=(1, 0)).failure.rank == 1
    assert _judge(ends, order=(0, 1)).failure.rank == 0


def test_effects_alone_are_a_loss():
    effect = _end(exit_status=1, cause="collective")
    ended = _judge({0: effect, 1: effect})
    assert (ended.outcome, ended.reason) == (Outcome.LOST, Reason.COLLECTIVE_FAILED)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_rank_that_kept_its_peers_waiting_is_named(order):
    effect = _end(exit_status=1, cause="collective")
    ended = _judge({0: effect, 1: _end(exit_status=-9, killed_in="T"), 2: effect}, order=order)
    assert (ended.outcome, ended.reason) == (Outcome.LOST, Reason.RANK_LOST)
    assert (ended.failure.rank, ended.failure.error_type) == (1, "RankSilent")
    assert ended.message == "Rank 1 stopped answering: its process is stopped, by SIGSTOP or a terminal (state T)."


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_of_silent_ranks_the_one_that_was_stopped_is_named(order):
    # The other one may have waited for it, and had not noticed yet that a third had given up.
    ends = {0: _end(exit_status=1, cause="collective"), 1: _end(exit_status=-9, killed_in="S")}
    ended = _judge(ends | {2: _end(exit_status=-9, killed_in="t")}, order=order)
    assert (ended.failure.rank, "debugger" in ended.message) == (2, True)


@pytest.mark.parametrize("cause", [_end(exit_status=-9), _end(exit_status=1, cause="user")])
def test_what_a_rank_met_by_itself_outweighs_another_ones_silence(cause):
    # The silent one was killed since its peer had failed; it may have been in the middle of anything.
    ends = {0: _end(exit_status=-9, killed_in="R"), 1: cause}
    assert _judge(ends).failure.rank == 1


def test_a_killed_rank_that_had_said_why_is_judged_by_that():
    assert _judge({0: _end(exit_status=-9, cause="user", killed_in="S")}).reason is Reason.USER_ERROR


@pytest.mark.parametrize("state", ["R", "S", "D", "I"])
def test_a_silent_rank_is_never_taken_for_one_that_ran_out_of_memory(state):
    message = _judge({0: _end(exit_status=-9, killed_in=state)}).message
    assert f"(state {state})" in message
    assert "memory" not in message


def test_a_node_that_cannot_be_reached_is_a_lost_node_and_the_cause():
    unreachable = RankFailure.of_unreachable(1, "c")
    ended = _judge({0: _end(exit_status=1, cause="collective")}, more=[unreachable])
    assert (ended.reason, ended.failure.rank) == (Reason.NODE_LOST, 1)
    assert "c" in ended.message


@pytest.mark.parametrize("reason", [Reason.CANCEL_REQUESTED, Reason.TIMEOUT, Reason.SERVICE_STOPPED])
def test_ranks_that_did_not_stop_within_the_grace_are_still_a_stop(reason):
    ends = {0: _end(exit_status=-9), 1: _end(exit_status=1, cause="collective"), 2: _end(step=6, stopped=True)}
    ended = _judge(ends, stop_reason=reason)
    assert (ended.outcome, ended.reason, ended.failure) == (Outcome.STOPPED, reason, None)


def test_an_error_of_the_users_is_told_even_while_stopping():
    ended = _judge({0: _end(exit_status=1, cause="user")}, stop_reason=Reason.TIMEOUT)
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.USER_ERROR)


def test_a_dead_actor_is_a_lost_rank_unless_its_node_is_gone():
    alive = RankFailure.of_actor(1, "a", frozenset({"a", "b"}))
    assert (alive.outcome, alive.reason, alive.is_effect) == (Outcome.LOST, Reason.RANK_LOST, False)
    gone = RankFailure.of_actor(1, "c", frozenset({"a", "b"}))
    assert (gone.outcome, gone.reason) == (Outcome.LOST, Reason.NODE_LOST)
    assert "c" in gone.failure.message
    ended = _judge({0: _end(exit_status=1, cause="collective")}, more=[gone])
    assert ended.reason is Reason.NODE_LOST


def test_trouble_of_the_services_own_is_a_loss_and_names_itself():
    failure = RankFailure.of_service(2, OSError("the disk is full"))
    assert (failure.outcome, failure.failure.error_type) == (Outcome.LOST, "OSError")
    assert "the disk is full" in failure.failure.message
