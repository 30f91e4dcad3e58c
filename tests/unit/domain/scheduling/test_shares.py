"""Queues, their shares and quotas. A failure means one group that works at the cost of another."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.queue import Queue, Quota
from service.domain.scheduling import HALF_LIFE_S, Cause, accrued, decide
from tests.unit.domain.scheduling.examples import make_active, make_node, make_pending, messages, names, running


def test_the_queue_that_used_the_least_for_its_weight_is_next():
    pending = [make_pending("a", queue="a"), make_pending("b", queue="b")]
    nodes = [make_node("n", 1)]
    assert names(decide(pending, [], nodes, usage_s={"a": 10.0, "b": 5.0})) == ["b"]
    heavy = [Queue(name="a", weight=4.0), Queue(name="b")]
    assert names(decide(pending, [], nodes, queues=heavy, usage_s={"a": 10.0, "b": 5.0})) == ["a"]


def test_a_queue_without_jobs_leaves_its_share_to_the_others():
    pending = [make_pending(f"a{number}", queue="a") for number in range(4)]
    queues = [Queue(name="a"), Queue(name="idle", weight=100.0)]
    assert len(decide(pending, [], [make_node("n", 4)], queues=queues, usage_s={"a": 1e6}).starts) == 4


def test_jobs_that_start_at_once_are_shared_out_too():
    pending = [make_pending(f"{queue}{number}", queue=queue) for queue in "ab" for number in range(12)]
    queues = [Queue(name="a", weight=3.0), Queue(name="b")]
    decision = decide(pending, [], [make_node("n", 12)], queues=queues)
    assert Counter(name[0] for name in names(decision)) == {"a": 9, "b": 3}


def test_a_paused_queue_starts_nothing_and_says_so():
    pending = [make_pending("a", queue="a"), make_pending("b", queue="b")]
    decision = decide(pending, [], [make_node("n", 4)], queues=[Queue(name="a", paused=True)])
    assert names(decision) == ["b"]
    (wait,) = decision.waits
    assert (wait.why.cause, wait.message, wait.position) == (Cause.PAUSED, "Queue a is paused.", None)


@pytest.mark.parametrize(
    ("quota", "told"),
    [
        (Quota(cpus=2.5), "2 of 2.5 CPU in use, 1 needed"),
        (Quota(gpus=2), "2 of 2 GPU in use, 1 needed"),
        (Quota(memory_bytes=5 * 2**29), "2.0 of 2.5 GiB in use, 1.0 needed"),
        (Quota(jobs=2), "2 of 2 job(s) at once"),
    ],
)
def test_a_queue_keeps_to_its_quota_and_holds_up_no_other(quota, told):
    options = {"gpus": 1, "memory_bytes": 2**30}
    pending = [make_pending(name, queue="a", **options) for name in ("a1", "a2")] + [make_pending("b", queue="b")]
    active = [make_active("running", "n", queue="a", **options)]
    decision = decide(pending, active, [make_node("n", 9, gpus=9)], queues=[Queue(name="a", quota=quota)])
    assert names(decision) == ["b", "a1"]
    assert messages(decision) == {"a2": f"Over the quota of queue a: {told}. 1st in queue a."}


def test_an_owner_keeps_to_the_quota_and_holds_up_no_other_of_the_same_queue():
    pending = [make_pending("mine", workers=2, owner="me"), make_pending("yours", owner="you")]
    active = [make_active("running", "n", owner="me")]
    queue = Queue(name="default", quota_per_owner=Quota(cpus=2))
    decision = decide(pending, active, [make_node("n", 9)], queues=[queue])
    assert names(decision) == ["yours"]
    assert messages(decision) == {
        "mine": "Over the quota of me in queue default: 1 of 2 CPU in use, 2 needed. 1st in queue default."
    }


def test_nobody_is_stopped_and_no_room_held_for_a_job_over_its_quota():
    urgent = make_pending("urgent", workers=2, priority=9)
    active = [make_active("low", "n", "n", remaining_s=60.0, preemptions_left=1)]
    decision = decide([urgent], active, [make_node("n", 2)], queues=[Queue(name="default", quota=Quota(cpus=3))])
    assert (decision.preemptions, decision.reservations) == ((), ())


def test_usage_counts_the_dominant_resource_and_halves():
    nodes = [make_node("n", 100, gpus=4)]
    active = [make_active("a", "n", gpus=2, queue="a"), make_active("b", "n", cpus=10.0, queue="b")]
    usage_s = accrued({}, active, nodes, elapsed_s=1.0)
    assert usage_s["a"] == pytest.approx(0.5, rel=1e-4)  # decays meanwhile, by 1 s in a day
    assert usage_s["b"] == pytest.approx(0.1, rel=1e-4)
    assert accrued({"a": 8.0}, [], nodes, elapsed_s=HALF_LIFE_S) == {"a": 4.0}


def test_usage_does_not_depend_on_how_a_time_is_divided():
    active, nodes = [make_active("a", "n", queue="a")], [make_node("n", 2)]
    whole = accrued({"a": 7.0}, active, nodes, elapsed_s=HALF_LIFE_S)
    parts = {"a": 7.0}
    for before, after in pairwise((0.0, 0.1, 0.5, 0.75, 1.0)):
        parts = accrued(parts, active, nodes, elapsed_s=(after - before) * HALF_LIFE_S)
    assert parts["a"] == pytest.approx(whole["a"], rel=1e-12)  # sums of a few floats


_quotas = st.builds(Quota, cpus=st.none() | st.integers(0, 6), jobs=st.none() | st.integers(0, 3))


@given(
    quota=_quotas,
    quota_per_owner=_quotas,
    shapes=st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ab"), st.booleans()), max_size=8),
    num_active=st.integers(0, 3),
)
def test_quotas_are_never_exceeded(quota, quota_per_owner, shapes, num_active):
    queue = Queue(name="default", quota=quota, quota_per_owner=quota_per_owner)
    nodes = [make_node("n", 8), make_node("m", 8)]
    jobs = [
        make_pending(f"j{number}", workers=range(1, workers + 1) if is_elastic else workers, owner=owner)
        for number, (workers, owner, is_elastic) in enumerate(shapes)
    ]
    earlier = decide(jobs[:num_active], [], nodes, queues=[queue])
    active = [running(start, jobs) for start in earlier.starts]
    decision = decide(jobs[num_active:], active, nodes, queues=[queue])
    world = {job.id: job.world for job in active}
    world |= {start.job_id: len(start.node_ids) for start in decision.starts}
    for resize in decision.resizes:
        world[resize.job_id] = max(world[resize.job_id], len(resize.node_ids))
    owners = {job.id: job.owner for job in jobs}
    for limits, some in [(quota, world)] + [
        (quota_per_owner, [name for name in world if owners[name] == one]) for one in "ab"
    ]:
        assert limits.cpus is None or sum(world[name] for name in some) <= limits.cpus
        assert limits.jobs is None or len(some) <= limits.jobs
