"""What a job's feed says, as server-sent events.

Each message is numbered by its position in the feed, so a client that comes back with ``Last-Event-ID`` misses
nothing and sees nothing twice. The last message, ``end``, follows the job's last event.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from service.domain.job import MetricPoint
from service.domain.ports import Feed, Followed


def feed_messages(feed: Feed) -> Iterator[tuple[int, bytes]]:
    """Yield the position of each message and its bytes, in order."""
    points = {
        position: _metrics_data(list(group)) for position, group in groupby(feed.points, lambda point: point.position)
    }
    events = {position: list(group) for position, group in groupby(feed.events, lambda event: event.position)}
    for position in sorted(points.keys() | events.keys()):
        parts: list[tuple[str, Any]] = []
        if position in points:
            parts.append(("metrics", points[position]))
        parts.extend(("event", event.model_dump(mode="json")) for event in events.get(position, ()))
        # Only the last message of a position carries it: who stops between two of them gets both again.
        for kind, data in parts[:-1]:
            yield position, message(kind, data, position=None)
        yield position, message(*parts[-1], position=position)


def end_data(followed: Followed) -> dict[str, Any]:
    """Return what the last message of a job that has ended says."""
    return {"status": followed.status, "reason": followed.reason, "message": followed.message}


def message(kind: str, data: object, *, position: int | None) -> bytes:
    """Return one message.

    Args:
        kind: of event.
        data: written as JSON.
        position: its ``id``; None: the client's last one stays.
    """
    number = "" if position is None else f"id: {position}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()


def _metrics_data(points: list[MetricPoint]) -> dict[str, Any]:
    return {
        "position": points[0].position,
        "attempt": points[0].attempt,
        "step": points[0].step,
        "values": {point.name: point.value for point in points},
        "nonfinite": {point.name: point.nonfinite for point in points if point.nonfinite is not None},
    }
