"""A route without FastAPI's resolution of dependencies, which takes longer than all else that a submit does."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from typing_extensions import override

from service.api.auth import TokenGuard


class DirectRoute(APIRoute):
    """Hands the request to its endpoint, behind the same guard as every other route.

    The endpoint takes a ``Request`` and returns a ``Response``; ``openapi_extra`` has to tell what it reads.
    """

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = cast(Callable[[Request], Awaitable[Response]], self.endpoint)

        async def handle(request: Request) -> Response:
            guard: TokenGuard = request.app.state.guard
            await guard.admit(request)
            return await endpoint(request)

        return handle


def header_parameters(dependency: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return what the schema says of the headers that a dependency takes, for an endpoint that calls it itself."""
    hints = get_type_hints(dependency, include_extras=True)
    return [
        {
            "name": header.alias,
            "in": "header",
            "required": False,
            "description": header.description,
            "schema": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        }
        for hint in hints.values()
        if get_origin(hint) is Annotated
        for header in get_args(hint)[1:]
    ]
