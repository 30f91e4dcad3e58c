"""Who starts now, alone. A failure means over-committed nodes, starved jobs, or a wrong answer to "why do I wait?"."""

from hypothesis import given
from hypothesis import strategies as st

from service.domain.scheduling import decide
from tests.unit.domain.scheduling.examples import (
    is_over_committed,
    make_active,
    make_node,
    make_pending,
    messages,
    names,
    running,
)


def test_jobs_start_in_their_order_while_they_fit():
    pending = [make_pending("a", workers=2), make_pending("b"), make_pending("c", workers=2)]
    decision = decide(pending, [], [make_node("n", 4)])
    assert names(decision) == ["a", "b"]
    assert decision.starts[0].node_ids == ("n", "n")
    assert list(messages(decision)) == ["c"]


def test_priority_comes_first_and_then_who_came_first():
    pending = [make_pending("late", sequence=9), make_pending("early", sequence=1), make_pending("high", priority=1)]
    assert names(decide(pending, [], [make_node("n", 4)])) == ["high", "early", "late"]


def test_a_large_job_is_not_overtaken_by_small_ones_that_may_hold_it_up():
    pending = [make_pending("large", workers=4), make_pending("small"), make_pending("smaller", cpus=0.1)]
    decision = decide(pending, [make_active("running", "n")], [make_node("n", 4)])
    assert decision.starts == ()
    assert messages(decision) == {
        "large": "Needs 4 × (1 CPU) at once; 3 free. 1st in queue default.",
        "small": "Needs 1 × (1 CPU) at once; 3 free, held for jobs ahead of it. 2nd in queue default.",
        "smaller": "Needs 1 × (0.1 CPU) at once; 30 free, held for jobs ahead of it. 3rd in queue default.",
    }


def test_a_job_that_no_cluster_like_this_holds_holds_up_nobody():
    pending = [make_pending("huge", workers=9), make_pending("gpu", gpus=1), make_pending("fits"), make_pending("also")]
    decision = decide(pending, [], [make_node("n", 4)])
    assert names(decision) == ["fits", "also"]
    told = messages(decision)
    assert told["huge"].startswith("Waits for a larger cluster: 9 worker(s)")
    assert "Use at most 4 workers" in told["huge"]
    assert "1 GPU" in told["gpu"]


def test_an_impossible_job_behind_a_waiting_one_is_told_that_it_is_impossible():
    pending = [make_pending("large", workers=4), make_pending("huge", workers=9)]
    decision = decide(pending, [make_active("running", "n")], [make_node("n", 4)])
    assert messages(decision)["huge"].startswith("Waits for a larger cluster")


def test_nothing_starts_without_nodes_and_nothing_is_wrong_without_jobs():
    decision = decide([make_pending("a")], [], [])
    assert decision.starts == ()
    assert "0 node(s)" in messages(decision)["a"]
    empty = decide([], [make_active("running", "n")], [make_node("n", 1)])
    assert (empty.starts, empty.waits, empty.resizes, empty.preemptions) == ((), (), (), ())


def test_what_runs_on_a_node_that_is_gone_takes_nothing_from_the_others():
    decision = decide([make_pending("a", workers=2)], [make_active("lost", "gone", "gone")], [make_node("n", 2)])
    assert names(decision) == ["a"]


def test_a_node_that_holds_more_than_it_has_takes_no_more():
    decision = decide([make_pending("a")], [make_active("running", "n", "n", "n")], [make_node("n", 2)])
    assert decision.starts == ()
    assert "0 free" in messages(decision)["a"]


def test_every_amount_counts():
    nodes = [make_node("n", 8, gpus=2, memory_bytes=2**31 - 1)]
    assert decide([make_pending("a", workers=2, memory_bytes=2**30)], [], nodes).starts == ()
    assert decide([make_pending("a", workers=2, gpus=2)], [], nodes).starts == ()
    assert names(decide([make_pending("a", workers=2, gpus=1, memory_bytes=2**29)], [], nodes)) == ["a"]


def test_a_job_may_be_spread_over_nodes():
    nodes = [make_node(name, 4) for name in "abc"]
    (start,) = decide([make_pending("packed", workers=4)], [], nodes).starts
    assert len(set(start.node_ids)) == 1
    (start,) = decide([make_pending("spread", workers=4, layout="spread")], [], nodes).starts
    assert sorted(start.node_ids.count(name) for name in "abc") == [1, 1, 2]


def test_what_may_not_start_yet_says_so_and_holds_up_nobody():
    obstacle = "Waits for the success of 1 job(s): job-1."
    decision = decide([make_pending("later", obstacle=obstacle), make_pending("now")], [], [make_node("n", 1)])
    assert names(decision) == ["now"]
    (wait,) = decision.waits
    assert (wait.message, wait.position) == (obstacle, None)


def test_an_elastic_job_starts_on_the_largest_world_that_is_free():
    elastic = make_pending("a", workers=range(1, 7))
    (start,) = decide([elastic], [make_active("running", "n")], [make_node("n", 4)]).starts
    assert start.node_ids == ("n",) * 3
    few = make_pending("b", workers=(2, 6))
    (start,) = decide([few], [], [make_node("n", 1), make_node("m", 4)]).starts
    assert len(start.node_ids) == 2
    decision = decide([few], [], [make_node("n", 1)])
    assert decision.starts == ()
    assert messages(decision)["b"].startswith("Waits for a larger cluster: 2 worker(s)")


def test_an_elastic_job_leaves_room_for_those_that_can_start_behind_it():
    pending = [make_pending("elastic", workers=range(1, 5)), make_pending("b")]
    decision = decide(pending, [], [make_node("n", 4)])
    assert {start.job_id: len(start.node_ids) for start in decision.starts} == {"elastic": 3, "b": 1}
    assert decision.waits == ()


def test_an_elastic_job_holds_up_those_behind_it_only_if_its_fewest_do_not_fit():
    pending = [make_pending("elastic", workers=(3, 4)), make_pending("small")]
    decision = decide(pending, [make_active("running", "n", "n")], [make_node("n", 4)])
    assert decision.starts == ()
    assert messages(decision)["elastic"] == "Needs at least 3 × (1 CPU) at once; 2 free. 1st in queue default."


def test_places_that_are_held_for_a_job_that_is_being_resized_are_not_free():
    pending = [make_pending("a", workers=2)]
    grows = make_active("elastic", "n", workers=(1, 2, 3), next_node_ids=("n", "n", "n"))
    shrinks = make_active("elastic", "n", "n", "n", workers=(1, 2, 3), next_node_ids=("n",))
    for active in (grows, shrinks):
        assert decide(pending, [active], [make_node("n", 4)]).starts == ()
    # It was asked to pause meanwhile: nothing follows it.
    paused = make_active("elastic", "n", workers=(1, 2, 3), is_stopping=True)
    assert names(decide(pending, [paused], [make_node("n", 4)])) == ["a"]


def test_places_far_behind_are_told_in_steps():
    pending = [make_pending(f"j{place}", workers=2) for place in range(1, 60)]
    told = messages(decide(pending, [make_active("running", "n")], [make_node("n", 2)]))
    assert told["j10"].endswith("10th in queue default.")
    assert told["j11"] == told["j20"] == "More than 10 jobs are ahead of it in queue default."
    assert told["j21"] == told["j50"] == "More than 20 jobs are ahead of it in queue default."
    assert told["j51"] == "More than 50 jobs are ahead of it in queue default."


_workers = st.integers(1, 6) | st.tuples(st.integers(1, 3), st.integers(4, 6)).map(lambda w: range(w[0], w[1] + 1))
_jobs = st.lists(
    st.tuples(_workers, st.sampled_from([0.1, 0.5, 1.0, 3.0]), st.integers(0, 1), st.sampled_from(["pack", "spread"])),
    min_size=1,
    max_size=8,
)
_nodes = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=4)


@given(shapes=_jobs, totals=_nodes, num_active=st.integers(0, 3))
def test_no_admission_over_commits_or_forgets_a_job(shapes, totals, num_active):
    jobs = [
        make_pending(f"j{number}", workers=workers, cpus=cpus, gpus=gpus, layout=layout)
        for number, (workers, cpus, gpus, layout) in enumerate(shapes)
    ]
    nodes = [make_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    earlier, pending = jobs[:num_active], jobs[num_active:]
    active = [running(start, earlier) for start in decide(earlier, [], nodes).starts]
    decision = decide(pending, active, nodes)
    assert sorted([*names(decision), *messages(decision)]) == sorted(job.id for job in pending)
    assert all(wait.message for wait in decision.waits)
    by_id = {job.id: job for job in pending}
    assert all(len(start.node_ids) in by_id[start.job_id].worlds for start in decision.starts)
    assert not is_over_committed([*active, *(running(start, pending) for start in decision.starts)], nodes)


@given(shapes=_jobs, totals=_nodes)
def test_whoever_waits_first_in_line_starts_as_soon_as_the_cluster_is_empty(shapes, totals):
    nodes = [make_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    jobs = [make_pending(f"j{n}", workers=w, cpus=cpus, gpus=gpus) for n, (w, cpus, gpus, _) in enumerate(shapes)]
    told = messages(decide(jobs, [], nodes))
    possible = [job for job in jobs if job.id in told and not told[job.id].startswith("Waits for a larger cluster")]
    if possible:
        assert names(decide(possible, [], nodes))[0] == possible[0].id
