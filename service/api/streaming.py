"""A job's feed as it comes, to one client."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from service.api.feeds import Feeds
from service.api.messages import message
from service.domain.errors import Unavailable

RECONNECT_AFTER_MS = 500


class Shutdown:
    """Tells the event streams that the server stops; it would wait for them otherwise."""

    def __init__(self) -> None:
        self.requested = False
        self._waiting: list[Callable[[], None]] = []

    def request(self) -> None:
        """End every stream at once; in the event loop that serves them."""
        self.requested = True
        for end in self._waiting:
            end()

    def on_request(self, end: Callable[[], None]) -> None:
        """Call something when it is requested."""
        self._waiting.append(end)


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How streams are served.

    Attributes:
        poll_s: time between two looks at the store, which serve all streams of a process.
        heartbeat_s: a comment is sent after this much silence, so that a dead connection is noticed.
        shutdown: ends them.
    """

    poll_s: float = 0.2
    heartbeat_s: float = 15.0
    shutdown: Shutdown = field(default_factory=Shutdown)


async def stream_job(feeds: Feeds, job_id: str, *, after: int, settings: StreamSettings) -> AsyncIterator[bytes]:
    """Yield a job's events and metrics after a position, until the job has ended and all is told.

    Args:
        feeds: where they come from.
        job_id: of which job.
        after: position in the feed.
        settings: how to serve it.
    """
    yield b"retry: %d\n" % RECONNECT_AFTER_MS  # a line of the first message: some clients take it for one by itself
    clock = asyncio.get_running_loop().time
    last_sent = clock()
    with feeds.channel(job_id, after) as channel:
        while not (settings.shutdown.requested or channel.closed):
            known, end = channel.position, channel.end
            data = channel.after(after)
            if data is None:  # too slow for what the channel keeps, or from further back
                try:
                    page = await feeds.read(job_id, after)
                except Unavailable:  # the answer has begun: all that is left is to say nothing, and to look again
                    await asyncio.sleep(settings.poll_s)
                    continue
                after = max(after, page.position)
                if page.data:
                    yield page.data
                    last_sent = clock()
                continue
            after = max(after, known)
            if data:
                yield data
                last_sent = clock()
                continue
            if end is not None and after >= known:
                yield message("end", dict(end), position=None)
                return
            silence_s = clock() - last_sent
            if silence_s >= settings.heartbeat_s:
                yield b": heartbeat\n"
                last_sent = clock()
                continue
            await channel.wait(settings.heartbeat_s - silence_s)
