"""Roll-ups of training curves: made as points are taken in, so that a long curve is read in a moment.

A bucket covers ``width`` steps of one metric. The points of a bucket of the smallest width are looked up again where
some of them count no more; a wider bucket is made of those of the next smaller width.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.curve import (
    COARSEST,
    WIDTHS,
    Bucket,
    Curve,
    Point,
    bucket_of,
    choose_width,
    merged,
    rolled_up,
    start_of,
)
from service.store.bulk import insert_rows
from service.store.tables import metric_rollups as rollups
from service.store.tables import metrics

_SELECT: sa.Select[Any] = sa.select(*(rollups.c[name] for name in ("width", "name", "start", *Bucket._fields)))
# Buckets of each width in a range of its own: each is a range of the table's key, which one condition for all of them
# would not be. Made once, since putting it together takes longer than running it.
_NEAR = sa.union_all(
    *(
        _SELECT.where(
            rollups.c.job_number == sa.bindparam("job"),
            rollups.c.width == width,
            rollups.c.name.in_(sa.bindparam("names", expanding=True)),
            rollups.c.start.between(sa.bindparam(f"from_{width}"), sa.bindparam(f"to_{width}")),
        )
        for width in WIDTHS
    )
)
_SMALLEST = WIDTHS[0]
_MOST_NAMES = 500  # in one statement

Key = tuple[int, str, int]
"""Width, name of the metric, first step."""


def add_points(
    connection: Connection,
    number: int,
    points: Mapping[str, Sequence[Point]],
    *,
    replaced: Set[tuple[int, str]],
    reached: int,
) -> None:
    """Add points that were just stored.

    Args:
        connection: in the transaction that stored them.
        number: of the job's row, which is locked.
        points: that count, by name of the metric.
        replaced: step and name of those that count in place of earlier ones.
        reached: no earlier point counts beyond this step.
    """
    added = _buckets_of(points)
    stale = {(_SMALLEST, name, start_of(step, _SMALLEST)) for step, name in replaced}
    is_stale = {(width, name, start_of(start, width)) for _, name, start in stale for width in WIDTHS}
    fresh = {key: bucket for key, bucket in added.items() if key not in is_stale}
    for key, bucket in _load(connection, number, [key for key in fresh if key[2] <= reached]).items():
        fresh[key] = merged([bucket, fresh[key]])
    _store(connection, number, fresh)
    _make_again(connection, number, stale)


def cut_beyond(connection: Connection, number: int, step: int) -> None:
    """Take out the points after a step, which count no more."""
    connection.execute(sa.delete(rollups).where(rollups.c.job_number == number, rollups.c.start > step))
    cut = connection.execute(
        sa.select(rollups.c.width, rollups.c.name, rollups.c.start).where(
            rollups.c.job_number == number, rollups.c.last_step > step
        )
    )
    _make_again(connection, number, {(row.width, row.name, row.start) for row in cut})


def read_curves(
    connection: Connection, number: int, *, names: Sequence[str], from_step: int, to_step: int, max_points: int
) -> dict[str, Curve]:
    """Return curves, each as fine as so many buckets allow.

    Buckets at the ends of the range are whole.

    Args:
        connection: to read with.
        number: of the job's row.
        names: of the metrics; none: all of them.
        from_step: first step.
        to_step: last step.
        max_points: most buckets of one curve.
    """
    extents = sa.select(
        rollups.c.name,
        sa.func.min(rollups.c.first_step),
        sa.func.max(rollups.c.last_step),
        sa.func.sum(rollups.c.finite_count + rollups.c.nonfinite_count),
    ).where(
        rollups.c.job_number == number,
        rollups.c.width == COARSEST,
        rollups.c.last_step >= from_step,
        rollups.c.first_step <= to_step,
    )
    if names:
        extents = extents.where(rollups.c.name.in_(names))
    curves = {}
    for name, first, last, most_points in connection.execute(extents.group_by(rollups.c.name)).all():
        first, last = max(first, from_step), min(last, to_step)
        width = 1 if most_points <= max_points else choose_width(first, last, max_points)
        begin, end = start_of(first, width), start_of(last, width) + width - 1
        found = _read(connection, number, name, width, begin, end)
        if found:
            curves[name] = Curve(bucket_steps=width, buckets=tuple(rolled_up(found, width)))
    return dict(sorted(curves.items()))


def _buckets_of(points: Mapping[str, Sequence[Point]]) -> dict[Key, Bucket]:
    buckets: dict[Key, Bucket] = {}
    for name, of_name in points.items():
        groups: defaultdict[int, list[Point]] = defaultdict(list)
        for point in of_name:
            groups[start_of(point[0], _SMALLEST)].append(point)
        level = {start: bucket_of(group) for start, group in groups.items()}
        for width in WIDTHS:
            if width > _SMALLEST:
                wider: defaultdict[int, list[Bucket]] = defaultdict(list)
                for start, bucket in level.items():
                    wider[start_of(start, width)].append(bucket)
                level = {start: merged(group) for start, group in wider.items()}
            buckets.update(((width, name, start), bucket) for start, bucket in level.items())
    return buckets


def _load(connection: Connection, number: int, keys: Sequence[Key]) -> dict[Key, Bucket]:
    """Return those of these buckets that there are."""
    if not keys:
        return {}
    wanted = set(keys)
    starts = {width: [start for at, _, start in keys if at == width] for width in WIDTHS}
    bounds: dict[str, object] = {}
    for width, of_width in starts.items():
        bounds |= {f"from_{width}": min(of_width, default=1), f"to_{width}": max(of_width, default=0)}
    names = sorted({name for _, name, _ in keys})
    found: dict[Key, Bucket] = {}
    for first in range(0, len(names), _MOST_NAMES):
        parameters = {"job": number, "names": names[first : first + _MOST_NAMES], **bounds}
        for row in connection.execute(_NEAR, parameters):
            if (row.width, row.name, row.start) in wanted:
                found[row.width, row.name, row.start] = _bucket(row)
    return found


def _store(connection: Connection, number: int, buckets: Mapping[Key, Bucket]) -> None:
    rows = [
        {"job_number": number, "width": width, "name": name, "start": start, **bucket._asdict()}
        for (width, name, start), bucket in buckets.items()
    ]
    insert_rows(connection, rollups, rows, on_conflict="replace")


def _make_again(connection: Connection, number: int, stale: Iterable[Key]) -> None:
    """Make buckets, and all wider ones around them, of what counts by now."""
    waiting = set(stale)
    for place, width in enumerate(WIDTHS):
        keys = {key for key in waiting if key[0] == width}
        buckets, empty = {}, []
        for key in keys:
            _, name, start = key
            below = 1 if place == 0 else WIDTHS[place - 1]
            parts = _read(connection, number, name, below, start, start + width - 1)
            if parts:
                buckets[key] = merged(parts)
            else:
                empty.append(key)
        _store(connection, number, buckets)
        for _, name, start in empty:
            connection.execute(
                sa.delete(rollups).where(
                    rollups.c.job_number == number,
                    rollups.c.width == width,
                    rollups.c.name == name,
                    rollups.c.start == start,
                )
            )
        if width != COARSEST:
            above = WIDTHS[place + 1]
            waiting |= {(above, name, start_of(start, above)) for _, name, start in keys}


def _read(connection: Connection, number: int, name: str, width: int, begin: int, end: int) -> list[Bucket]:
    """Return the widest buckets of at most a width that are kept, or points, which start within a range of steps."""
    kept = max((one for one in WIDTHS if one <= width), default=None)
    if kept is not None:
        query = _SELECT.where(
            rollups.c.job_number == number,
            rollups.c.width == kept,
            rollups.c.name == name,
            rollups.c.start.between(begin, end),
        )
        return [_bucket(row) for row in connection.execute(query.order_by(rollups.c.start))]
    points = connection.execute(
        sa.select(metrics.c.step, metrics.c.value, metrics.c.nonfinite, metrics.c.attempt)
        .where(
            metrics.c.job_number == number,
            metrics.c.name == name,
            ~metrics.c.superseded,
            metrics.c.step.between(begin, end),
        )
        .order_by(metrics.c.step)
    )
    rows: Iterable[Any] = (tuple(row) for row in points)
    return [bucket_of(list(group)) for _, group in groupby(rows, key=lambda point: point[0] // max(1, width))]


def _bucket(row: Row[Any]) -> Bucket:
    return Bucket._make(row[3:])
