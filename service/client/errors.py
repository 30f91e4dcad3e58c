"""Errors of the client, each with what to do about it.

ClientError
├── NoService               nothing says where the service is
├── ServiceUnreachable      it does not answer, or not now
├── AuthenticationError     the token is missing or wrong
├── RequestRefused          it answered with a problem; ``problems`` names the fields
│   └── JobNotFound         no such job, checkpoint or file
├── ServiceFailed           it answered that it failed
├── UnexpectedAnswer        what answers speaks another language
├── DownloadFailed          a file is not what its checkpoint says
├── UploadFailed            a file or directory cannot be sent
└── WaitTimeout             the job had not ended in time
"""

from service.domain.errors import FieldProblem


class ClientError(Exception):
    """Base of every error that the client reports to a person.

    Args:
        message: what happened and what to do about it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class NoService(ClientError):
    """Nothing says where the service is."""


class ServiceUnreachable(ClientError):
    """The service does not answer, or not now."""


class AuthenticationError(ClientError):
    """The token is missing or wrong."""


class RequestRefused(ClientError):
    """The service refused a request.

    Args:
        message: what was wrong and what to do about it.
        status: HTTP status.
        problem_type: ``type`` of the problem document.
        problems: the fields at fault, where there are any.
    """

    def __init__(
        self, message: str, status: int, problem_type: str = "about:blank", problems: tuple[FieldProblem, ...] = ()
    ) -> None:
        super().__init__(message)
        self.args = (message, status, problem_type, problems)
        self.status = status
        self.problem_type = problem_type
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  {problem}" for problem in self.problems)])


class JobNotFound(RequestRefused):
    """There is no such job, checkpoint or file."""


class ServiceFailed(ClientError):
    """The service answered that it failed."""


class UnexpectedAnswer(ClientError):
    """What answers is no service of this kind, or of another version."""


class DownloadFailed(ClientError):
    """A file that was downloaded is not what its checkpoint says."""


class UploadFailed(ClientError):
    """A file or directory cannot be sent as it is, or did not arrive as it was."""


class WaitTimeout(ClientError):
    """The job had not ended in time."""
