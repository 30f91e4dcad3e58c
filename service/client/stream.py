"""A job's server-sent events, across interruptions."""

import json
from collections.abc import Iterator

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse
from pydantic import ValidationError

from service.client.connection import CONNECT_TIMEOUT_S, Connection, check
from service.client.errors import ServiceUnreachable, UnexpectedAnswer
from service.client.patience import Patience
from service.domain.job import Event, MetricPoint

StreamItem = Event | MetricPoint

SILENCE_S = 45.0  # three heartbeats of the service


def stream_job(connection: Connection, path: str, *, after: int, patience: Patience) -> Iterator[StreamItem]:
    """Yield the events and metric points of a stream, each once, until it says that the job has ended.

    Args:
        connection: to the service.
        path: of the stream.
        after: position in the job's feed.
        patience: with a service that is away.

    Raises:
        ServiceUnreachable: it stayed away for too long.
    """
    position = after
    while True:
        reason: Exception | None = None
        try:
            for message in _messages(connection, path, position):
                patience.renew()
                if message.event == "end":
                    return
                yield from _items(message)
                position = max(position, _position(message))
        except httpx.TransportError as error:
            reason = error
        except ServiceUnreachable as error:  # answered with 503
            reason = error
        except SSEError as error:
            raise UnexpectedAnswer(f"What answers at {connection.url} is no event stream: {error}") from None
        if not patience.pause():
            raise connection.unreachable(reason)
        connection.relocate()


def _messages(connection: Connection, path: str, position: int) -> Iterator[ServerSentEvent]:
    """Yield messages; those that share a position together, so that none is seen twice after an interruption."""
    together: list[ServerSentEvent] = []
    headers = {"Last-Event-ID": str(position)}
    timeout = httpx.Timeout(SILENCE_S, connect=CONNECT_TIMEOUT_S)
    with connect_sse(connection.http, "GET", path, headers=headers, timeout=timeout) as source:
        check(source.response)
        for message in source.iter_sse():
            together.append(message)
            if message.event == "end" or _position(message) > position:  # the last of a position carries it
                position = _position(message)
                yield from together
                together.clear()


def _position(message: ServerSentEvent) -> int:
    if message.id and not message.id.isdecimal():
        raise UnexpectedAnswer(f"The stream holds a message with the id {message.id!r}. Check the URL.")
    return int(message.id or 0)


def _items(message: ServerSentEvent) -> Iterator[StreamItem]:
    try:
        data = json.loads(message.data)
        if message.event == "event":
            yield Event.model_validate(data)
        elif message.event == "metrics":
            for name, value in data["values"].items():
                yield MetricPoint(
                    position=data["position"],
                    attempt=data["attempt"],
                    step=data["step"],
                    name=name,
                    value=value,
                    nonfinite=data["nonfinite"].get(name),
                )
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UnexpectedAnswer(f"The stream holds a message that this client does not know: {error!r}") from None
