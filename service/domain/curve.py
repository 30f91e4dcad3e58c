"""Training curves at a resolution that a screen can show: what the values of neighbouring steps come to."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

WIDTHS = (16, 128, 1024, 8192, 65536)
"""Steps per bucket of the roll-ups that are kept; each divides the next, and each is a power of two."""

COARSEST = WIDTHS[-1]


class Bucket(NamedTuple):
    """What the points of one metric at some neighbouring steps come to.

    Attributes:
        first_step: of its points.
        last_step: of its points.
        finite_count: points with a finite value.
        nonfinite_count: the others.
        min: of the finite values; None where there is none.
        mean: likewise.
        max: likewise.
        last: value of the last step; None where it is not finite.
        last_nonfinite: which it is then: ``nan``, ``inf`` or ``-inf``.
        attempt: that reported the last step.
    """

    first_step: int
    last_step: int
    finite_count: int
    nonfinite_count: int
    min: float | None
    mean: float | None
    max: float | None
    last: float | None
    last_nonfinite: str | None
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the steps.

    Attributes:
        bucket_steps: steps per bucket, a power of two; a bucket begins at a multiple of it. 1: each point is shown.
        buckets: those that hold points, in order.
    """

    bucket_steps: int
    buckets: tuple[Bucket, ...]


Point = tuple[int, float | None, str | None, int]
"""Step, value, which it is where it is not finite, attempt."""


def bucket_of(points: Sequence[Point]) -> Bucket:
    """Return what points come to.

    Args:
        points: at least one, of one metric, no two at one step.
    """
    last = max(points)
    values = [value for _, value, _, _ in points if value is not None]
    return Bucket(
        first_step=min(points)[0],
        last_step=last[0],
        finite_count=len(values),
        nonfinite_count=len(points) - len(values),
        min=min(values, default=None),
        mean=_mean(values),
        max=max(values, default=None),
        last=last[1],
        last_nonfinite=last[2],
        attempt=last[3],
    )


def merged(buckets: Sequence[Bucket]) -> Bucket:
    """Return what the points of buckets come to together.

    Args:
        buckets: at least one, of one metric, no point in two of them.
    """
    if len(buckets) == 1:
        return buckets[0]
    last = max(buckets, key=attrgetter("last_step"))
    count = sum(bucket.finite_count for bucket in buckets)
    return Bucket(
        first_step=min(bucket.first_step for bucket in buckets),
        last_step=last.last_step,
        finite_count=count,
        nonfinite_count=sum(bucket.nonfinite_count for bucket in buckets),
        min=min((bucket.min for bucket in buckets if bucket.min is not None), default=None),
        # Weights first: a sum of finite values may be beyond what a float holds, their mean never is.
        mean=sum(bucket.mean * (bucket.finite_count / count) for bucket in buckets if bucket.mean is not None)
        if count
        else None,
        max=max((bucket.max for bucket in buckets if bucket.max is not None), default=None),
        last=last.last,
        last_nonfinite=last.last_nonfinite,
        attempt=last.attempt,
    )


def start_of(step: int, width: int) -> int:
    """Return the first step of the bucket that a step is in."""
    return step // width * width


def rolled_up(buckets: Iterable[Bucket], width: int) -> Iterator[Bucket]:
    """Merge buckets, in order and of widths that divide this one, into wider ones."""
    for _, group in groupby(buckets, key=lambda bucket: bucket.first_step // width):
        yield merged(list(group))


def choose_width(first_step: int, last_step: int, max_buckets: int) -> int:
    """Return the smallest power of two with which so many buckets suffice for a range of steps.

    Args:
        first_step: of the range.
        last_step: likewise, included.
        max_buckets: at least 2: a range across the boundary of two buckets of any width takes both.
    """
    width = 1
    while last_step // width - first_step // width + 1 > max_buckets:
        width *= 2
    return width


def _mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    total = sum(values)
    if abs(total) == float("inf"):
        return sum(value / len(values) for value in values)
    return total / len(values)
