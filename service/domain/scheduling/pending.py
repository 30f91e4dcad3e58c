"""A job that waits, as the policy sees it."""

from dataclasses import dataclass, field

from service.domain.placement import Layout, Resources
from service.domain.scheduling.amount import Amount, amount_of

# CPUs, GPUs and memory of each rank, and how many ranks.
Size = tuple[float, int, int, int]

_FOREVER_S = float("inf")


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A queued job.

    Attributes:
        id: of the job.
        queue: name of the queue that it waits in.
        owner: whose it is, for quotas.
        priority: higher comes first within its queue, and may have running jobs stopped.
        sequence: order of submission; lower comes first.
        worlds: the numbers of ranks that it may start on, largest first; never empty.
        per_rank: what each of them needs.
        layout: on as few nodes as possible, or on as many.
        duration_s: how long it will run on its largest world; None: unknown.
        obstacle: why it may not start whatever is free, such as a job that it comes after; None: it may.
        amount: ``per_rank`` as a tuple.
        fewest: the smallest number of ranks that it may start on.
        stays_s: how long it holds its resources on these, in s; infinite if that is unknown. Fewer ranks are taken to
            need longer in proportion: that is the longest it can be.
        order: its place within its queue.
        size: what has to fit; where it does not, no other job of this size does.
    """

    id: str
    queue: str
    owner: str
    priority: int
    sequence: int
    worlds: tuple[int, ...]
    per_rank: Resources
    layout: Layout = "pack"
    duration_s: float | None = None
    obstacle: str | None = None
    amount: Amount = field(init=False, repr=False, compare=False)
    fewest: int = field(init=False, repr=False, compare=False)
    stays_s: float = field(init=False, repr=False, compare=False)
    order: tuple[int, int] = field(init=False, repr=False, compare=False)
    size: "Size" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once, and not at every decision.
        amount, fewest = amount_of(self.per_rank), self.worlds[-1]
        stays_s = _FOREVER_S if self.duration_s is None else self.duration_s * self.worlds[0] / fewest
        for name, value in (
            ("amount", amount),
            ("fewest", fewest),
            ("stays_s", stays_s),
            ("order", (-self.priority, self.sequence)),
            ("size", (*amount, fewest)),
        ):
            object.__setattr__(self, name, value)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of its ranks is the policy's to choose."""
        return len(self.worlds) > 1
