"""Which queue is next: the one that used the least for its weight."""

from collections.abc import Iterable, Mapping, Sequence

from service.domain.placement import Node
from service.domain.scheduling.active import Active
from service.domain.scheduling.amount import NOTHING, Amount, amount_of, dominant_share, plus

# After so long, time that was used counts half.
HALF_LIFE_S = 24 * 3600.0
# What a queue holds counts as if it had held it for so much longer: several starts of one moment are shared out, too.
LOOKAHEAD_S = 600.0


def total_of(nodes: Iterable[Node]) -> Amount:
    """Return all that the cluster has."""
    total = NOTHING
    for node in nodes:
        total = plus(total, amount_of(node.total), 1)
    return total


def held_by_queue(active: Iterable[Active]) -> dict[str, Amount]:
    """Return what the jobs of each queue hold together."""
    held: dict[str, Amount] = {}
    for job in active:
        held[job.queue] = plus(held.get(job.queue, NOTHING), job.amount, job.num_held)
    return held


def accrued(
    usage_s: Mapping[str, float],
    active: Iterable[Active],
    nodes: Sequence[Node],
    *,
    elapsed_s: float,
    half_life_s: float = HALF_LIFE_S,
) -> dict[str, float]:
    """Return what each queue has used when a while has passed in which all this was held.

    Usage u of a queue that holds the share h of the cluster's dominant resource follows du/dt = h − λu with
    λ = ln 2 / half-life; this is its solution, so that it does not matter how a time is divided into steps.

    Args:
        usage_s: used until then: decayed seconds of the whole cluster.
        active: what held resources meanwhile.
        nodes: the cluster.
        elapsed_s: how long.
        half_life_s: after which usage counts half.
    """
    remains = 0.5 ** (elapsed_s / half_life_s)
    usage = {queue: used * remains for queue, used in usage_s.items()}
    total = total_of(nodes)
    # ∫ 2^(−t / half-life) dt over the elapsed time.
    lasting_s = (1.0 - remains) * half_life_s / _LN_2
    for queue, amount in held_by_queue(active).items():
        usage[queue] = usage.get(queue, 0.0) + dominant_share(amount, total) * lasting_s
    return usage


_LN_2 = 0.6931471805599453
