"""How a world of W ranks computes the mini-batch and the normalization batches of a job.

Both batches belong to the job; the number of ranks is a detail of its execution. A plan says which samples of
each mini-batch go to which rank in which micro-step, so that every world computes the same sums.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, islice
from math import isqrt
from typing import NamedTuple

MAX_WORLD_SIZE = 4096


class NoPlan(ValueError):
    """This world cannot compute this batch exactly.

    Args:
        field: the field of the specification to change.
        reason: why not.
        remedy: which values would do.
    """

    def __init__(self, field: str, reason: str, remedy: str) -> None:
        super().__init__(field, reason, remedy)
        self.field = field
        self.reason = reason
        self.remedy = remedy

    @property
    def message(self) -> str:
        """Why not, and what to do."""
        return f"{self.reason} {self.remedy}"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class MemoryHint:
    """What is known of the memory that training takes.

    Attributes:
        bytes_per_rank: what a rank has.
        bytes_fixed: what it needs however few samples it holds: weights, gradients, optimizer, libraries.
        bytes_per_sample: what each sample adds: its activations.
    """

    bytes_per_rank: int
    bytes_fixed: int
    bytes_per_sample: int

    @property
    def max_per_rank(self) -> int:
        """Samples that a rank can hold at once."""
        return max(0, self.bytes_per_rank - self.bytes_fixed) // self.bytes_per_sample


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Micro-steps, in each of which every group of ranks computes one normalization batch.

    Groups are of consecutive ranks. In micro-step m, group g of G computes normalization batch m·G + g, its samples
    spread over its ranks as evenly as whole samples allow: earlier ranks take those that do not divide (8 over 3
    ranks: 3 + 3 + 2).

    Attributes:
        size: samples of the mini-batch, one optimizer step.
        num_normalization_batches: into how many it is cut; earlier ones take the samples that do not divide.
        group_sizes: ranks of each group.
    """

    size: int
    num_normalization_batches: int
    group_sizes: tuple[int, ...]

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(self.group_sizes)

    @property
    def num_groups(self) -> int:
        """Normalization batches that are computed side by side."""
        return len(self.group_sizes)

    @property
    def num_micro_steps(self) -> int:
        """Normalization batches that are computed one after another."""
        return self.num_normalization_batches // len(self.group_sizes)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Samples of each rank in the first micro-step, the fullest one; at least 1."""
        slices = [self.rank_slice(0, rank) for rank in range(self.world_size)]
        return tuple(int(positions.stop - positions.start) for positions in slices)

    @cached_property
    def groups(self) -> tuple[range, ...]:
        """The ranks of each group."""
        return tuple(range(end - size, end) for size, end in zip(self.group_sizes, self._group_ends, strict=True))

    def group_of(self, rank: int) -> int:
        """Return the index of a rank's group."""
        return bisect_right(self._group_ends, rank)

    @cached_property
    def _group_ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.group_sizes))

    def normalization_batch(self, micro_step: int, rank: int) -> int:
        """Return which normalization batch of the mini-batch a rank takes part in."""
        return micro_step * self.num_groups + self.group_of(rank)

    def normalization_slice(self, batch: int) -> slice:
        """Return the positions of a normalization batch within the mini-batch."""
        return _share(self.size, self.num_normalization_batches, batch)

    def rank_slice(self, micro_step: int, rank: int) -> slice:
        """Return the positions within the mini-batch that a rank computes in a micro-step."""
        whole = self.normalization_slice(self.normalization_batch(micro_step, rank))
        group = self.groups[self.group_of(rank)]
        part = _share(whole.stop - whole.start, len(group), rank - group.start)
        return slice(whole.start + part.start, whole.start + part.stop)


@lru_cache(maxsize=1024)  # many jobs have the same
def plan_batch(
    *,
    size: int,
    normalization_size: int,
    world_size: int,
    max_per_rank: int | None = None,
    memory: MemoryHint | None = None,
) -> BatchPlan:
    """Choose how a world computes a mini-batch: the fastest of the exact ways.

    The fastest way gives the busiest rank the fewest samples; of those, the one with the fewest micro-steps, whose
    smaller groups also communicate less.

    Args:
        size: samples of the mini-batch.
        normalization_size: samples normalized together. Where it does not divide ``size``, as at the end of an epoch,
            the mini-batch is cut into the fewest normalization batches of at most so many, as even as can be.
        world_size: number of ranks.
        max_per_rank: most samples that fit on a rank at once; None for no limit.
        memory: what they take, where known; limits them too.

    Returns:
        The plan: every sample once, every normalization batch whole, every rank with a sample in every micro-step.

    Raises:
        NoPlan: a rank would be handed no sample, or more than fit on it.
    """
    assert 1 <= normalization_size <= size
    number = -(-size // normalization_size)
    by_number, by_memory = _limits(size, max_per_rank, memory)
    ways = [way for way in _ways(size, number, world_size) if way.most_at_once <= min(by_number, by_memory)]
    if not ways:
        raise _no_plan(size, normalization_size, world_size, by_number, memory)
    groups = _share_out(world_size, number // min(ways).num_micro_steps)
    return BatchPlan(size=size, num_normalization_batches=number, group_sizes=groups)


def has_plan(
    *,
    size: int,
    normalization_size: int,
    world_size: int,
    max_per_rank: int | None = None,
    memory: MemoryHint | None = None,
) -> bool:
    """Tell whether there is a plan, without looking for what would do instead; arguments as of ``plan_batch``."""
    limit = min(_limits(size, max_per_rank, memory))
    return any(way.most_at_once <= limit for way in _ways(size, -(-size // normalization_size), world_size))


def _limits(size: int, max_per_rank: int | None, memory: MemoryHint | None) -> tuple[int, int]:
    """Return how many samples a rank may hold by their number, and by their memory."""
    return size if max_per_rank is None else max_per_rank, size if memory is None else memory.max_per_rank


def _share(total: int, number: int, index: int) -> slice:
    """Cut a range into equal parts, of which earlier ones take what does not divide, and return one."""
    share, extra = divmod(total, number)
    first = index * share + min(index, extra)
    return slice(first, first + share + (index < extra))


class _Way(NamedTuple):
    """A way to divide the ranks into groups; the least one is the fastest.

    Attributes:
        busiest: samples of the rank that computes the most in the mini-batch.
        num_micro_steps: in which it does.
        most_at_once: samples that a rank holds at the same time.
    """

    busiest: int
    num_micro_steps: int
    most_at_once: int


def _ways(size: int, number: int, world_size: int) -> Iterator[_Way]:
    """Yield the exact ways, those with fewer groups first.

    Groups are as even as can be, larger ones first, as are the normalization batches: where these do not fit, others
    do not fit either.
    """
    samples, num_larger = divmod(size, number)  # of a normalization batch; the first ones have one more
    for num_groups in divisors(number):
        if num_groups > world_size:
            return
        num_micro_steps = number // num_groups
        ranks, num_larger_groups = divmod(world_size, num_groups)
        rounds, rest = divmod(num_larger, num_groups)
        busiest = most_at_once = 0
        # What a group computes changes only here: from these on, groups have a rank, or a larger batch, less.
        for group in {0, num_larger_groups, rest} - {num_groups}:
            own_ranks, larger = ranks + (group < num_larger_groups), rounds + (group < rest)
            smaller = num_micro_steps - larger
            if own_ranks > samples + (smaller == 0):
                break  # a rank without a sample
            of_larger, of_smaller = -(-(samples + 1) // own_ranks), -(-samples // own_ranks)
            busiest = max(busiest, larger * of_larger + smaller * of_smaller)
            most_at_once = max(most_at_once, of_larger if larger else of_smaller)
        else:
            yield _Way(busiest, num_micro_steps, most_at_once)


def _share_out(total: int, number: int) -> tuple[int, ...]:
    share, extra = divmod(total, number)
    return (share + 1,) * extra + (share,) * (number - extra)


def _most_per_rank(size: int, number: int, world_size: int) -> int | None:
    """Return how many samples a rank must hold at the least; None where this world has no plan at all."""
    return min((way.most_at_once for way in _ways(size, number, world_size)), default=None)


def _no_plan(size: int, normalization_size: int, world_size: int, by_number: int, memory: MemoryHint | None) -> NoPlan:
    number = -(-size // normalization_size)
    by_number, by_memory = _limits(size, by_number, memory)
    limit = min(by_number, by_memory)

    def fits(world: int, number: int = number) -> bool:
        most = _most_per_rank(size, number, world)
        return most is not None and most <= limit

    worlds = sorted(range(1, min(size, MAX_WORLD_SIZE) + 1), key=lambda world: abs(world - world_size))
    remedies = [f"{near} worker(s)" for near in islice(filter(fits, worlds), 1)]
    needed = _most_per_rank(size, number, world_size)
    if needed is not None and by_number < needed <= by_memory:
        remedies.append(f"batch.max_per_rank={needed}")
    elif needed is not None and memory is not None and by_memory < needed <= by_number:
        enough = memory.bytes_fixed + needed * memory.bytes_per_sample
        remedies.append(f"resources.memory_bytes_per_rank={enough}")
    if size % normalization_size == 0:
        others = sorted(divisors(size), key=lambda other: abs(other - normalization_size))
        fitting = (other for other in others if fits(world_size, size // other))
        remedies += [f"batch.normalization_size={near}" for near in islice(fitting, 1)]
    use = f"Use {', or '.join(remedies)}." if remedies else "No number of workers can; use a smaller batch.size."
    whole = f"normalization batches of {normalization_size} of {size} samples"
    if needed is None:
        return NoPlan(
            "workers",
            f"{world_size} workers cannot share {whole}: each needs at least one sample at a time, and every "
            "normalization batch stays whole.",
            use,
        )
    if memory is None or by_number <= by_memory:
        why = f"put {needed} samples on a worker at once, more than max_per_rank={limit}"
        return NoPlan("batch.max_per_rank", f"{whole} on {world_size} worker(s) {why}.", use)
    return NoPlan(
        "resources.memory_bytes_per_rank",
        f"{whole} on {world_size} worker(s) put {needed} samples on a worker at once, more than the {limit} that "
        f"{memory.bytes_per_rank} bytes hold with {memory.bytes_fixed} fixed and {memory.bytes_per_sample} each.",
        use,
    )


@lru_cache(maxsize=256)
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number, in order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))
