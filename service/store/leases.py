"""The lease of the one scheduler that leads, by the database's clock."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from service.domain.errors import LeaseLost
from service.domain.ports import Lease
from service.store.clock import read_unix_clock
from service.store.tables import leases

_SCHEDULER = leases.c.name == "scheduler"


def acquire(connection: Connection, holder: str, ttl_s: float) -> Lease | None:
    """Take or renew the lease; None while another holds it."""
    row = _row(connection, sa.select(leases).where(_SCHEDULER).with_for_update())
    now = read_unix_clock(connection)  # after the lock, which may have taken a while
    if row.holder not in (None, holder) and now < row.expires_at:
        return None
    epoch = row.epoch if row.holder == holder else row.epoch + 1
    connection.execute(sa.update(leases).where(_SCHEDULER).values(holder=holder, epoch=epoch, expires_at=now + ttl_s))
    return Lease(holder=holder, epoch=epoch)


def release(connection: Connection, lease: Lease) -> None:
    """Give the lease up; nothing if it was lost."""
    connection.execute(
        sa.update(leases)
        .where(_SCHEDULER, leases.c.holder == lease.holder, leases.c.epoch == lease.epoch)
        .values(holder=None, expires_at=0.0)
    )


def verify(connection: Connection, lease: Lease) -> None:
    """Prove that a lease is current, and keep it so to the end of the transaction.

    Raises:
        LeaseLost: another took it, or it was not renewed in time.
    """
    row = _row(connection, sa.select(leases).where(_SCHEDULER).with_for_update(read=True))
    if (row.holder, row.epoch) != (lease.holder, lease.epoch):
        by = f"{row.holder} leads" if row.holder else "it was released"
        raise LeaseLost(f"{lease.holder} no longer leads (epoch {lease.epoch}): {by} (epoch {row.epoch}).")
    late_s = read_unix_clock(connection) - row.expires_at
    if late_s >= 0:
        raise LeaseLost(f"{lease.holder} no longer leads: its lease ended {late_s:.1f} s ago without renewal.")


def _row(connection: Connection, query: sa.Select[Any]) -> Row[Any]:
    return connection.execute(query).one()  # the migration that makes the table makes its row
