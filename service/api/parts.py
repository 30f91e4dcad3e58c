"""What an app was given, and how its routes get at it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Path, Request

from service.api.feeds import Feeds
from service.api.streaming import StreamSettings
from service.api.uploads import Uploads
from service.domain.errors import NotFound
from service.domain.placement import Node
from service.domain.ports import JobStore, RunFiles


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the routes work with.

    Attributes:
        store: the jobs.
        files: run storage.
        uploads: bundles and files of data.
        nudge: tells the scheduler that there is something new; may be lost.
        capacity: the most that the cluster will ever have; None where unknown.
        streams: how event streams are served.
        feeds: what they tell.
    """

    store: JobStore
    files: RunFiles
    uploads: Uploads
    nudge: Callable[[], None]
    capacity: tuple[Node, ...] | None
    streams: StreamSettings
    feeds: Feeds


async def parts_of(request: Request) -> Parts:
    """Return the parts of the app that a request came to."""
    return cast(Parts, request.app.state.parts)


AppParts = Annotated[Parts, Depends(parts_of)]
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


async def job_id_of(job_id: Annotated[str, Path(description="id of the job")]) -> str:
    """Return the id in a path, if it can be one. Raises ``NotFound``."""
    if not _ID.fullmatch(job_id):  # a database may refuse to look for what no id contains
        raise NotFound(f"There is no job {job_id!r}.")
    return job_id


JobId = Annotated[str, Depends(job_id_of)]
