"""Amounts of resources as plain tuples: a decision adds and compares hundreds of thousands of them."""

from service.domain.placement import Resources

# CPUs, GPUs, bytes of memory.
Amount = tuple[float, int, int]

NOTHING: Amount = (0.0, 0, 0)


def amount_of(resources: Resources) -> Amount:
    """Return the same as a tuple."""
    return (resources.cpus, resources.gpus, resources.memory_bytes)


def resources_of(amount: Amount) -> Resources:
    """Return the same as a value with names."""
    return Resources(cpus=amount[0], gpus=amount[1], memory_bytes=amount[2])


def plus(amount: Amount, per_rank: Amount, count: int) -> Amount:
    """Return an amount and what so many ranks need; they may be negative."""
    return (amount[0] + per_rank[0] * count, amount[1] + per_rank[1] * count, amount[2] + per_rank[2] * count)


def least(one: Amount, other: Amount) -> Amount:
    """Return the lesser of each resource."""
    return (min(one[0], other[0]), min(one[1], other[1]), min(one[2], other[2]))


def holds(free: Amount, per_rank: Amount) -> int:
    """Return how many ranks fit, as ``Resources.holds`` does."""
    cpus, gpus, memory_bytes = per_rank
    most = -1
    if cpus > 0:
        most = int(free[0] / cpus + 1e-9)  # 3 × 0.1 fit in 0.3
        if most <= 0:
            return 0
    if gpus > 0:
        count = free[1] // gpus
        if count <= 0:
            return 0
        most = count if most < 0 else min(most, count)
    if memory_bytes > 0:
        count = free[2] // memory_bytes
        if count <= 0:
            return 0
        most = count if most < 0 else min(most, count)
    return max(0, most)


def dominant_share(amount: Amount, total: Amount) -> float:
    """Return the largest part of what the cluster has of a resource that an amount is (Ghodsi et al. 2011)."""
    share = 0.0
    for part, whole in zip(amount, total, strict=True):
        if whole > 0:
            share = max(share, part / whole)
    return share
