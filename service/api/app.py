"""The app: the routes, the guard before them and the answers to errors."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.responses import JSONResponse

from service.api.auth import TokenGuard
from service.api.direct import Shortcut
from service.api.feeds import Feeds
from service.api.limits import UPLOAD_DEADLINE_S, Allowance, BodyLimit
from service.api.parts import Parts
from service.api.problems import MEDIA_TYPE, PROBLEM_SCHEMA, install_problem_handlers
from service.api.routes import (
    bundles,
    checkpoints,
    cluster,
    datasets,
    health,
    history,
    jobs,
    lifecycle,
    logs,
    plan,
    queues,
    stream,
)
from service.api.streaming import Shutdown, StreamSettings
from service.api.uploads import ROUTES, Uploads
from service.domain.placement import Node
from service.domain.ports import JobStore, RunFiles

ANY_ERROR: dict[int | str, dict[str, Any]] = {
    "default": {"description": "an error (RFC 9457)", "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}}}
}


def _nobody_to_nudge() -> None:
    """Leave it to the scheduler's polling."""


def create_app(
    *,
    store: JobStore,
    files: RunFiles,
    uploads: Uploads,
    token: str,
    nudge: Callable[[], None] = _nobody_to_nudge,
    capacity: Sequence[Node] | None = None,
    streams: StreamSettings | None = None,
) -> FastAPI:
    """Build the API.

    Args:
        store: the jobs.
        files: run storage.
        uploads: where bundles and files of data go.
        token: what every request but those for health has to show.
        nudge: called after a commit that the scheduler should notice soon; an ``OSError`` of it is logged.
        capacity: the most that the cluster will ever have; a job that cannot fit is refused. None: unknown.
        streams: how event streams are served.

    Returns:
        The app. ``shutdown_of(app).request()`` ends its event streams before a server waits for them.

    Raises:
        ValueError: the token is empty.
    """
    guard = TokenGuard(token)
    streams = streams or StreamSettings()
    feeds = Feeds(store, poll_s=streams.poll_s)
    streams.shutdown.on_request(feeds.close)
    app = FastAPI(
        title="syncbn",
        summary="Distributed training with synchronized batch norm",
        version="1",
        dependencies=[Depends(guard)],
        responses=ANY_ERROR,
        # The pages of docs load scripts from elsewhere; the schema has a route of ours, behind the token.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.parts = Parts(
        store=store,
        files=files,
        uploads=uploads,
        nudge=nudge,
        capacity=None if capacity is None else tuple(capacity),
        streams=streams,
        feeds=feeds,
    )
    app.add_middleware(
        BodyLimit,
        exceptions={
            ("POST", path): Allowance(max_bytes=uploads.max_bytes(kind), deadline_s=UPLOAD_DEADLINE_S)
            for kind, path in ROUTES.items()
        },
    )
    install_problem_handlers(app)
    v1 = APIRouter(prefix="/v1")
    for resource in (jobs, plan, lifecycle, history, logs, checkpoints, stream, bundles, datasets, queues, cluster):
        v1.include_router(resource.router)
    app.include_router(v1)
    app.router.routes.insert(0, Shortcut("POST", "/v1/jobs", jobs.submit_job, guard))
    app.include_router(health.router)

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:
        """Return the schema of this API."""
        return JSONResponse(app.openapi())

    return app


def shutdown_of(app: FastAPI) -> Shutdown:
    """Return what ends the event streams of an app."""
    parts: Parts = app.state.parts
    return parts.streams.shutdown
