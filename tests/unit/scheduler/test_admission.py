"""Who starts now, alone. A failure means over-committed nodes, starved jobs, or a wrong answer to "why do I wait?"."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from service.domain.elasticity import exact_worlds
from service.domain.job import Reason
from service.domain.placement import Resources
from service.scheduler.admission import admit
from tests.unit.scheduler.examples import make_job as _job
from tests.unit.scheduler.examples import make_live as _live
from tests.unit.scheduler.examples import make_node as _node


def _names(starts):
    return [start.job.spec.name for start in starts]


def _messages(waits):
    return {wait.job.spec.name: wait.message for wait in waits}


def test_jobs_start_in_their_order_while_they_fit():
    starts, waits = admit([_job("a", workers=2), _job("b"), _job("c", workers=2)], [], [_node("n", 4)])
    assert _names(starts) == ["a", "b"]
    assert starts[0].node_ids == ("n", "n")
    assert list(_messages(waits)) == ["c"]


def test_a_large_job_is_not_overtaken_by_small_ones():
    queued = [_job("large", workers=4), _job("small"), _job("smaller", cpus=0.1)]
    starts, waits = admit(queued, [_live(_job("running"), "n")], [_node("n", 4)])
    assert starts == ()
    messages = _messages(waits)
    assert messages["large"] == "Needs 4 × (1 CPU) at once; 3 free now. First in line."
    assert messages["small"] == messages["smaller"] == "Waits for the jobs ahead of it."


def test_a_job_that_no_cluster_like_this_holds_holds_up_nobody():
    queued = [_job("huge", workers=9), _job("gpu", gpus=1), _job("fits"), _job("also")]
    starts, waits = admit(queued, [], [_node("n", 4)])
    assert _names(starts) == ["fits", "also"]
    messages = _messages(waits)
    assert messages["huge"].startswith("Waits for a larger cluster: 9 worker(s)")
    assert "Use at most 4 workers" in messages["huge"]
    assert "1 GPU" in messages["gpu"]


def test_an_impossible_job_behind_a_waiting_one_is_told_that_it_is_impossible():
    queued = [_job("large", workers=4), _job("huge", workers=9)]
    _, waits = admit(queued, [_live(_job("running"), "n")], [_node("n", 4)])
    assert _messages(waits)["huge"].startswith("Waits for a larger cluster")


def test_nothing_starts_without_nodes_and_nothing_is_wrong_without_jobs():
    starts, waits = admit([_job("a")], [], [])
    assert starts == ()
    assert "0 node(s)" in _messages(waits)["a"]
    assert admit([], [_live(_job("running"), "n")], [_node("n", 1)]) == ((), ())


def test_what_runs_on_a_node_that_is_gone_takes_nothing_from_the_others():
    starts, _ = admit([_job("a", workers=2)], [_live(_job("lost", workers=2), "gone", "gone")], [_node("n", 2)])
    assert _names(starts) == ["a"]


def test_a_node_that_holds_more_than_it_has_takes_no_more():
    live = [_live(_job("running", workers=3), "n", "n", "n")]
    starts, waits = admit([_job("a")], live, [_node("n", 2)])
    assert starts == ()
    assert "0 free now" in _messages(waits)["a"]


def test_every_amount_counts():
    spec = _job("a", cpus=0.5, gpus=2, memory_bytes=2**30).spec
    assert spec.resources_per_rank == Resources(cpus=0.5, gpus=2, memory_bytes=2**30)
    assert _job("a").spec.resources_per_rank == Resources(cpus=1.0)
    starts, _ = admit([_job("a", workers=2, memory_bytes=2**30)], [], [_node("n", 8, memory_bytes=2**31 - 1)])
    assert starts == ()


def test_an_elastic_job_starts_on_the_largest_exact_world_that_is_free():
    elastic = _job("a", workers={"min": 1, "max": 6})
    (start,), _ = admit([elastic], [_live(_job("running"), "n")], [_node("n", 4)])
    assert start.node_ids == ("n",) * 3
    # One worker alone would hold all 6 samples.
    capped = _job("b", workers={"min": 1, "max": 6}, batch={"size": 6, "max_per_rank": 3})
    (start,), _ = admit([capped], [], [_node("n", 1), _node("m", 1)])
    assert start.node_ids == ("n", "m")
    starts, (wait,) = admit([capped], [], [_node("n", 1)])
    assert starts == ()
    assert wait.message.startswith("Waits for a larger cluster: 2 worker(s)")


def test_an_elastic_job_leaves_room_for_those_that_can_start_behind_it():
    starts, waits = admit([_job("elastic", workers={"min": 1, "max": 4}), _job("b")], [], [_node("n", 4)])
    assert {start.job.spec.name: len(start.node_ids) for start in starts} == {"elastic": 3, "b": 1}
    assert waits == ()


def test_an_elastic_job_holds_up_those_behind_it_only_if_its_fewest_do_not_fit():
    queued = [_job("elastic", workers={"min": 3, "max": 4}), _job("small")]
    starts, waits = admit(queued, [_live(_job("running", workers=2), "n", "n")], [_node("n", 4)])
    assert starts == ()
    assert _messages(waits) == {
        "elastic": "Needs at least 3 × (1 CPU) at once; 2 free now. First in line.",
        "small": "Waits for the jobs ahead of it.",
    }


def test_a_job_has_no_more_workers_than_its_owner_asked_for():
    (start,), _ = admit([_job("a", workers={"min": 1, "max": 4}, workers_wanted=2)], [], [_node("n", 8)])
    assert len(start.node_ids) == 2


def test_places_that_are_held_for_a_job_that_is_being_resized_are_not_free():
    elastic = _job("elastic", workers={"min": 1, "max": 3})
    for live in (_live(elastic, "n", target=("n", "n", "n")), _live(elastic, "n", "n", "n", target=("n",))):
        starts, _ = admit([_job("a", workers=2)], [live], [_node("n", 4)])
        assert starts == ()
    # It was asked to pause meanwhile: nothing follows it.
    paused = _live(elastic, "n", target=("n", "n", "n"), stop_reason=Reason.PAUSE_REQUESTED)
    starts, _ = admit([_job("a", workers=2)], [paused], [_node("n", 4)])
    assert _names(starts) == ["a"]


_workers = st.integers(1, 6) | st.tuples(st.integers(1, 3), st.integers(4, 6)).map(lambda w: {"min": w[0], "max": w[1]})
_jobs = st.lists(st.tuples(_workers, st.sampled_from([0.1, 0.5, 1.0, 3.0]), st.integers(0, 1)), min_size=1, max_size=8)
_nodes = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=4)


@given(sizes=_jobs, totals=_nodes, num_live=st.integers(0, 3))
def test_no_admission_over_commits_or_forgets_a_job(sizes, totals, num_live):
    jobs = [
        _job(f"j{number}", workers=workers, cpus=cpus, gpus=gpus) for number, (workers, cpus, gpus) in enumerate(sizes)
    ]
    nodes = [_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    # What an earlier admission started is live now.
    earlier, _ = admit(jobs[:num_live], [], nodes)
    live = [_live(start.job, *start.node_ids) for start in earlier]
    queued = jobs[num_live:]
    starts, waits = admit(queued, live, nodes)
    assert sorted([*(s.job.id for s in starts), *(w.job.id for w in waits)]) == sorted(job.id for job in queued)
    assert [s.job.id for s in starts] == [job.id for job in queued if job.id in {s.job.id for s in starts}]
    assert all(wait.message for wait in waits)
    used = Counter()
    for job, node_ids in [*((s.job, s.node_ids) for s in earlier), *((s.job, s.node_ids) for s in starts)]:
        assert job.spec.workers.min <= len(node_ids) <= job.spec.workers.max
        assert len(node_ids) in exact_worlds(job.spec)
        for node_id in node_ids:
            used[node_id, "cpus"] += job.spec.resources.cpus_per_rank
            used[node_id, "gpus"] += job.spec.resources.gpus_per_rank
    for node in nodes:
        assert used[node.id, "cpus"] <= node.total.cpus + 1e-9  # sums of tenths
        assert used[node.id, "gpus"] <= node.total.gpus


@given(sizes=_jobs, totals=_nodes)
def test_whoever_waits_first_in_line_starts_as_soon_as_the_cluster_is_empty(sizes, totals):
    nodes = [_node(f"n{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(totals)]
    jobs = [_job(f"j{n}", workers=workers, cpus=cpus, gpus=gpus) for n, (workers, cpus, gpus) in enumerate(sizes)]
    _, waits = admit(jobs, [], nodes)
    possible = [wait.job for wait in waits if not wait.message.startswith("Waits for a larger cluster")]
    if possible:
        starts, _ = admit(possible, [], nodes)
        assert starts[0].job == possible[0]


def test_a_job_without_an_exact_world_as_an_earlier_version_may_have_accepted_stops_nobody():
    old = _job("old", workers={"min": 2, "max": 4})
    old = old.model_copy(
        update={"spec": old.spec.model_copy(update={"batch": old.spec.batch.model_copy(update={"size": 1})})}
    )
    assert exact_worlds(old.spec) == ()
    starts, waits = admit([old, _job("new")], [], [_node("n", 4)])
    assert [len(start.node_ids) for start in starts] == [2, 1]
    assert waits == ()
