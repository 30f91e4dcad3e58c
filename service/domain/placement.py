"""Which node each rank of a gang goes to; all ranks or none."""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Layout = Literal["pack", "spread"]


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


def choose_nodes(num_ranks: int, room: Mapping[str, int], layout: Layout) -> list[tuple[str, int]]:
    """Choose how many ranks of a gang go to which node, those of a node together; whatever the order of the nodes.

    Args:
        num_ranks: ranks of the gang.
        room: how many ranks each node holds; enough of them in all.
        layout: ``pack`` or ``spread``.
    """
    return _spread(num_ranks, room) if layout == "spread" else _pack(num_ranks, room)


def _pack(num_ranks: int, room: Mapping[str, int]) -> list[tuple[str, int]]:
    """Take the fullest node that still takes all that is left; else the emptiest one. Ties go by id."""
    by_room = sorted((count, node_id) for node_id, count in room.items() if count > 0)
    chosen = []
    while num_ranks > 0:
        enough = bisect_left(by_room, (num_ranks, ""))
        count, node_id = by_room.pop(enough if enough < len(by_room) else -1)
        chosen.append((node_id, min(num_ranks, count)))
        num_ranks -= count
    return chosen


def _spread(num_ranks: int, room: Mapping[str, int]) -> list[tuple[str, int]]:
    """Fill all nodes to one level; the emptiest ones take the ranks that are left over. Ties go by id."""
    by_room = sorted((-count, node_id) for node_id, count in room.items() if count > 0)
    level = (
        bisect_right(range(num_ranks), num_ranks, key=lambda full: sum(min(-count, full) for count, _ in by_room)) - 1
    )
    taken = {node_id: min(-count, level) for count, node_id in by_room}
    left = num_ranks - sum(taken.values())
    for count, node_id in by_room:
        if left > 0 and -count > level:
            taken[node_id] += 1
            left -= 1
    return [(node_id, count) for node_id, count in taken.items() if count > 0]


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
