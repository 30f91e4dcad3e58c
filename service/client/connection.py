"""Requests to the service: repeated while it does not answer, refusals turned into errors."""

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.client.discovery import Endpoint, is_loopback
from service.client.errors import (
    AuthenticationError,
    ClientError,
    JobNotFound,
    NoService,
    RequestRefused,
    ServiceFailed,
    ServiceUnreachable,
    UnexpectedAnswer,
)
from service.client.patience import Patience
from service.domain.errors import FieldProblem

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
NOT_FOUND = "urn:syncbn:problem:not-found"


class Connection:
    """A way to the service.

    Args:
        endpoint: where it is.
        retry_for_s: how long a request is repeated that was not answered, or answered with 503.
        locate: where it is now; asked when it stops answering, since a restarted service may have another port.

    Raises:
        ClientError: the URL or the token cannot be one.
    """

    def __init__(self, endpoint: Endpoint, *, retry_for_s: float, locate: Callable[[], Endpoint] | None = None) -> None:
        self.http = _open(endpoint)
        self._endpoint = endpoint
        self._retry_for_s = retry_for_s
        self._locate = locate

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._endpoint.url

    def close(self) -> None:
        """Close it."""
        self.http.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send a request that may be repeated, and return its answer.

        Raises:
            ClientError: it was refused, or not answered.
        """
        patience = Patience(self._retry_for_s)
        while True:
            try:
                response = self.http.request(method, path, params=params, content=content, headers=headers)
            except httpx.TransportError as error:
                if not patience.pause():
                    raise self.unreachable(error) from None
                self.relocate()
                continue
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE or not patience.pause(_retry_after_s(response)):
                check(response)
                return response

    def json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - as request
        """Send a request and return the JSON object that answers it."""
        return json_of(self.request(method, path, **arguments))

    def relocate(self) -> None:
        """Look again where the service is."""
        if self._locate is None:
            return
        try:
            endpoint = self._locate()
        except NoService:
            return  # it may be on its way back
        if endpoint != self._endpoint:
            self.http.close()
            self.http = _open(endpoint)
            self._endpoint = endpoint

    def unreachable(self, error: Exception | None) -> ServiceUnreachable:
        """Return the error to raise when there will be no further try."""
        why = f" ({error})" if error is not None and str(error) else ""
        return ServiceUnreachable(
            f"No service answers at {self.url}{why}. Start one with `syncbn serve`, or name another with --url."
        )


def check(response: httpx.Response) -> None:
    """Raise the error that an answer stands for; nothing if it is none."""
    if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
        return
    response.read()
    try:
        problem = json.loads(response.content)
        detail, kind = str(problem["detail"]), str(problem["type"])
        problems = tuple(
            FieldProblem(field=str(one["field"]), message=str(one["message"])) for one in problem.get("errors", ())
        )
    except (ValueError, KeyError, TypeError):
        raise UnexpectedAnswer(
            f"{response.url.netloc.decode()} answered {response.status_code} without a problem document, so it is not "
            "this service. Check the URL."
        ) from None
    raise _error(response.status_code, detail, kind, problems)


def json_of(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of an answer.

    Raises:
        UnexpectedAnswer: it holds none.
    """
    try:
        data = json.loads(response.content)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UnexpectedAnswer(f"{response.url.path} was not answered with a JSON object. Check the URL.")
    return data


def _error(status: int, detail: str, kind: str, problems: tuple[FieldProblem, ...]) -> ClientError:
    if status == httpx.codes.UNAUTHORIZED:
        return AuthenticationError(detail)
    if status == httpx.codes.SERVICE_UNAVAILABLE:
        return ServiceUnreachable(f"The service cannot answer now: {detail}")
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return ServiceFailed(detail)
    if kind == NOT_FOUND:
        return JobNotFound(detail, status, kind, problems)
    return RequestRefused(detail, status, kind, problems)


def _open(endpoint: Endpoint) -> httpx.Client:
    try:
        url = httpx.URL(endpoint.url)
        host = urlsplit(endpoint.url).hostname
    except (httpx.InvalidURL, ValueError):
        url, host = httpx.URL(), None
    if url.scheme not in ("http", "https") or not host:
        raise NoService(f"{endpoint.url!r} is no URL of a service. It looks like http://127.0.0.1:8000.")
    if not endpoint.token or not endpoint.token.isprintable() or " " in endpoint.token:
        raise AuthenticationError("The token is empty or holds characters that a token never has.")
    return httpx.Client(
        base_url=url,
        headers={b"Authorization": f"Bearer {endpoint.token}".encode()},
        timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        verify=url.scheme == "https",  # loading certificates takes longer than most requests
        trust_env=not is_loopback(endpoint.url),  # a proxy does not lead to this machine
    )


def _retry_after_s(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), 5.0) if value.isdecimal() else 0.0
