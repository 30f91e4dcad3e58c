"""The JSON body of a request: parsed strictly, before anything else looks at it."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from fastapi import Depends, Request

from service.api.problems import BODY_INVALID, MAX_PROBLEMS, REQUEST_INVALID, Refused
from service.domain.errors import FieldProblem

MAX_DEPTH = 32
_INT64 = range(-(2**63), 2**63)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")  # which 64 bits may not hold


@dataclass(frozen=True, kw_only=True)
class Document:
    """A JSON document with finite numbers, 64-bit integers and text that UTF-8 can carry.

    Attributes:
        data: the parsed document.
        sha256: hash of its canonical form, hexadecimal: keys sorted, no white space.
        size_bytes: as it was sent.
    """

    data: Any
    sha256: str
    size_bytes: int


async def read_document(request: Request) -> Document:
    """Read the body of a request. Raises ``Refused``."""
    return parse_document(await request.body())


RequestDocument = Annotated[Document, Depends(read_document)]


def parse_document(raw: bytes) -> Document:
    """Parse a JSON document.

    Raises:
        Refused: it is not JSON (400), or holds values that no field can take (422).
    """
    try:
        data = json.loads(raw.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Refused(BODY_INVALID, f"The body is not UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Refused(BODY_INVALID, f"The body is not JSON: {error.msg} ({where}).") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of more digits than Python converts
        raise Refused(REQUEST_INVALID, "The body holds an integer of thousands of digits.") from None
    canonical = _canonical_if_plain(data)
    if canonical is None:
        problems = list(islice(_problems(data), MAX_PROBLEMS))
        if problems:
            raise Refused(REQUEST_INVALID, "The body holds values that no field can take.", problems)
        canonical = _canonical(data)
    return Document(data=data, sha256=hashlib.sha256(canonical).hexdigest(), size_bytes=len(raw))


def _canonical(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _canonical_if_plain(data: object) -> bytes | None:
    """Return the canonical form of a document in which nothing can be wrong; None if that takes a closer look."""
    try:
        canonical = _canonical(data)
    except (ValueError, RecursionError):  # a number that is not finite, half a surrogate pair, too many levels
        return None
    # As deep as it has brackets, at most; brackets and digits within text count too.
    has_many_levels = canonical.count(b"{") + canonical.count(b"[") > MAX_DEPTH
    return None if has_many_levels or _LONG_NUMBER.search(canonical) else canonical


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refused(
            REQUEST_INVALID,
            "The body gives a field twice.",
            [FieldProblem(field=twice, message="is given twice in one object. Keep one of them.")],
        )
    return result


def _problems(data: object) -> Iterator[FieldProblem]:
    waiting: list[tuple[tuple[str, ...], object]] = [((), data)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise _too_deep()
        message = None
        if isinstance(value, dict):
            waiting.extend(((*path, key), item) for key, item in reversed(value.items()))
            if not all(_is_text(key) for key in value):
                message = "a field name holds half of a surrogate pair, which is no character."
        elif isinstance(value, list):
            waiting.extend(((*path, str(index)), item) for index, item in reversed(list(enumerate(value))))
        elif isinstance(value, str):
            if not _is_text(value):
                message = "holds half of a surrogate pair, which is no character."
        elif isinstance(value, float):
            if not math.isfinite(value):
                message = "must be a finite number, not NaN or infinity."
        elif isinstance(value, int) and value not in _INT64:
            message = "must fit in 64 bits."
        if message is not None:
            yield FieldProblem(field=".".join(path), message=message)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> Refused:
    return Refused(REQUEST_INVALID, f"The body is nested more than {MAX_DEPTH} levels deep.")
