"""What queues have used of the cluster: counted here, kept in the store."""

from collections.abc import Sequence

from service.domain.placement import Node
from service.domain.ports import Lease, SchedulerStore
from service.domain.scheduling import Active, accrued

RECORD_INTERVAL_S = 10.0
IDLE_RECORD_INTERVAL_S = 600.0


class Usage:
    """Goes on from what the leader before recorded; what passed between two leaders is not counted.

    Args:
        store: of the queues.
    """

    def __init__(self, store: SchedulerStore) -> None:
        self._store = store
        self._usage_s: dict[str, float] = {}
        self._epoch: int | None = None
        self._counted_until_s = 0.0
        self._recorded_s = 0.0

    def accrue(self, lease: Lease, active: Sequence[Active], nodes: Sequence[Node], now_s: float) -> dict[str, float]:
        """Count the time since the last call, and return what each queue has used, in seconds of the whole cluster.

        Args:
            lease: of this scheduler.
            active: what holds resources.
            nodes: the cluster.
            now_s: by a clock that is never set back.
        """
        if self._epoch != lease.epoch:
            self._usage_s = dict(self._store.queue_usage())
            self._epoch = lease.epoch
            self._counted_until_s = self._recorded_s = now_s
        self._usage_s = accrued(self._usage_s, active, nodes, elapsed_s=now_s - self._counted_until_s)
        self._counted_until_s = now_s
        interval_s = RECORD_INTERVAL_S if active else IDLE_RECORD_INTERVAL_S
        if now_s - self._recorded_s >= interval_s and any(self._usage_s.values()):
            self._store.record_usage(lease, self._usage_s)
            self._recorded_s = now_s
        return self._usage_s
