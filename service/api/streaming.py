"""A job's feed as server-sent events.

Each message is numbered by its position in the feed, so a client that comes back with ``Last-Event-ID`` misses
nothing and sees nothing twice. The last message, ``end``, follows the job's last event.
"""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import anyio
import anyio.to_thread

from service.domain.errors import Unavailable
from service.domain.job import Job, MetricPoint
from service.domain.ports import Feed, JobStore

RECONNECT_AFTER_MS = 500
PAGE = 1000


class Shutdown:
    """Tells the event streams that the server stops; it would wait for them otherwise."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """End every stream at its next look, within ``StreamSettings.poll_s``."""
        self.requested = True


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How streams are served.

    Attributes:
        poll_s: time between two looks at the store.
        heartbeat_s: a comment is sent after this much silence, so that a dead connection is noticed.
        shutdown: ends them.
    """

    poll_s: float = 0.2
    heartbeat_s: float = 15.0
    shutdown: Shutdown = field(default_factory=Shutdown)


async def stream_job(store: JobStore, job_id: str, *, after: int, settings: StreamSettings) -> AsyncIterator[bytes]:
    """Yield a job's events and metrics after a position, until the job has ended and all is told.

    Args:
        store: where they are.
        job_id: of which job.
        after: position in the feed.
        settings: how to serve it.
    """
    yield b"retry: %d\n" % RECONNECT_AFTER_MS  # a line of the first message: some clients take it for one by itself
    last_sent = anyio.current_time()
    while not settings.shutdown.requested:
        try:
            feed, ended = await anyio.to_thread.run_sync(_look, store, job_id, after)
        except Unavailable:  # the answer has begun: all that is left to say is nothing, and to look again
            feed, ended = Feed(events=(), points=(), position=after), None
        messages = b"".join(_messages(feed))
        after = max(after, feed.position)
        if messages:
            yield messages
            last_sent = anyio.current_time()
            continue
        if ended is not None:
            data = {"status": ended.status, "reason": ended.reason, "message": ended.message}
            yield _message("end", data, position=None)
            return
        if anyio.current_time() - last_sent >= settings.heartbeat_s:
            yield b": heartbeat\n"
            last_sent = anyio.current_time()
        await anyio.sleep(settings.poll_s)


def _look(store: JobStore, job_id: str, after: int) -> tuple[Feed, Job | None]:
    """Return what is new; if nothing is and the job has ended, also the job."""
    feed = store.feed(job_id, after=after, limit=PAGE)
    if feed.events or feed.points:
        return feed, None
    job = store.get(job_id)
    if not job.status.is_terminal:
        return feed, None
    # Its last events may have been committed between the two looks.
    feed = store.feed(job_id, after=after, limit=PAGE)
    return feed, None if feed.events or feed.points else job


def _messages(feed: Feed) -> Iterator[bytes]:
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
            yield _message(kind, data, position=None)
        yield _message(*parts[-1], position=position)


def _metrics_data(points: list[MetricPoint]) -> dict[str, Any]:
    return {
        "position": points[0].position,
        "attempt": points[0].attempt,
        "step": points[0].step,
        "values": {point.name: point.value for point in points},
        "nonfinite": {point.name: point.nonfinite for point in points if point.nonfinite is not None},
    }


def _message(kind: str, data: object, *, position: int | None) -> bytes:
    number = "" if position is None else f"id: {position}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()
