"""Jobs: submit, list, look at."""

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from service.api.body import RequestDocument
from service.api.fit import fit_problem
from service.api.idempotency import OWNER, REPLAYED_HEADER, RequestKey
from service.api.owner import RequestOwner
from service.api.parts import AppParts, JobId, Parts
from service.api.schemas import JobList, JobQuery
from service.api.uploads import check_uploads
from service.domain.errors import InvalidSpec
from service.domain.job import Job
from service.domain.ports import IdempotencyKey
from service.domain.spec import JobSpec, parse_spec

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/jobs", tags=["jobs"])

SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


CREATED: dict[int | str, dict[str, Any]] = {
    201: {"headers": {"Location": {"description": "path of the job", "schema": {"type": "string"}}}}
}


@router.post("", status_code=201, openapi_extra=SPEC_BODY, responses=CREATED)
def submit_job(
    document: RequestDocument, key: RequestKey, owner: RequestOwner, parts: AppParts, response: Response
) -> Job:
    """Submit a job. Once this is answered, no crash loses it."""
    named = None
    if key is not None:
        named = IdempotencyKey(owner=OWNER, route="POST /v1/jobs", key=key, body_sha256=document.sha256)
    # Before the checks, whose answer may be another by now.
    job, created = (None if named is None else parts.store.replayed(named)), False
    if job is None:
        spec = parse_spec(document.data)
        check_uploads(spec, parts.uploads.rows)
        refuse_unfit(spec, parts)
        job, created = parts.store.submit(spec, owner=owner, key=named)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if created:
        nudge(parts)
    else:
        response.headers[REPLAYED_HEADER] = "true"
    return job


@router.get("")
def list_jobs(query: Annotated[JobQuery, Query()], parts: AppParts) -> JobList:
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
    return JobList(jobs=page.jobs, next_cursor=page.next_cursor)


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
