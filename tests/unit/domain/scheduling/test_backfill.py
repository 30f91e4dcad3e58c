"""Who may go first, alone. A failure means a large job that is held up by small ones, or nodes that lie idle for it."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.domain.scheduling import Cause, decide
from tests.unit.domain.scheduling.examples import (
    is_over_committed,
    make_active,
    make_node,
    make_pending,
    messages,
    names,
    place_gang,
    running,
)


def test_what_ends_before_the_first_in_line_can_start_goes_first():
    active = [make_active("running", "n", "n", remaining_s=600.0)]
    head = make_pending("head", workers=4)
    pending = [head, make_pending("short", duration_s=600.0), make_pending("long", duration_s=601.0)]
    decision = decide(pending, active, [make_node("n", 4)])
    assert names(decision) == ["short"]
    assert messages(decision) == {
        "head": "Needs 4 × (1 CPU) at once; 1 free. 1st in queue default; about 10 min.",
        "long": "Needs 1 × (1 CPU) at once; 1 free, held for jobs ahead of it. 2nd in queue default.",
    }
    assert [wait.why.cause for wait in decision.waits] == [Cause.ROOM, Cause.RESERVED]
    assert decision.waits[0].why.starts_in_s == 600.0


def test_what_the_first_in_line_will_not_need_may_be_used_for_any_time():
    active = [make_active("running", "n", "n", "n", "n", remaining_s=600.0), make_active("other", "m", "m", "m")]
    pending = [make_pending("head", workers=4), make_pending("unknown"), make_pending("more")]
    decision = decide(pending, active, [make_node("n", 4), make_node("m", 4)])
    assert names(decision) == ["unknown"], "one CPU of the other node"
    # Four of the six that will be free are the head's; two may stay for longer.
    nodes = [make_node("n", 6)]
    decision = decide(pending, [make_active("running", "n", "n", "n", remaining_s=60.0)], nodes)
    assert names(decision) == ["unknown", "more"]


def test_other_resources_than_those_that_the_first_in_line_waits_for_are_free_to_use():
    active = [make_active("running", "n", cpus=1.0, gpus=4)]
    pending = [make_pending("head", workers=2, gpus=2), make_pending("cpus", cpus=4.0), make_pending("gpu", gpus=1)]
    # Two ranks of the head will need two CPUs at most: four can go to others, whatever ends when.
    decision = decide(pending, active, [make_node("n", 7, gpus=5)])
    assert names(decision) == ["cpus"]
    assert decide(pending, active, [make_node("n", 6, gpus=5)]).starts == ()


def test_where_no_end_is_known_nothing_that_could_hold_up_the_first_goes_before_it():
    active = [make_active("running", "n", "n")]
    pending = [make_pending("head", workers=4), make_pending("short", duration_s=1.0)]
    decision = decide(pending, active, [make_node("n", 4)])
    assert decision.starts == ()
    assert decision.waits[0].why.starts_in_s is None
    # On a node that can hold none of it there is nothing to hold up.
    pending[0] = make_pending("head", workers=2, cpus=2.0, sequence=0)
    assert names(decide(pending, active, [make_node("n", 4), make_node("m", 1)])) == ["short"]


def test_a_longer_run_on_fewer_workers_is_reckoned_with():
    active = [make_active("running", "n", "n", remaining_s=600.0)]
    elastic = make_pending("elastic", workers=(2, 1), duration_s=400.0, sequence=10**9)  # 800 s on one worker
    assert decide([make_pending("head", workers=4), elastic], active, [make_node("n", 3)]).starts
    assert decide([make_pending("head", workers=3), elastic], active, [make_node("n", 3)]).starts == ()


def test_a_promise_that_was_not_kept_stops_others_from_going_first():
    head, short = make_pending("head", workers=4), make_pending("short", duration_s=10.0)
    nodes = [make_node("n", 4)]
    promised = decide([head], [make_active("running", "n", "n", remaining_s=600.0)], nodes, now_s=1000.0).reservations
    (reservation,) = promised
    assert (reservation.made_at_s, reservation.promised_at_s) == (1000.0, 1600.0)
    overdue = [make_active("running", "n", "n", remaining_s=60.0)]
    kept = decide([head, short], overdue, nodes, reservations=promised, now_s=1950.0)
    assert names(kept) == ["short"]
    assert kept.reservations == promised, "the promise stays the first one"
    late = decide([head, short], overdue, nodes, reservations=promised, now_s=1970.0)
    assert late.starts == ()


def test_a_queue_that_has_used_less_does_not_take_room_that_is_held_already():
    head = make_pending("head", workers=4, queue="a")
    active = [make_active("running", "n", "n", queue="a", remaining_s=600.0)]
    nodes = [make_node("n", 4)]
    reservations = decide([head], active, nodes, usage_s={"a": 50.0}).reservations
    pending = [head, make_pending("other", workers=2, queue="b", duration_s=3600.0)]
    assert names(decide(pending, active, nodes, usage_s={"a": 50.0})) == ["other"], "it is the other queue's turn"
    assert decide(pending, active, nodes, usage_s={"a": 50.0}, reservations=reservations).starts == ()


def test_room_is_held_for_the_first_of_a_queue_only():
    nodes, active = [make_node("n", 4)], [make_active("running", "n", "n", remaining_s=600.0)]
    head = make_pending("head", workers=4)
    reservations = decide([head], active, nodes).reservations
    higher = make_pending("higher", workers=3, priority=1)
    decision = decide([head, higher], active, nodes, reservations=reservations)
    assert [reservation.job_id for reservation in decision.reservations] == ["higher"]


_shapes = st.tuples(
    st.integers(1, 6), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 1), st.sampled_from([5.0, 10.0, 20.0, 60.0])
)
_nodes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2)), min_size=1, max_size=3)


def _earliest(job, active, nodes):
    """When a job could start if nothing else did: the slow, obvious way."""
    for time_s in sorted({0.0, *(entry.remaining_s for entry in active)}):
        free = {node.id: node.total for node in nodes}
        for entry in active:
            if entry.remaining_s > time_s:
                for node_id in entry.node_ids:
                    free[node_id] = free[node_id] - entry.per_rank
        if place_gang(job.fewest, job.per_rank, free) is not None:
            return time_s
    raise AssertionError("it fits the empty cluster")


@given(shapes=st.lists(_shapes, min_size=2, max_size=10), totals=_nodes, num_active=st.integers(1, 5))
def test_the_first_in_line_starts_no_later_than_without_those_that_go_before_it(shapes, totals, num_active):
    nodes = [make_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    jobs = [
        make_pending(f"j{n}", workers=workers, cpus=cpus, gpus=gpus, duration_s=duration_s)
        for n, (workers, cpus, gpus, duration_s) in enumerate(shapes)
    ]
    first = decide(jobs[:num_active], [], nodes)
    active = [running(start, jobs) for start in first.starts]
    decision = decide(jobs[num_active:], active, nodes)
    assume(decision.reservations)
    head = next(job for job in jobs if job.id == decision.reservations[0].job_id)
    ahead = decision.starts[: _num_before(head, decision, jobs)]
    promised_s = _earliest(head, [*active, *(running(start, jobs) for start in ahead)], nodes)
    assert decision.reservations[0].promised_at_s == promised_s
    with_all = [*active, *(running(start, jobs) for start in decision.starts)]
    assert not is_over_committed(with_all, nodes)
    assert _earliest(head, with_all, nodes) <= promised_s


def _num_before(head, decision, jobs):
    order = {job.id: job.sequence for job in jobs}
    return sum(order[start.job_id] < head.sequence for start in decision.starts)


@pytest.mark.parametrize("knows_ends", [True, False])
@given(shapes=st.lists(_shapes, min_size=2, max_size=10), totals=_nodes)
def test_every_job_runs_in_the_end_and_none_after_its_promise(knows_ends, shapes, totals):
    """Events by hand: time goes on to the next end, all estimates are exact."""
    nodes = [make_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    jobs = [
        make_pending(f"j{n}", workers=workers, cpus=cpus, gpus=gpus, duration_s=duration_s if knows_ends else None)
        for n, (workers, cpus, gpus, duration_s) in enumerate(shapes)
    ]
    lasts_s = {job.id: shape[3] for job, shape in zip(jobs, shapes, strict=True)}
    told = messages(decide(jobs, [], nodes))
    pending = [job for job in jobs if not told.get(job.id, "").startswith("Waits for a larger cluster")]
    now_s, ends_s, active, reservations = 0.0, {}, [], ()
    while pending:
        decision = decide(pending, active, nodes, reservations=reservations, now_s=now_s)
        for start in decision.starts:
            promise = next((one.promised_at_s for one in reservations if one.job_id == start.job_id), None)
            assert promise is None or now_s <= promise
            active.append(running(start, pending))
            ends_s[start.job_id] = now_s + lasts_s[start.job_id]
        assert not is_over_committed(active, nodes)
        started = set(names(decision))
        pending = [job for job in pending if job.id not in started]
        reservations = decision.reservations
        if pending:
            assert active, "an idle cluster starts something"
            now_s = min(ends_s[job.id] for job in active)
        active = [
            replace(job, remaining_s=ends_s[job.id] - now_s if knows_ends else None)
            for job in active
            if ends_s[job.id] > now_s
        ]


def test_what_starts_now_and_for_how_long_nobody_knows_is_not_taken_to_end():
    pending = [make_pending("unknown", workers=3), make_pending("head", workers=2), make_pending("small")]
    decision = decide(pending, [], [make_node("n", 4)])
    assert names(decision) == ["unknown"]
    assert decision.waits[0].why.starts_in_s is None
