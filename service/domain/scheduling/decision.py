"""What the policy decides."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job to start, with the node of each of its ranks."""

    job_id: str
    node_ids: tuple[str, ...]


class Cause(StrEnum):
    """Why a job waits, for programs to read."""

    OBSTACLE = "obstacle"  # it may not start yet
    PAUSED = "paused"  # its queue is
    TOO_LARGE = "too_large"  # for the cluster, even if that were empty
    QUOTA = "quota"
    ROOM = "room"  # too little is free
    RESERVED = "reserved"  # enough is free, and held for a job ahead of it


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why jobs wait; many have one in common.

    Attributes:
        cause: for programs to read.
        message: the same in words, which do not change from moment to moment.
        num_ranks: how many ranks have to fit at once.
        num_free: how many of them would fit what is free.
        starts_in_s: when room is reserved; None: it is not known when, or none is reserved.
    """

    cause: Cause
    message: str
    num_ranks: int
    num_free: int
    starts_in_s: float | None = None


class Wait(NamedTuple):
    """A job that stays queued; a tuple, for there are many thousands of them at each decision.

    Attributes:
        job_id: which.
        position: its place, from 1, among those of its queue that wait for room or quota; None: it waits for neither.
        why: why.
    """

    job_id: str
    position: int | None
    why: Why

    @property
    def message(self) -> str:
        """Why, in words."""
        return self.why.message


@dataclass(frozen=True, kw_only=True)
class Preemption:
    """A running job to stop so that another one can start.

    Attributes:
        job_id: which is to stop.
        for_job_id: for which.
        message: why.
    """

    job_id: str
    for_job_id: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Resize:
    """A running job that is to go on elsewhere.

    Attributes:
        job_id: which.
        node_ids: node of each rank of its next attempt.
        message: why.
    """

    job_id: str
    node_ids: tuple[str, ...]
    message: str


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Room that is held for a waiting job; to be handed to the next decision.

    Times are those of the clock that decisions are given.

    Attributes:
        job_id: for which.
        made_at_s: when it was first promised a time.
        promised_at_s: that time; None: it was unknown until now.
        is_coming: running jobs were asked to make room for it.
    """

    job_id: str
    made_at_s: float
    promised_at_s: float | None
    is_coming: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """All that is to be done now.

    Attributes:
        starts: jobs that start.
        waits: all others that are queued.
        preemptions: running jobs to stop for waiting ones.
        resizes: elastic jobs that go on with more or fewer workers.
        reservations: to be handed to the next decision.
    """

    starts: tuple[Start, ...]
    waits: tuple[Wait, ...]
    preemptions: tuple[Preemption, ...]
    resizes: tuple[Resize, ...]
    reservations: tuple[Reservation, ...]
