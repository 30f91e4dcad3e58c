"""The cluster as the scheduler last saw it."""

from fastapi import APIRouter

from service.api.parts import AppParts
from service.api.schemas import Amount, Cluster, ClusterNode
from service.domain.placement import Resources

router = APIRouter(tags=["cluster"])


@router.get("/cluster")
def get_cluster(parts: AppParts) -> Cluster:
    """Return the nodes of the cluster."""
    snapshot = parts.store.cluster()
    return Cluster(
        nodes=[ClusterNode.of(node) for node in snapshot.nodes],
        total=Amount.of(sum((node.total for node in snapshot.nodes), Resources())),
        observed_at=snapshot.observed_at,
    )
