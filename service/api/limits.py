"""How much and how slowly a request may send; uvicorn itself sets no limit."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import BODY_TOO_LARGE, BODY_TOO_SLOW, Refused, problem_response

MAX_BODY_BYTES = 2**20
BODY_DEADLINE_S = 30.0
# Of an upload: as long as it goes on arriving, it may take its time.
UPLOAD_DEADLINE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """How much a body may hold, and how long it may take.

    Attributes:
        max_bytes: most bytes of it.
        deadline_s: longest time from its first read to its end.
        silence_s: longest time between two pieces of it.
    """

    max_bytes: int = MAX_BODY_BYTES
    deadline_s: float = BODY_DEADLINE_S
    silence_s: float = BODY_DEADLINE_S


Route = tuple[str, str]
_NO_ROUTES: Mapping[Route, Allowance] = MappingProxyType({})


class BodyLimit:
    """ASGI middleware that ends a request whose body is too large, declared or chunked, or takes too long.

    Args:
        app: what answers the others.
        usual: for every route but the following.
        exceptions: for routes of their own, by method and path.
    """

    def __init__(
        self, app: ASGIApp, *, usual: Allowance | None = None, exceptions: Mapping[Route, Allowance] = _NO_ROUTES
    ) -> None:
        self._app = app
        self._usual = usual or Allowance()
        self._exceptions = exceptions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowance = self._exceptions.get((scope.get("method", ""), scope["path"]), self._usual)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > allowance.max_bytes:
            refusal = _too_large(allowance)
            response = problem_response(
                refusal.problem, refusal.detail, instance=scope["path"], headers=refusal.headers
            )
            await response(scope, receive, send)
            return

        received = 0
        complete = False
        deadline: float | None = None

        async def limited() -> Message:
            nonlocal received, complete, deadline
            if complete:  # what follows is the wait for a disconnect, which may take as long as the answer
                return await receive()
            deadline = deadline or anyio.current_time() + allowance.deadline_s
            try:
                with anyio.fail_after(min(allowance.silence_s, max(0.0, deadline - anyio.current_time()))):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    BODY_TOO_SLOW,
                    f"The body did not arrive within {allowance.deadline_s:g} s, or not for {allowance.silence_s:g} s. "
                    "Send it again.",
                    headers={"Connection": "close"},
                ) from None
            received += len(message.get("body", b""))
            if received > allowance.max_bytes:
                raise _too_large(allowance)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)


def _too_large(allowance: Allowance) -> Refused:
    return Refused(
        BODY_TOO_LARGE,
        f"A body may have at most {allowance.max_bytes} bytes.",
        headers={"Connection": "close"},  # the rest of the body is not read
    )
