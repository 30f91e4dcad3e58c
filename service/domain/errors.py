"""Errors that carry what a person needs to act.

ServiceError
├── NotFound                no such job, checkpoint or file (or not yours)
├── InvalidSpec             a job specification that cannot be run as written
├── InvalidUpload           a file that is not what it should be, or could do harm
├── InvalidCursor           a page cursor that this service did not hand out
├── IdempotencyConflict     a key used before with another request
├── InvalidTransition       the job's status does not allow what was asked
├── StaleWrite              an attempt or scheduler that is no longer current tried to write
├── LeaseLost               this scheduler no longer leads
├── UserCodeRefused         code or data that a job brings cannot be used on a node
├── StorageError            run storage refused or lost something
│   └── CorruptCheckpoint   a file of a checkpoint differs from its manifest
└── Unavailable             the database or the cluster does not answer; try again
    └── DiskFull            there is no room to store what was asked for; what was stored before is safe
"""

import errno
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FieldProblem:
    """What is wrong with one field of a request.

    Attributes:
        field: dotted path, such as ``batch.max_per_rank``; empty for the whole body.
        message: what is wrong and what to do about it.
    """

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class ServiceError(Exception):
    """Base of every error that the service reports to a person.

    Args:
        message: what happened and what to do about it.
        problems: the fields at fault, where there are any.
    """

    def __init__(self, message: str, problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(message, problems)
        self.message = message
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class NotFound(ServiceError):
    """No such job, checkpoint or file."""


class InvalidSpec(ServiceError):
    """A job specification that cannot be run as written."""


class InvalidUpload(ServiceError):
    """A file that is not what it should be, or could do harm."""


class InvalidCursor(ServiceError):
    """A page cursor that this service did not hand out."""


class IdempotencyConflict(ServiceError):
    """The idempotency key was used before with another request."""


class InvalidTransition(ServiceError):
    """The job's status does not allow what was asked."""


class StaleWrite(ServiceError):
    """An attempt or a scheduler that is no longer current tried to write."""


class LeaseLost(ServiceError):
    """This scheduler no longer leads."""


class UserCodeRefused(ServiceError):
    """Code or data that a job brings cannot be used on a node; running the job again would meet the same."""


class StorageError(ServiceError):
    """Run storage refused or lost something."""


class CorruptCheckpoint(StorageError):
    """A file of a checkpoint differs from its manifest."""


class Unavailable(ServiceError):
    """The database or the cluster does not answer; trying again may help."""


class DiskFull(Unavailable):
    """There is no room to store what was asked for; somebody has to make some. What was stored before is safe."""


def storage_error(message: str, cause: OSError) -> ServiceError:
    """Return the error of files that cannot be written: ``DiskFull`` if that is why, or else ``StorageError``."""
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{message} Make room there, and send it again.")
    return StorageError(message)
