"""A node's rank actors, without Ray. A failure means one actor for two attempts, or one that nobody ends."""

import time

import pytest
from ray.exceptions import ActorUnavailableError

from service.cluster import rank_pool
from service.cluster.rank_pool import RankPool
from tests.fake_ray import Actor, FakeRay

DEADLINE_S = 10.0


@pytest.fixture
def ray(monkeypatch):
    ray = FakeRay()
    monkeypatch.setattr(rank_pool, "ray", ray)
    monkeypatch.setattr(rank_pool, "REFILL_AFTER_S", 0.0)
    return ray


@pytest.fixture
def supervisor():
    return Actor({})


def _pool(size):
    pool = RankPool(node_id="ab" * 28, size=size)
    for _ in range(size):
        pool.keep_up()
    return pool


def _wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_warm_actors_are_lent_first_and_no_actor_twice(ray, supervisor):
    pool = _pool(2)
    warm = list(ray.actors)
    assert len(warm) == 2
    lent = [rank.actor for rank in pool.lend(3, supervisor, "a", 1)]
    assert set(map(id, lent[:2])) == set(map(id, warm))
    others = [rank.actor for rank in pool.lend(2, supervisor, "b", 1)]
    assert len({id(actor) for actor in lent + others}) == 5
    assert all(actor.options["num_cpus"] == 0 for actor in ray.actors)


def test_what_comes_back_is_lent_again(ray, supervisor):
    pool = _pool(0)
    first = pool.lend(2, supervisor, "a", 1)
    pool.take_back([rank.id for rank in first])
    assert pool.lend(2, supervisor, "a", 2) == first[::-1]
    pool.take_back(["not one of them"])
    assert len(ray.actors) == 2


@pytest.mark.parametrize("dies", [False, True])
def test_what_an_attempt_does_not_give_back_ends_with_it_or_with_its_supervisor(ray, supervisor, dies):
    pool = _pool(0)
    kept, returned = pool.lend(2, supervisor, "a", 1)
    (other,) = pool.lend(1, Actor({}), "b", 1)
    pool.take_back([returned.id])
    if dies:
        supervisor.die()
    else:
        supervisor.asked("until_over")[0].answer(None)
    _wait_until(lambda: not kept.actor.is_alive)
    assert returned.actor.is_alive
    assert other.actor.is_alive


def test_a_supervisor_that_cannot_be_reached_for_a_while_keeps_its_ranks(ray, supervisor, monkeypatch):
    monkeypatch.setattr(rank_pool, "WATCH_RETRY_S", 0.0)
    pool = _pool(0)
    (rank,) = pool.lend(1, supervisor, "a", 1)
    supervisor.asked("until_over")[0].answer(ActorUnavailableError("no route", None))
    _wait_until(lambda: len(supervisor.asked("until_over")) == 2)
    assert rank.actor.is_alive
    supervisor.die()
    _wait_until(lambda: not rank.actor.is_alive)


def test_one_that_died_while_it_waited_is_not_lent(ray, supervisor):
    pool = _pool(2)
    ray.actors[0].die()
    assert [rank.actor for rank in pool.lend(1, supervisor, "a", 1)] == [ray.actors[1]]
    pool.keep_up()
    pool.keep_up()
    assert len(ray.alive()) == 3


def test_the_node_is_left_to_an_attempt_that_starts(ray, supervisor, monkeypatch):
    pool = _pool(1)
    monkeypatch.setattr(rank_pool, "REFILL_AFTER_S", 1000.0)
    pool.lend(1, supervisor, "a", 1)
    pool.keep_up()
    assert len(ray.actors) == 1
    monkeypatch.setattr(rank_pool, "REFILL_AFTER_S", 0.0)
    pool.keep_up()
    assert len(ray.actors) == 2
    pool.keep_up()
    assert len(ray.actors) == 2


def test_under_any_traffic_those_that_are_too_many_are_left_over(ray, supervisor, monkeypatch):
    pool = _pool(0)
    burst = pool.lend(3, supervisor, "a", 1)
    pool.take_back([rank.id for rank in burst])
    monkeypatch.setattr(rank_pool, "SURPLUS_S", 0.05)
    for attempt in range(10):
        time.sleep(0.01)
        assert pool.lend(1, supervisor, "b", attempt) == [burst[-1]]
        pool.keep_up()
        pool.take_back([burst[-1].id])
    assert ray.alive() == [burst[-1].actor]


def test_one_that_was_lent_often_ends(ray, supervisor, monkeypatch):
    monkeypatch.setattr(rank_pool, "MAX_LOANS", 2)
    pool = _pool(0)
    (rank,) = pool.lend(1, supervisor, "a", 1)
    pool.take_back([rank.id])
    assert pool.lend(1, supervisor, "a", 2) == [rank]
    pool.take_back([rank.id])
    assert not rank.actor.is_alive
    assert pool.lend(1, supervisor, "a", 3) != [rank]


def test_one_that_is_ready_is_lent_before_one_that_starts(ray, supervisor):
    pool = RankPool(node_id="ab" * 28, size=2)
    pool.keep_up()
    (ready,) = pool.lend(1, supervisor, "a", 1)
    pool.take_back([ready.id])
    pool.keep_up()
    assert len(ray.actors) == 2
    assert pool.lend(1, supervisor, "a", 2) == [ready]


def test_too_many_that_wait_are_ended_after_a_while(ray, supervisor, monkeypatch):
    pool = _pool(1)
    pool.take_back([rank.id for rank in pool.lend(3, supervisor, "a", 1)])
    pool.keep_up()
    assert len(ray.alive()) == 3
    monkeypatch.setattr(rank_pool, "SURPLUS_S", 0.0)
    pool.keep_up()
    assert len(ray.alive()) == 1
