"""When a job that does not fit now will, and where: what others that go first must leave it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.domain.placement import choose_nodes
from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import Amount, holds, plus
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.room import Hold, Room


@dataclass(frozen=True, kw_only=True)
class Release:
    """Ranks that go away.

    Attributes:
        in_s: when.
        ranks: how many on each node.
        per_rank: what each of them gives back.
    """

    in_s: float
    ranks: Mapping[str, int]
    per_rank: Amount


def releases_of(active: Iterable[Active]) -> list[Release]:
    """Return what active jobs will give back; nothing of those whose end is not known.

    What an elastic job has beyond its fewest ranks counts as free at once: it gives them up when that lets a job start.
    """
    releases = []
    for job in active:
        stays = job.leaving
        if not job.is_stopping and len(job.worlds) > 1 and job.world > job.worlds[-1]:
            spare = job.spare
            releases.append(Release(in_s=0.0, ranks=spare, per_rank=job.amount))
            stays = stays - spare
        if job.remaining_s is not None:
            releases.append(Release(in_s=job.remaining_s, ranks=stays, per_rank=job.amount))
    return releases


def find_hold(job: Pending, room: Room, releases: Sequence[Release]) -> Hold | None:
    """Return the earliest room for a job, given what ends when; None if that is not known.

    Args:
        job: that does not fit now.
        room: with what is held for others, whose room it does not touch.
        releases: by time.
    """
    amount, left = job.amount, room.later()
    counts = {node_id: holds(free, amount) for node_id, free in left.items()}
    total = sum(counts.values())
    from_s, place = 0.0, 0
    while total < job.fewest:
        if place == len(releases):
            return None
        from_s = releases[place].in_s
        while place < len(releases) and releases[place].in_s <= from_s:
            release = releases[place]
            for node_id, count in release.ranks.items():
                if node_id in left:
                    left[node_id] = plus(left[node_id], release.per_rank, count)
                    total -= counts[node_id]
                    counts[node_id] = holds(left[node_id], amount)
                    total += counts[node_id]
            place += 1
    ranks = dict(choose_nodes(job.fewest, counts, job.layout))
    spare = {node_id: plus(left[node_id], amount, -count) for node_id, count in ranks.items()}
    return Hold(job_id=job.id, per_rank=amount, from_s=from_s, is_known=True, ranks=ranks, spare=spare)


def hold_all(job: Pending, room: Room, totals: Mapping[str, Amount]) -> Hold:
    """Return a hold of all that a job could ever use.

    Whatever ends first: what others take beside it makes it wait no longer. On a node that holds at most r of its
    ranks, that is what is free now beyond r of them, and all of a resource that it does not use.

    Args:
        job: for which it is not known when it starts, or that should have by now.
        room: what is free now.
        totals: all that each node has.
    """
    ranks = {node_id: count for node_id, total in totals.items() if (count := holds(total, job.amount)) > 0}
    spare = {node_id: plus(room.free[node_id], job.amount, -count) for node_id, count in ranks.items()}
    return Hold(job_id=job.id, per_rank=job.amount, from_s=0.0, is_known=False, ranks=ranks, spare=spare)
