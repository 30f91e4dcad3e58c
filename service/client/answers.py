"""What the service answers beside the domain's own models."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from service.domain.placement import Node, Resources
from service.domain.queue import Queue, QueueState
from service.domain.spec import JobSpec


class Answer(BaseModel):
    """Base of the answers: immutable; fields of a newer service are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class WorldPlan(Answer):
    """How a number of workers computes an optimizer step.

    Attributes:
        samples_per_rank: in the fullest micro-step.
        num_micro_steps: normalization batches one after another.
        groups: normalization batches side by side.
    """

    world_size: int
    samples_per_rank: tuple[int, ...]
    num_micro_steps: int
    groups: int


class PlannedStart(Answer):
    """When a job would start if it were submitted now.

    Attributes:
        now: whether at once.
        message: why it would wait; None if it would not.
        position: its place in its queue, from 1; None if it waits in none.
        in_s: in about so many seconds; None where no estimates tell.
    """

    now: bool
    message: str | None
    position: int | None
    in_s: float | None


class JobPlan(Answer):
    """What would become of a job if it were submitted.

    Attributes:
        spec: with every default written out.
        world_size: the largest that computes it exactly; the following are of it.
        samples_per_rank: in one micro-step.
        num_micro_steps: normalization batches of one optimizer step.
        num_steps: None where only the dataset can tell.
        worlds: every number of workers that computes the job exactly, largest first.
        resources: of all workers together.
        fits: whether the cluster holds the job when it is empty; None while that is unknown.
        reason: why it does not, or why that is unknown.
        start: when it would start; None where it does not fit, or that is unknown.
    """

    spec: JobSpec
    world_size: int
    samples_per_rank: tuple[int, ...]
    num_micro_steps: int
    num_steps: int | None
    worlds: tuple[WorldPlan, ...] = ()
    resources: Resources
    fits: bool | None
    reason: str | None
    start: PlannedStart | None = None


class Rollup(Answer):
    """What the points at neighbouring steps come to, in columns of the same length as the series.

    Attributes:
        bucket_steps: a power of two; a bucket begins at a multiple of it.
        last_steps: of the points of each bucket.
        counts: points with a finite value.
        nonfinite_counts: the others.
        min: of the finite values; None where there is none.
        max: likewise.
        last: at the last step; None where it is not finite.
    """

    bucket_steps: int
    last_steps: tuple[int, ...]
    counts: tuple[int, ...]
    nonfinite_counts: tuple[int, ...]
    min: tuple[float | None, ...]
    max: tuple[float | None, ...]
    last: tuple[float | None, ...]


class Series(Answer):
    """One metric over the steps, in columns of one length; rolled up, a place holds a bucket.

    Attributes:
        steps: of the points; the first of each bucket.
        values: None where the value is not finite; the mean of the finite ones of a bucket.
        nonfinite: step → ``nan``, ``inf`` or ``-inf``; of the last value of a bucket.
        rollup: the rest of it, where it was asked for.
    """

    steps: tuple[int, ...]
    values: tuple[float | None, ...]
    attempts: tuple[int, ...]
    nonfinite: dict[int, str]
    rollup: Rollup | None = None


@dataclass(frozen=True, kw_only=True)
class LogChunk:
    """A part of what a rank printed.

    Attributes:
        attempt: its number; 0 before the first.
        rank: which rank of it.
        start: offset of the first byte; later than what was asked for where that is no longer kept.
        content: the bytes, which may begin or end within a character.
        next_offset: where the log goes on.
        ended: whether the attempt had ended when this was read.
    """

    attempt: int
    rank: int
    start: int
    content: bytes
    next_offset: int
    ended: bool


class LogMatch(Answer):
    """A line that a rank printed and that was searched for.

    Attributes:
        attempt: number of the attempt.
        rank: which rank of it.
        offset: of the line's first byte in the rank's log.
        text: the line; of a long one the part around the match.
        is_cut: whether that is only a part of it.
    """

    attempt: int
    rank: int
    offset: int
    text: str
    is_cut: bool


def node_of(data: dict[str, Any]) -> Node:
    """Return the node that the cluster's route shows."""
    total = data["total"]
    return Node(
        id=data["id"],
        address=data["address"],
        total=Resources(cpus=total["cpus"], gpus=total["gpus"], memory_bytes=total["memory_bytes"]),
    )


def queue_state_of(data: dict[str, Any]) -> QueueState:
    """Return the queue that the queues' routes show; fields of a newer service are passed over."""
    known = {name: data[name] for name in QueueState.model_fields if name != "queue"}
    return QueueState(queue=Queue(**{name: data[name] for name in Queue.model_fields}), **known)
