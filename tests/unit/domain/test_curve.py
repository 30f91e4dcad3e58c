"""What the points of a bucket come to. A failure here shows as a wrong curve at every resolution."""

import pytest

from service.domain.curve import Bucket, bucket_of, choose_width, merged, rolled_up, start_of


def test_a_bucket_tells_what_its_points_come_to():
    points = [(3, 2.0, None, 1), (1, 4.0, None, 1), (2, None, "nan", 1), (4, None, "-inf", 2)]
    assert bucket_of(points) == Bucket(
        first_step=1,
        last_step=4,
        finite_count=2,
        nonfinite_count=2,
        min=2.0,
        mean=3.0,
        max=4.0,
        last=None,
        last_nonfinite="-inf",
        attempt=2,
    )


def test_merging_is_as_good_as_the_points_themselves():
    points = [(step, float(step * step), None, 1) for step in range(1, 50)]
    whole = bucket_of(points)
    # In any order, and of any sizes.
    parts = merged([bucket_of(points[30:]), bucket_of(points[:1]), bucket_of(points[1:30])])
    assert parts.mean == pytest.approx(whole.mean, rel=1e-15)
    assert (parts.first_step, parts.last_step, parts.last, parts.min, parts.max, parts.finite_count) == (
        1, 49, 2401.0, 1.0, 2401.0, 49,
    )  # fmt: skip


def test_a_mean_of_finite_values_is_finite():
    largest = 1.7e308
    bucket = bucket_of([(step, largest, None, 1) for step in range(4)])
    assert bucket.mean == pytest.approx(largest, rel=1e-15)
    assert merged([bucket, bucket_of([(9, largest, None, 1)])]).mean == pytest.approx(largest, rel=1e-15)


def test_buckets_without_a_finite_value_have_no_mean():
    empty = bucket_of([(1, None, "inf", 1)])
    assert (empty.min, empty.mean, empty.max, empty.finite_count, empty.nonfinite_count) == (None, None, None, 0, 1)
    assert merged([empty, bucket_of([(2, None, "nan", 1)])]).mean is None
    assert merged([empty, bucket_of([(2, 5.0, None, 1)])]).mean == 5.0


@pytest.mark.parametrize(
    ("first", "last", "most", "width"),
    [(0, 0, 2, 1), (0, 999, 1000, 1), (0, 1000, 1000, 2), (1, 1_000_000, 1000, 1024), (65_535, 65_536, 2, 1)],
)
def test_the_width_is_the_smallest_power_of_two_that_suffices(first, last, most, width):
    assert choose_width(first, last, most) == width


def test_any_range_can_be_shown_in_two_buckets():
    for first in range(0, 300, 7):
        for last in range(first, 600, 11):
            width = choose_width(first, last, 2)
            assert start_of(last, width) - start_of(first, width) <= width


def test_wider_buckets_begin_at_multiples_of_their_width():
    narrow = [bucket_of([(step, 1.0, None, 1)]) for step in (0, 15, 16, 31, 64)]
    assert [(one.first_step, one.finite_count) for one in rolled_up(narrow, 32)] == [(0, 4), (64, 1)]
