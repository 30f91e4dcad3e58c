"""What the ranks of a job printed."""

from typing import Annotated

from fastapi import APIRouter, Query, Response

from service.api.parts import AppParts, JobId
from service.api.problems import REQUEST_INVALID, Refused
from service.api.schemas import LogQuery
from service.domain.errors import FieldProblem, NotFound
from service.domain.job import Job, JobStatus
from service.domain.ports import RunFiles

router = APIRouter(prefix="/jobs/{job_id}", tags=["history"])

_HEADERS = {
    "Log-Attempt": {"description": "number of the attempt; 0 before the first", "schema": {"type": "integer"}},
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

    To follow a log, ask again with ``offset`` as ``Log-Next-Offset`` said.
    """
    if query.tail is not None and query.offset is not None:
        problem = FieldProblem(field="tail", message="cannot be combined with offset. Give one of them.")
        raise Refused(REQUEST_INVALID, "The request cannot be answered as written.", [problem])
    job = parts.store.get(job_id)
    attempt = job.attempt if query.attempt is None else query.attempt
    if attempt > job.attempt:
        raise NotFound(f"Job {job.id} has had {job.attempt} attempt(s); there is no attempt {attempt}.")
    if query.rank >= job.spec.workers.max:
        raise NotFound(f"Job {job.id} has {job.spec.workers} rank(s), from 0; there is no rank {query.rank}.")

    # Whether it has ended is known from before the read: what is read then is all there will be.
    size_bytes = parts.files.log_size(job.id, attempt, query.rank) if attempt else 0
    if query.tail is None:
        start = query.offset or 0
        content = parts.files.read_log(job.id, attempt, query.rank, start, start + query.limit) if attempt else b""
    else:
        start, content = _last_lines(parts.files, job.id, attempt, query, size_bytes)
    return Response(
        content,
        media_type="text/plain; charset=utf-8",
        headers={
            "Log-Attempt": str(attempt),
            "Log-Next-Offset": str(start + len(content)),
            "Log-Size": str(max(size_bytes, start + len(content) if content else 0)),
            "Log-Ended": str(_has_ended(job, attempt)).lower(),
            "X-Content-Type-Options": "nosniff",
        },
    )


def _last_lines(files: RunFiles, job_id: str, attempt: int, query: LogQuery, size_bytes: int) -> tuple[int, bytes]:
    if not attempt:
        return 0, b""
    start = max(0, size_bytes - query.limit)
    content = files.read_log(job_id, attempt, query.rank, start, size_bytes)
    kept = b"".join(content.splitlines(keepends=True)[-(query.tail or 1) :])
    return start + len(content) - len(kept), kept


def _has_ended(job: Job, attempt: int) -> bool:
    waits = job.status in (JobStatus.QUEUED, JobStatus.PAUSED)
    return attempt < job.attempt or job.status.is_terminal or (attempt > 0 and waits)
