"""What a supervisor is told about the attempt that it is to run."""

from dataclasses import dataclass

from service.domain.job import Attempt, Job
from service.domain.ports import Launch, SchedulerStore


@dataclass(frozen=True, kw_only=True)
class LaunchFactory:
    """Builds launches from rows and settings; calling it twice for one attempt gives the same.

    Attributes:
        store: for the checkpoints to resume from.
        storage_url: root of run storage, as the cluster's nodes see it.
        storage_id: what that root says of itself.
        collective_timeout_s: how long a rank waits for its peers.
        start_timeout_s: how long the ranks may take to start.
        stop_grace_s: how long a rank that was asked to stop may take for its last checkpoint.
    """

    store: SchedulerStore
    storage_url: str
    storage_id: str
    collective_timeout_s: float
    start_timeout_s: float
    stop_grace_s: float

    def __call__(self, job: Job, attempt: Attempt) -> Launch:
        """Return the launch of an attempt."""
        return Launch(
            job_id=job.id,
            attempt=attempt.number,
            spec=job.spec,
            node_ids=attempt.node_ids,
            storage_url=self.storage_url,
            storage_id=self.storage_id,
            checkpoints=self.store.resumable_checkpoints(job.id),
            collective_timeout_s=self.collective_timeout_s,
            start_timeout_s=self.start_timeout_s,
            stop_grace_s=self.stop_grace_s,
        )
