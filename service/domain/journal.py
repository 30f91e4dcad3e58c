"""The journal: the append-only, sequence-numbered record of what an attempt reported."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from service.domain.job import CheckpointFile, Failure, Outcome, Reason


class Report(BaseModel):
    """Base of what is reported: the body of a journal record."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Launched(Report):
    """The supervisor runs and has taken the attempt's launch marker."""

    kind: Literal["launched"] = "launched"
    supervisor_pid: int


class CheckpointQuarantined(Report):
    """A checkpoint failed its verification and is not used.

    Attributes:
        job_id: whose it is; None: the job's own.
        attempt: which attempt wrote it; None: the one whose checkpoint of that step counts.
    """

    kind: Literal["checkpoint_quarantined"] = "checkpoint_quarantined"
    step: int
    message: str
    job_id: str | None = None
    attempt: int | None = None


class Resumed(Report):
    """The attempt continues from a checkpoint (step 0: from the beginning); what came after that is superseded."""

    kind: Literal["resumed"] = "resumed"
    step: int


class Placed(Report):
    """All ranks have a process."""

    kind: Literal["placed"] = "placed"
    node_ids: tuple[str, ...]
    pids: tuple[int, ...]


class Running(Report):
    """All ranks have joined the process group and taken a step."""

    kind: Literal["running"] = "running"
    num_steps: int | None


class Metrics(Report):
    """Values of a step; computed over all ranks.

    Attributes:
        values: the finite ones.
        nonfinite: the others, as ``nan``, ``inf`` or ``-inf``.
    """

    kind: Literal["metrics"] = "metrics"
    step: int
    values: dict[str, float]
    nonfinite: dict[str, str] = {}

    @classmethod
    def of(cls, step: int, values: Mapping[str, float]) -> "Metrics":
        """Sort values into finite and non-finite ones."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        others = {name: str(float(value)) for name, value in values.items() if name not in finite}
        return cls(step=step, values=finite, nonfinite=others)


class CheckpointWritten(Report):
    """A checkpoint lies whole in run storage, and so does all that was reported up to its step."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    manifest_sha256: str
    files: tuple[CheckpointFile, ...]
    metrics: dict[str, float]


class Warned(Report):
    """Something that the owner of the job should know and that did not stop it."""

    kind: Literal["warning"] = "warning"
    message: str
    rank: int | None = None


class ExactnessFound(Report):
    """Whether the result depends on the number of workers, as far as could be seen before the first step.

    Attributes:
        exact: it does not.
        reasons: what makes it depend on it.
        rehearsed: what the first steps showed on two world sizes, in words; None where none was asked for.
    """

    kind: Literal["exactness"] = "exactness"
    exact: bool
    reasons: tuple[str, ...]
    rehearsed: str | None = None

    @property
    def message(self) -> str:
        """All of it in words."""
        said = ["The result depends on the number of workers.", *self.reasons]
        if self.exact:
            said = ["The result does not depend on the number of workers."]
        return " ".join([*said, *([self.rehearsed] if self.rehearsed else [])])


class Ended(Report):
    """The attempt ended; the last record."""

    kind: Literal["ended"] = "ended"
    outcome: Outcome
    reason: Reason
    message: str
    step: int
    failure: Failure | None = None


AnyReport = Annotated[
    Launched
    | CheckpointQuarantined
    | Resumed
    | Placed
    | Running
    | ExactnessFound
    | Metrics
    | CheckpointWritten
    | Warned
    | Ended,
    Field(discriminator="kind"),
]


class JournalRecord(BaseModel):
    """A report with its place in the journal.

    Attributes:
        sequence: from 1, without gaps.
        time: when the supervisor took it in, UTC; for people, since clocks jump.
        elapsed_s: the same in seconds since the supervisor began, by its monotonic clock.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    time: datetime
    elapsed_s: float = 0.0
    report: AnyReport


_REPORT: TypeAdapter[AnyReport] = TypeAdapter(AnyReport)


def parse_report(data: str | bytes) -> AnyReport:
    """Read a report from its JSON.

    Raises:
        pydantic.ValidationError: it is none.
    """
    return _REPORT.validate_json(data)


def utc_now() -> datetime:
    """Return the time, timezone-aware, UTC."""
    return datetime.now(UTC)
