"""Errors as answers: RFC 9457 problem documents, and the one table from an error to its HTTP status."""

import http
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.domain import errors
from service.domain.errors import FieldProblem, ServiceError
from service.domain.spec import field_problems

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S: Mapping[int, int] = MappingProxyType(
    {http.HTTPStatus.SERVICE_UNAVAILABLE: 1, http.HTTPStatus.INSUFFICIENT_STORAGE: 30}
)
MAX_PROBLEMS = 100
MAX_TEXT = 1000  # characters of one message: what a client sent is not echoed back without end


@dataclass(frozen=True, kw_only=True)
class ProblemType:
    """A kind of error that programs may tell apart.

    Attributes:
        name: last part of its ``type`` URI.
        status: HTTP status.
        title: the same for every occurrence.
    """

    name: str
    status: int
    title: str

    @property
    def uri(self) -> str:
        """The ``type`` member of a problem document."""
        return f"urn:syncbn:problem:{self.name}"


BODY_INVALID = ProblemType(name="invalid-body", status=400, title="The body is not JSON")
UNAUTHENTICATED = ProblemType(name="unauthenticated", status=401, title="The token is missing or wrong")
NOT_FOUND = ProblemType(name="not-found", status=404, title="Not found")
METHOD_NOT_ALLOWED = ProblemType(name="method-not-allowed", status=405, title="Method not allowed")
BODY_TOO_SLOW = ProblemType(name="body-too-slow", status=408, title="The body did not arrive in time")
BODY_TOO_LARGE = ProblemType(name="body-too-large", status=413, title="The body is too large")
RANGE_NOT_SATISFIABLE = ProblemType(name="range-not-satisfiable", status=416, title="The range lies outside the file")
REQUEST_INVALID = ProblemType(name="invalid-request", status=422, title="The request has invalid values")
INTERNAL = ProblemType(name="internal", status=500, title="The service failed")

PROBLEM_OF_ERROR: Mapping[type[ServiceError], ProblemType] = MappingProxyType(
    {
        errors.NotFound: NOT_FOUND,
        errors.InvalidSpec: ProblemType(
            name="invalid-spec", status=422, title="The job specification cannot be run as written"
        ),
        errors.InvalidUpload: ProblemType(name="invalid-upload", status=422, title="The file is not accepted"),
        errors.InvalidCursor: ProblemType(name="invalid-cursor", status=422, title="The cursor is not of this service"),
        errors.IdempotencyConflict: ProblemType(
            name="idempotency-conflict", status=422, title="The idempotency key was used with another request"
        ),
        errors.InvalidTransition: ProblemType(
            name="invalid-transition", status=409, title="The job's status does not allow this"
        ),
        errors.StaleWrite: ProblemType(name="stale-write", status=409, title="The writer is no longer current"),
        errors.LeaseLost: ProblemType(name="lease-lost", status=503, title="The scheduler is changing"),
        errors.StorageError: ProblemType(name="storage-error", status=500, title="Run storage failed"),
        errors.CorruptCheckpoint: ProblemType(
            name="corrupt-checkpoint", status=500, title="A checkpoint differs from its manifest"
        ),
        errors.Unavailable: ProblemType(name="unavailable", status=503, title="The service cannot answer now"),
        errors.DiskFull: ProblemType(name="disk-full", status=507, title="The service has no room to store this"),
        ServiceError: INTERNAL,
    }
)

PROBLEM_TYPES: tuple[ProblemType, ...] = tuple(
    dict.fromkeys(
        [
            BODY_INVALID,
            UNAUTHENTICATED,
            NOT_FOUND,
            METHOD_NOT_ALLOWED,
            BODY_TOO_SLOW,
            BODY_TOO_LARGE,
            RANGE_NOT_SATISFIABLE,
            REQUEST_INVALID,
            *PROBLEM_OF_ERROR.values(),
        ]
    )
)

PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "enum": [problem.uri for problem in PROBLEM_TYPES]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


class Refused(HTTPException):
    """A request that a route or middleware turns away.

    Args:
        problem: what kind of error it is.
        detail: what happened and what to do about it.
        problems: the fields at fault, where there are any.
        headers: to add to the answer.
    """

    def __init__(
        self,
        problem: ProblemType,
        detail: str,
        problems: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem.status, detail, headers)
        self.problem = problem
        self.problems = tuple(problems)


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every error of an app with a problem document."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(Exception, _unexpected)


def problem_type_of(error: ServiceError) -> ProblemType:
    """Return the kind of problem that an error of the domain is."""
    return next(PROBLEM_OF_ERROR[cls] for cls in type(error).__mro__ if cls in PROBLEM_OF_ERROR)


def problem_response(
    problem: ProblemType,
    detail: str,
    *,
    instance: str,
    problems: Sequence[FieldProblem] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Render a problem document.

    Args:
        problem: its kind.
        detail: what happened here and what to do about it.
        instance: path of the request.
        problems: the fields at fault.
        headers: to add.
    """
    body: dict[str, Any] = {
        "type": problem.uri,
        "title": problem.title,
        "status": problem.status,
        "detail": _shorten(detail),
        "instance": _shorten(instance),
    }
    if problems:
        body["errors"] = [
            {"field": _shorten(one.field), "message": _shorten(one.message)} for one in problems[:MAX_PROBLEMS]
        ]
    # Escaped to ASCII: what a client sent may hold lone surrogates, which UTF-8 cannot carry.
    return Response(json.dumps(body), status_code=problem.status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    problem = problem_type_of(error)
    return problem_response(
        problem,
        error.message,
        instance=request.url.path,
        problems=error.problems,
        headers={"Retry-After": str(RETRY_AFTER_S[problem.status])} if problem.status in RETRY_AFTER_S else None,
    )


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Routes take bodies as documents of their own, so these are parameters of the path or the query.
    problems = [
        FieldProblem(field=problem.field, message="unknown parameter. docs/api.md lists those of each route.")
        if raw["type"] == "extra_forbidden"
        else problem
        for raw, problem in zip(error.errors(), field_problems(list(error.errors())), strict=True)
    ]
    detail = "The request cannot be answered as written."
    return problem_response(REQUEST_INVALID, detail, instance=request.url.path, problems=problems)


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refused):
        problem, detail, problems = error.problem, error.detail, error.problems
    else:
        problem, detail, problems = _framework_problem(error), _framework_detail(request, error), ()
    return problem_response(problem, detail, instance=request.url.path, problems=problems, headers=error.headers)


def _framework_problem(error: HTTPException) -> ProblemType:
    known = {NOT_FOUND.status: NOT_FOUND, METHOD_NOT_ALLOWED.status: METHOD_NOT_ALLOWED}
    if error.status_code in known:
        return known[error.status_code]
    if error.status_code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
        return ProblemType(name=REQUEST_INVALID.name, status=error.status_code, title=REQUEST_INVALID.title)
    return INTERNAL


def _framework_detail(request: Request, error: HTTPException) -> str:
    if error.status_code in (NOT_FOUND.status, METHOD_NOT_ALLOWED.status):
        return f"There is no {request.method} {request.url.path}. GET /openapi.json lists what there is."
    return error.detail


def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette raises it again once this is sent, so the server logs the traceback.
    return problem_response(
        INTERNAL,
        "Something in the service went wrong that should not. Its log has the traceback; please report it.",
        instance=request.url.path,
    )


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
