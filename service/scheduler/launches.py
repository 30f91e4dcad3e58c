"""What a supervisor is told about the attempt that it is to run."""

from dataclasses import dataclass

from service.domain.job import Attempt, Job
from service.domain.ports import MAX_LOG_BYTES, Launch, SchedulerStore
from service.domain.uploads import NODE_CACHE_BYTES, PREPARE_TIMEOUT_S


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
        prepare_timeout_s: how long a node may take to get what a job brings.
        node_cache_bytes: most that a node keeps of such things.
        max_log_bytes: most that is kept of what a rank prints.
    """

    store: SchedulerStore
    storage_url: str
    storage_id: str
    collective_timeout_s: float
    start_timeout_s: float
    stop_grace_s: float
    prepare_timeout_s: float = PREPARE_TIMEOUT_S
    node_cache_bytes: int = NODE_CACHE_BYTES
    max_log_bytes: int = MAX_LOG_BYTES

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
            forked_from=job.forked_from,
            prepare_timeout_s=self.prepare_timeout_s,
            node_cache_bytes=self.node_cache_bytes,
            max_log_bytes=self.max_log_bytes,
        )
