"""Rolled-up training curves of every ``JobStore`` against the points that they are made of.

A failure means that a dashboard would show values that were superseded, or lose some that count.
"""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain.errors import NotFound
from service.domain.job import Outcome, Reason
from service.domain.journal import Metrics, Resumed
from tests.contract.store_examples import lead, loss, make_spec, records, run
from tests.fakes import naive_curves

VALUES = st.one_of(
    st.floats(-1e6, 1e6),
    st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf")]),
)
# Steps around the bounds of buckets of every width, and close to each other.
STEPS = st.builds(
    lambda base, offset: max(0, base + offset),
    st.sampled_from([0, 0, 0, 16, 128, 1024, 8192, 65536, 70_000, 131_072]),
    st.integers(-20, 20),
)
REPORT = st.builds(
    lambda step, values: Metrics.of(step, values),
    STEPS,
    st.dictionaries(st.sampled_from(["train/loss", "eval/loss", "a"]), VALUES, min_size=1),
)
RUN = st.builds(
    lambda first, length, scale: [
        Metrics.of(step, {"train/loss": scale * step}) for step in range(first, first + length)
    ],
    STEPS,
    st.integers(1, 60),
    st.sampled_from([1.0, -0.25]),
)
CHANGE = st.one_of(REPORT.map(lambda report: [report]), RUN, STEPS.map(lambda step: [Resumed(step=step)]))


def check(store, job_id, *, max_points, from_step=0, to_step=None):
    """Compare curves with what a naive roll-up makes of the same points."""
    found = store.curves(job_id, max_points=max_points, from_step=from_step, to_step=to_step)
    points = store.metrics(job_id)
    names = {point.name for point in points}
    for name in names:
        of_name = [point for point in points if point.name == name]
        if name not in found:
            assert naive_curves(of_name, 1, from_step, to_step) == {}
            continue
        curve = found[name]
        assert len(curve.buckets) <= max_points
        width = curve.bucket_steps
        assert width & (width - 1) == 0
        (expected,) = naive_curves(of_name, width, from_step, to_step).values()
        assert len(curve.buckets) == len(expected.buckets)
        largest = max((abs(point.value) for point in of_name if point.value is not None), default=0.0)
        for one, other in zip(curve.buckets, expected.buckets, strict=True):
            for field in (
                "first_step",
                "last_step",
                "finite_count",
                "nonfinite_count",
                "min",
                "max",
                "last",
                "attempt",
            ):
                assert getattr(one, field) == getattr(other, field), field
            assert one.last_nonfinite == other.last_nonfinite
            # A mean of n values of one size, added in any order and merged level by level, errs by at most about n
            # roundings of the largest of them.
            if other.mean is None:
                assert one.mean is None
            else:
                assert math.isclose(one.mean, other.mean, rel_tol=1e-12, abs_tol=max(1e-12 * largest, 5e-324))
    assert found.keys() <= names


def check_everywhere(store, job_id):
    for max_points in (2, 3, 17, 100, 10_000):
        check(store, job_id, max_points=max_points)
    for from_step, to_step in ((5, 40), (100, 9000), (8192, None), (0, 15), (65_537, 65_537)):
        check(store, job_id, max_points=10, from_step=from_step, to_step=to_step)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGE, max_size=12), cuts=st.sets(st.integers(1, 11)))
def test_rolled_up_curves_are_those_of_the_points_that_count(store, changes, cuts):
    """Whatever was reported again or superseded, and however the journal was cut into pieces on its way."""
    lease = lead(store)
    job = run(store, lease)
    first, waiting = 4, []
    for place, change in enumerate(changes):
        if place in cuts and waiting:
            store.ingest(lease, job.id, 1, records(*waiting, first=first))
            first, waiting = first + len(waiting), []
        waiting += change
    store.ingest(lease, job.id, 1, records(*waiting, first=first))
    check_everywhere(store, job.id)


def test_a_second_attempt_supersedes_what_the_first_did_beyond_its_checkpoint(store):
    lease = lead(store)
    job = run(store, lease, *(loss(step, float(step)) for step in range(1, 301)))
    store.seal_attempt(lease, job.id, 1, outcome=Outcome.LOST, reason=Reason.NODE_LOST, failure=None)
    run(store, lease, *(loss(step, -float(step)) for step in range(201, 251)), job=job, resume=200)
    (curve,) = store.curves(job.id, max_points=4).values()
    assert curve.bucket_steps == 64
    assert [(one.first_step, one.last_step, one.attempt) for one in curve.buckets] == [
        (1, 63, 1),
        (64, 127, 1),
        (128, 191, 1),
        (192, 250, 2),
    ]
    last = curve.buckets[-1]
    assert (last.min, last.max, last.last, last.finite_count) == (-250.0, 200.0, -250.0, 59)
    assert last.mean == pytest.approx((sum(range(192, 201)) - sum(range(201, 251))) / 59, rel=1e-12)


def test_a_step_that_is_reported_again_counts_once(store):
    lease = lead(store)
    job = run(store, lease, *(loss(step) for step in range(1, 41)))
    store.ingest(lease, job.id, 1, records(loss(7, 100.0), loss(7, 50.0), Metrics.of(40, {"eval/loss": 2.0}), first=44))
    curves = store.curves(job.id, max_points=3)
    assert [(one.finite_count, one.max) for one in curves["train/loss"].buckets] == [(15, 50.0), (16, 1.0), (9, 1.0)]
    assert [one.finite_count for one in curves["eval/loss"].buckets] == [1]


def test_few_points_are_shown_one_by_one(store):
    job = run(store, lead(store), *(Metrics.of(step, {"eval/loss": step}) for step in range(1000, 100_001, 1000)))
    (curve,) = store.curves(job.id, max_points=100).values()
    assert curve.bucket_steps == 1
    assert [(one.first_step, one.last) for one in curve.buckets] == [
        (step, step) for step in range(1000, 100_001, 1000)
    ]


def test_only_the_metrics_that_are_asked_for_are_rolled_up(store):
    job = run(store, lead(store), Metrics.of(1, {"a": 1.0, "b": 2.0}))
    assert list(store.curves(job.id, max_points=10)) == ["a", "b"]
    assert list(store.curves(job.id, max_points=10, names=["b", "c"])) == ["b"]
    assert store.curves(store.submit(make_spec())[0].id, max_points=10) == {}
    with pytest.raises(NotFound):
        store.curves("job-none", max_points=10)


def test_exact_points_of_a_range_are_there_as_well(store):
    job = run(store, lead(store), *(loss(step) for step in range(1, 11)))
    assert [point.step for point in store.metrics(job.id, after_step=3, to_step=6)] == [4, 5, 6]
