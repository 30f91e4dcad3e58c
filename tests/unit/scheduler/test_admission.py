"""Who starts now, alone. A failure means over-committed nodes, starved jobs, or a wrong answer to "why do I wait?"."""

from collections import Counter
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from service.domain.job import Attempt, AttemptStatus, Job, JobStatus, Reason
from service.domain.placement import Node, Resources
from service.domain.ports import LiveAttempt
from service.domain.spec import parse_spec
from service.scheduler.admission import admit

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _job(name, *, workers=1, cpus=1.0, gpus=0, memory_bytes=None):
    spec = parse_spec(
        {
            "name": name,
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 64},
            "steps": 1,
            "workers": workers,
            "resources": {"cpus_per_rank": cpus, "gpus_per_rank": gpus, "memory_bytes_per_rank": memory_bytes},
        }
    )
    return Job(
        id=f"job-{name}",
        spec=spec,
        status=JobStatus.QUEUED,
        reason=Reason.SUBMITTED,
        message="",
        attempt=0,
        retries_used=0,
        step=0,
        num_steps=1,
        cancel_requested=False,
        running_s=0.0,
        failure=None,
        created_at=NOW,
        started_at=None,
        ended_at=None,
    )


def _live(job, *node_ids):
    attempt = Attempt(
        job_id=job.id,
        number=1,
        status=AttemptStatus.RUNNING,
        world_size=len(node_ids),
        node_ids=node_ids,
        last_sequence=0,
        resumed_from_step=None,
        stop_reason=None,
        outcome=None,
        reason=None,
        failure=None,
        created_at=NOW,
        running_at=None,
        ended_at=None,
    )
    return LiveAttempt(job=job, attempt=attempt)


def _node(name, cpus, gpus=0, memory_bytes=2**40):
    return Node(id=name, address="", total=Resources(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes))


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


_jobs = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from([0.1, 0.5, 1.0, 3.0]), st.integers(0, 1)), min_size=1, max_size=8
)
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
        assert len(node_ids) == job.spec.workers
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
