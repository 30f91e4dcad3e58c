"""What running jobs are asked to do so that one that waits can start."""

from collections import Counter
from collections.abc import Mapping, Sequence

from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import Amount, plus
from service.domain.scheduling.decision import Preemption
from service.domain.scheduling.elasticity import give_back, make_room, with_spare
from service.domain.scheduling.line import Line
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.preemption import find_victims
from service.domain.scheduling.room import Hold, Room

# How long a job that is asked to stop is taken to need for its checkpoint.
STOP_S = 60.0


class Clearing:
    """Room that comes free because jobs stop or shrink, and for whom it is kept.

    Args:
        active: jobs that hold resources.
        room: what is left; jobs that start take from it meanwhile.
        line: knows what queues have used.

    Attributes:
        resizes: elastic jobs that give up workers.
        preemptions: jobs that are stopped.
        is_scarce: a job could start on what elastic ones can spare, but they cannot be asked yet.
    """

    def __init__(self, active: Sequence[Active], room: Room, line: Line) -> None:
        self._active = [job for job in active if room.has_nodes(job.node_ids)]
        self._room = room
        self._line = line
        # Ranks that go away, and those that come in their place.
        self._given = [(job.leaving, job.amount) for job in self._active if job.is_stopping]
        self._kept: list[tuple[Mapping[str, int], Amount]] = []
        self._stops_in_s = max(
            (STOP_S if job.remaining_s is None else job.remaining_s for job in active if job.is_stopping), default=0.0
        )
        self.preemptions: list[Preemption] = []
        self.is_scarce = False
        self.resizes = list(give_back(self._active))
        self._asked = {resize.job_id for resize in self.resizes}
        self._given += [(job.beside(job.worlds[0]), job.amount) for job in self._active if job.id in self._asked]

    @property
    def movable(self) -> list[Active]:
        """Elastic jobs that could be asked for something now."""
        return [job for job in self._unasked if job.is_movable]

    @property
    def is_kept(self) -> bool:
        """Whether room that comes free is kept for a job that waits."""
        return bool(self._kept)

    def unclaimed(self) -> Room:
        """Return what is left beside all that is kept, as if it were taken already."""
        room = self._room.copy()
        for ranks, amount in self._kept:
            room.take(ranks, amount)
        return room

    def keep(self, job: Pending, others: Sequence[Hold]) -> Hold | None:
        """Keep what comes free anyway for a job, if it is enough.

        Args:
            job: that waits.
            others: what is held for jobs ahead of it, beside what is kept here.
        """
        return self._keep(job, self._coming(others))

    def make_way(self, job: Pending, others: Sequence[Hold]) -> Hold | None:
        """Do the least that lets a job start, and keep the room; None, and nothing is done, if it cannot be done.

        Elastic jobs give up workers; where that is not enough, jobs of a lower priority are stopped.

        Args:
            job: that waits.
            others: what is held for jobs ahead of it, beside what is kept here.
        """
        coming = self._coming(others)
        if hold := self._keep(job, coming):
            return hold
        by_id = {entry.id: entry for entry in self._active}
        shrinks = make_room(job, self.movable, coming)
        for shrink in shrinks:
            entry = by_id[shrink.job_id]
            self._ask(entry, entry.own - Counter(shrink.node_ids), coming)
        self.resizes += shrinks
        if shrinks:
            return self._keep(job, coming)
        if with_spare(coming, self._unasked).num_fitting(job.amount) >= job.fewest:
            self.is_scarce = True  # as soon as those that start now can be asked for it
            return None
        victims = find_victims(job, self._unasked, coming, self._line)
        for victim in victims:
            message = f"Asked to stop: job {job.id} of priority {job.priority} takes its place. It goes on after it."
            self.preemptions.append(Preemption(job_id=victim.id, for_job_id=job.id, message=message))
            self._ask(victim, victim.leaving, coming)
        return self._keep(job, coming) if victims else None

    @property
    def _unasked(self) -> list[Active]:
        return [job for job in self._active if job.id not in self._asked]

    def _coming(self, others: Sequence[Hold]) -> Room:
        """Return the room there will be once every job that was asked to stop has stopped."""
        room = self.unclaimed()
        for ranks, amount in self._given:
            room.give(ranks, amount)
        for hold in others:
            room.take(hold.ranks, hold.per_rank)
        return room

    def _ask(self, job: Active, given: Counter[str], coming: Room) -> None:
        self._asked.add(job.id)
        self._given.append((given, job.amount))
        coming.give(given, job.amount)
        self._stops_in_s = max(self._stops_in_s, STOP_S)

    def _keep(self, job: Pending, coming: Room) -> Hold | None:
        places = coming.place(job.fewest, job.amount, layout=job.layout)
        if places is None:
            return None
        ranks = Counter(places)
        spare = {node_id: plus(coming.free[node_id], job.amount, -count) for node_id, count in ranks.items()}
        self._kept.append((ranks, job.amount))
        return Hold(
            job_id=job.id, per_rank=job.amount, from_s=self._stops_in_s, is_known=True, ranks=ranks, spare=spare
        )
