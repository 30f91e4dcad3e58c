"""What became of a job: its attempts, events and training curves."""

import json
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from service.api.parts import AppParts, JobId
from service.api.schemas import AttemptList, EventList, EventQuery, MetricQuery, Metrics
from service.domain.curve import Curve
from service.domain.job import MetricPoint

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
    """Return the training curves of a job, in columns; with ``max_points`` rolled up to what a screen can show."""
    if query.max_points is None:
        points = parts.store.metrics(job_id, names=query.name, after_step=query.first_step - 1, to_step=query.to_step)
        series = _exact(points)
    else:
        curves = parts.store.curves(
            job_id,
            max_points=query.max_points,
            names=query.name,
            from_step=query.first_step,
            to_step=query.to_step,
        )
        series = {name: _rolled_up(curve) for name, curve in curves.items()}
    # Written out directly: checking a long curve against the model would take longer than reading it.
    body = json.dumps({"series": series}, allow_nan=False, separators=(",", ":"))
    return Response(body, media_type="application/json")


def _exact(points: Iterable[MetricPoint]) -> dict[str, dict[str, Any]]:
    series: dict[str, dict[str, Any]] = {}
    for point in points:
        columns = series.get(point.name)
        if columns is None:
            columns = series[point.name] = {"steps": [], "values": [], "attempts": [], "nonfinite": {}}
        columns["steps"].append(point.step)
        columns["values"].append(point.value)
        columns["attempts"].append(point.attempt)
        if point.nonfinite is not None:
            columns["nonfinite"][point.step] = point.nonfinite
    return series


def _rolled_up(curve: Curve) -> dict[str, Any]:
    buckets = curve.buckets
    return {
        "steps": [bucket.first_step for bucket in buckets],
        "values": [bucket.mean for bucket in buckets],
        "attempts": [bucket.attempt for bucket in buckets],
        "nonfinite": {bucket.first_step: bucket.last_nonfinite for bucket in buckets if bucket.last_nonfinite},
        "rollup": {
            "bucket_steps": curve.bucket_steps,
            "last_steps": [bucket.last_step for bucket in buckets],
            "counts": [bucket.finite_count for bucket in buckets],
            "nonfinite_counts": [bucket.nonfinite_count for bucket in buckets],
            "min": [bucket.min for bucket in buckets],
            "max": [bucket.max for bucket in buckets],
            "last": [bucket.last for bucket in buckets],
        },
    }
