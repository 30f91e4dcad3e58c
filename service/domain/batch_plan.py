"""How a world of W ranks computes the mini-batch and the normalization batch of a job.

Both batches belong to the job; the number of ranks is a detail of its execution. A plan says which samples of
each mini-batch go to which rank in which micro-step, so that every world computes the same sums.
"""

from dataclasses import dataclass
from itertools import accumulate
from math import isqrt


class NoPlan(ValueError):
    """This world cannot compute this batch exactly.

    Args:
        field: the field of the specification to change.
        message: why not, and which values would do.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Micro-steps, each of one normalization batch spread over all ranks.

    Attributes:
        size: samples of a mini-batch, one optimizer step.
        normalization_size: samples whose statistics are computed together.
        world_size: number of ranks.
        counts: samples of one micro-step on each rank, ``world_size`` of them, all at least one; they sum to
            ``normalization_size`` and are the same in every micro-step.
    """

    size: int
    normalization_size: int
    world_size: int
    counts: tuple[int, ...]

    @property
    def num_micro_steps(self) -> int:
        """Normalization batches in a mini-batch."""
        return self.size // self.normalization_size

    def rank_slice(self, micro_step: int, rank: int) -> slice:
        """Return the positions within the mini-batch that a rank computes in a micro-step."""
        ends = list(accumulate(self.counts))
        first = micro_step * self.normalization_size
        return slice(first + ends[rank] - self.counts[rank], first + ends[rank])


def plan_batch(*, size: int, normalization_size: int, max_per_rank: int | None, world_size: int) -> BatchPlan:
    """Spread each normalization batch over the ranks as evenly as whole samples allow.

    Args:
        size: samples of a mini-batch.
        normalization_size: samples normalized together; divides ``size``.
        max_per_rank: most samples that fit on a rank at once; None for no limit.
        world_size: number of ranks.

    Returns:
        The plan; earlier ranks take the samples that do not divide evenly (8 over 3 ranks: 3 + 3 + 2).

    Raises:
        NoPlan: a rank would be handed no sample, or more than ``max_per_rank``.
    """
    assert normalization_size >= 1
    assert size % normalization_size == 0
    most_per_rank = size if max_per_rank is None else max_per_rank
    if world_size > normalization_size:
        fitting = _fitting(size, most_per_rank, world_size)
        other = f", or batch.normalization_size={fitting[0]}" if fitting else ""
        raise NoPlan(
            "workers",
            f"{world_size} workers cannot share a normalization batch of {normalization_size} samples: each needs "
            f"at least one. Use at most {normalization_size} workers{other}.",
        )
    share, extra = divmod(normalization_size, world_size)
    most = share + (extra > 0)
    if most > most_per_rank:
        needed = -(-normalization_size // most_per_rank)
        fitting = _fitting(size, most_per_rank, world_size)
        other = f", or batch.normalization_size={fitting[-1]}" if fitting else ""
        raise NoPlan(
            "batch.max_per_rank",
            f"{normalization_size} samples normalized together on {world_size} worker(s) put {most} on one, more than "
            f"max_per_rank={max_per_rank}. Use at least {needed} workers, or batch.max_per_rank={most}{other}.",
        )
    counts = tuple(share + (rank < extra) for rank in range(world_size))
    return BatchPlan(size=size, normalization_size=normalization_size, world_size=world_size, counts=counts)


def _fitting(size: int, most_per_rank: int, world_size: int) -> list[int]:
    """What this world could normalize together."""
    return [n for n in divisors(size) if world_size <= n <= world_size * most_per_rank]


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in order."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
