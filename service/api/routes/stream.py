"""A job's events and metrics as they come."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.responses import StreamingResponse

from service.api.parts import AppParts, JobId
from service.api.problems import REQUEST_INVALID, Refused
from service.api.schemas import MAX_POSITION, StreamQuery
from service.api.streaming import stream_job
from service.domain.errors import FieldProblem

router = APIRouter(prefix="/jobs/{job_id}", tags=["history"])


@router.get(
    "/stream",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
def stream(
    job_id: JobId,
    query: Annotated[StreamQuery, Query()],
    parts: AppParts,
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
) -> Response:
    """Send events and metrics as server-sent events, until the job has ended."""
    after = query.after if last_event_id is None else _position(last_event_id)
    job = parts.store.get(job_id)
    return StreamingResponse(
        stream_job(parts.feeds, job.id, after=after, settings=parts.streams),
        media_type="text/event-stream",
        # A proxy that buffers would hold messages back.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _position(header: str) -> int:
    position = int(header) if header.isascii() and header.isdecimal() and len(header) < 20 else -1
    if 0 <= position <= MAX_POSITION:
        return position
    problem = FieldProblem(field="Last-Event-ID", message="must be the id of a message of this stream.")
    raise Refused(REQUEST_INVALID, "The stream cannot go on from there.", [problem])
