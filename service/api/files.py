"""Files of run storage as answers: whole, in ranges, or not at all where the client has them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Response
from starlette.responses import StreamingResponse

from service.api.problems import RANGE_NOT_SATISFIABLE, Refused
from service.api.ranges import ByteRange, Unsatisfiable, etag_of, matches, parse_range
from service.domain.errors import StorageError
from service.domain.ports import RunFiles

CHUNK_BYTES = 2**20

_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "the file", "content": _BINARY},
    206: {"description": "the range asked for", "content": _BINARY},
    304: {"description": "the client has it already"},
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which part of a file a client wants, by its headers."""

    range: str | None
    if_range: str | None
    if_none_match: str | None


async def wanted_of(
    range_header: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Wanted:
    """Return what the headers of a request ask for."""
    return Wanted(range=range_header, if_range=if_range, if_none_match=if_none_match)


WantedPart = Annotated[Wanted, Depends(wanted_of)]


def file_response(
    files: RunFiles,
    path: str,
    *,
    size_bytes: int,
    sha256: str,
    wanted: Wanted,
    media_type: str = "application/octet-stream",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Send a file, or a range of it. Its entity tag is the SHA-256 of its content.

    Args:
        files: run storage.
        path: of the file in it.
        size_bytes: of the whole file.
        sha256: likewise.
        wanted: by the client.
        media_type: of its content.
        headers: to add.

    Raises:
        Refused: the range lies outside of the file.
    """
    etag = etag_of(sha256)
    tags = {"ETag": etag, "Accept-Ranges": "bytes"}
    if matches(wanted.if_none_match, etag):
        return Response(status_code=304, headers=tags)
    try:
        part = parse_range(wanted.range if wanted.if_range in (None, etag) else None, size_bytes)
    except Unsatisfiable:
        name = path.rpartition("/")[2]
        raise Refused(
            RANGE_NOT_SATISFIABLE,
            f"{name} has {size_bytes} bytes.",
            headers={**tags, "Content-Range": f"bytes */{size_bytes}"},
        ) from None
    if part is not None:
        tags["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size_bytes}"
    sent = part or ByteRange(start=0, stop=size_bytes)
    return StreamingResponse(
        _chunks(files, path, sent),
        status_code=200 if part is None else 206,
        headers={**tags, "Content-Length": str(len(sent)), "X-Content-Type-Options": "nosniff", **(headers or {})},
        media_type=media_type,
    )


def _chunks(files: RunFiles, path: str, part: ByteRange) -> Iterator[bytes]:
    for start in range(part.start, part.stop, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, part.stop)
        chunk = files.read(path, start, stop)
        if len(chunk) != stop - start:
            raise StorageError(f"{path} ended at byte {start + len(chunk)} while it was being sent.")
        yield chunk
