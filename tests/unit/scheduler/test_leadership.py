"""Who leads and for how long, by clocks that a test moves. A failure means two leaders, or none for too long."""

import pytest

from service.domain.errors import LeaseLost, Unavailable
from service.scheduler import leadership
from service.scheduler.leadership import RENEWALS_PER_TTL, Leadership
from tests.fakes import FakeJobStore

TTL_S = 6.0
MOMENT_S = 0.001


class Clocks:
    """The clocks of one process; whoever reads the time of day is caught."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        raise AssertionError("leadership asked for the time of day")


@pytest.fixture
def clocks(monkeypatch):
    clocks = Clocks()
    monkeypatch.setattr(leadership, "time", clocks)
    return clocks


@pytest.fixture
def store():
    return FakeJobStore()


def candidate(store, name):
    return Leadership(holder=name, store=store, ttl_s=TTL_S)


def test_the_first_leads_at_once_and_renews_three_times_in_the_life_of_its_lease(store, clocks):
    first = candidate(store, "a")
    lease = first.claim()
    assert (lease.holder, lease.epoch) == ("a", 1)
    for num_renewals in range(1, 10):
        for _ in range(2):
            clocks.now += TTL_S / RENEWALS_PER_TTL / 2 + MOMENT_S
            assert first.claim() == lease
        assert store.read_lease().num_renewals == num_renewals


def test_another_takes_over_when_it_has_seen_no_renewal_for_the_whole_life(store, clocks):
    first, second = candidate(store, "a"), candidate(store, "b")
    first.claim()
    clocks.now += TTL_S - 1.0
    assert second.claim() is None  # looks for the first time: how old the lease is it cannot know
    clocks.now += TTL_S - MOMENT_S
    assert second.claim() is None
    clocks.now += 2 * MOMENT_S
    assert second.claim().epoch == 2


def test_every_renewal_that_is_seen_begins_the_wait_anew(store, clocks):
    first, second = candidate(store, "a"), candidate(store, "b")
    first.claim()
    for _ in range(10):
        clocks.now += 0.9 * TTL_S
        assert second.claim() is None
        first.claim()


def test_one_that_was_stopped_while_it_waited_looks_again_before_it_takes_over(store, clocks):
    first, second = candidate(store, "a"), candidate(store, "b")
    first.claim()
    second.claim()
    clocks.now += 100 * TTL_S
    first.claim()  # alive all along
    assert second.claim() is None


def test_what_is_released_is_taken_at_once(store, clocks):
    first, second = candidate(store, "a"), candidate(store, "b")
    first.claim()
    assert second.claim() is None
    first.release()
    assert second.claim().epoch == 2
    first.release()  # has none: nothing
    assert store.read_lease().holder == "b"


def test_a_leader_that_was_away_does_nothing_before_it_has_looked(store, clocks):
    first, second = candidate(store, "a"), candidate(store, "b")
    first.claim()
    second.claim()
    clocks.now += TTL_S
    second.claim()
    with pytest.raises(LeaseLost):
        first.keep()
    first.forget()
    assert first.claim() is None


def test_a_leader_that_was_away_goes_on_if_nobody_came(store, clocks):
    first = candidate(store, "a")
    lease = first.claim()
    clocks.now += 100 * TTL_S
    assert first.claim() == lease
    first.forget()
    assert first.claim() == lease


def test_a_leader_acts_under_no_lease_that_it_cannot_renew(store, clocks):
    first = candidate(store, "a")
    lease = first.claim()
    store.unavailable = True
    assert first.keep() == lease
    clocks.now += TTL_S / RENEWALS_PER_TTL
    with pytest.raises(Unavailable):
        first.keep()
    with pytest.raises(Unavailable):
        first.claim()
    store.unavailable = False
    assert first.claim() == lease


def test_a_lease_that_was_taken_although_the_answer_was_lost_is_found_again(store, clocks):
    class LosesAnswers(FakeJobStore):
        def take_lease(self, holder, *, seen):
            super().take_lease(holder, seen=seen)
            raise Unavailable("the connection broke during the commit")

    store = LosesAnswers()
    first = candidate(store, "a")
    with pytest.raises(Unavailable):
        first.claim()
    assert first.claim().epoch == 1
