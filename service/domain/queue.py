"""Queues: what jobs wait in, and how the cluster is divided between them."""

from typing import Annotated, Literal

from pydantic import Field

from service.domain.placement import Resources
from service.domain.record import Record

DEFAULT_QUEUE = "default"
QUEUE_NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class Quota(Record):
    """The most that may be held at once; None: no limit.

    Attributes:
        cpus: logical CPUs of all workers.
        gpus: likewise GPUs.
        memory_bytes: likewise main memory, of those workers that ask for some.
        jobs: jobs that hold resources.
    """

    cpus: Annotated[float | None, Field(ge=0, le=10**9)] = None
    gpus: Annotated[int | None, Field(ge=0, le=10**9)] = None
    memory_bytes: Annotated[int | None, Field(ge=0, le=2**62)] = None
    jobs: Annotated[int | None, Field(ge=0, le=10**9)] = None

    def first_exceeded(
        self, held: Resources, jobs: int, more: Resources, more_jobs: int
    ) -> Literal["cpus", "gpus", "memory_bytes", "jobs"] | None:
        """Return which limit more would exceed; None if none. What none is asked of may be exceeded already.

        Args:
            held: resources of all workers together.
            jobs: how many jobs hold them.
            more: resources beside them.
            more_jobs: likewise jobs.
        """
        after = held + more
        if self.cpus is not None and more.cpus > 0 and after.cpus > self.cpus + 1e-9:  # 3 × 0.1 are within 0.3
            return "cpus"
        if self.gpus is not None and more.gpus > 0 and after.gpus > self.gpus:
            return "gpus"
        if self.memory_bytes is not None and more.memory_bytes > 0 and after.memory_bytes > self.memory_bytes:
            return "memory_bytes"
        return "jobs" if self.jobs is not None and more_jobs > 0 and jobs + more_jobs > self.jobs else None


class Queue(Record):
    """A queue as its operator set it.

    Attributes:
        name: how jobs name it.
        weight: its share of the cluster, in relation to the weights of the other queues that have jobs.
        quota: the most that its jobs may hold together.
        quota_per_owner: the most that the jobs of one owner in it may hold together.
        paused: nothing is started from it; what runs goes on.
    """

    name: Annotated[str, Field(pattern=QUEUE_NAME_PATTERN)]
    weight: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    quota: Quota = Quota()
    quota_per_owner: Quota = Quota()
    paused: bool = False


class QueueState(Record):
    """A queue and what is in it.

    Attributes:
        usage_s: decayed time for which its jobs held the cluster's scarcest resource, in seconds of the whole cluster.
        num_queued: jobs that wait in it.
        num_live: jobs that hold resources.
    """

    queue: Queue
    usage_s: float
    num_queued: int
    num_live: int
