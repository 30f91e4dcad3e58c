"""Checkpoints and their files."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from starlette.responses import StreamingResponse

from service.api.parts import AppParts, JobId
from service.api.problems import RANGE_NOT_SATISFIABLE, Refused
from service.api.ranges import ByteRange, Unsatisfiable, etag_of, matches, parse_range
from service.api.schemas import MAX_STEP, CheckpointList
from service.domain.errors import CorruptCheckpoint, NotFound, StorageError
from service.domain.job import Checkpoint
from service.domain.ports import JobStore, RunFiles

CHUNK_BYTES = 2**20
MANIFEST = "manifest.json"

router = APIRouter(prefix="/jobs/{job_id}/checkpoints", tags=["checkpoints"])
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get("")
def list_checkpoints(job_id: JobId, parts: AppParts) -> CheckpointList:
    """Return the committed checkpoints of a job."""
    return CheckpointList(checkpoints=parts.store.checkpoints(job_id))


@router.get(
    "/{step}/files/{name}",
    response_class=Response,
    responses={
        200: {"description": "the file", "content": _BINARY},
        206: {"description": "the range asked for", "content": _BINARY},
        304: {"description": "the client has it already"},
    },
)
def get_file(
    job_id: JobId,
    step: Annotated[int, Path(ge=0, le=MAX_STEP)],
    name: str,
    parts: AppParts,
    range_header: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Response:
    """Send a file of a checkpoint, or a range of it. Its entity tag is the SHA-256 of its content."""
    checkpoint = _checkpoint(parts.store, job_id, step)
    path, size_bytes, sha256 = _file(parts.files, checkpoint, name)
    etag = etag_of(sha256)
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    try:
        part = parse_range(range_header if if_range in (None, etag) else None, size_bytes)
    except Unsatisfiable:
        raise Refused(
            RANGE_NOT_SATISFIABLE,
            f"{name} has {size_bytes} bytes.",
            headers={**headers, "Content-Range": f"bytes */{size_bytes}"},
        ) from None
    if part is not None:
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size_bytes}"
    sent = part or ByteRange(start=0, stop=size_bytes)
    return StreamingResponse(
        _chunks(parts.files, path, sent),
        status_code=200 if part is None else 206,
        headers={**headers, "Content-Length": str(len(sent)), "X-Content-Type-Options": "nosniff"},
        media_type="application/json" if name.endswith(".json") else "application/octet-stream",
    )


def _checkpoint(store: JobStore, job_id: str, step: int) -> Checkpoint:
    checkpoints = store.checkpoints(job_id)
    for checkpoint in checkpoints:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints[-10:]) or "none yet"
    raise NotFound(f"Job {job_id} has no checkpoint of step {step}. The latest: {steps}.")


def _file(files: RunFiles, checkpoint: Checkpoint, name: str) -> tuple[str, int, str]:
    """Return path, size and hash of a file; only names that the checkpoint's row knows lead to a path."""
    path = f"{checkpoint.path}/{name}"
    known = {file.name: file for file in checkpoint.files}
    if name in known:
        size_bytes = files.size(path)
        if size_bytes != known[name].size_bytes:
            raise CorruptCheckpoint(
                f"{path} has {size_bytes} bytes where its manifest says {known[name].size_bytes}. "
                "Take another checkpoint of the job."
            )
        return path, size_bytes, known[name].sha256
    if name == MANIFEST:
        return path, files.size(path), checkpoint.manifest_sha256
    raise NotFound(f"The checkpoint has no file {name!r}. It has: {', '.join([*known, MANIFEST])}.")


def _chunks(files: RunFiles, path: str, part: ByteRange) -> Iterator[bytes]:
    for start in range(part.start, part.stop, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, part.stop)
        chunk = files.read(path, start, stop)
        if len(chunk) != stop - start:
            raise StorageError(f"{path} ended at byte {start + len(chunk)} while it was being sent.")
        yield chunk
