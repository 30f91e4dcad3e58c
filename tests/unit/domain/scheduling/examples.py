"""Jobs, queues and nodes for the policy."""

import itertools
from collections import Counter

from service.domain.placement import Node, Resources, choose_nodes
from service.domain.scheduling import Active, Pending

_sequences = itertools.count(1)


def make_pending(
    name, *, workers=1, cpus=1.0, gpus=0, memory_bytes=0, priority=0, queue="default", owner="someone", **changes
):
    """A waiting job; ``workers`` is a number, or the worlds that an elastic one may have."""
    return Pending(
        id=name,
        queue=queue,
        owner=owner,
        priority=priority,
        sequence=changes.pop("sequence", next(_sequences)),
        worlds=_worlds(workers),
        per_rank=Resources(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes),
        **changes,
    )


def make_active(
    name,
    *node_ids,
    workers=None,
    cpus=1.0,
    gpus=0,
    memory_bytes=0,
    priority=0,
    queue="default",
    owner="someone",
    **changes,
):
    """A running job; with ``workers``, an elastic one that may be moved and has run for long enough."""
    is_elastic = workers is not None and len(_worlds(workers)) > 1
    is_stopping = changes.pop("is_stopping", bool(changes.get("next_node_ids")))
    return Active(
        id=name,
        queue=queue,
        owner=owner,
        priority=priority,
        sequence=changes.pop("sequence", next(_sequences)),
        worlds=_worlds(workers or len(node_ids)),
        per_rank=Resources(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes),
        node_ids=node_ids,
        is_stopping=is_stopping,
        is_movable=changes.pop("is_movable", is_elastic and not is_stopping),
        is_settled=changes.pop("is_settled", True),
        **changes,
    )


def make_node(name, cpus, gpus=0, memory_bytes=2**40):
    return Node(id=name, address="", total=Resources(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes))


def place_gang(num_ranks, per_rank, free):
    """The node of each rank; None if they do not all fit what each node has left: the slow, obvious way."""
    room = {node_id: amount.holds(per_rank) for node_id, amount in free.items()}
    if sum(room.values()) < num_ranks:
        return None
    return tuple(node_id for node_id, count in choose_nodes(num_ranks, room, "pack") for _ in range(count))


def running(start, pending, **changes):
    """What a start makes of a waiting job."""
    job = next(job for job in pending if job.id == start.job_id)
    return Active(
        id=job.id,
        queue=job.queue,
        owner=job.owner,
        priority=job.priority,
        sequence=job.sequence,
        worlds=job.worlds,
        per_rank=job.per_rank,
        layout=job.layout,
        node_ids=start.node_ids,
        **({"remaining_s": job.duration_s, "is_movable": job.is_elastic, "is_settled": True} | changes),
    )


def names(decision):
    """The jobs that start, in order."""
    return [start.job_id for start in decision.starts]


def messages(decision):
    return {wait.job_id: wait.message for wait in decision.waits}


def sizes(decision):
    """How many ranks those that are resized go on with."""
    return {resize.job_id: len(resize.node_ids) for resize in decision.resizes}


def used(active):
    """CPUs, GPUs and memory held on each node."""
    held = Counter()
    for job in active:
        for node_id, count in job.held.items():
            for field in ("cpus", "gpus", "memory_bytes"):
                held[node_id, field] += count * getattr(job.per_rank, field)
    return held


def is_over_committed(active, nodes):
    held = used(active)
    return any(
        held[node.id, field] > getattr(node.total, field) + 1e-9  # sums of tenths
        for node in nodes
        for field in ("cpus", "gpus", "memory_bytes")
    )


def _worlds(workers):
    return (workers,) if isinstance(workers, int) else tuple(sorted(workers, reverse=True))
