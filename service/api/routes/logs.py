"""What the ranks of a job printed."""

import threading
from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.api.log_search import BadPattern, LinePattern, LogPlace, search_logs
from service.api.parts import AppParts, JobId
from service.api.problems import REQUEST_INVALID, Refused
from service.api.schemas import LogMatch, LogMatches, LogQuery, LogSearchQuery
from service.domain.errors import FieldProblem, NotFound, Unavailable
from service.domain.job import Job, JobStatus
from service.domain.ports import LogPart, RunFiles

router = APIRouter(prefix="/jobs/{job_id}", tags=["history"])

# A search reads as much as it can for its time; more of them at once would leave nothing for other requests.
MAX_SEARCHES = 4
_searches = threading.BoundedSemaphore(MAX_SEARCHES)

_HEADERS = {
    "Log-Attempt": {"description": "number of the attempt; 0 before the first", "schema": {"type": "integer"}},
    "Log-Start-Offset": {"description": "offset of the first byte of the answer", "schema": {"type": "integer"}},
    "Log-Next-Offset": {"description": "the `offset` that goes on here", "schema": {"type": "integer"}},
    "Log-Size": {"description": "bytes logged so far", "schema": {"type": "integer"}},
    "Log-Ended": {"description": "whether the attempt has ended: true or false", "schema": {"type": "string"}},
}


@router.get(
    "/logs",
    response_class=Response,
    responses={200: {"headers": _HEADERS, "content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def get_log(job_id: JobId, query: Annotated[LogQuery, Query()], parts: AppParts) -> Response:
    """Return a part of what a rank of an attempt printed.

    To follow a log, ask again with ``offset`` as ``Log-Next-Offset`` said. Of a log that is longer than what is kept,
    the answer begins with the first byte that is, as ``Log-Start-Offset`` says.
    """
    if query.tail is not None and query.offset is not None:
        problem = FieldProblem(field="tail", message="cannot be combined with offset. Give one of them.")
        raise Refused(REQUEST_INVALID, "The request cannot be answered as written.", [problem])
    job = parts.store.get(job_id)
    attempt = job.attempt if query.attempt is None else query.attempt
    _check_log(job, attempt, query.rank)

    # Whether it has ended is known from before the read: what is read then is all there will be.
    size_bytes = parts.files.log_size(job.id, attempt, query.rank) if attempt else 0
    if query.tail is None:
        part = LogPart(start=query.offset or 0, content=b"")
        if attempt:
            part = parts.files.read_log(job.id, attempt, query.rank, part.start, query.limit)
    else:
        part = _last_lines(parts.files, job.id, attempt, query, size_bytes)
    end = part.start + len(part.content)
    return Response(
        part.content,
        media_type="text/plain; charset=utf-8",
        headers={
            "Log-Attempt": str(attempt),
            "Log-Start-Offset": str(part.start),
            "Log-Next-Offset": str(end),
            "Log-Size": str(max(size_bytes, end if part.content else 0)),
            "Log-Ended": str(_has_ended(job, attempt)).lower(),
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.get("/logs/search")
def search_log(job_id: JobId, query: Annotated[LogSearchQuery, Query()], parts: AppParts) -> LogMatches:
    """Return lines that ranks of a job printed and that contain a text or match a regular expression.

    An answer takes about two seconds at most, and may hold nothing yet: ask again with ``cursor`` as ``next_cursor``
    said until that is null.
    """
    try:
        pattern = LinePattern(query.q, is_regex=query.regex, ignore_case=query.ignore_case)
    except BadPattern as error:
        problem = FieldProblem(field="q", message=str(error))
        raise Refused(REQUEST_INVALID, "The request cannot be answered as written.", [problem]) from None
    start = None if query.cursor is None else LogPlace.of_cursor(query.cursor)
    job = parts.store.get(job_id)
    attempt = job.attempt if query.attempt is None else query.attempt
    _check_log(job, job.attempt if attempt == "all" else attempt, query.rank or 0)
    logs = [
        LogPlace(attempt=one.number, rank=rank)
        for one in parts.store.attempts(job.id)
        if attempt in ("all", one.number)
        for rank in range(one.world_size)
        if query.rank in (None, rank)
    ]
    if not _searches.acquire(blocking=False):
        raise Unavailable(f"{MAX_SEARCHES} searches are under way. Try again in a moment.")
    try:
        found = search_logs(parts.files, job.id, pattern, logs=logs, start=start, limit=query.limit)
    finally:
        _searches.release()
    return LogMatches(
        matches=[
            LogMatch(
                attempt=line.place.attempt,
                rank=line.place.rank,
                offset=line.place.offset,
                text=line.text,
                is_cut=line.is_cut,
            )
            for line in found.lines
        ],
        next_cursor=None if found.next_place is None else found.next_place.cursor,
    )


def _check_log(job: Job, attempt: int, rank: int) -> None:
    if attempt > job.attempt:
        raise NotFound(f"Job {job.id} has had {job.attempt} attempt(s); there is no attempt {attempt}.")
    if rank >= job.spec.workers.max:
        raise NotFound(f"Job {job.id} has {job.spec.workers} rank(s), from 0; there is no rank {rank}.")


def _last_lines(files: RunFiles, job_id: str, attempt: int, query: LogQuery, size_bytes: int) -> LogPart:
    if not attempt:
        return LogPart(start=0, content=b"")
    start = max(0, size_bytes - query.limit)
    part = files.read_log(job_id, attempt, query.rank, start, size_bytes - start)
    kept = b"".join(part.content.splitlines(keepends=True)[-(query.tail or 1) :])
    return LogPart(start=part.start + len(part.content) - len(kept), content=kept)


def _has_ended(job: Job, attempt: int) -> bool:
    waits = job.status in (JobStatus.QUEUED, JobStatus.PAUSED)
    return attempt < job.attempt or job.status.is_terminal or (attempt > 0 and waits)
