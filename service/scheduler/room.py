"""What each node has left beside what attempts hold; pure."""

from collections import Counter
from collections.abc import Mapping, Sequence

from service.domain.job import Attempt, Reason
from service.domain.placement import Node, Resources, place_gang
from service.domain.ports import LiveAttempt


class Room:
    """Amounts by node id; only of nodes that are there.

    Args:
        free: what each node has left.
    """

    def __init__(self, free: Mapping[str, Resources]) -> None:
        self._free = dict(free)

    @classmethod
    def beside(cls, live: Sequence[LiveAttempt], nodes: Sequence[Node]) -> "Room":
        """Return what nodes have left beside all that live attempts hold."""
        room = cls({node.id: node.total for node in nodes})
        for entry in live:
            room.take(held_by(entry.attempt), entry.job.spec.resources_per_rank)
        return room

    def copy(self) -> "Room":
        """Return the same room, to try something out."""
        return Room(self._free)

    def has_nodes(self, node_ids: Sequence[str]) -> bool:
        """Return whether all of these nodes are there."""
        return all(node_id in self._free for node_id in node_ids)

    def place(self, num_ranks: int, per_rank: Resources) -> tuple[str, ...] | None:
        """Return a node for each rank of a gang; None if there are more of them than ``num_fitting``."""
        return place_gang(num_ranks, per_rank, self._free)

    def num_fitting(self, per_rank: Resources) -> int:
        """Return how many ranks fit."""
        return sum(amount.holds(per_rank) for amount in self._free.values())

    def take(self, ranks: Mapping[str, int], per_rank: Resources) -> None:
        """Take what so many ranks on each node need."""
        for node_id, count in ranks.items():
            if node_id in self._free:
                self._free[node_id] = self._free[node_id] - per_rank.times(count)

    def give(self, ranks: Mapping[str, int], per_rank: Resources) -> None:
        """Give back what so many ranks on each node have."""
        self.take({node_id: -count for node_id, count in ranks.items()}, per_rank)


def held_by(attempt: Attempt) -> Counter[str]:
    """Return how many ranks an attempt holds room for on each node.

    One that is being resized holds its own places and those of the attempt that follows it, so that nothing else can
    take them in between.
    """
    return Counter(attempt.node_ids) | next_of(attempt)


def next_of(attempt: Attempt) -> Counter[str]:
    """Return the places of the attempt that follows one that is being resized; none otherwise."""
    return Counter(attempt.target_node_ids if attempt.stop_reason is Reason.RESIZED else ())
