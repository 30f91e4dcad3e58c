"""Page cursors: opaque to those who carry them."""

import base64
import binascii
import re

from service.domain.errors import InvalidCursor

_PLAIN = re.compile(r"jobs:([1-9][0-9]{0,17})", re.ASCII)


def encode_cursor(number: int) -> str:
    """Return the cursor of the page that follows the job with this number."""
    return base64.urlsafe_b64encode(f"jobs:{number}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Return the number that a cursor was made of.

    Raises:
        InvalidCursor: ``encode_cursor`` did not make it.
    """
    try:
        plain = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        plain = ""
    match = _PLAIN.fullmatch(plain)
    if match is None or encode_cursor(int(match[1])) != cursor:
        raise InvalidCursor("The cursor is not one that this service hands out. Start again without a cursor.")
    return int(match[1])
