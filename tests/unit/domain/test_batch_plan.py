"""The batch plan alone. A failure means that ranks would train on other samples than the job's specification says."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.domain.batch_plan import NoPlan, divisors, plan_batch


@st.composite
def _batches(draw):
    """A mini-batch and a normalization batch that divides it, small enough to enumerate."""
    size = draw(st.integers(1, 240))
    return size, draw(st.sampled_from(divisors(size)))


_worlds = st.integers(1, 24)
_limits = st.one_of(st.none(), st.integers(1, 60))


def _plan_or_none(size, normalization_size, max_per_rank, world_size):
    try:
        return plan_batch(
            size=size, normalization_size=normalization_size, max_per_rank=max_per_rank, world_size=world_size
        )
    except NoPlan:
        return None


@given(batch=_batches(), limit=_limits, world_size=_worlds)
def test_every_sample_is_computed_exactly_once(batch, limit, world_size):
    plan = _plan_or_none(*batch, limit, world_size)
    assume(plan is not None)
    seen = [
        position
        for micro_step in range(plan.num_micro_steps)
        for rank in range(world_size)
        for position in range(plan.size)[plan.rank_slice(micro_step, rank)]
    ]
    # In order too: the samples of a normalization batch lie together, and ranks take them from first to last.
    assert seen == list(range(plan.size))


@given(batch=_batches(), limit=_limits, world_size=_worlds)
def test_shares_are_even_within_one_and_nobody_is_left_without(batch, limit, world_size):
    plan = _plan_or_none(*batch, limit, world_size)
    assume(plan is not None)
    assert len(plan.counts) == world_size
    assert sum(plan.counts) == batch[1]
    assert min(plan.counts) >= 1
    assert max(plan.counts) - min(plan.counts) <= 1
    assert list(plan.counts) == sorted(plan.counts, reverse=True)
    assert limit is None or max(plan.counts) <= limit


@given(batch=_batches(), limit=_limits, world_size=_worlds)
def test_a_world_is_refused_only_if_no_even_spread_fits(batch, limit, world_size):
    fits = world_size <= batch[1] and (limit is None or limit * world_size >= batch[1])
    assert (_plan_or_none(*batch, limit, world_size) is not None) == fits


@given(batch=_batches(), limit=_limits, world_size=_worlds)
def test_every_remedy_that_a_refusal_names_works_by_itself(batch, limit, world_size):
    size, normalization_size = batch
    assume(_plan_or_none(size, normalization_size, limit, world_size) is None)
    with pytest.raises(NoPlan) as caught:
        plan_batch(size=size, normalization_size=normalization_size, max_per_rank=limit, world_size=world_size)
    error = caught.value
    assert error.field in ("workers", "batch.max_per_rank")
    assert str(error) == f"{error.field}: {error.message}"
    remedy = error.message.partition("Use ")[2]
    (workers,) = map(int, re.findall(r"at (?:most|least) (\d+) workers", remedy))
    assert _plan_or_none(size, normalization_size, limit, workers)
    for other in map(int, re.findall(r"batch\.normalization_size=(\d+)", remedy)):
        assert size % other == 0
        assert _plan_or_none(size, other, limit, world_size)
    for other in map(int, re.findall(r"batch\.max_per_rank=(\d+)", remedy)):
        assert _plan_or_none(size, normalization_size, other, world_size)


def test_the_remainder_goes_to_the_first_ranks():
    plan = plan_batch(size=16, normalization_size=8, max_per_rank=None, world_size=3)
    assert plan.counts == (3, 3, 2)
    assert plan.num_micro_steps == 2
    assert [plan.rank_slice(1, rank) for rank in range(3)] == [slice(8, 11), slice(11, 14), slice(14, 16)]


@given(number=st.integers(1, 3000))
def test_divisors_are_those_of_the_definition(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]
