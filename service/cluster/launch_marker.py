"""The file that makes one supervisor the owner of an attempt; what it says outlives every process."""

import uuid

from service.domain.errors import NotFound
from service.storage.layout import launch_marker
from service.storage.object_store import ObjectStore


def take_launch_marker(store: ObjectStore, job_id: str, attempt: int, supervisor_name: str) -> bool:
    """Take an attempt for a supervisor; False if it was taken before, by whomever.

    Raises:
        OSError: run storage does not answer. The marker may have been taken, or not.
    """
    marker = launch_marker(job_id, attempt)
    # Told from an earlier one of the same supervisor: it supervises one attempt after another.
    content = f"{supervisor_name}\n{uuid.uuid4().hex}\n".encode()
    if store.create_exclusively(marker, content):
        return True
    # On an object store an earlier try of that very call may have got through while its answer was lost.
    return store.read(marker) == content


def read_launch_marker(store: ObjectStore, job_id: str, attempt: int) -> str | None:
    """Return the name of the supervisor that has taken an attempt; None if none has.

    Raises:
        OSError: run storage does not answer.
    """
    try:
        return store.read(launch_marker(job_id, attempt)).decode().partition("\n")[0]
    except NotFound:
        return None
