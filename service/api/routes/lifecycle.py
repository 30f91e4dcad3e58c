"""What the owner of a job may ask for: to cancel, pause, resume, resize or fork it."""

import hashlib
from collections.abc import Callable

from fastapi import APIRouter, Response

from service.api.body import RequestDocument
from service.api.idempotency import REPLAYED_HEADER, RequestKey, owner_of_keys
from service.api.owner import RequestOwner
from service.api.parsing import body_of, parse
from service.api.parts import AppParts, JobId, Parts
from service.api.routes.jobs import CREATED, nudge, refuse_unfit
from service.api.schemas import ForkBody, ResizeBody
from service.api.uploads import check_uploads
from service.domain.elasticity import resize_problem
from service.domain.errors import InvalidSpec
from service.domain.fork import ForkRequest, plan_fork
from service.domain.job import DEFAULT_OWNER, Job, Origin
from service.domain.ports import IdempotencyKey

router = APIRouter(prefix="/jobs/{job_id}", tags=["lifecycle"])

_NO_BODY_SHA256 = hashlib.sha256(b"").hexdigest()


@router.post("/cancel", status_code=202)
def cancel_job(job_id: JobId, key: RequestKey, parts: AppParts, response: Response) -> Job:
    """Cancel a job that waits at once; ask for a checkpoint and an end of one that runs.

    Asking again changes nothing.
    """
    named = _named(key, job_id, "cancel")
    return _once(named, parts, response, lambda: parts.store.request_cancel(job_id, key=named))


@router.post("/pause", status_code=202)
def pause_job(job_id: JobId, key: RequestKey, parts: AppParts, response: Response) -> Job:
    """Pause a queued job at once; ask for a checkpoint and a pause of one that runs.

    Asking again changes nothing.
    """
    named = _named(key, job_id, "pause")
    return _once(named, parts, response, lambda: parts.store.request_pause(job_id, key=named))


@router.post("/resume", status_code=202)
def resume_job(job_id: JobId, key: RequestKey, parts: AppParts, response: Response) -> Job:
    """Queue a job again that was paused, has failed or was cancelled; it goes on from its last checkpoint."""
    named = _named(key, job_id, "resume")
    return _once(named, parts, response, lambda: parts.store.resume(job_id, key=named))


@router.post("/resize", status_code=202, openapi_extra=body_of(ResizeBody))
def resize_job(document: RequestDocument, job_id: JobId, key: RequestKey, parts: AppParts, response: Response) -> Job:
    """Let an elastic job have so many workers from now on, as soon as there is room for them."""
    workers = parse(ResizeBody, document).workers
    named = _named(key, job_id, "resize", document.sha256)

    def resize() -> Job:
        problem = resize_problem(parts.store.get(job_id).spec, workers)
        if problem is not None:
            raise InvalidSpec("The job cannot be resized like this.", (problem,))
        return parts.store.request_resize(job_id, workers, key=named)

    return _once(named, parts, response, resize)


@router.post("/fork", status_code=201, openapi_extra=body_of(ForkBody), responses=CREATED)
def fork_job(
    document: RequestDocument, job_id: JobId, key: RequestKey, owner: RequestOwner, parts: AppParts, response: Response
) -> Job:
    """Submit a job that goes on from a checkpoint of this one, with changes that leave the checkpoint loadable."""
    body = parse(ForkBody, document)
    named = _named(key, job_id, "fork", document.sha256, owner=owner)
    # Before the checks, whose answer may be another by now.
    job, created = (None if named is None else parts.store.replayed(named)), False
    if job is None:
        request = ForkRequest(step=body.step, changes=body.changes)
        spec, checkpoint = plan_fork(parts.store.get(job_id), parts.store.checkpoints(job_id), request)
        check_uploads(spec, parts.uploads.rows)
        refuse_unfit(spec, parts)
        origin = Origin(job_id=job_id, attempt=checkpoint.attempt, step=checkpoint.step)
        job, created = parts.store.fork(spec, origin, owner=owner, key=named)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if created:
        nudge(parts)
    else:
        response.headers[REPLAYED_HEADER] = "true"
    return job


def _once(named: IdempotencyKey | None, parts: Parts, response: Response, ask: Callable[[], Job]) -> Job:
    """Ask for something, unless an earlier request with this key did; then say so."""
    earlier = None if named is None else parts.store.replayed(named)
    if earlier is not None:
        response.headers[REPLAYED_HEADER] = "true"
        return earlier
    job = ask()
    nudge(parts)
    return job


def _named(
    key: str | None, job_id: str, action: str, body_sha256: str = _NO_BODY_SHA256, *, owner: str = DEFAULT_OWNER
) -> IdempotencyKey | None:
    """Return the key of a request; each owner may use one key once for each job and action."""
    if key is None:
        return None
    route = f"POST /v1/jobs/{job_id}/{action}"
    return IdempotencyKey(owner=owner_of_keys(owner), route=route, key=key, body_sha256=body_sha256)
