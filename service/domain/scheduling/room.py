"""What each node has left, now and where room is held for jobs that start later."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.domain.placement import Layout, Node, choose_nodes
from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import Amount, amount_of, holds, least, plus


@dataclass(kw_only=True)
class Hold:
    """Room that is held for a job from some time on.

    Attributes:
        job_id: of the job.
        per_rank: what each of its ranks needs.
        from_s: when it starts; 0 if that is not known.
        is_known: whether it is.
        ranks: how many ranks it has on each node; where its time is unknown, the most that the node could ever hold.
        spare: what each of these nodes has beside them at that time, for those who stay longer.
    """

    job_id: str
    per_rank: Amount
    from_s: float
    is_known: bool
    ranks: Mapping[str, int]
    spare: dict[str, Amount]


@dataclass(kw_only=True)
class _Fit:
    """How many ranks of one size each node holds, as of a point in the history of takes."""

    counts: dict[str, int]
    total: int
    seen: int


class Room:
    """Amounts by node id; only of nodes that are there.

    Args:
        free: what each node has left.
    """

    def __init__(self, free: Mapping[str, Amount]) -> None:
        self._free = dict(free)
        self._holds: list[Hold] = []
        # Nodes in the order of changes: what is known of sizes is brought up to date where it is asked for.
        self._touched: list[str] = []
        self._fits: dict[tuple[Amount, int], _Fit] = {}

    @classmethod
    def beside(cls, active: Iterable[Active], nodes: Sequence[Node]) -> "Room":
        """Return what nodes have left beside all that active jobs hold."""
        room = cls({node.id: amount_of(node.total) for node in nodes})
        for job in active:
            room.take(job.held, job.amount)
        return room

    @property
    def free(self) -> Mapping[str, Amount]:
        """What each node has left."""
        return self._free

    def copy(self) -> "Room":
        """Return the same room without what is held for later, to try something out."""
        return Room(self._free)

    def has_nodes(self, node_ids: Iterable[str]) -> bool:
        """Return whether all of these nodes are there."""
        return all(node_id in self._free for node_id in node_ids)

    def num_fitting(self, per_rank: Amount, duration_s: float = 0.0) -> int:
        """Return how many ranks fit.

        Args:
            per_rank: what each needs.
            duration_s: how long they stay; those that stay until others are to start must leave these their room.
        """
        return self._fit(per_rank, duration_s).total

    def place(
        self, num_ranks: int, per_rank: Amount, *, layout: Layout = "pack", duration_s: float = 0.0
    ) -> tuple[str, ...] | None:
        """Return a node for each rank of a gang; None if there are more of them than ``num_fitting``."""
        fit = self._fit(per_rank, duration_s)
        if fit.total < num_ranks:
            return None
        chosen = choose_nodes(num_ranks, fit.counts, layout)
        return tuple(node_id for node_id, count in chosen for _ in range(count))

    def take(self, ranks: Mapping[str, int], per_rank: Amount, duration_s: float = 0.0) -> None:
        """Take what so many ranks on each node need."""
        binding = self._num_binding(duration_s)
        for node_id, count in ranks.items():
            if node_id in self._free:
                self._free[node_id] = plus(self._free[node_id], per_rank, -count)
                for hold in self._holds[:binding]:
                    if node_id in hold.spare:
                        hold.spare[node_id] = plus(hold.spare[node_id], per_rank, -count)
                self._touched.append(node_id)

    def give(self, ranks: Mapping[str, int], per_rank: Amount) -> None:
        """Give back what so many ranks on each node have."""
        self.take({node_id: -count for node_id, count in ranks.items()}, per_rank)

    def later(self) -> dict[str, Amount]:
        """Return what each node has left beside all that is held for later, as if it began now; may be negative."""
        left = dict(self._free)
        for hold in self._holds:
            for node_id, count in hold.ranks.items():
                left[node_id] = plus(left[node_id], hold.per_rank, -count)
        return left

    def hold(self, hold: Hold) -> None:
        """Hold room for later from now on."""
        for earlier in self._holds:
            if earlier.from_s >= hold.from_s:
                for node_id, count in hold.ranks.items():
                    if node_id in earlier.spare:
                        earlier.spare[node_id] = plus(earlier.spare[node_id], hold.per_rank, -count)
        self._holds.append(hold)
        self._holds.sort(key=lambda hold: hold.from_s)
        self._fits.clear()

    def _num_binding(self, duration_s: float) -> int:
        """Return how many holds begin before the end of something that starts now."""
        return bisect_left(self._holds, duration_s, key=lambda hold: hold.from_s) if self._holds else 0

    def _fit(self, per_rank: Amount, duration_s: float) -> _Fit:
        binding = self._num_binding(duration_s)
        key = (per_rank, binding)
        fit = self._fits.get(key)
        if fit is None:
            counts = {node_id: holds(self._left(node_id, binding), per_rank) for node_id in self._free}
            fit = self._fits[key] = _Fit(counts=counts, total=sum(counts.values()), seen=len(self._touched))
        elif fit.seen < len(self._touched):
            for node_id in self._touched[fit.seen :]:
                count = holds(self._left(node_id, binding), per_rank)
                fit.total += count - fit.counts[node_id]
                fit.counts[node_id] = count
            fit.seen = len(self._touched)
        return fit

    def _left(self, node_id: str, binding: int) -> Amount:
        left = self._free[node_id]
        for hold in self._holds[:binding]:
            spare = hold.spare.get(node_id)
            if spare is not None:
                left = least(left, spare)
        return left
