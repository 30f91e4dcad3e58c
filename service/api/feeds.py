"""The feeds of all jobs that streams are open for: one look at the store for all of them, one page for all who wait."""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread

from service.api.messages import end_data, feed_messages
from service.domain.errors import Unavailable
from service.domain.ports import Followed, JobStore

logger = logging.getLogger(__name__)

POSITIONS_PER_LOOK = 10_000
POSITIONS_PER_READ = 1000
MAX_KEPT_BYTES = 1 << 16
"""Most bytes kept of one feed for streams that lag; one that lags further reads for itself."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Messages of a feed, written out.

    Attributes:
        after: position that they follow.
        position: up to which they tell everything.
        messages: position and bytes of each, in order.
        data: all of them.
    """

    after: int
    position: int
    messages: tuple[tuple[int, bytes], ...]
    data: bytes

    @classmethod
    def of(cls, after: int, followed: Followed) -> "Page":
        """Write out what follows a position."""
        messages = tuple(feed_messages(followed.feed))
        return cls(
            after=after,
            position=followed.feed.position,
            messages=messages,
            data=b"".join(data for _, data in messages),
        )

    def beyond(self, position: int) -> bytes:
        """Return the messages after a position."""
        if position <= self.after:
            return self.data
        return b"".join(data for at, data in self.messages if at > position)


class Channel:
    """The latest pages of one job's feed, and those who wait for the next.

    Attributes:
        position: up to which it is known.
        end: what the last message says, where the job has ended and all of its feed is known.
        closed: no page will come any more.
    """

    def __init__(self, position: int) -> None:
        self.position = position
        self.end: Mapping[str, Any] | None = None
        self.closed = False
        self.num_streams = 0
        self._pages: deque[Page] = deque()
        self._kept_bytes = 0
        self._news = asyncio.Event()

    def publish(self, page: Page, end: Mapping[str, Any] | None) -> None:
        """Add the page that follows, and wake who waits if it is news.

        It is from further back where the first stream began at a position that the feed does not have yet.
        """
        is_news = page.position != self.position or end != self.end
        if page.position > self.position:
            self._pages.append(page)
            self._kept_bytes += len(page.data)
            while self._kept_bytes > MAX_KEPT_BYTES and len(self._pages) > 1:
                self._kept_bytes -= len(self._pages.popleft().data)
        self.position, self.end = page.position, end
        if is_news:
            self._wake()

    def close(self) -> None:
        """Wake who waits for good."""
        self.closed = True
        self._wake()

    def after(self, position: int) -> bytes | None:
        """Return the messages after a position up to that of the channel; None if it does not have all of them."""
        if position >= self.position:
            return b""
        pages: list[bytes] = []
        for page in reversed(self._pages):
            pages.append(page.beyond(position))
            if page.after <= position:
                return pages[0] if len(pages) == 1 else b"".join(reversed(pages))
        return None

    async def wait(self, timeout_s: float) -> None:
        """Return at the next news, or after the time."""
        news = self._news
        try:
            async with asyncio.timeout(timeout_s):
                await news.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


class Feeds:
    """Looks at the store for every stream of this process, for as long as there are any.

    Used from the event loop alone.

    Args:
        store: where the feeds are.
        poll_s: time between two looks.
    """

    def __init__(self, store: JobStore, *, poll_s: float) -> None:
        self._store = store
        self._poll_s = poll_s
        self._channels: dict[str, Channel] = {}
        self._task: asyncio.Task[None] | None = None
        self._joined = asyncio.Event()

    @contextmanager
    def channel(self, job_id: str, after: int) -> Iterator[Channel]:
        """Follow a job's feed for a stream that begins after a position."""
        channel = self._channels.get(job_id)
        if channel is None:
            channel = self._channels[job_id] = Channel(after)
            self._joined.set()
        channel.num_streams += 1
        if self._task is None:
            self._task = asyncio.create_task(self._follow())
        try:
            yield channel
        finally:
            channel.num_streams -= 1
            if channel.num_streams == 0 and self._channels.get(job_id) is channel:
                del self._channels[job_id]

    async def read(self, job_id: str, after: int) -> Page:
        """Return what follows a position, for a stream that its channel has left behind. Raises ``Unavailable``."""

        def look() -> Page:
            return Page.of(after, self._store.follow({job_id: after}, limit=POSITIONS_PER_READ)[job_id])

        return await anyio.to_thread.run_sync(look)

    def close(self) -> None:
        """End every stream at once."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()
        self._joined.set()

    async def _follow(self) -> None:
        limiter = anyio.CapacityLimiter(1)  # other requests may keep all the usual threads busy
        try:
            while self._channels:
                self._joined.clear()
                positions = {job_id: channel.position for job_id, channel in self._channels.items()}
                try:
                    found = await anyio.to_thread.run_sync(self._look, positions, limiter=limiter)
                except Unavailable:  # the answers have begun: all that is left to say is nothing, and to look again
                    await asyncio.sleep(self._poll_s)
                    continue
                if not self._publish(positions, found):
                    await self._pause()
        except Exception:
            logger.exception("The feeds of jobs cannot be followed; their streams end, and clients come back.")
            self.close()
        finally:
            self._task = None

    def _look(self, positions: Mapping[str, int]) -> dict[str, tuple[Page, Followed]]:
        found = self._store.follow(positions, limit=POSITIONS_PER_LOOK)
        return {job_id: (Page.of(positions[job_id], followed), followed) for job_id, followed in found.items()}

    def _publish(self, positions: Mapping[str, int], found: Mapping[str, tuple[Page, Followed]]) -> bool:
        """Hand out what was found; return whether there is more to read at once."""
        for job_id, (page, followed) in found.items():
            channel = self._channels.get(job_id)
            if channel is not None and channel.position == positions[job_id]:
                has_ended = followed.status.is_terminal and not followed.has_more
                channel.publish(page, end_data(followed) if has_ended else None)
        return any(followed.has_more for _, followed in found.values())

    async def _pause(self) -> None:
        """Wait for the next look, or the first stream of another job."""
        try:
            async with asyncio.timeout(self._poll_s):
                await self._joined.wait()
        except TimeoutError:
            return
