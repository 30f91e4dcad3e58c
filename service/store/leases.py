"""The row of the lease by which one scheduler leads.

It holds no time: clocks differ between machines, and jump. Who leads makes the row change; whoever wants to lead takes
it over once it has itself seen it unchanged for long enough. Here is only what a transaction can prove: that the row
still is as somebody saw it.
"""

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.errors import LeaseLost
from service.domain.ports import Lease, LeaseState
from service.store.tables import leases

_SCHEDULER = leases.c.name == "scheduler"


def read(connection: Connection) -> LeaseState:
    """Return the lease as it is."""
    row = connection.execute(sa.select(leases).where(_SCHEDULER)).one()  # the migration that makes the table makes it
    return LeaseState(holder=row.holder, epoch=row.epoch, num_renewals=row.num_renewals)


def take(connection: Connection, holder: str, seen: LeaseState) -> Lease | None:
    """Take the lease under the next epoch; None if it is no longer as it was seen."""
    taken = connection.execute(
        sa.update(leases)
        .where(
            _SCHEDULER,
            leases.c.holder.is_not_distinct_from(seen.holder),
            leases.c.epoch == seen.epoch,
            leases.c.num_renewals == seen.num_renewals,
        )
        .values(holder=holder, epoch=seen.epoch + 1, num_renewals=0)
    )
    return Lease(holder=holder, epoch=seen.epoch + 1) if taken.rowcount else None


def renew(connection: Connection, lease: Lease) -> None:
    """Show that its holder is alive.

    Raises:
        LeaseLost: another took it, or it was released.
    """
    renewed = connection.execute(
        sa.update(leases).where(*_held_by(lease)).values(num_renewals=leases.c.num_renewals + 1)
    )
    if not renewed.rowcount:
        raise _lost(lease, read(connection))


def release(connection: Connection, lease: Lease) -> None:
    """Give the lease up; nothing if it was lost."""
    connection.execute(sa.update(leases).where(*_held_by(lease)).values(holder=None))


def verify(connection: Connection, lease: Lease) -> None:
    """Prove that a lease is current, and keep it so to the end of the transaction.

    Raises:
        LeaseLost: another took it, or it was released.
    """
    row = connection.execute(sa.select(leases).where(_SCHEDULER).with_for_update(read=True)).one()
    if (row.holder, row.epoch) != (lease.holder, lease.epoch):
        raise _lost(lease, LeaseState(holder=row.holder, epoch=row.epoch, num_renewals=row.num_renewals))


def _held_by(lease: Lease) -> tuple[sa.ColumnElement[bool], ...]:
    return _SCHEDULER, leases.c.holder == lease.holder, leases.c.epoch == lease.epoch


def _lost(lease: Lease, found: LeaseState) -> LeaseLost:
    by = f"{found.holder} leads" if found.holder else "it was released"
    return LeaseLost(f"{lease.holder} no longer leads (epoch {lease.epoch}): {by} (epoch {found.epoch}).")
