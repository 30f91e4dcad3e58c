"""A file of a checkpoint, written whole or not at all."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import httpx

from service.client.connection import Connection, check
from service.client.errors import DownloadFailed, RequestRefused, ServiceUnreachable
from service.client.patience import Patience

BLOCK_BYTES = 2**20


def download_file(
    connection: Connection,
    source: str,
    *,
    to: Path,
    name: str,
    sha256: str,
    patience: Patience,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Download a file and give it its name once its hash is right.

    Args:
        connection: to the service.
        source: path of the file's route.
        to: directory to write to.
        name: of the file.
        sha256: what its content has to hash to.
        patience: with a service that is away.
        on_bytes: called with the bytes of each piece that arrives.

    Returns:
        The file.

    Raises:
        DownloadFailed: the name leads elsewhere, or the content is not right, also when fetched anew.
    """
    if name in ("", ".", "..") or PurePosixPath(name).name != name or "\\" in name or not name.isprintable():
        raise DownloadFailed(f"The service names a file {name!r}, which is not a plain name. Nothing was written.")
    target = to / name
    if target.is_file() and _sha256(target) == sha256:
        return target
    part = to / f".{name}.{sha256[:16]}.part"
    resumed = part.exists()
    _fetch(connection, source, part, sha256, patience, on_bytes)
    if _sha256(part) != sha256 and resumed:  # the earlier try may have left anything
        part.unlink()
        _fetch(connection, source, part, sha256, patience, on_bytes)
    if _sha256(part) != sha256:
        part.unlink()
        raise DownloadFailed(
            f"{name} arrived with another SHA-256 than its checkpoint says, so it was not kept. Try again; if it "
            "stays so, the checkpoint is damaged: take an earlier one."
        )
    os.replace(part, target)
    return target


def _fetch(
    connection: Connection,
    source: str,
    part: Path,
    sha256: str,
    patience: Patience,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Append what is missing, going on where an interruption left it."""
    while True:
        reason: Exception
        try:
            with part.open("ab") as file:
                _append(connection, source, file.tell(), file.write, sha256, patience, on_bytes)
                file.flush()
                os.fsync(file.fileno())
        except (httpx.TransportError, ServiceUnreachable) as error:
            reason = error
        else:
            return
        if not patience.pause():
            raise connection.unreachable(reason)
        connection.relocate()


def _append(
    connection: Connection,
    source: str,
    start: int,
    write: Callable[[bytes], int],
    sha256: str,
    patience: Patience,
    on_bytes: Callable[[int], None] | None,
) -> None:
    # With an If-Range that no longer matches, the whole file would come: the tag of what is wanted is known.
    headers = {"Range": f"bytes={start}-", "If-Range": f'"{sha256}"'} if start else {}
    with connection.http.stream("GET", source, headers={**headers, "Accept-Encoding": "identity"}) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing
        check(response)
        if start and response.status_code != httpx.codes.PARTIAL_CONTENT:
            raise RequestRefused("The file changed while it was downloaded. Try again.", response.status_code)
        for block in response.iter_bytes(BLOCK_BYTES):
            write(block)
            patience.renew()
            if on_bytes is not None:
                on_bytes(len(block))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
