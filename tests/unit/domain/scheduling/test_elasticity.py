"""Who grows and who shrinks, alone. A failure means over-committed nodes, a job below its fewest workers, or churn."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.queue import Queue, Quota
from service.domain.scheduling import decide
from service.domain.scheduling.room import Room
from tests.unit.domain.scheduling.examples import (
    is_over_committed,
    make_active,
    make_node,
    make_pending,
    names,
    place_gang,
    running,
    sizes,
)

ELASTIC = (1, 2, 3, 4)


def _decide(pending, active, nodes, **options):
    return sizes(decide(pending, active, nodes, **options))


def test_a_job_grows_into_what_is_free():
    active = make_active("a", "n", workers=ELASTIC)
    assert _decide([], [active], [make_node("n", 3)]) == {"a": 3}
    assert _decide([], [active], [make_node("n", 8)]) == {"a": 4}
    assert _decide([], [active], [make_node("n", 1), make_node("m", 1)]) == {"a": 2}
    assert _decide([], [active], [make_node("n", 1)]) == {}


def test_it_grows_only_to_a_world_that_it_may_have():
    assert _decide([], [make_active("a", "n", workers=(1, 3, 6))], [make_node("n", 5)]) == {"a": 3}


def test_it_grows_only_within_its_quota():
    active = make_active("a", "n", workers=ELASTIC)
    queue = Queue(name="default", quota=Quota(cpus=3))
    assert _decide([], [active], [make_node("n", 8)], queues=[queue]) == {"a": 3}
    (start,) = decide([make_pending("b", workers=ELASTIC)], [], [make_node("n", 8)], queues=[queue]).starts
    assert len(start.node_ids) == 3


def test_a_job_that_was_started_a_moment_ago_is_left_alone_unless_its_owner_asked():
    active = make_active("a", "n", workers=ELASTIC, is_settled=False)
    assert _decide([], [active], [make_node("n", 4)]) == {}
    assert _decide([], [replace(active, is_resize_requested=True)], [make_node("n", 4)]) == {"a": 4}


def test_a_job_gives_back_what_its_owner_does_not_want_any_more():
    active = make_active("a", "n", "n", "n", workers=(1, 2), is_settled=False)
    assert _decide([], [active], [make_node("n", 4)]) == {"a": 2}


def test_a_job_shrinks_just_as_much_as_the_first_in_line_needs():
    active = make_active("a", "n", "n", "n", "n", workers=ELASTIC)
    assert _decide([make_pending("b")], [active], [make_node("n", 4)]) == {"a": 3}
    assert _decide([make_pending("b", workers=2), make_pending("c")], [active], [make_node("n", 4)]) == {"a": 2}
    assert _decide([make_pending("b", workers=(3, 4))], [active], [make_node("n", 4)]) == {"a": 1}


def test_nobody_shrinks_for_a_job_that_could_not_start_all_the_same():
    active = make_active("a", "n", "n", "n", "n", workers=(2, 3, 4))
    assert _decide([make_pending("b", workers=3)], [active], [make_node("n", 4)]) == {}
    assert _decide([make_pending("b", workers=5)], [active], [make_node("n", 4)]) == {}
    assert _decide([make_pending("b", gpus=1)], [active], [make_node("n", 4)]) == {}


def test_room_that_the_queue_has_a_use_for_is_not_grown_into():
    grower = make_active("a", "n", "n", workers=(2, 3, 4))
    nodes = [make_node("n", 4)]
    # It starts now, or could if the job that starts now were asked to shrink.
    assert _decide([make_pending("b", workers=2)], [grower], nodes) == {}
    starting = make_active("c", "m", "m", workers=(1, 2), is_movable=False)
    assert _decide([make_pending("b", workers=3)], [grower, starting], [*nodes, make_node("m", 2)]) == {}


def test_room_that_nobody_in_the_queue_can_use_is_grown_into():
    active = make_active("a", "n", workers=ELASTIC)
    assert _decide([make_pending("b", workers=4)], [active], [make_node("n", 4)]) == {"a": 4}, "b waits for its end"
    assert _decide([make_pending("b", gpus=1)], [active], [make_node("n", 4)]) == {"a": 4}


def test_room_that_somebody_will_take_soon_is_not_grown_into():
    nodes = [make_node("n", 4)]
    pending = [make_pending("b", workers=3)]
    for remaining_s, expected in ((60.0, {}), (6000.0, {"a": 2})):
        active = [make_active("a", "n", workers=ELASTIC), make_active("c", "n", "n", remaining_s=remaining_s)]
        assert _decide(pending, active, nodes) == expected


def test_nobody_is_asked_twice_or_while_something_else_was_asked():
    nodes, pending = [make_node("n", 4)], [make_pending("b")]
    shrinking = make_active("a", *["n"] * 4, workers=ELASTIC, next_node_ids=("n", "n", "n"))
    assert _decide(pending, [shrinking], nodes) == {}
    other = make_active("c", *["m"] * 4, workers=ELASTIC)
    assert _decide(pending, [shrinking, other], [*nodes, make_node("m", 4)]) == {}, "room is on its way"
    assert _decide(pending, [make_active("a", *["n"] * 4, workers=ELASTIC, is_stopping=True)], nodes) == {}
    assert _decide([], [make_active("a", "n", workers=ELASTIC, is_stopping=True)], nodes) == {}


def test_an_attempt_on_a_node_that_is_gone_is_not_resized():
    assert _decide([], [make_active("a", "gone", workers=ELASTIC)], [make_node("n", 4)]) == {}


def test_the_lowest_priority_gives_first_and_of_one_priority_the_latest():
    nodes = [make_node("n", 9)]
    active = [
        make_active("old", *["n"] * 3, workers=ELASTIC),
        make_active("low", *["n"] * 3, workers=ELASTIC, priority=-1),
        make_active("new", *["n"] * 3, workers=ELASTIC),
    ]
    assert _decide([make_pending("b", workers=2)], active, nodes) == {"low": 1}
    assert _decide([make_pending("b", workers=3)], active, nodes) == {"low": 1, "new": 2}
    assert _decide([make_pending("b", workers=6)], active, nodes) == {"low": 1, "new": 1, "old": 1}


def test_room_on_a_node_where_it_does_not_help_is_not_asked_for():
    active = [make_active("a", "n", "n", workers=ELASTIC), make_active("b", "m", "m", workers=ELASTIC)]
    # Two CPUs on one node: only a can make it so.
    assert _decide([make_pending("c", cpus=2)], active, [make_node("n", 3), make_node("m", 2)]) == {"a": 1}


def test_what_fewer_ranks_leave_is_found_where_it_helps():
    active = make_active("a", "n", "n", "n", "m", "m", "o", workers=range(1, 7))
    nodes = [make_node("n", 3), make_node("m", 3), make_node("o", 3)]
    # Three CPUs on one node; two of that of the last rank are free already.
    assert _decide([make_pending("b", cpus=3)], [active], nodes) == {"a": 5}
    assert _decide([make_pending("b", cpus=3, workers=2)], [active], nodes) == {"a": 3}


def test_a_job_that_stands_in_the_way_steps_aside():
    active = make_active("a", "n", "n", "n", "m", workers=ELASTIC)
    nodes = [make_node("n", 4), make_node("m", 1)]
    decision = decide([make_pending("b", cpus=4)], [active], nodes)
    assert [resize.node_ids for resize in decision.resizes] == [("m",)]
    # Of two, both stand there; the one that has nowhere else to go is the more important.
    other = make_active("c", "n", "n", "m", workers=ELASTIC, priority=1)
    nodes = [make_node("n", 6), make_node("m", 2)]
    decision = decide([make_pending("b", cpus=6)], [replace(active, node_ids=("n", "n", "n", "m")), other], nodes)
    assert {resize.job_id: resize.node_ids for resize in decision.resizes} == {"a": ("m",), "c": ("m",)}


def test_an_elastic_job_that_starts_leaves_the_head_its_room_in_the_end():
    """Its fewest ranks are in nobody's way; what it has beyond them it gives up when the time has come."""
    nodes = [make_node("a", 8), make_node("b", 2)]
    runs = make_active("r", "a", cpus=6.0, remaining_s=1000.0)
    pending = [make_pending("head", cpus=8.0), make_pending("e", workers=ELASTIC, duration_s=100_000.0)]
    first = decide(pending, [runs], nodes)
    (start,) = first.starts
    assert Counter(start.node_ids) == {"a": 2, "b": 2}
    assert first.reservations[0].promised_at_s == 1000.0
    elastic = running(start, pending)
    (resize,) = decide(pending[:1], [elastic], nodes, reservations=first.reservations, now_s=1000.0).resizes
    assert set(resize.node_ids) == {"b"}
    shrunk = replace(elastic, node_ids=resize.node_ids)
    assert names(decide(pending[:1], [shrunk], nodes, reservations=first.reservations, now_s=1001.0)) == ["head"]


def test_a_job_that_grows_keeps_its_places_while_room_is_held():
    nodes = [make_node("a", 8), make_node("b", 4)]
    runs = make_active("r", "a", cpus=4.0, remaining_s=1000.0)
    elastic = make_active("e", "b", workers=ELASTIC)
    head = make_pending("head", cpus=8.0)
    (resize,) = decide([head], [runs, elastic], nodes).resizes
    assert resize.node_ids[0] == "b"
    grown = replace(elastic, node_ids=resize.node_ids)
    resizes = decide([head], [grown], nodes).resizes
    for smaller in resizes:
        grown = replace(grown, node_ids=smaller.node_ids)
    assert names(decide([head], [grown], nodes)) == ["head"]


@given(data=st.data())
def test_a_shrink_is_the_least_that_helps(data):
    node_names = ["n", "m", "o", "p"]
    places = [name for name in node_names for _ in range(data.draw(st.integers(0, 3)))] or ["n"]
    active = make_active("a", *places, workers=range(1, 13))
    nodes = [make_node(name, places.count(name) + data.draw(st.integers(0, 3))) for name in node_names]
    head = make_pending("b", cpus=data.draw(st.sampled_from([1, 2, 3, 5])), workers=data.draw(st.integers(1, 4)))
    if decide([head], [active], nodes).starts:
        return
    enough = [
        world
        for world in active.worlds
        if world < len(places)
        and decide([head], [make_active("a", *_kept(places, world), workers=range(1, 13))], nodes).starts
    ]
    shrinks = [
        resize.node_ids for resize in decide([head], [active], nodes).resizes if len(resize.node_ids) < len(places)
    ]
    if enough:
        assert [len(node_ids) for node_ids in shrinks] == [enough[0]]
    for node_ids in shrinks:
        assert not Counter(node_ids) - Counter(places)
        assert decide([head], [make_active("a", *node_ids, workers=range(1, 13))], nodes).starts


def _kept(places, world):
    """The places that stay: most of them on few nodes."""
    return sorted(places, key=lambda name: (-places.count(name), name))[:world]


def test_thousands_of_worlds_take_few_looks_at_the_cluster(monkeypatch):
    # Each of them takes time on a large cluster, and all of them happen between two renewals of the lease.
    num_placed, num_counted = Counter(), Counter()
    place, num_fitting = Room.place, Room.num_fitting
    monkeypatch.setattr(Room, "place", lambda *args, **options: num_placed.update("n") or place(*args, **options))
    monkeypatch.setattr(Room, "num_fitting", lambda *args: num_counted.update("n") or num_fitting(*args))
    pending = [make_pending(f"j{number}", workers=range(1, 4097)) for number in range(4)]
    nodes = [make_node(f"n{number}", 8) for number in range(16)]
    starts = decide(pending, [], nodes).starts
    assert [len(start.node_ids) for start in starts] == [125, 1, 1, 1]
    active = [running(start, pending) for start in starts]
    assert _decide([make_pending("head", workers=60)], active, nodes) == {"j0": 65}
    assert _decide([], active[1:], nodes) == {"j1": 126}
    assert num_placed.total() < 20
    assert num_counted.total() < 80


_ranges = st.tuples(st.integers(1, 3), st.integers(0, 5)).map(lambda pair: range(pair[0], pair[0] + pair[1] + 1))
_shapes = st.lists(
    st.tuples(_ranges, st.sampled_from([0.5, 1.0, 3.0]), st.integers(-1, 1), st.none() | st.integers(0, 7)),
    min_size=1,
    max_size=6,
)
_totals = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@given(shapes=_shapes, totals=_totals, num_active=st.integers(0, 6), data=st.data())
def test_no_resize_over_commits_or_goes_below_the_fewest(shapes, totals, num_active, data):
    nodes = [make_node(f"n{number}", cpus) for number, cpus in enumerate(totals)]
    active, free = [], {node.id: node.total for node in nodes}
    for number, (workers, cpus, priority, wanted) in enumerate(shapes[:num_active]):
        world = data.draw(st.sampled_from(workers))  # on any, as earlier decisions may have left them
        job = make_active(
            f"j{number}",
            workers=[one for one in workers if wanted is None or one <= workers[wanted % len(workers)]],
            cpus=cpus,
            priority=priority,
            is_settled=data.draw(st.booleans()),
            is_resize_requested=wanted is not None,
            is_movable=True,
        )
        places = place_gang(world, job.per_rank, free)
        if places is not None:
            active.append(replace(job, node_ids=places))
            for node_id in places:
                free[node_id] = free[node_id] - job.per_rank
    pending = [
        make_pending(f"p{number}", workers=workers, cpus=cpus, priority=priority)
        for number, (workers, cpus, priority, _) in enumerate(shapes[num_active:])
    ]

    decision = decide(pending, active, nodes)

    by_id = {job.id: job for job in active}
    assert len(sizes(decision)) == len(decision.resizes)
    targets = {resize.job_id: resize.node_ids for resize in decision.resizes}
    between = [replace(job, next_node_ids=targets.get(job.id, ())) for job in active]
    assert not is_over_committed([*between, *(running(start, pending) for start in decision.starts)], nodes)
    for name, world in sizes(decision).items():
        job = by_id[name]
        assert world in job.worlds
        assert world != job.world
        if world > job.world:
            assert job.is_resize_requested or job.is_settled
    shrunk_for_room = [n for n, world in sizes(decision).items() if world < by_id[n].world <= by_id[n].worlds[0]]
    if shrunk_for_room:
        # Then, and only then, the first in line starts; and nobody takes the room.
        assert not any(world > by_id[name].world for name, world in sizes(decision).items())
        first = decision.reservations[0]
        after = [replace(job, node_ids=targets.get(job.id, job.node_ids)) for job in active]
        after += [running(start, pending) for start in decision.starts]
        waiting = [job for job in pending if job.id in {wait.job_id for wait in decision.waits}]
        assert first.job_id in names(decide(waiting, after, nodes, reservations=decision.reservations))


@pytest.mark.parametrize("priorities", [(0, 0, 0, 0, 0, 0), (1, -1, 0, 1, 0, -1)])
@given(shapes=_shapes, totals=_totals)
def test_deciding_again_after_what_was_decided_changes_nothing_more(priorities, shapes, totals):
    """Whatever grew has no reason to grow or shrink again while nothing else happens: there is no oscillation."""
    nodes = [make_node(f"n{number}", cpus) for number, cpus in enumerate(totals)]
    pending = [
        make_pending(f"j{number}", workers=workers, cpus=cpus, priority=priorities[number])
        for number, (workers, cpus, _, _) in enumerate(shapes)
    ]
    active, reservations = [], ()
    for _ in range(4 * len(pending) + 4):
        decision = decide(pending, active, nodes, reservations=reservations)
        reservations = decision.reservations
        targets = {resize.job_id: resize.node_ids for resize in decision.resizes}
        active = [replace(job, node_ids=targets.get(job.id, job.node_ids)) for job in active]
        active += [running(start, pending) for start in decision.starts]
        started = {start.job_id for start in decision.starts}
        pending = [job for job in pending if job.id not in started]
        if not started and not targets:
            return
    raise AssertionError("no rest was found")
