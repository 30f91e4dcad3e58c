"""Whether a job fits a cluster."""

from collections.abc import Sequence

from service.domain.elasticity import exact_worlds
from service.domain.errors import FieldProblem
from service.domain.placement import Node, Resources, why_not
from service.domain.spec import JobSpec


def fit_problem(spec: JobSpec, nodes: Sequence[Node]) -> FieldProblem | None:
    """Say which field keeps a job from ever running on these nodes, and why; None if it fits when they are empty.

    An elastic job fits if its smallest exact world does.

    Args:
        spec: the job.
        nodes: the cluster.
    """
    per_rank = spec.resources_per_rank
    reason = why_not(exact_worlds(spec)[-1], per_rank, nodes)
    if reason is None:
        return None
    if any(node.total.holds(per_rank) for node in nodes):
        return FieldProblem(field="workers", message=reason)
    alone = {
        "resources.cpus_per_rank": Resources(cpus=per_rank.cpus),
        "resources.gpus_per_rank": Resources(gpus=per_rank.gpus),
        "resources.memory_bytes_per_rank": Resources(memory_bytes=per_rank.memory_bytes),
    }
    lacking = [
        field
        for field, need in alone.items()
        if need != Resources() and not any(node.total.holds(need) for node in nodes)
    ]
    return FieldProblem(field=lacking[0] if len(lacking) == 1 else "resources", message=reason)
