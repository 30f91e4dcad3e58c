"""What became of a job: its attempts, events and training curves."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from service.api.parts import AppParts, JobId
from service.api.schemas import AttemptList, EventList, EventQuery, MetricQuery, Metrics

router = APIRouter(prefix="/jobs/{job_id}", tags=["history"])


@router.get("/attempts")
def list_attempts(job_id: JobId, parts: AppParts) -> AttemptList:
    """Return the attempts at a job."""
    return AttemptList(attempts=parts.store.attempts(job_id))


@router.get("/events")
def list_events(job_id: JobId, query: Annotated[EventQuery, Query()], parts: AppParts) -> EventList:
    """Return what happened to a job after a position."""
    events = parts.store.events(job_id, after=query.after, limit=query.limit)
    return EventList(events=events, next_after=events[-1].position if events else query.after)


@router.get("/metrics", response_model=Metrics)
def get_metrics(job_id: JobId, query: Annotated[MetricQuery, Query()], parts: AppParts) -> Response:
    """Return the training curves of a job, in columns."""
    series: dict[str, dict[str, Any]] = {}
    for point in parts.store.metrics(job_id, names=query.name, after_step=query.after_step):
        columns = series.get(point.name)
        if columns is None:
            columns = series[point.name] = {"steps": [], "values": [], "attempts": [], "nonfinite": {}}
        columns["steps"].append(point.step)
        columns["values"].append(point.value)
        columns["attempts"].append(point.attempt)
        if point.nonfinite is not None:
            columns["nonfinite"][point.step] = point.nonfinite
    # Written out directly: checking a long curve against the model would take longer than reading it.
    body = json.dumps({"series": series}, allow_nan=False, separators=(",", ":"))
    return Response(body, media_type="application/json")
