"""What is to be done now: which jobs start, stop, shrink and grow, and why the others wait; one pure decision."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from service.domain.placement import Node
from service.domain.queue import Queue
from service.domain.scheduling.active import Active
from service.domain.scheduling.admission import Admission
from service.domain.scheduling.decision import Decision, Reservation, Resize, Start
from service.domain.scheduling.elasticity import grow, widened
from service.domain.scheduling.explanation import Explanation
from service.domain.scheduling.pending import Pending

# Room that is held for a job that starts so soon is of no use to elastic ones: they would be interrupted at once.
_WORTH_GROWING_S = 600.0


def decide(
    pending: Iterable[Pending],
    active: Sequence[Active],
    nodes: Sequence[Node],
    *,
    queues: Iterable[Queue] = (),
    usage_s: Mapping[str, float] | None = None,
    reservations: Sequence[Reservation] = (),
    now_s: float = 0.0,
) -> Decision:
    """Decide what is to be done now.

    1. The next job is the first, by priority, then first come, of the queue that has used the least for its weight.
    2. It starts if all its ranks fit at once. The first that does not is given a reservation: the earliest time at
       which, by what is known of those that run, it will fit, and where. Others start only if they have ended by then
       or leave it that room.
    3. For one that waits, elastic jobs give up workers; else jobs of lower priority are stopped. Either is done only
       if it makes room enough, and to no more of them than it takes.
    4. Elastic jobs start on their fewest workers; what nobody else has a use for is then given to them.

    Args:
        pending: queued jobs, in any order.
        active: jobs that hold resources.
        nodes: the cluster.
        queues: those that have a weight, quotas or a pause.
        usage_s: what each queue has used, as ``accrued`` counts.
        reservations: of the decision before this one.
        now_s: by the clock of the reservations, which is never set back.
    """
    by_name = {queue.name: queue for queue in queues}
    admission = Admission(
        pending,
        active,
        nodes,
        queues=by_name,
        usage_s=usage_s or {},
        reservations=reservations,
        now_s=now_s,
    )
    clearing = admission.clearing
    unclaimed = clearing.unclaimed()
    for hold in admission.holds.values():
        if hold.is_known and hold.from_s <= _WORTH_GROWING_S and not admission.reservations[hold.job_id].is_coming:
            unclaimed.take(hold.ranks, hold.per_rank)
    starts = []
    for job, node_ids in admission.starts.values():
        places = node_ids
        if job.is_elastic and not clearing.is_scarce:
            places = widened(job, node_ids, unclaimed, admission.ledger, is_room_held=bool(admission.holds))
            admission.room.take(Counter(places), job.amount)
            admission.room.give(Counter(node_ids), job.amount)
        starts.append(Start(job_id=job.id, node_ids=places))
    growths: Sequence[Resize] = ()
    if not (clearing.is_kept or clearing.is_scarce):
        growths = grow(clearing.movable, unclaimed, admission.ledger, is_room_held=bool(admission.holds))
    return Decision(
        starts=tuple(starts),
        waits=Explanation(admission).waits(),
        preemptions=tuple(clearing.preemptions),
        resizes=(*clearing.resizes, *growths),
        reservations=tuple(admission.reservations.values()),
    )
