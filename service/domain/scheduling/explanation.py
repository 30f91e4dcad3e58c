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

    def waits(self) -> tuple[Wait, ...]:
        """Return all that wait, by queue and place."""
        starts, hindrances = self._admission.starts, self._admission.hindrances
        waits: list[Wait] = []
        for queue, jobs in self._admission.line.by_queue.items():
            position = told_until = 0
            behind = ""
            shared: dict[Size, Why] = {}  # by those that are told the same
            for job in jobs:
                job_id = job.id
                if job_id in starts:
                    continue
                hindrance = hindrances.get(job_id)
                if hindrance is not None and hindrance.cause is not Cause.QUOTA:
                    waits.append(Wait(job_id, None, self._why(job, hindrance.cause, hindrance.detail)))
                    continue
                position += 1
                if position <= EXACT_PLACES:
                    waits.append(Wait(job_id, position, self._near(job, hindrance, position)))
                elif hindrance is not None:
                    waits.append(Wait(job_id, position, self._why(job, hindrance.cause, hindrance.brief)))
                else:
                    if position > told_until:
                        behind, told_until = far_behind(position, queue)
                        shared = {}
                    why = shared.get(job.size)
                    if why is None:
                        why = shared[job.size] = self._why(job, self._cause(job), behind)
                    waits.append(Wait(job_id, position, why))
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
