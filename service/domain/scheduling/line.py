"""The order in which waiting jobs are looked at: queue by queue, the one that used the least for its weight first."""

import heapq
from collections.abc import Container, Iterable, Iterator, Mapping
from operator import attrgetter

from service.domain.queue import Queue
from service.domain.scheduling.amount import NOTHING, Amount, dominant_share, plus
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.shares import LOOKAHEAD_S


class Line:
    """Jobs in order; each that starts costs its queue, which others may then come before.

    Args:
        pending: in any order.
        queues: by name; one that is missing weighs 1.
        usage_s: what each has used.
        held: what the jobs of each hold.
        total: all that the cluster has.
    """

    def __init__(
        self,
        pending: Iterable[Pending],
        *,
        queues: Mapping[str, Queue],
        usage_s: Mapping[str, float],
        held: Mapping[str, Amount],
        total: Amount,
    ) -> None:
        self.by_queue: dict[str, list[Pending]] = {}
        for job in pending:
            self.by_queue.setdefault(job.queue, []).append(job)
        for jobs in self.by_queue.values():
            jobs.sort(key=attrgetter("order"))
        self._weights = {name: queue.weight for name, queue in queues.items()}
        self._usage_s = usage_s
        self._held = dict(held)
        self._total = total

    def by_id(self, ids: Container[str]) -> list[Pending]:
        """Return the jobs with these ids."""
        return [job for jobs in self.by_queue.values() for job in jobs if job.id in ids]

    def charge(self, queue: str) -> float:
        """Return what a queue has used for its weight, what it holds now included."""
        share = dominant_share(self._held.get(queue, NOTHING), self._total)
        return (self._usage_s.get(queue, 0.0) + LOOKAHEAD_S * share) / self._weights.get(queue, 1.0)

    def add(self, job: Pending, num_ranks: int) -> None:
        """Charge a job that starts to its queue."""
        self._held[job.queue] = plus(self._held.get(job.queue, NOTHING), job.amount, num_ranks)

    def __iter__(self) -> Iterator[Pending]:
        """Yield every job once; ``add`` what starts before the next is asked for."""
        waiting = {name: iter(jobs) for name, jobs in self.by_queue.items()}
        order = [(self.charge(name), name) for name in waiting]
        heapq.heapify(order)
        while order:
            _, name = heapq.heappop(order)
            held = self._held.get(name)
            for job in waiting[name]:
                yield job
                if self._held.get(name) is not held:
                    heapq.heappush(order, (self.charge(name), name))
                    break
