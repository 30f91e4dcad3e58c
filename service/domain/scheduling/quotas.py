"""What is held against the quotas of queues and of their owners."""

from collections.abc import Iterable, Mapping

from service.domain.queue import Queue, Quota
from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import NOTHING, Amount, plus, resources_of
from service.domain.scheduling.pending import Pending

_GIB = 2**30


class Ledger:
    """What the jobs of each queue hold together, and those of each owner in it.

    Args:
        active: what holds resources.
        queues: by name; one that is missing has no quota.
    """

    def __init__(self, active: Iterable[Active], queues: Mapping[str, Queue]) -> None:
        # Only those that have a limit: most have none, and are looked at for every job.
        self._quotas = {name: queue.quota for name, queue in queues.items() if queue.quota != Quota()}
        self._quotas_per_owner = {
            name: queue.quota_per_owner for name, queue in queues.items() if queue.quota_per_owner != Quota()
        }
        self._held: dict[str | tuple[str, str], tuple[Amount, int]] = {}
        for job in active:
            self.take(job, job.num_held)

    def take(self, job: Pending | Active, num_ranks: int, num_jobs: int = 1) -> None:
        """Count so many more ranks of a job, and so many more jobs."""
        if job.queue in self._quotas:
            self._add(job.queue, job.amount, num_ranks, num_jobs)
        if job.queue in self._quotas_per_owner:
            self._add((job.queue, job.owner), job.amount, num_ranks, num_jobs)

    def is_limited(self, queue: str) -> bool:
        """Return whether any quota holds in a queue."""
        return queue in self._quotas or queue in self._quotas_per_owner

    def exceeded_by(self, job: Pending | Active, num_ranks: int, num_jobs: int = 1) -> str | None:
        """Say which quota so many more ranks would exceed; None if none."""
        quota = self._quotas.get(job.queue)
        if quota is not None:
            excess = self._excess(quota, job.queue, job.amount, num_ranks, num_jobs)
            if excess is not None:
                return f"the quota of queue {job.queue}: {excess}"
        quota = self._quotas_per_owner.get(job.queue)
        if quota is not None:
            excess = self._excess(quota, (job.queue, job.owner), job.amount, num_ranks, num_jobs)
            if excess is not None:
                return f"the quota of {job.owner} in queue {job.queue}: {excess}"
        return None

    def _add(self, key: str | tuple[str, str], amount: Amount, num_ranks: int, num_jobs: int) -> None:
        held, jobs = self._held.get(key, (NOTHING, 0))
        self._held[key] = (plus(held, amount, num_ranks), jobs + num_jobs)

    def _excess(
        self, quota: Quota, key: str | tuple[str, str], amount: Amount, num_ranks: int, num_jobs: int
    ) -> str | None:
        held, jobs = self._held.get(key, (NOTHING, 0))
        before, more = resources_of(held), resources_of(amount).times(num_ranks)
        match quota.first_exceeded(before, jobs, more, num_jobs):
            case "cpus":
                return f"{before.cpus:g} of {quota.cpus:g} CPU in use, {more.cpus:g} needed"
            case "gpus":
                return f"{before.gpus} of {quota.gpus} GPU in use, {more.gpus} needed"
            case "memory_bytes":
                assert quota.memory_bytes is not None
                return (
                    f"{before.memory_bytes / _GIB:.1f} of {quota.memory_bytes / _GIB:.1f} GiB in use, "
                    f"{more.memory_bytes / _GIB:.1f} needed"
                )
            case "jobs":
                return f"{jobs} of {quota.jobs} job(s) at once"
        return None
