"""What a rank actor and the training process of its rank say to each other: JSON lines over a socket pair.

The process is given a ``RankTask``; it answers with reports and with the messages below, in order.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from service.domain.journal import ExactnessFound, Metrics, Warned
from service.domain.spec import JobSpec

Cause = Literal["collective", "checkpoint", "memory", "user"]


class RankMessage(BaseModel):
    """Base of the messages; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RankTask(RankMessage):
    """What a training process is to do.

    Attributes:
        rendezvous_host: address of rank 0's store.
        rendezvous_port: its port.
        rendezvous_fd: rank 0 only: the listening socket, inherited; the store takes it over.
        interface: network interface that collectives use, such as ``lo``; None: let the backend choose.
        num_threads: threads of the process's own computations.
        staging_dir: node-local directory in which checkpoints are prepared.
        resume_dir: local directory of a verified checkpoint to continue from; None: from the beginning.
        resume_job_id: job that wrote that checkpoint; None: this one.
        code_dir: local directory of the job's unpacked bundle; None: it brings no code.
        packages_dir: local directory in which the bundle's requirements are installed; None: it has none.
        uploads: local files of uploaded data that the dataset names, by SHA-256.
        collective_timeout_s: how long to wait for peers.
    """

    job_id: str
    attempt: int
    spec: JobSpec
    rank: int
    world_size: int
    rendezvous_host: str
    rendezvous_port: int
    rendezvous_fd: int | None
    interface: str | None
    num_threads: int
    staging_dir: str
    resume_dir: str | None
    resume_job_id: str | None = None
    code_dir: str | None = None
    packages_dir: str | None = None
    uploads: dict[str, str] = {}
    collective_timeout_s: float


class Stepped(RankMessage):
    """This rank has joined the process group and taken its first step."""

    kind: Literal["stepped"] = "stepped"
    num_steps: int | None


class Staged(RankMessage):
    """Rank 0 has prepared a checkpoint in a directory below ``staging_dir``, manifest included."""

    kind: Literal["staged"] = "staged"
    step: int
    directory: str
    metrics: dict[str, float]


class Errored(RankMessage):
    """The process ends with an error.

    Attributes:
        cause: ``collective`` when a peer did not answer or went away, ``checkpoint`` when the training state could
            not be written, ``memory`` when there was none left, ``user`` for anything that running it again would meet
            again.
    """

    kind: Literal["errored"] = "errored"
    cause: Cause
    error_type: str
    message: str
    traceback: str


class Finished(RankMessage):
    """The process has done what it was asked to.

    Attributes:
        step: optimizer steps done.
        stopped: it was asked to stop before the last one.
        note: why it ended before the last one by itself; empty where it did not.
    """

    kind: Literal["finished"] = "finished"
    step: int
    stopped: bool
    note: str = ""


class StopRequest(RankMessage):
    """To the process: write a checkpoint at the next step that all ranks agree on, and finish."""

    kind: Literal["stop"] = "stop"


FromRank = Annotated[
    Stepped | Staged | Errored | Finished | ExactnessFound | Metrics | Warned, Field(discriminator="kind")
]

_FROM_RANK: TypeAdapter[FromRank] = TypeAdapter(FromRank)


def parse_from_rank(line: bytes) -> FromRank:
    """Read one message of a training process.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return _FROM_RANK.validate_json(line)
