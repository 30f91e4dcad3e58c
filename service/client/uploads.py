"""Sending bundles and files of data: only what the service does not have yet, and only what it would take."""

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import httpx

from service.client.connection import Connection, check, json_of
from service.client.errors import JobNotFound, ServiceUnreachable, UnexpectedAnswer, UploadFailed
from service.client.patience import Patience

BLOCK_BYTES = 1 << 20
# The service reads all of an upload, checks it and stores it before it answers.
ANSWER_TIMEOUT_S = 600.0


def send_upload(
    connection: Connection,
    route: str,
    file: BinaryIO,
    *,
    what: str,
    name: str | None = None,
    again: bool = False,
    patience: Patience,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, object]:
    """Send a file, unless the service has it.

    Args:
        connection: to the service.
        route: ``/v1/bundles`` or ``/v1/datasets``.
        file: the file; read from its beginning, twice.
        what: it is, for errors.
        name: to keep it under.
        again: send it though the service has it: its copy may be damaged.
        patience: with a service that is away; the file is then sent anew.
        on_bytes: called with the number of bytes of each piece that is sent.

    Returns:
        What the service says of it.

    Raises:
        UploadFailed: it is larger than the service takes, or arrived as something else.
    """
    sha256, size_bytes = _describe(file)
    if not again:
        try:
            return connection.json("GET", f"{route}/{sha256}")
        except JobNotFound:
            pass  # to be sent
    limit = upload_limit(connection, route)
    if limit is not None and size_bytes > limit:
        raise UploadFailed(f"{what} has {size_bytes} bytes, and the service takes at most {limit}. Nothing was sent.")
    answer = _send(connection, route, file, size_bytes, name, patience, on_bytes)
    if "sha256" not in answer:
        raise UnexpectedAnswer(f"{route} was answered without a SHA-256. Check the URL.")
    if answer["sha256"] != sha256:
        raise UploadFailed(f"{what} changed while it was sent, or on its way. Send it again.")
    return answer


def upload_limit(connection: Connection, route: str) -> int | None:
    """Return the most bytes that the service takes at a route; None where it does not say."""
    limit = connection.json("GET", route, params={"limit": 0}).get("max_bytes")
    return limit if isinstance(limit, int) else None


def _send(
    connection: Connection,
    route: str,
    file: BinaryIO,
    size_bytes: int,
    name: str | None,
    patience: Patience,
    on_bytes: Callable[[int], None] | None,
) -> dict[str, object]:
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=connection.http.timeout.connect)
    while True:
        reason: Exception
        try:
            response = connection.http.post(
                route,
                params={} if name is None else {"name": name},
                content=_blocks(file, on_bytes),
                headers={"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)},
                timeout=timeout,
            )
            check(response)
        except (httpx.TransportError, ServiceUnreachable) as error:
            reason = error
        else:
            return json_of(response)
        if not patience.pause():
            raise connection.unreachable(reason)
        connection.relocate()


def _describe(file: BinaryIO) -> tuple[str, int]:
    digest = hashlib.sha256()
    for block in _blocks(file, None):
        digest.update(block)
    return digest.hexdigest(), file.tell()


def _blocks(file: BinaryIO, on_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        yield block
        if on_bytes is not None:
            on_bytes(len(block))
