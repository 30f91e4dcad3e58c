"""Checkpoints and their files."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from service.api.files import FILE_RESPONSES, WantedPart, file_response
from service.api.parts import AppParts, JobId
from service.api.schemas import MAX_STEP, CheckpointList
from service.domain.errors import CorruptCheckpoint, NotFound
from service.domain.job import Checkpoint
from service.domain.ports import JobStore, RunFiles

MANIFEST = "manifest.json"

router = APIRouter(prefix="/jobs/{job_id}/checkpoints", tags=["checkpoints"])


@router.get("")
def list_checkpoints(job_id: JobId, parts: AppParts) -> CheckpointList:
    """Return the committed checkpoints of a job."""
    return CheckpointList(checkpoints=parts.store.checkpoints(job_id))


@router.get("/{step}/files/{name}", response_class=Response, responses=FILE_RESPONSES)
def get_file(
    job_id: JobId, step: Annotated[int, Path(ge=0, le=MAX_STEP)], name: str, parts: AppParts, wanted: WantedPart
) -> Response:
    """Send a file of a checkpoint, or a range of it. Its entity tag is the SHA-256 of its content."""
    checkpoint = _checkpoint(parts.store, job_id, step)
    path, size_bytes, sha256 = _file(parts.files, checkpoint, name)
    return file_response(
        parts.files,
        path,
        size_bytes=size_bytes,
        sha256=sha256,
        wanted=wanted,
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
