"""Which running jobs are stopped so that a job of higher priority can start."""

from collections.abc import Sequence

from service.domain.scheduling.active import Active
from service.domain.scheduling.line import Line
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.room import Room


def find_victims(job: Pending, active: Sequence[Active], coming: Room, line: Line) -> tuple[Active, ...]:
    """Return the jobs to stop so that one can start; none if all that may be stopped do not make room for it.

    Only jobs of a lower priority are stopped, and in other queues only in those that have used no less for their
    weight: a priority does not take from others what is theirs. The lowest go first, then those that lose the least.
    None of them could be left out.

    Args:
        job: that does not fit.
        active: what holds resources.
        coming: what will be free without any of them.
        line: knows what queues have used.
    """
    charge = line.charge(job.queue)
    queues = {victim.queue for victim in active}
    open_queues = {queue for queue in queues if queue == job.queue or line.charge(queue) >= charge}
    candidates = [
        victim
        for victim in active
        if victim.priority < job.priority
        and victim.preemptions_left > 0
        and not victim.is_stopping
        and victim.queue in open_queues
    ]
    candidates.sort(key=lambda victim: (victim.priority, victim.ran_for_s, -victim.sequence))
    room = coming.copy()
    chosen: list[Active] = []
    for victim in candidates:
        before = room.num_fitting(job.amount)
        if before >= job.fewest:
            break
        room.give(victim.leaving, victim.amount)
        chosen.append(victim)
    if room.num_fitting(job.amount) < job.fewest:
        return ()
    return _needed(job, chosen, room)


def _needed(job: Pending, chosen: Sequence[Active], room: Room) -> tuple[Active, ...]:
    """Leave out those whose room turned out not to be needed, the dearest first."""
    needed = []
    for victim in reversed(chosen):
        room.take(victim.leaving, victim.amount)
        if room.num_fitting(job.amount) < job.fewest:
            room.give(victim.leaving, victim.amount)
            needed.append(victim)
    return tuple(reversed(needed))
