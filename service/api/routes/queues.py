"""Queues: what jobs wait in, and their shares of the cluster."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Response

from service.api.body import RequestDocument
from service.api.parsing import body_of, parse
from service.api.parts import AppParts, Parts
from service.api.problems import REQUEST_INVALID, Refused
from service.api.routes.jobs import nudge
from service.api.schemas import QueueList, QueueSettings, QueueShown
from service.domain.errors import FieldProblem, NotFound
from service.domain.queue import QUEUE_NAME_PATTERN, Queue

router = APIRouter(prefix="/queues", tags=["queues"])

MADE: dict[int | str, dict[str, Any]] = {201: {"description": "There was no queue of this name."}}


async def queue_name_of(name: Annotated[str, Path(description="name of the queue")]) -> str:
    """Return the name in a path, if it can be one. Raises ``Refused``."""
    if not re.fullmatch(QUEUE_NAME_PATTERN, name):
        message = "must be 1 to 63 lower-case letters, digits, '_' or '-', the first a letter or digit."
        raise Refused(
            REQUEST_INVALID, "This cannot be the name of a queue.", [FieldProblem(field="name", message=message)]
        )
    return name


QueueName = Annotated[str, Depends(queue_name_of)]


@router.get("")
def list_queues(parts: AppParts) -> QueueList:
    """Return every queue, by name."""
    return QueueList(queues=[QueueShown.of(state) for state in parts.store.queue_states()])


@router.get("/{name}")
def get_queue(name: QueueName, parts: AppParts) -> QueueShown:
    """Return a queue."""
    return _find(parts, name)


@router.put("/{name}", openapi_extra=body_of(QueueSettings), responses=MADE)
def put_queue(document: RequestDocument, name: QueueName, parts: AppParts, response: Response) -> QueueShown:
    """Make a queue, or give it these settings; what runs goes on, whatever its quotas are now."""
    settings = parse(QueueSettings, document)
    queue = Queue(
        name=name,
        weight=settings.weight,
        quota=settings.quota,
        quota_per_owner=settings.quota_per_owner,
        paused=settings.paused,
    )
    if parts.store.put_queue(queue):
        response.status_code = 201
    nudge(parts)
    return _find(parts, name)


@router.delete("/{name}", status_code=204)
def delete_queue(name: QueueName, parts: AppParts) -> None:
    """Remove a queue whose jobs have all ended."""
    parts.store.remove_queue(name)


def _find(parts: Parts, name: str) -> QueueShown:
    for state in parts.store.queue_states():
        if state.queue.name == name:
            return QueueShown.of(state)
    raise NotFound(f"There is no queue {name!r}. List queues to see their names.")
