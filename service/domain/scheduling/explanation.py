"""Why each job that does not start waits."""

from service.domain.scheduling.admission import Admission, Hindrance
from service.domain.scheduling.amount import Amount
from service.domain.scheduling.decision import Cause, Wait, Why
from service.domain.scheduling.pending import Pending, Size
from service.domain.scheduling.wording import EXACT_PLACES, about, far_behind, need, ordinal


class Explanation:
    """Says why jobs wait.

    Args:
        admission: what was admitted, and what is left.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_free: dict[Amount, int] = {}
        self._shared: dict[tuple[Size, str], Why] = {}

    def waits(self) -> tuple[Wait, ...]:
        """Return all that wait, by queue and place."""
        starts, hindrances = self._admission.starts, self._admission.hindrances
        waits: list[Wait] = []
        for queue, jobs in self._admission.line.by_queue.items():
            position = told_until = 0
            behind = ""
            for job in jobs:
                if job.id in starts:
                    continue
                hindrance = hindrances.get(job.id)
                if hindrance is not None and hindrance.cause is not Cause.QUOTA:
                    why = self._why(job, hindrance.cause, hindrance.detail)
                    waits.append(Wait(job_id=job.id, position=None, why=why))
                    continue
                position += 1
                if position <= EXACT_PLACES:
                    why = self._near(job, hindrance, position)
                else:
                    if position > told_until:
                        behind, told_until = far_behind(position, queue)
                    why = self._far(job, hindrance, behind)
                waits.append(Wait(job_id=job.id, position=position, why=why))
        return tuple(waits)

    def _near(self, job: Pending, hindrance: Hindrance | None, position: int) -> Why:
        place = f"{ordinal(position)} in queue {job.queue}"
        if hindrance is not None:
            return self._why(job, hindrance.cause, f"{hindrance.detail} {place}.")
        cause = self._cause(job)
        hold = self._admission.holds.get(job.id)
        starts_in_s = hold.from_s if hold is not None and hold.is_known else None
        held = ", held for jobs ahead of it" if cause is Cause.RESERVED else ""
        start = "" if starts_in_s is None else f"; {about(starts_in_s)}"
        return self._why(job, cause, f"{need(job, self._free_for(job))}{held}. {place}{start}.", starts_in_s)

    def _far(self, job: Pending, hindrance: Hindrance | None, behind: str) -> Why:
        told = behind if hindrance is None else hindrance.brief
        why = self._shared.get((job.size, told))
        if why is None:
            cause = self._cause(job) if hindrance is None else hindrance.cause
            why = self._shared[job.size, told] = self._why(job, cause, told)
        return why

    def _why(self, job: Pending, cause: Cause, message: str, starts_in_s: float | None = None) -> Why:
        return Why(
            cause=cause,
            message=message,
            num_ranks=job.fewest,
            num_free=self._free_for(job),
            starts_in_s=starts_in_s,
        )

    def _cause(self, job: Pending) -> Cause:
        return Cause.ROOM if self._free_for(job) < job.fewest else Cause.RESERVED

    def _free_for(self, job: Pending) -> int:
        num_free = self._num_free.get(job.amount)
        if num_free is None:
            num_free = self._num_free[job.amount] = self._admission.room.num_fitting(job.amount)
        return num_free
