"""Which node each rank of a gang goes to; all ranks or none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Resources:
    """An amount of what ranks use.

    Attributes:
        cpus: logical CPUs, fractions allowed.
        gpus: whole GPUs.
        memory_bytes: main memory.
    """

    cpus: float = 0.0
    gpus: int = 0
    memory_bytes: int = 0

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(
            cpus=self.cpus + other.cpus,
            gpus=self.gpus + other.gpus,
            memory_bytes=self.memory_bytes + other.memory_bytes,
        )

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(
            cpus=self.cpus - other.cpus,
            gpus=self.gpus - other.gpus,
            memory_bytes=self.memory_bytes - other.memory_bytes,
        )

    def times(self, count: int) -> "Resources":
        """Return ``count`` of these."""
        return Resources(cpus=self.cpus * count, gpus=self.gpus * count, memory_bytes=self.memory_bytes * count)

    def holds(self, per_rank: "Resources") -> int:
        """Return how many ranks fit."""
        limits = []
        if per_rank.cpus > 0:
            limits.append(int(self.cpus / per_rank.cpus + 1e-9))  # 3 × 0.1 fit in 0.3
        if per_rank.gpus > 0:
            limits.append(self.gpus // per_rank.gpus)
        if per_rank.memory_bytes > 0:
            limits.append(self.memory_bytes // per_rank.memory_bytes)
        return max(0, min(limits, default=0))

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        if self.gpus:
            parts.append(f"{self.gpus} GPU")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB")
        return " + ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster that is alive.

    Attributes:
        id: hexadecimal, as Ray names it.
        address: IP address that other nodes reach it by.
        total: all that it has, in use or not.
    """

    id: str
    address: str
    total: Resources


def place_gang(num_ranks: int, per_rank: Resources, free: Mapping[str, Resources]) -> tuple[str, ...] | None:
    """Choose a node for each rank, packed on as few nodes as possible; ranks of a node are consecutive.

    Args:
        num_ranks: ranks of the gang.
        per_rank: what each needs.
        free: what each node has left, by node id.

    Returns:
        The node id of each rank, or None if they do not all fit now.
    """
    room = {node_id: amount.holds(per_rank) for node_id, amount in free.items()}
    if sum(room.values()) < num_ranks:
        return None
    chosen: list[str] = []
    # The fullest node that still takes all that is left; else the emptiest one. Ties go by id, so that the choice
    # is a function of its arguments.
    while len(chosen) < num_ranks:
        left = num_ranks - len(chosen)
        enough = [node_id for node_id, ranks in room.items() if ranks >= left]
        node_id = min(enough, key=lambda n: (room[n], n)) if enough else max(room, key=lambda n: (room[n], n))
        take = min(left, room.pop(node_id))
        chosen.extend([node_id] * take)
    return tuple(chosen)


def why_not(num_ranks: int, per_rank: Resources, nodes: Sequence[Node]) -> str | None:
    """Say why a gang cannot run even on the empty cluster; None if it can.

    Args:
        num_ranks: ranks of the gang.
        per_rank: what each needs.
        nodes: the cluster.
    """
    room = sum(node.total.holds(per_rank) for node in nodes)
    if room >= num_ranks:
        return None
    total = sum((node.total for node in nodes), Resources())
    return (
        f"{num_ranks} worker(s) of {per_rank} each need more than the cluster has: {len(nodes)} node(s) with {total} "
        f"in all hold at most {room} of them. Use at most {room} workers, or ask for less in resources, or add nodes "
        "(on one machine: syncbn serve --cpus)."
        if room
        else f"no node of the cluster holds a worker of {per_rank}: {len(nodes)} node(s) with {total} in all. "
        "Ask for less in resources, or add a larger node."
    )
