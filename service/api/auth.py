"""Who may ask: whoever shows the token; every route but health wants it."""

import hmac
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.problems import UNAUTHENTICATED, Refused

PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})

_REMEDY = (
    "Send the header 'Authorization: Bearer <token>'. `syncbn serve` keeps the token in the file 'token' of its data "
    "directory; the command line also takes --token or SYNCBN_TOKEN."
)
_bearer = HTTPBearer(auto_error=False, scheme_name="token", description=_REMEDY)


class TokenGuard:
    """A dependency of the whole app, so that a route added later is guarded unless it is named public.

    Args:
        token: what every request has to show.
    """

    def __init__(self, token: str) -> None:
        if not token.strip():
            raise ValueError("The API needs a token that is not empty; anybody could use the service without one.")
        self._token = token.encode()

    async def __call__(
        self, request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> None:
        """Let a request pass, or refuse it."""
        if request.scope["path"] in PUBLIC_PATHS:
            return
        if credentials is None:
            raise _refusal("There is no token in the request.")
        # Headers arrive decoded as Latin-1; bytes are compared, since compare_digest takes no other text than ASCII.
        if not hmac.compare_digest(credentials.credentials.encode("latin-1", "replace"), self._token):
            raise _refusal("The token is not the one of this service.")

    async def admit(self, request: Request) -> None:
        """Let a request pass, or refuse it: for a route that resolves no dependencies."""
        await self(request, await _bearer(request))


def _refusal(what: str) -> Refused:
    return Refused(UNAUTHENTICATED, f"{what} {_REMEDY}", headers={"WWW-Authenticate": 'Bearer realm="syncbn"'})
