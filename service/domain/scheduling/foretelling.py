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
) -> tuple[Decision, float | None]:
    """Return what is decided now, and when a job starts if nothing else is submitted and all estimates are right.

    Jobs that are stopped for others are taken to go on after it.

    Args:
        job_id: of one of those that wait.
        pending: queued jobs.
        active: jobs that hold resources.
        nodes: the cluster.
        queues: those that have a weight, quotas or a pause.
        usage_s: what each queue has used.

    Returns:
        The decision, and a time from now in s; None if that depends on ends that nobody knows, or is too far off.
    """
    waiting = {job.id: job for job in pending}
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
            lasts_s = None if job.duration_s is None else job.duration_s * job.worlds[0] / len(start.node_ids)
            running[job.id] = (_started(job, start.node_ids), None if lasts_s is None else now_s + lasts_s)
        for preemption in decision.preemptions:
            victim, _ = running[preemption.job_id]
            running[victim.id] = (replace(victim, is_stopping=True), now_s + STOP_S)
        for resize in decision.resizes:
            resized, ends_s = running[resize.job_id]
            running[resized.id] = (replace(resized, node_ids=resize.node_ids), ends_s)
        ends = [ends_s for _, ends_s in running.values() if ends_s is not None]
        if not ends:
            return first, None
        usage = accrued(usage, seen, nodes, elapsed_s=max(0.0, min(ends) - now_s))
        now_s = max(now_s, min(ends))
        running = {name: entry for name, entry in running.items() if entry[1] is None or entry[1] > now_s}
    assert first is not None
    return first, None


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
