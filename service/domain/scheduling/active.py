"""A job that holds resources, as the policy sees it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from service.domain.placement import Layout, Resources
from service.domain.scheduling.amount import Amount, amount_of


@dataclass(frozen=True, kw_only=True)
class Active:
    """A job with an attempt that has not been sealed.

    Attributes:
        id: of the job.
        queue: name of the queue that it came from.
        owner: whose it is, for quotas.
        priority: a waiting job of a higher one may have it stopped.
        sequence: order of submission.
        worlds: the numbers of ranks that it may go on with, largest first; never empty.
        per_rank: what each rank holds.
        layout: how its ranks are to be placed, if they are placed anew.
        node_ids: the node of each rank.
        next_node_ids: where it goes on, if it was asked to stop to be resized; held for it.
        remaining_s: how long it will still hold its resources; None: unknown.
        ran_for_s: how long the attempt has run.
        preemptions_left: how often it may still be stopped for another job.
        is_stopping: it was asked to stop, or has.
        is_movable: it is elastic and could be asked to go on with more or fewer ranks now.
        is_settled: it has run for long enough to be interrupted for growing.
        is_resize_requested: its owner asked for other workers than it has.
        amount: ``per_rank`` as a tuple.
    """

    id: str
    queue: str
    owner: str
    priority: int
    sequence: int
    worlds: tuple[int, ...]
    per_rank: Resources
    layout: Layout = "pack"
    node_ids: tuple[str, ...]
    next_node_ids: tuple[str, ...] = ()
    remaining_s: float | None = None
    ran_for_s: float = 0.0
    preemptions_left: int = 0
    is_stopping: bool = False
    is_movable: bool = False
    is_settled: bool = False
    is_resize_requested: bool = False
    amount: Amount = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", amount_of(self.per_rank))

    @property
    def world(self) -> int:
        """The number of its ranks."""
        return len(self.node_ids)

    @property
    def num_held(self) -> int:
        """The ranks that count against quotas: now, or as it goes on, whichever are more; they never run at once."""
        return max(len(self.node_ids), len(self.next_node_ids))

    @cached_property
    def own(self) -> Counter[str]:
        """How many ranks it has on each node."""
        return Counter(self.node_ids)

    @cached_property
    def held(self) -> Counter[str]:
        """How many ranks it holds room for on each node.

        One that is being resized holds its own places and those of the attempt that follows it, so that nothing else
        can take them in between.
        """
        return self.own | Counter(self.next_node_ids) if self.next_node_ids else self.own

    @property
    def leaving(self) -> Counter[str]:
        """How many ranks on each node come free when it has stopped."""
        return self.held - Counter(self.next_node_ids) if self.next_node_ids else self.own

    @property
    def spare(self) -> Counter[str]:
        """How many ranks on each node it could do without."""
        return self.beside(self.worlds[-1])

    def beside(self, world: int) -> Counter[str]:
        """Return how many ranks on each node come free if it goes on with so many of its own."""
        return self.own - Counter(self.part(world))

    def part(self, world: int) -> tuple[str, ...]:
        """Return places for fewer ranks among those that it has: on the nodes with the most of them.

        Those for a smaller world are among those for a larger one.
        """
        return most_of(self.own, world)


def most_of(ranks: Mapping[str, int], world: int) -> tuple[str, ...]:
    """Return places for so many ranks, on the nodes that have the most of them.

    Args:
        ranks: how many there may be on each node.
        world: at most as many as that in all.
    """
    by_node = sorted(ranks.items(), key=lambda item: (-item[1], item[0]))
    return tuple(node_id for node_id, count in by_node for _ in range(count))[:world]
