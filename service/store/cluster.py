"""The nodes as the scheduler last saw them."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.placement import Node, Resources
from service.domain.ports import ClusterSnapshot
from service.store.tables import cluster


def replace_nodes(connection: Connection, nodes: Sequence[Node], time: datetime) -> None:
    """Replace the snapshot."""
    connection.execute(sa.update(cluster).values(nodes=[asdict(node) for node in nodes], observed_at=time))


def read_snapshot(connection: Connection) -> ClusterSnapshot:
    """Return the snapshot."""
    row = connection.execute(sa.select(cluster)).one()  # the migration that makes the table makes its row
    return ClusterSnapshot(
        nodes=tuple(
            Node(id=node["id"], address=node["address"], total=Resources(**node["total"])) for node in row.nodes
        ),
        observed_at=row.observed_at,
    )
