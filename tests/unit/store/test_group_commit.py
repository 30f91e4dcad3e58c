"""Requests carried out in groups. A failure means that one request pays for another, or is told what is not so."""

import threading

import pytest

from service.domain.errors import DiskFull, Unavailable
from service.store.engine import Deadlock
from service.store.group_commit import MAX_GROUP, MAX_WAITING, GroupCommit


class Ledger:
    """Carries requests out: odd ones alone are refused, "broken" breaks its transaction, "away" finds no database."""

    def __init__(self):
        self.groups = []
        self.num_deadlocks = 0  # after the first
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def commit(self, requests):
        self.entered.set()
        self.gate.wait(timeout=10)
        self.groups.append(list(requests))
        if self.num_deadlocks > 0 and len(self.groups) > 1:
            self.num_deadlocks -= 1
            raise Deadlock("deadlock")
        if "away" in requests:
            raise Unavailable("away")
        if "full" in requests:
            raise DiskFull("full")
        if "broken" in requests:
            raise RuntimeError("broken")
        return [ValueError(request) if request == "refused" else f"done {request}" for request in requests]


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def group(ledger):
    group = GroupCommit(ledger.commit, name="test")
    yield group
    group.close()


def put_together(ledger, group, *requests):
    """Futures of requests that arrive while an earlier one is being committed."""
    ledger.gate.clear()
    first = group.put("first")
    assert ledger.entered.wait(timeout=10)
    futures = [group.put(request) for request in requests]
    ledger.gate.set()
    assert first.result(timeout=10) == "done first"
    return futures


def test_what_arrives_during_a_commit_shares_the_next(ledger, group):
    futures = put_together(ledger, group, *range(50))
    assert [future.result(timeout=10) for future in futures] == [f"done {number}" for number in range(50)]
    assert ledger.groups == [["first"], list(range(50))]


def test_a_refusal_touches_no_other(ledger, group):
    before, refused, after = put_together(ledger, group, "a", "refused", "b")
    with pytest.raises(ValueError, match="refused"):
        refused.result(timeout=10)
    assert (before.result(timeout=10), after.result(timeout=10)) == ("done a", "done b")


def test_one_that_breaks_its_transaction_breaks_its_own_alone(ledger, group):
    before, broken, after = put_together(ledger, group, "a", "broken", "b")
    with pytest.raises(RuntimeError, match="broken"):
        broken.result(timeout=10)
    assert (before.result(timeout=10), after.result(timeout=10)) == ("done a", "done b")


def test_a_group_that_was_undone_for_another_transaction_is_tried_once_more(ledger, group):
    ledger.num_deadlocks = 1
    futures = put_together(ledger, group, "a", "refused", "b")
    assert [futures[0].result(timeout=10), futures[2].result(timeout=10)] == ["done a", "done b"]
    assert isinstance(futures[1].exception(timeout=10), ValueError)
    assert ledger.groups == [["first"], *[["a", "refused", "b"]] * 2]


def test_a_group_that_is_undone_again_is_told_so(ledger, group):
    ledger.num_deadlocks = 2
    futures = put_together(ledger, group, "a", "b")
    assert [type(future.exception(timeout=10)) for future in futures] == [Deadlock] * 2
    assert group.put("later").result(timeout=10) == "done later"


@pytest.mark.parametrize(("what", "kind"), [("away", Unavailable), ("full", DiskFull)])
def test_without_a_database_all_are_told_so_at_once(ledger, group, what, kind):
    futures = put_together(ledger, group, "a", what, "b")
    errors = [future.exception(timeout=10) for future in futures]
    assert [(type(error), error.message) for error in errors] == [(kind, what)] * 3
    assert len({id(error) for error in errors}) == 3
    assert ledger.groups == [["first"], ["a", what, "b"]]
    assert group.put("later").result(timeout=10) == "done later"


def test_one_that_is_cancelled_in_time_has_no_effect(ledger, group):
    ledger.gate.clear()
    first = group.put("first")
    assert ledger.entered.wait(timeout=10)
    kept, cancelled = group.put("kept"), group.put("cancelled")
    assert cancelled.cancel()
    ledger.gate.set()
    assert (first.result(timeout=10), kept.result(timeout=10)) == ("done first", "done kept")
    assert "cancelled" not in [request for requests in ledger.groups for request in requests]


def test_a_group_has_a_largest_size(ledger, group):
    futures = put_together(ledger, group, *range(2 * MAX_GROUP))
    assert [future.result(timeout=10) for future in futures] == [f"done {n}" for n in range(2 * MAX_GROUP)]
    assert max(map(len, ledger.groups)) == MAX_GROUP


def test_closing_carries_out_what_waits_and_it_can_be_used_again(ledger, group):
    futures = [group.put(number) for number in range(5)]
    group.close()
    assert all(future.done() for future in futures)
    assert group.put("again").result(timeout=10) == "done again"


def test_more_than_can_wait_is_refused_at_once(ledger, group):
    futures = put_together(ledger, group, *range(MAX_WAITING + 1))
    assert isinstance(futures[-1].exception(timeout=10), Unavailable)
    assert [future.result(timeout=10) for future in futures[:-1]] == [f"done {n}" for n in range(MAX_WAITING)]


def test_those_that_came_while_the_database_was_tried_are_told_with_the_others(ledger, group):
    ledger.gate.clear()
    away = group.put("away")
    assert ledger.entered.wait(timeout=10)
    waiting = [group.put(number) for number in range(3)]
    ledger.gate.set()
    assert [type(future.exception(timeout=10)) for future in [away, *waiting]] == [Unavailable] * 4
    assert ledger.groups == [["away"]]
