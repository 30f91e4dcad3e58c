"""Whether this scheduler leads: decided by what it sees of the lease, and by the monotonic clock of its own process.

No wall clock takes part, and no clock is compared with another one. A leader renews the lease three times in its life
and does nothing under a lease that is due until it has renewed it. Another takes the lease over only when it has itself
seen it unchanged for its whole life, which is longer than that. What a leader still writes that was stopped in between
is refused: each of its transactions verifies the epoch.
"""

import logging
import time

from service.domain.ports import Lease, LeaseState, SchedulerStore

RENEWALS_PER_TTL = 3

logger = logging.getLogger(__name__)


class Leadership:
    """The lease as one scheduler sees it.

    Args:
        holder: name of this process, unique.
        store: has the lease.
        ttl_s: how long the lease lasts without a renewal; the same for all schedulers of a database.
    """

    def __init__(self, *, holder: str, store: SchedulerStore, ttl_s: float) -> None:
        self._holder = holder
        self._store = store
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._renewed_at = 0.0
        self._seen: LeaseState | None = None
        self._seen_at = 0.0
        self._told_of: str | None = None

    @property
    def lease(self) -> Lease | None:
        """The lease as it was at the last claim; None if another scheduler leads."""
        return self._lease

    def claim(self) -> Lease | None:
        """Take the lease if its time has come, or keep it; None while another leads.

        Raises:
            LeaseLost: it was ours, and another has taken it.
            Unavailable: the database does not answer.
        """
        if self._lease is not None:
            return self.keep()
        now = time.monotonic()
        self._lease = self._take(self.observe())
        self._renewed_at = now  # from before the transaction, which may have taken a while
        return self._lease

    def keep(self) -> Lease:
        """Return the lease that was claimed, renewed if it is due, before something is done under it.

        Raises:
            LeaseLost: another has taken it.
            Unavailable: the database does not answer, so that it cannot be renewed.
        """
        assert self._lease is not None
        now = time.monotonic()
        if now - self._renewed_at >= self._ttl_s / RENEWALS_PER_TTL:
            self._store.renew_lease(self._lease)
            self._renewed_at = now
        return self._lease

    def observe(self) -> LeaseState:
        """Look at the lease; whoever holds it has its whole life from the first look that finds it changed.

        Raises:
            Unavailable: the database does not answer.
        """
        state = self._store.read_lease()
        if state != self._seen:
            self._seen, self._seen_at = state, time.monotonic()
        return state

    def forget(self) -> None:
        """Lead no more, as far as this process is concerned."""
        self._lease = None

    def release(self) -> None:
        """Let another scheduler lead at once.

        Raises:
            Unavailable: the database does not answer; the lease ends by itself.
        """
        lease, self._lease = self._lease, None
        if lease is not None:
            self._store.release_lease(lease)

    def _take(self, state: LeaseState) -> Lease | None:
        if state.holder == self._holder:
            # Ours: the answer to the transaction that took it was lost, or it was let go and nobody came.
            lease = Lease(holder=self._holder, epoch=state.epoch)
            self._store.renew_lease(lease)
            return lease
        if state.holder is not None and time.monotonic() - self._seen_at < self._ttl_s:
            if self._told_of != state.holder:
                self._told_of = state.holder
                logger.info("Standing by: %s leads", state.holder)
            return None
        taken = self._store.take_lease(self._holder, seen=state)
        if taken is not None:
            logger.info("Leading, epoch %d", taken.epoch)
        return taken
