"""Placement of one gang. A failure means over-committed nodes, half a gang, or advice that contradicts placement."""

from collections import Counter
from fractions import Fraction
from itertools import combinations, groupby

from hypothesis import assume, given
from hypothesis import strategies as st

from service.domain.placement import Node, Resources, why_not
from tests.unit.domain.scheduling.examples import place_gang

# Tenths of a CPU: sums of such shares are where floating point misleads.
_tenths = st.integers(1, 40).map(lambda tenths: tenths / 10)
_per_rank = st.builds(
    Resources, cpus=_tenths, gpus=st.integers(0, 2), memory_bytes=st.sampled_from([0, 2**20, 2**30 + 1, 2**42 + 1])
)
_amounts = st.builds(
    Resources,
    cpus=st.integers(0, 80).map(lambda tenths: tenths / 10),
    gpus=st.integers(0, 4),
    memory_bytes=st.sampled_from([0, 2**30, 2**31 + 2, 2**42, 3 * 2**42 + 3]),
)
_clusters = st.lists(_amounts, max_size=5).map(lambda totals: {f"node-{n}": total for n, total in enumerate(totals)})


def _tenths_of(cpus):
    return Fraction(round(cpus * 10), 10)


def _room(total, per_rank):
    """How many ranks fit, in exact arithmetic."""
    limits = [_tenths_of(total.cpus) // _tenths_of(per_rank.cpus)]
    if per_rank.gpus:
        limits.append(total.gpus // per_rank.gpus)
    if per_rank.memory_bytes:
        limits.append(total.memory_bytes // per_rank.memory_bytes)
    return min(limits)


@given(total=_amounts, per_rank=_per_rank)
def test_a_node_holds_as_many_ranks_as_exact_arithmetic_says(total, per_rank):
    assert total.holds(per_rank) == _room(total, per_rank)


@given(free=_clusters, per_rank=_per_rank, num_ranks=st.integers(1, 12))
def test_all_ranks_are_placed_or_none_and_no_node_is_over_committed(free, per_rank, num_ranks):
    room = {node_id: _room(amount, per_rank) for node_id, amount in free.items()}
    placed = place_gang(num_ranks, per_rank, free)
    assert (placed is None) == (sum(room.values()) < num_ranks)
    if placed is not None:
        assert len(placed) == num_ranks
        assert all(count <= room[node_id] for node_id, count in Counter(placed).items())


@given(free=_clusters, per_rank=_per_rank, num_ranks=st.integers(1, 12))
def test_a_gang_takes_as_few_nodes_as_any_placement_could(free, per_rank, num_ranks):
    placed = place_gang(num_ranks, per_rank, free)
    assume(placed is not None)
    room = [_room(amount, per_rank) for amount in free.values()]
    fewest = next(
        count
        for count in range(1, len(room) + 1)
        if any(sum(chosen) >= num_ranks for chosen in combinations(room, count))
    )
    assert len(set(placed)) == fewest
    # The ranks of a node are consecutive, so that neighbours talk within a machine.
    assert len(list(groupby(placed))) == fewest


@given(free=_clusters, per_rank=_per_rank, num_ranks=st.integers(1, 12), data=st.data())
def test_the_choice_is_a_function_of_what_is_free_and_not_of_its_order(free, per_rank, num_ranks, data):
    shuffled = dict(data.draw(st.permutations(list(free.items()))))
    assert place_gang(num_ranks, per_rank, shuffled) == place_gang(num_ranks, per_rank, free)


def test_a_gang_goes_where_it_fits_tightest():
    free = {"large": Resources(cpus=8), "small": Resources(cpus=2), "medium": Resources(cpus=4)}
    assert place_gang(2, Resources(cpus=1), free) == ("small", "small")
    assert place_gang(3, Resources(cpus=1), free) == ("medium",) * 3
    assert place_gang(9, Resources(cpus=1), free) == ("large",) * 8 + ("small",)


def test_a_node_that_shrank_below_what_it_runs_takes_nothing():
    assert place_gang(1, Resources(cpus=1), {"node": Resources(cpus=-2)}) is None
    assert Resources(cpus=-2, memory_bytes=-5).holds(Resources(cpus=1, memory_bytes=5)) == 0


@given(totals=st.lists(_amounts, max_size=4), per_rank=_per_rank, num_ranks=st.integers(1, 12))
def test_why_not_agrees_with_placement_on_the_empty_cluster(totals, per_rank, num_ranks):
    nodes = [Node(id=f"node-{n}", address="", total=total) for n, total in enumerate(totals)]
    placed = place_gang(num_ranks, per_rank, {node.id: node.total for node in nodes})
    message = why_not(num_ranks, per_rank, nodes)
    assert (message is None) == (placed is not None)
    if message is not None:
        assert str(per_rank) in message
        assert f"{len(nodes)} node(s)" in message


def test_the_advice_of_why_not_works():
    nodes = [Node(id="a", address="", total=Resources(cpus=4)), Node(id="b", address="", total=Resources(cpus=3))]
    message = why_not(9, Resources(cpus=1), nodes)
    assert "Use at most 7 workers" in message
    assert why_not(7, Resources(cpus=1), nodes) is None
    assert "no node of the cluster holds a worker of 5 CPU" in why_not(1, Resources(cpus=5), nodes)


@given(first=_amounts, second=_amounts, count=st.integers(0, 5))
def test_amounts_add_up(first, second, count):
    there_and_back = first + second - second
    assert (there_and_back.gpus, there_and_back.memory_bytes) == (first.gpus, first.memory_bytes)
    assert abs(there_and_back.cpus - first.cpus) < 1e-9  # CPUs are floats of magnitude 10
    repeated = sum([first] * count, Resources())
    assert repeated.gpus == first.times(count).gpus
    assert repeated.memory_bytes == first.times(count).memory_bytes
    assert abs(repeated.cpus - first.times(count).cpus) < 1e-9
