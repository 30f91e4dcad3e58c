"""The ``Idempotency-Key`` of a request."""

import re
from typing import Annotated

from fastapi import Depends, Header

from service.api.problems import REQUEST_INVALID, Refused
from service.domain.errors import FieldProblem
from service.domain.job import DEFAULT_OWNER

HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"
OWNER = "token"  # whoever holds it; one token, one owner of all that is not a job's
_KEY = re.compile(r"[ -~]{1,255}")


async def read_key(
    key: Annotated[
        str | None,
        Header(alias=HEADER, description="names the request, so that repeating it has no second effect"),
    ] = None,
) -> str | None:
    """Return the key that a request came with, if any. Raises ``Refused``."""
    if key is not None and not _KEY.fullmatch(key):
        raise Refused(
            REQUEST_INVALID,
            "The idempotency key cannot be used.",
            [FieldProblem(field=HEADER, message="must be 1 to 255 printable ASCII characters, such as a UUID.")],
        )
    return key


def owner_of_keys(owner: str) -> str:
    """Return whose the keys are of requests for an owner: two owners may use the same ones."""
    return OWNER if owner == DEFAULT_OWNER else f"{OWNER}/{owner}"


RequestKey = Annotated[str | None, Depends(read_key)]
