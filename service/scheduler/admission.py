"""Which queued jobs start now, where, and why the others wait; a pure decision."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.job import Job
from service.domain.placement import Node, place_gang, why_not
from service.domain.ports import LiveAttempt


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
    room holds up all that come after it, so that a large job is not starved by small ones.

    Args:
        queued: by priority, then first come.
        live: attempts that hold resources.
        nodes: the cluster.
    """
    free = {node.id: node.total for node in nodes}
    for entry in live:
        amount = entry.job.spec.resources_per_rank
        for node_id in entry.attempt.node_ids:
            if node_id in free:
                free[node_id] = free[node_id] - amount
    starts: list[Start] = []
    waits: list[Wait] = []
    is_blocked = False
    for job in queued:
        amount = job.spec.resources_per_rank
        impossible = why_not(job.spec.workers, amount, nodes)
        if impossible is not None:
            waits.append(Wait(job=job, message=f"Waits for a larger cluster: {impossible}"))
        elif is_blocked:
            waits.append(Wait(job=job, message="Waits for the jobs ahead of it."))
        elif (node_ids := place_gang(job.spec.workers, amount, free)) is not None:
            for node_id in node_ids:
                free[node_id] = free[node_id] - amount
            starts.append(Start(job=job, node_ids=node_ids))
        else:
            room = sum(amount_free.holds(amount) for amount_free in free.values())
            message = f"Needs {job.spec.workers} × ({amount}) at once; {room} free now. First in line."
            waits.append(Wait(job=job, message=message))
            is_blocked = True
    return tuple(starts), tuple(waits)
