"""Which waiting jobs start now, and where; what is held for the first that has to wait; why the others do."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from service.domain.placement import Node, why_not
from service.domain.queue import Queue
from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import amount_of, holds
from service.domain.scheduling.clearing import Clearing
from service.domain.scheduling.decision import Cause, Reservation
from service.domain.scheduling.line import Line
from service.domain.scheduling.pending import Pending, Size
from service.domain.scheduling.quotas import Ledger
from service.domain.scheduling.reservation import Release, find_hold, hold_all, releases_of
from service.domain.scheduling.room import Hold, Room
from service.domain.scheduling.shares import held_by_queue, total_of

# A job that has waited for longer than it was promised, by this part of the promise and this time, is overtaken by
# nothing that could make it wait longer: estimates were wrong, and are not trusted again for it.
_LATENESS = 0.5
_LATE_S = 60.0
# Way is made for so many jobs at once; others follow with the next decisions.
_MAX_CLEARINGS = 8


@dataclass(frozen=True, kw_only=True)
class Hindrance:
    """Why a job does not start.

    Attributes:
        cause: why.
        detail: the same in words, where the cause alone does not say it.
        brief: the same without figures that change all the time.
    """

    cause: Cause
    detail: str = ""
    brief: str = ""


def _over_quota(excess: str) -> Hindrance:
    return Hindrance(cause=Cause.QUOTA, detail=f"Over {excess}.", brief=f"Over {excess.partition(':')[0]}.")


class Admission:
    """Goes through the line once, and tells what came of it.

    Args:
        pending: in any order.
        active: what holds resources.
        nodes: the cluster.
        queues: by name.
        usage_s: what each queue has used.
        reservations: of the decision before.
        now_s: by the clock of the reservations.

    Attributes:
        room: what is left beside all that is held, by those that start, too.
        ledger: likewise what is held against quotas.
        line: the order.
        starts: the jobs that start, in order, with the node of each rank.
        hindrances: why others do not whatever is free, by id; the rest waits for room.
        reservations: by id of the job, in the order in which they were made.
        holds: the room of these.
        clearing: what running jobs are asked to do for those that wait.
    """

    def __init__(
        self,
        pending: Iterable[Pending],
        active: Sequence[Active],
        nodes: Sequence[Node],
        *,
        queues: Mapping[str, Queue],
        usage_s: Mapping[str, float],
        reservations: Sequence[Reservation],
        now_s: float,
    ) -> None:
        total = total_of(nodes)
        self.room = Room.beside(active, nodes)
        self.ledger = Ledger(active, queues)
        self.line = Line(pending, queues=queues, usage_s=usage_s, held=held_by_queue(active), total=total)
        self.starts: dict[str, tuple[Pending, tuple[str, ...]]] = {}
        self.hindrances: dict[str, Hindrance] = {}
        self.reservations: dict[str, Reservation] = {}
        self.holds: dict[str, Hold] = {}
        self.clearing = Clearing(active, self.room, self.line)
        self._active = active
        self._nodes = nodes
        self._totals = {node.id: amount_of(node.total) for node in nodes}
        self._alike = Counter(self._totals.values())  # a cluster has few kinds of nodes
        self._paused = {name for name, queue in queues.items() if queue.paused}
        self._now_s = now_s
        self._releases: list[Release] | None = None
        # Queues whose first job has to wait: none of those behind it has others stopped.
        self._passed: set[str] = set()
        self._has_head = False
        self._num_clearings = 0
        self._free_queues = {
            name for name in self.line.by_queue if name not in self._paused and not self.ledger.is_limited(name)
        }
        self._too_large: dict[Size, Hindrance | None] = {}
        self._over_quota: dict[tuple[str, str, Size], Hindrance | None] = {}
        self._go_on(reservations)
        self._go_through_the_line()

    def _go_on(self, reservations: Sequence[Reservation]) -> None:
        """Start those that room was held for, or hold it further, before anything else is looked at."""
        by_id = {reservation.job_id: reservation for reservation in reservations}
        earlier = [(job, by_id[job.id]) for job in self.line.by_id(by_id)] if by_id else []
        # Those that others were asked to make room for come first, the most important of them before the others.
        earlier.sort(key=lambda pair: (not pair[1].is_coming, pair[0].order))
        for job, reservation in earlier:
            if self._hindrance(job) is not None or self._start(job):
                continue
            if reservation.is_coming and self._keep(job, reservation):
                continue
            # What was to come has gone, or nothing was: it is the first in line if it is the first of its queue.
            if self._first_of(job.queue) is job and not self._has_head:
                self._hold_up(job, reservation)

    def _first_of(self, queue: str) -> Pending | None:
        """Return the first job of a queue that waits for room, beside those for which it is coming."""
        return next(
            (
                job
                for job in self.line.by_queue[queue]
                if job.id not in self.starts and job.id not in self.reservations and self._hindrance(job) is None
            ),
            None,
        )

    def _go_through_the_line(self) -> None:
        # What did not fit for so long does not fit for longer, nor later: room only shrinks on the way.
        tried_for_s: dict[Size, float] = {}
        for job in self.line:
            tried_s = tried_for_s.get(job.size)
            has_failed = tried_s is not None and job.stays_s >= tried_s and job.queue in self._passed
            if has_failed and job.queue in self._free_queues and job.obstacle is None:
                continue  # most of a long line
            if job.id in self.starts or job.id in self.reservations:
                continue
            hindrance = self._hindrance(job)
            if hindrance is not None:
                self.hindrances[job.id] = hindrance
                continue
            if has_failed:
                continue
            if self._start(job):
                continue
            tried_for_s[job.size] = job.stays_s
            if job.queue not in self._passed:
                self._hold_up(job, Reservation(job_id=job.id, made_at_s=self._now_s, promised_at_s=None))

    def _hold_up(self, job: Pending, reservation: Reservation) -> None:
        """Make way for a job that does not fit; if that cannot be done, and it is the first, hold room for later."""
        if self._num_clearings < _MAX_CLEARINGS:
            hold = self.clearing.make_way(job, self._held_for_later())
            if hold is not None:
                self._num_clearings += 1
                self._hold(hold, replace(reservation, is_coming=True))
                return
        self._passed.add(job.queue)
        if not self._has_head:
            self._has_head = True
            self._reserve(job, replace(reservation, is_coming=False))

    def _keep(self, job: Pending, reservation: Reservation) -> bool:
        hold = self.clearing.keep(job, self._held_for_later())
        if hold is not None:
            self._hold(hold, reservation)
        return hold is not None

    def _held_for_later(self) -> list[Hold]:
        return [hold for job_id, hold in self.holds.items() if not self.reservations[job_id].is_coming]

    def _hindrance(self, job: Pending) -> Hindrance | None:
        """Return what keeps a job from starting whatever is free."""
        if job.obstacle is not None:
            return Hindrance(cause=Cause.OBSTACLE, detail=job.obstacle)
        if job.size not in self._too_large:
            self._too_large[job.size] = self._why_too_large(job)
        too_large = self._too_large[job.size]
        if too_large is not None or job.queue in self._free_queues:
            return too_large
        if job.queue in self._paused:
            return Hindrance(cause=Cause.PAUSED, detail=f"Queue {job.queue} is paused.")
        key = (job.queue, job.owner, job.size)
        if key not in self._over_quota:
            excess = self.ledger.exceeded_by(job, job.fewest)
            self._over_quota[key] = None if excess is None else _over_quota(excess)
        return self._over_quota[key]

    def _why_too_large(self, job: Pending) -> Hindrance | None:
        if sum(count * holds(total, job.amount) for total, count in self._alike.items()) >= job.fewest:
            return None
        why = why_not(job.fewest, job.per_rank, self._nodes)
        return Hindrance(cause=Cause.TOO_LARGE, detail=f"Waits for a larger cluster: {why}")

    def _start(self, job: Pending) -> bool:
        world, duration_s = job.fewest, job.stays_s
        places = self.room.place(world, job.amount, layout=job.layout, duration_s=duration_s)
        if places is None:
            return False
        ranks = Counter(places)
        self.room.take(ranks, job.amount, duration_s)
        self.ledger.take(job, world)
        if self.ledger.is_limited(job.queue):
            self._over_quota.clear()
        self.line.add(job, world)
        self.starts[job.id] = (job, places)
        if self._releases is not None and job.duration_s is not None:
            self._releases.append(Release(in_s=duration_s, ranks=ranks, per_rank=job.amount))
        return True

    def _reserve(self, job: Pending, reservation: Reservation) -> None:
        """Hold room for a job until it starts, at the time that estimates give, or all that it could use."""
        if self._releases is None:
            self._releases = releases_of(self._active)
            self._releases += [
                Release(in_s=started.stays_s, ranks=Counter(places), per_rank=started.amount)
                for started, places in self.starts.values()
                if started.duration_s is not None
            ]
        self._releases.sort(key=lambda release: release.in_s)
        hold = find_hold(job, self.room, self._releases)
        if hold is None or self._is_late(reservation):
            hold = hold_all(job, self.room, self._totals)
        self._hold(hold, reservation)

    def _hold(self, hold: Hold, reservation: Reservation) -> None:
        if hold.is_known and reservation.promised_at_s is None:
            reservation = replace(reservation, made_at_s=self._now_s, promised_at_s=self._now_s + hold.from_s)
        self.room.hold(hold)
        self.holds[hold.job_id] = hold
        self.reservations[hold.job_id] = reservation

    def _is_late(self, reservation: Reservation) -> bool:
        if reservation.promised_at_s is None:
            return False
        promise_s = reservation.promised_at_s - reservation.made_at_s
        return self._now_s > reservation.promised_at_s + _LATENESS * promise_s + _LATE_S
