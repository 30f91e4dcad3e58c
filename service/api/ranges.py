"""HTTP ranges and entity tags (RFC 9110, sections 8.8.3, 13.1 and 14)."""

import re
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """The bytes ``[start, stop)``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Unsatisfiable(ValueError):
    """No byte of the file lies in the range."""


def parse_range(header: str | None, size_bytes: int) -> ByteRange | None:
    """Read a ``Range`` header.

    Args:
        header: its value, if there is one.
        size_bytes: size of the file.

    Returns:
        The range; None where the whole file is to be sent: no header, several ranges, or not a range of bytes.

    Raises:
        Unsatisfiable: to be answered with 416.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":  # the last bytes
        start, stop = max(0, size_bytes - int(last)), size_bytes
    else:
        start = int(first)
        stop = size_bytes if last == "" else min(int(last) + 1, size_bytes)
        if last and int(last) < start:
            return None
    if start >= stop:
        raise Unsatisfiable
    return ByteRange(start=start, stop=stop)


def etag_of(sha256: str) -> str:
    """Return the strong entity tag of content with a hash."""
    return f'"{sha256}"'


def matches(header: str | None, etag: str) -> bool:
    """Say whether an ``If-None-Match`` header names a tag, by the weak comparison that it asks for."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
