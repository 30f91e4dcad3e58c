"""Jobs: submit, list, look at."""

import asyncio
import logging
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from service.api import idempotency
from service.api import owner as owners
from service.api.body import Document, read_document
from service.api.direct import header_parameters
from service.api.fit import fit_problem
from service.api.idempotency import REPLAYED_HEADER, owner_of_keys, read_key
from service.api.owner import read_owner
from service.api.parts import AppParts, JobId, Parts, parts_of
from service.api.schemas import JobList, JobQuery
from service.api.uploads import check_uploads
from service.domain.errors import InvalidSpec
from service.domain.job import Job
from service.domain.ports import IdempotencyKey
from service.domain.spec import JobSpec, parse_spec
from service.domain.uploads import brings_something

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/jobs", tags=["jobs"])

MAX_LIGHT_BYTES = 16 << 10
"""A larger job is checked in a thread, so that no one else waits for it."""

SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


HEADERS = {"parameters": [*header_parameters(read_key), *header_parameters(read_owner)]}
CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"description": "path of the job", "schema": {"type": "string"}}}}
}


@router.post("", status_code=201, openapi_extra=SPEC_BODY | HEADERS, responses=CREATED, response_model=Job)
async def submit_job(request: Request) -> Response:
    """Submit a job. Once this is answered, no crash loses it."""
    parts = await parts_of(request)
    document = await read_document(request)
    key = await read_key(request.headers.get(idempotency.HEADER))
    owner = await read_owner(request.headers.get(owners.HEADER))
    named = None
    if key is not None:
        named = IdempotencyKey(owner=owner_of_keys(owner), route="POST /v1/jobs", key=key, body_sha256=document.sha256)
    try:
        spec = await _checked(document, parts)
    except InvalidSpec:
        # It may have been accepted before, when the checks had another answer.
        earlier = None if named is None else await anyio.to_thread.run_sync(parts.store.replayed, named)
        if earlier is None:
            raise
        job, created = earlier, False
    else:
        job, created = await asyncio.wrap_future(parts.store.submit_soon(spec, owner=owner, key=named))
    headers = {"Location": f"/v1/jobs/{job.id}"}
    if created:
        nudge(parts)
    else:
        headers[REPLAYED_HEADER] = "true"
    # Written out directly: the job is a model of ours, which needs no check on its way out.
    return Response(job.model_dump_json(), status_code=201, headers=headers, media_type="application/json")


async def _checked(document: Document, parts: Parts) -> JobSpec:
    """Return the job of a document. Raises ``InvalidSpec``; what may take more than a moment runs in a thread."""
    workers = document.data.get("workers") if isinstance(document.data, dict) else None
    is_elastic = isinstance(workers, dict)  # each number of workers is tried, up to thousands
    if is_elastic or document.size_bytes > MAX_LIGHT_BYTES:
        spec = await anyio.to_thread.run_sync(_parsed, document.data, parts)
    else:
        spec = _parsed(document.data, parts)
    if brings_something(spec):
        await anyio.to_thread.run_sync(check_uploads, spec, parts.uploads.rows)
    return spec


def _parsed(data: object, parts: Parts) -> JobSpec:
    spec = parse_spec(data)
    refuse_unfit(spec, parts)
    return spec


@router.get("", response_model=JobList)
def list_jobs(query: Annotated[JobQuery, Query()], parts: AppParts) -> Response:
    """List jobs, newest first, that match everything given."""
    labels = [label.partition("=") for label in query.label]
    page = parts.store.list_jobs(
        statuses=query.status,
        name=query.name,
        queue=query.queue,
        owner=query.owner,
        labels=[(key, value) for key, _, value in labels],
        limit=query.limit,
        cursor=query.cursor,
    )
    # Written out directly, as above: hundreds of jobs take most of the time otherwise.
    shown = JobList.model_construct(jobs=page.jobs, next_cursor=page.next_cursor)
    return Response(shown.model_dump_json(), media_type="application/json")


@router.get("/{job_id}")
def get_job(job_id: JobId, parts: AppParts) -> Job:
    """Return a job."""
    return parts.store.get(job_id)


def refuse_unfit(spec: JobSpec, parts: Parts) -> None:
    """Turn a job away that the cluster will never be able to run. Raises ``InvalidSpec``."""
    if parts.capacity is not None and (problem := fit_problem(spec, parts.capacity)) is not None:
        raise InvalidSpec("The cluster will never be able to run this job.", (problem,))


def nudge(parts: Parts) -> None:
    """Tell the scheduler that there is something new."""
    try:
        parts.nudge()
    except OSError:
        # What was asked for is committed, and the scheduler polls: a lost nudge costs a moment, not the answer.
        logger.warning("The scheduler could not be nudged; it will notice by itself.", exc_info=True)
