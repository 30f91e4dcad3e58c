"""How much and how slowly a request may send; uvicorn itself sets no limit."""

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import BODY_TOO_LARGE, BODY_TOO_SLOW, Refused, problem_response

MAX_BODY_BYTES = 2**20
BODY_DEADLINE_S = 30.0


class BodyLimit:
    """ASGI middleware that ends a request whose body is too large, declared or chunked, or takes too long.

    Args:
        app: what answers the others.
        max_bytes: most bytes of a body.
        deadline_s: longest time from the first read of a body to its end.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_BODY_BYTES, deadline_s: float = BODY_DEADLINE_S) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            refusal = self._too_large()
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
            deadline = deadline or anyio.current_time() + self._deadline_s
            try:
                with anyio.fail_after(max(0.0, deadline - anyio.current_time())):
                    message = await receive()
            except TimeoutError:
                raise Refused(
                    BODY_TOO_SLOW,
                    f"The body did not arrive within {self._deadline_s:g} s. Send it again.",
                    headers={"Connection": "close"},
                ) from None
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> Refused:
        return Refused(
            BODY_TOO_LARGE,
            f"A body may have at most {self._max_bytes} bytes.",
            headers={"Connection": "close"},  # the rest of the body is not read
        )
