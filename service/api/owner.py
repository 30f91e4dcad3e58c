"""Whose a request is for."""

import re
from typing import Annotated

from fastapi import Depends, Header

from service.api.problems import REQUEST_INVALID, Refused
from service.domain.errors import FieldProblem
from service.domain.job import DEFAULT_OWNER

HEADER = "Syncbn-Owner"
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


async def read_owner(
    owner: Annotated[str | None, Header(alias=HEADER, description="whose the job is, for quotas and lists")] = None,
) -> str:
    """Return the owner that a request names. Raises ``Refused``."""
    if owner is None:
        return DEFAULT_OWNER
    if not _OWNER.fullmatch(owner):
        message = "must be 1 to 64 letters, digits, '.', '_', '@' or '-', the first a letter or digit."
        raise Refused(REQUEST_INVALID, "The owner cannot be used.", [FieldProblem(field=HEADER, message=message)])
    return owner


RequestOwner = Annotated[str, Depends(read_owner)]
