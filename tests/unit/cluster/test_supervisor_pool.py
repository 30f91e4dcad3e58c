"""The supervisors that wait, without Ray. A failure means one for two attempts, or one that nobody ends."""

import time

import pytest

from service.cluster import supervisor_pool
from service.cluster.supervisor_actor import Release
from service.cluster.supervisor_pool import SupervisorPool
from tests.fake_ray import FakeRay


@pytest.fixture
def ray(monkeypatch):
    ray = FakeRay()
    monkeypatch.setattr(supervisor_pool, "ray", ray)
    monkeypatch.setattr(supervisor_pool, "REFILL_AFTER_S", 0.0)
    return ray


def test_one_that_waits_is_taken_first_and_no_other_twice(ray):
    pool = SupervisorPool(1)
    pool.keep_up()
    pool.keep_up()
    assert len(ray.actors) == 1
    first, second = pool.take(), pool.take()
    assert first.actor is ray.actors[0]
    assert second.actor is ray.actors[1]
    assert first.name != second.name
    assert {actor.options["lifetime"] for actor in ray.actors} == {"detached"}


@pytest.mark.parametrize("state", Release)
def test_one_is_used_again_only_if_it_is_free(ray, state):
    pool = SupervisorPool(0)
    supervisor = pool.take()
    pool.give_back(supervisor, "job", 1)
    assert supervisor.name in pool.names
    (release,) = supervisor.actor.asked("release")
    assert release.arguments == ("job", 1)
    release.answer(state)
    again = pool.take()
    assert (again is supervisor) == (state is Release.FREE)
    assert supervisor.actor.is_alive == (state is not Release.SPENT)


def test_one_that_dies_or_hangs_is_not_used_again(ray, monkeypatch):
    pool = SupervisorPool(1)
    pool.keep_up()
    ray.actors[0].die()
    hung = pool.take()
    assert hung.actor is ray.actors[1]
    pool.give_back(hung, "job", 1)
    assert pool.take() is not hung
    assert hung.actor.is_alive
    monkeypatch.setattr(supervisor_pool, "PATIENCE_S", 0.0)
    pool.keep_up()
    assert not hung.actor.is_alive


def test_the_machine_is_left_to_an_attempt_that_starts(ray, monkeypatch):
    pool = SupervisorPool(1)
    monkeypatch.setattr(supervisor_pool, "REFILL_AFTER_S", 1000.0)
    pool.take()
    pool.keep_up()
    assert len(ray.actors) == 1


def test_under_any_traffic_those_that_are_too_many_are_left_over(ray, monkeypatch):
    pool = SupervisorPool(1)
    burst = [pool.take() for _ in range(3)]
    for supervisor in burst:
        pool.give_back(supervisor, "job", 1)
        supervisor.actor.asked("release")[-1].answer(Release.FREE)
    pool.keep_up()
    monkeypatch.setattr(supervisor_pool, "SURPLUS_S", 0.05)
    for attempt in range(10):
        time.sleep(0.01)
        supervisor = pool.take()
        assert supervisor is burst[-1]
        pool.keep_up()
        pool.give_back(supervisor, "job", attempt)
        supervisor.actor.asked("release")[-1].answer(Release.FREE)
    pool.keep_up()
    assert [actor for actor in ray.actors if actor.is_alive] == [burst[-1].actor]


def test_one_of_an_earlier_scheduler_ends_with_its_attempt(ray):
    earlier = SupervisorPool(1).take()
    pool = SupervisorPool(1)
    pool.give_back(earlier, "job", 1)
    earlier.actor.asked("release")[0].answer(Release.FREE)
    assert pool.take() is not earlier
    assert not earlier.actor.is_alive


def test_one_that_does_not_come_back_is_waited_for_once(ray, monkeypatch):
    waits = []
    wait = ray.wait
    monkeypatch.setattr(
        ray, "wait", lambda references, timeout: (waits.append(timeout), wait(references, timeout=0))[1]
    )
    monkeypatch.setattr(supervisor_pool, "RETURN_S", 0.05)
    pool = SupervisorPool(0)
    pool.give_back(pool.take(), "job", 1)
    waits.clear()
    pool.take()
    time.sleep(0.05)
    pool.take()
    assert max(waits) > 0
    assert [timeout for timeout in waits if timeout] == [max(waits)]


def test_too_many_that_wait_are_ended_after_a_while_and_all_at_the_end(ray, monkeypatch):
    pool = SupervisorPool(1)
    for supervisor in [pool.take() for _ in range(3)]:
        pool.give_back(supervisor, "job", 1)
        supervisor.actor.asked("release")[0].answer(Release.FREE)
    pool.keep_up()
    assert len(ray.alive()) == 3
    monkeypatch.setattr(supervisor_pool, "SURPLUS_S", 0.0)
    pool.keep_up()
    assert len(ray.alive()) == 1
    pool.close()
    assert not ray.alive()
