"""When a job that waits is likely to start: the policy, carried on in time by what is estimated."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from service.domain.placement import Node
from service.domain.queue import Queue
from service.domain.scheduling.active import Active
from service.domain.scheduling.clearing import STOP_S
from service.domain.scheduling.decision import Decision, Reservation
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.policy import decide
from service.domain.scheduling.shares import accrued

# Decisions are foretold for so many jobs in all: a few far ahead of a long queue, or many of a short one.
_MAX_JOBS_DECIDED = 50_000


def foretell(
    job_id: str,
    pending: Iterable[Pending],
    active: Sequence[Active],
    nodes: Sequence[Node],
    *,
    queues: Sequence[Queue] = (),
    usage_s: Mapping[str, float] | None = None,
    going_on: Iterable[Pending] = (),
) -> tuple[Decision, float | None]:
    """Return what is decided now, and when a job starts if nothing else is submitted and all estimates are right.

    Jobs that are stopped for others wait again once they have stopped; those that are resized go on where they are to.

    Args:
        job_id: of one of those that wait.
        pending: queued jobs.
        active: jobs that hold resources.
        nodes: the cluster.
        queues: those that have a weight, quotas or a pause.
        usage_s: what each queue has used.
        going_on: those of the active jobs that are stopping and are not done then, as they will wait.

    Returns:
        The decision, and a time from now in s; None if that depends on ends that nobody knows, or is too far off.
    """
    waiting = {job.id: job for job in pending}
    again = {job.id: job for job in going_on}
    # Ends by the clock of this forecast; None: unknown.
    running = {job.id: (job, job.remaining_s) for job in active}
    now_s, usage, reservations = 0.0, dict(usage_s or {}), tuple[Reservation, ...]()
    first: Decision | None = None
    for _ in range(max(1, _MAX_JOBS_DECIDED // (len(waiting) + len(running) + 1))):
        seen = [
            replace(job, remaining_s=None if ends_s is None else max(0.0, ends_s - now_s))
            for job, ends_s in running.values()
        ]
        decision = decide(
            waiting.values(),
            seen,
            nodes,
            queues=queues,
            usage_s=usage,
            reservations=reservations,
            now_s=now_s,
        )
        first = first or decision
        reservations = decision.reservations
        for start in decision.starts:
            if start.job_id == job_id:
                return first, now_s
            job = waiting.pop(start.job_id)
            running[job.id] = (_started(job, start.node_ids), _end_s(job, len(start.node_ids), now_s))
        for preemption in decision.preemptions:
            victim, ends_s = running[preemption.job_id]
            again[victim.id] = _stopped(victim, None if ends_s is None else ends_s - now_s)
            running[victim.id] = (replace(victim, is_stopping=True), now_s + STOP_S)
        for resize in decision.resizes:
            resized, ends_s = running[resize.job_id]
            running[resized.id] = (replace(resized, node_ids=resize.node_ids), ends_s)
        ends = [ends_s for _, ends_s in running.values() if ends_s is not None]
        if not ends:
            return first, None
        usage = accrued(usage, seen, nodes, elapsed_s=max(0.0, min(ends) - now_s))
        now_s = max(now_s, min(ends))
        for entry, ends_s in list(running.values()):
            if ends_s is None or ends_s > now_s:
                continue
            del running[entry.id]
            rest = again.pop(entry.id, None)
            if entry.next_node_ids:
                moved = replace(entry, node_ids=entry.next_node_ids, next_node_ids=(), is_stopping=False)
                running[moved.id] = (moved, None if rest is None else _end_s(rest, moved.world, now_s))
            elif rest is not None:
                waiting[rest.id] = rest
    assert first is not None
    return first, None


def _end_s(job: Pending, world: int, now_s: float) -> float | None:
    """Return when a job ends that starts now on so many ranks; None: unknown."""
    return None if job.duration_s is None else now_s + job.duration_s * job.worlds[0] / world


def _stopped(job: Active, left_s: float | None) -> Pending:
    """Return a job as it waits once it was stopped, with so much left to do on the ranks that it had."""
    return Pending(
        id=job.id,
        queue=job.queue,
        owner=job.owner,
        priority=job.priority,
        sequence=job.sequence,
        worlds=job.worlds,
        per_rank=job.per_rank,
        layout=job.layout,
        duration_s=None if left_s is None else left_s * job.world / job.worlds[0],
    )


def _started(job: Pending, node_ids: tuple[str, ...]) -> Active:
    return Active(
        id=job.id,
        queue=job.queue,
        owner=job.owner,
        priority=job.priority,
        sequence=job.sequence,
        worlds=job.worlds,
        per_rank=job.per_rank,
        layout=job.layout,
        node_ids=node_ids,
    )
