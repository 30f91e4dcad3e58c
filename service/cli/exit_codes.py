"""How a command ends."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the process."""

    OK = 0
    ERROR = 1
    USAGE = 2
    JOB_FAILED = 3
    AUTHENTICATION = 4
    JOB_CANCELLED = 5
    TIMEOUT = 124
    INTERRUPTED = 130


def exit_code_of(error: Exception) -> ExitCode:
    """Return the code for an error that a command ended with."""
    from service.client import errors as client_errors  # noqa: PLC0415 - a command that needs no service loads none
    from service.domain.errors import InvalidSpec  # noqa: PLC0415

    match error:
        case client_errors.AuthenticationError():
            return ExitCode.AUTHENTICATION
        case client_errors.WaitTimeout():
            return ExitCode.TIMEOUT
        case client_errors.RequestRefused(status=422) | InvalidSpec():
            return ExitCode.USAGE
        case _:
            return ExitCode.ERROR
