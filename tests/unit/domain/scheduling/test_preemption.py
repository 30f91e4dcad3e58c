"""Who is stopped for whom, alone. A failure means work that is lost for nothing, or an urgent job that waits."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from service.domain.scheduling import decide
from tests.unit.domain.scheduling.examples import (
    make_active,
    make_node,
    make_pending,
    names,
    place_gang,
    sizes,
)


def _victims(decision):
    return [preemption.job_id for preemption in decision.preemptions]


def _low(name, *node_ids, **options):
    return make_active(name, *node_ids, **{"preemptions_left": 1, "remaining_s": 1e6} | options)


def test_only_a_higher_priority_has_others_stopped():
    active, nodes = [_low("low", "n")], [make_node("n", 1)]
    for priority, expected in ((0, []), (-1, []), (1, ["low"])):
        decision = decide([make_pending("job", priority=priority)], active, nodes)
        assert _victims(decision) == expected
        assert decision.starts == ()
    (preemption,) = decide([make_pending("job", priority=5)], active, nodes).preemptions
    assert preemption.for_job_id == "job"
    assert preemption.message == "Asked to stop: job job of priority 5 takes its place. It goes on after it."


def test_nobody_is_stopped_for_a_job_that_could_not_start_all_the_same():
    urgent = make_pending("urgent", workers=4, priority=9)
    active = [_low("low", "n", "n"), _low("high", "n", "n", priority=9)]
    assert _victims(decide([urgent], active, [make_node("n", 4)])) == []


def test_whoever_was_stopped_often_enough_or_is_stopping_is_left_alone():
    urgent, nodes = make_pending("urgent", priority=9), [make_node("n", 1)]
    assert _victims(decide([urgent], [_low("low", "n", preemptions_left=0)], nodes)) == []
    assert _victims(decide([urgent], [_low("low", "n", is_stopping=True)], nodes)) == []


def test_the_lowest_priority_goes_first_then_whoever_ran_for_the_shortest_time():
    nodes = [make_node("n", 4)]
    active = [
        _low("long", "n", ran_for_s=900.0),
        _low("short", "n", ran_for_s=30.0),
        _low("lowest", "n", priority=-1, ran_for_s=9000.0),
        _low("equal", "n", priority=2),
    ]
    for workers, expected in ((1, ["lowest"]), (2, ["lowest", "short"]), (3, ["lowest", "short", "long"]), (4, [])):
        decision = decide([make_pending("urgent", workers=workers, priority=2)], active, nodes)
        assert _victims(decision) == expected


def test_nobody_is_stopped_whose_room_does_not_help():
    active = [_low("young", "m", ran_for_s=1.0), _low("old", "n", "n", ran_for_s=900.0)]
    nodes = [make_node("m", 1), make_node("n", 2)]
    assert _victims(decide([make_pending("urgent", cpus=2.0, priority=1)], active, nodes)) == ["old"]


def test_what_comes_free_is_kept_and_nobody_is_stopped_twice():
    urgent = make_pending("urgent", workers=2, priority=1, sequence=50)
    others = [make_pending("other", duration_s=1.0, sequence=40), make_pending("third", queue="b", sequence=41)]
    active, nodes = [_low("a", "n"), _low("b", "n"), _low("c", "n")], [make_node("n", 4)]
    first = decide([urgent, *others], active, nodes, usage_s={"b": 9000.0})
    assert _victims(first) == ["c"]
    reservation = first.reservations[0]
    assert (reservation.job_id, reservation.is_coming) == ("urgent", True)
    stopping = [*active[:2], replace(active[2], is_stopping=True, remaining_s=30.0)]
    second = decide([urgent, *others], stopping, nodes, usage_s={"default": 9000.0}, reservations=first.reservations)
    assert (_victims(second), names(second)) == ([], ["other"])  # it has ended before the room is needed
    third = decide(
        [urgent, others[1]], active[:2], nodes, usage_s={"default": 9000.0}, reservations=second.reservations
    )
    assert names(third) == ["urgent"]


def test_if_what_was_to_come_is_gone_another_is_found():
    urgent = make_pending("urgent", priority=1)
    active = [_low("a", "n"), _low("b", "m")]
    nodes = [make_node("n", 1), make_node("m", 1)]
    first = decide([urgent], active, nodes)
    assert _victims(first) == ["b"]
    # Its node went away with it.
    second = decide([urgent], active[:1], nodes[:1], reservations=first.reservations)
    assert _victims(second) == ["a"]


def test_elastic_jobs_give_up_workers_before_anybody_is_stopped():
    active = [_low("elastic", "n", "n", workers=(1, 2)), _low("low", "n", ran_for_s=0.0)]
    decision = decide([make_pending("urgent", priority=1)], active, [make_node("n", 3)])
    assert sizes(decision) == {"elastic": 1}
    assert _victims(decision) == []


def test_a_priority_takes_nothing_from_a_queue_that_has_used_less():
    urgent = make_pending("urgent", queue="greedy", priority=9)
    active, nodes = [_low("low", "n", queue="modest")], [make_node("n", 1)]
    assert _victims(decide([urgent], active, nodes, usage_s={"greedy": 5000.0})) == []
    assert _victims(decide([urgent], active, nodes, usage_s={"modest": 5000.0})) == ["low"]
    own = [_low("own", "n", queue="greedy")]
    assert _victims(decide([urgent], own, nodes, usage_s={"greedy": 5000.0})) == ["own"]


_places = st.lists(st.sampled_from(["n", "m"]), min_size=1, max_size=2)
_actives = st.lists(st.tuples(_places, st.sampled_from([1.0, 2.0]), st.integers(-1, 1), st.integers(0, 1)), max_size=6)


@given(shapes=_actives, extra=st.integers(0, 2), workers=st.integers(1, 3), cpus=st.sampled_from([1.0, 2.0, 3.0]))
def test_victims_are_enough_and_none_of_them_could_be_left_out(shapes, extra, workers, cpus):
    active = [
        _low(f"a{number}", *places, cpus=amount, priority=priority, preemptions_left=left, ran_for_s=float(number))
        for number, (places, amount, priority, left) in enumerate(shapes)
    ]
    used = Counter()
    for job in active:
        for node_id in job.node_ids:
            used[node_id] += job.per_rank.cpus
    nodes = [make_node(name, used[name] + extra) for name in ("n", "m")]
    urgent = make_pending("urgent", workers=workers, cpus=cpus, priority=1)
    decision = decide([urgent], active, nodes)
    chosen = set(_victims(decision))
    stoppable = [job for job in active if job.priority < 1 and job.preemptions_left > 0]

    def fits_without(ids):
        free = {node.id: node.total for node in nodes}
        for job in active:
            if job.id not in ids:
                for node_id in job.node_ids:
                    free[node_id] = free[node_id] - job.per_rank
        return place_gang(workers, urgent.per_rank, free) is not None

    if decision.starts:
        assert fits_without(())
        assert not chosen
    elif chosen:
        assert chosen <= {job.id for job in stoppable}
        assert fits_without(chosen)
        assert not any(fits_without(chosen - {one}) for one in chosen)
    else:
        subsets = (set(some) for size in range(len(stoppable) + 1) for some in combinations(stoppable, size))
        assert not any(fits_without({job.id for job in some}) for some in subsets)
