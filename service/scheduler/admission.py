"""Which queued jobs start now, where, and why the others wait; a pure decision."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.elasticity import worlds_of
from service.domain.job import Job
from service.domain.placement import Node, why_not
from service.domain.ports import LiveAttempt
from service.scheduler.room import Room


@dataclass(frozen=True, kw_only=True)
class Start:
    """A job to start, with the node of each of its ranks."""

    job: Job
    node_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Wait:
    """A job that stays queued, and why."""

    job: Job
    message: str


def admit(
    queued: Sequence[Job], live: Sequence[LiveAttempt], nodes: Sequence[Node]
) -> tuple[tuple[Start, ...], tuple[Wait, ...]]:
    """Start jobs in their order for as long as each fits whole.

    A job that the empty cluster could not hold waits without holding up the others; one that only has to wait for
    room holds up all that come after it, so that a large job is not starved by small ones. An elastic job fits if its
    smallest exact world does; what is left when every job that can start has its place goes to the elastic ones among
    them, in their order, so that none takes what the next one needs.

    Args:
        queued: by priority, then first come.
        live: attempts that hold resources.
        nodes: the cluster.
    """
    room = Room.beside(live, nodes)
    starts: list[Start] = []
    waits: list[Wait] = []
    is_blocked = False
    for job in queued:
        amount = job.spec.resources_per_rank
        fewest = worlds_of(job)[-1]
        impossible = why_not(fewest, amount, nodes)
        if impossible is not None:
            waits.append(Wait(job=job, message=f"Waits for a larger cluster: {impossible}"))
        elif is_blocked:
            waits.append(Wait(job=job, message="Waits for the jobs ahead of it."))
        elif (node_ids := room.place(fewest, amount)) is not None:
            room.take(Counter(node_ids), amount)
            starts.append(Start(job=job, node_ids=node_ids))
        else:
            need = f"at least {fewest}" if job.spec.workers.is_elastic else f"{fewest}"
            message = f"Needs {need} × ({amount}) at once; {room.num_fitting(amount)} free now. First in line."
            waits.append(Wait(job=job, message=message))
            is_blocked = True
    return tuple(_widened(start, room) for start in starts), tuple(waits)


def first_in_line(queued: Sequence[Job], nodes: Sequence[Node]) -> Job | None:
    """Return the first queued job that the empty cluster could hold; None if there is none."""
    return next(
        (job for job in queued if why_not(worlds_of(job)[-1], job.spec.resources_per_rank, nodes) is None), None
    )


def _widened(start: Start, room: Room) -> Start:
    """Return the start on the largest exact world that fits, and take the room for it."""
    amount = start.job.spec.resources_per_rank
    room.give(Counter(start.node_ids), amount)
    num_fitting = room.num_fitting(amount)
    node_ids = room.place(next(world for world in worlds_of(start.job) if world <= num_fitting), amount)
    assert node_ids is not None, "it has places already"
    room.take(Counter(node_ids), amount)
    return Start(job=start.job, node_ids=node_ids)
