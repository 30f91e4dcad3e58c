"""The order of samples, and who computes which. A failure shows as curves that part between worlds, or a resume."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.domain.batch_plan import NoPlan, divisors, plan_batch
from service.domain.spec import JobSpec
from service.training.data import InMemorySource, Stream
from service.training.errors import DatasetError
from service.training.sample_plan import SamplePlan
from service.training.sampling import SampleOrder, derive_seed, permutation

seeds = st.integers(0, 2**63 - 1)


@given(num_samples=st.integers(1, 400), data=st.data(), seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_holds_each_sample_at_most_once_and_drops_only_the_rest(num_samples, data, seed, epoch):
    batch_size = data.draw(st.integers(1, num_samples))
    order = SampleOrder(num_samples=num_samples, batch_size=batch_size, seed=seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.minibatch(step) for step in steps])
    assert len(seen) == num_samples - num_samples % batch_size
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < num_samples


@given(num_samples=st.integers(1, 400), data=st.data(), seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_that_drops_nothing_holds_every_sample_once(num_samples, data, seed, epoch):
    batch_size = data.draw(st.integers(1, num_samples))
    order = SampleOrder(num_samples=num_samples, batch_size=batch_size, seed=seed, drop_last=False)
    assert order.steps_per_epoch == -(-num_samples // batch_size)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    minibatches = [order.minibatch(step) for step in steps]
    assert np.array_equal(np.sort(np.concatenate(minibatches)), np.arange(num_samples))
    sizes = [len(minibatch) for minibatch in minibatches]
    assert sizes == [batch_size] * (num_samples // batch_size) + [num_samples % batch_size] * bool(
        num_samples % batch_size
    )
    # Keeping the rest leaves the whole mini-batches as they are.
    dropping = SampleOrder(num_samples=num_samples, batch_size=batch_size, seed=seed)
    whole = range(epoch * dropping.steps_per_epoch, (epoch + 1) * dropping.steps_per_epoch)
    for step, minibatch in zip(whole, minibatches, strict=False):
        assert np.array_equal(dropping.minibatch(step), minibatch)


@given(num_samples=st.integers(1, 200), data=st.data(), drop_last=st.booleans(), epoch=st.integers(0, 5))
def test_a_stream_comes_in_its_own_order(num_samples, data, drop_last, epoch):
    batch_size = data.draw(st.integers(1, num_samples))
    order = SampleOrder(num_samples=num_samples, batch_size=batch_size, seed=0, drop_last=drop_last, shuffled=False)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = np.concatenate([order.minibatch(step) for step in steps])
    assert np.array_equal(seen, np.arange(num_samples - (num_samples % batch_size if drop_last else 0)))


@given(world_size=st.integers(1, 8), num_micro_steps=st.integers(1, 4), share=st.integers(1, 5), seed=seeds)
def test_the_ranks_together_hold_the_minibatch_in_its_order(world_size, num_micro_steps, share, seed):
    normalization_size = world_size * share + world_size // 2
    size = normalization_size * num_micro_steps
    plan = plan_batch(size=size, normalization_size=normalization_size, max_per_rank=None, world_size=world_size)
    minibatch = SampleOrder(num_samples=2 * size + 1, batch_size=size, seed=seed).minibatch(1)
    parts = [minibatch[plan.rank_slice(m, rank)] for m in range(num_micro_steps) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), minibatch)


@given(length=st.integers(0, 500), seed=seeds, index=st.integers(0, 10**6))
def test_a_permutation_is_one(length, seed, index):
    order = permutation(length, seed=seed, purpose="any", index=index)
    assert np.array_equal(np.sort(order), np.arange(length))


def test_orders_stay_the_same_from_release_to_release():
    # Written down once: a change would give every job in flight another order after an upgrade.
    assert SampleOrder(num_samples=10, batch_size=5, seed=7).minibatch(3).tolist() == [3, 1, 0, 2, 7]
    assert derive_seed(seed=7, purpose="samples", index=1) == 5321358562413411444


def test_epochs_seeds_and_purposes_do_not_share_an_order():
    keys = [(0, "samples", 0), (0, "samples", 1), (1, "samples", 0), (0, "split", 0)]
    orders = {tuple(permutation(50, seed=seed, purpose=purpose, index=index)) for seed, purpose, index in keys}
    assert len(orders) == len(keys)


class _Stream(Stream):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def read(self, epoch):
        raise AssertionError("a plan reads nothing")


def _source(num_samples):
    return InMemorySource(torch.zeros(num_samples, 1), torch.zeros(num_samples))


def _spec(**fields):
    return JobSpec.model_validate(
        {
            "name": "any",
            "model": {"factory": "my.code:model"},
            "dataset": {"factory": "my.code:data"},
            "batch": {"size": 4},
            "steps": 10,
            **fields,
        }
    )


@settings(max_examples=300)
@given(
    num_samples=st.integers(1, 120),
    data=st.data(),
    world_size=st.integers(1, 7),
    drop_last=st.booleans(),
    is_stream=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_the_ranks_of_any_world_together_compute_each_sample_of_an_epoch_once(
    num_samples, data, world_size, drop_last, is_stream, epoch
):
    size = data.draw(st.integers(1, num_samples))
    batch = {"size": size, "normalization_size": data.draw(st.sampled_from(divisors(size))), "drop_last": drop_last}
    samples = _Stream(num_samples) if is_stream else _source(num_samples)
    plan = _plan_or_none(_spec(batch=batch, seed=3), samples, world_size)
    assume(plan is not None)
    alone = SamplePlan(_spec(batch=batch, seed=3), samples, 1)
    assert plan.steps_per_epoch == alone.steps_per_epoch
    seen = Counter()
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        assert plan.epoch(step) == epoch
        assert plan.plan(step) in plan.plans
        assert plan.num_micro_steps(step) == plan.plan(step).num_micro_steps
        parts = [
            plan.rows(step, micro_step, rank)
            for micro_step, rank in product(range(plan.num_micro_steps(step)), range(world_size))
        ]
        assert all(len(part) for part in parts)
        # The same mini-batch on every world, in the same order: normalization batches are its consecutive parts.
        whole = [alone.rows(step, micro_step, 0) for micro_step in range(alone.num_micro_steps(step))]
        assert np.array_equal(np.concatenate(parts), np.concatenate(whole))
        seen.update(np.concatenate(parts).tolist())
    rest = num_samples % size if drop_last else 0
    assert set(seen.values()) == {1}
    assert len(seen) == num_samples - rest
    if is_stream:
        assert sorted(seen) == list(range(num_samples - rest))


def _plan_or_none(spec, samples, world_size):
    try:
        return SamplePlan(spec, samples, world_size)
    except NoPlan:
        return None


def test_the_partial_mini_batch_has_a_plan_of_its_own_at_the_end_of_each_epoch():
    spec = _spec(batch={"size": 8, "normalization_size": 4, "drop_last": False}, steps=None, epochs=2)
    plan = SamplePlan(spec, _source(21), 2)  # two mini-batches of 8, one of 5 as 3 + 2
    assert (plan.num_steps, plan.steps_per_epoch) == (6, 3)
    assert [plan.plan(step).size for step in range(6)] == [8, 8, 5, 8, 8, 5]
    assert [len(plan.rows(2, 0, rank)) for rank in range(2)] == [3, 2]
    assert plan.tail.num_normalization_batches == 2


@pytest.mark.parametrize(("drop_last", "num_samples"), [(True, 21), (False, 16)])
def test_there_is_no_partial_mini_batch_where_none_is_left_or_it_is_dropped(drop_last, num_samples):
    plan = SamplePlan(_spec(batch={"size": 8, "drop_last": drop_last}), _source(num_samples), 2)
    assert plan.tail is None
    assert plan.plans == (plan.full,)
    assert plan.num_steps == 10


def test_a_stream_of_unknown_length_is_one_endless_epoch():
    plan = SamplePlan(_spec(batch={"size": 8, "drop_last": False}), _Stream(None), 2)
    assert plan.tail is None
    assert plan.epoch(10**12) == 0
    assert plan.rows(10**12, 0, 1).tolist() == list(range(8 * 10**12 + 4, 8 * 10**12 + 8))


def test_epochs_of_a_stream_of_unknown_length_are_refused_with_a_remedy_that_works():
    spec = _spec(steps=None, epochs=2)
    with pytest.raises(DatasetError, match=r"^epochs: .* Give steps instead\.$"):
        SamplePlan(spec, _Stream(None), 1)
    assert SamplePlan(_spec(steps=2), _Stream(None), 1).num_steps == 2


def test_a_batch_that_is_larger_than_the_dataset_is_refused_with_a_remedy_that_works():
    with pytest.raises(
        DatasetError, match=r"^batch\.size: 4 is more than the 3 training samples\. Use at most so many"
    ):
        SamplePlan(_spec(), _source(3), 1)
    assert SamplePlan(_spec(batch={"size": 3}), _source(3), 1).num_steps == 10


def test_a_world_that_the_partial_mini_batch_does_not_fit_is_refused_with_a_remedy_that_works():
    batch = {"size": 12, "normalization_size": 2, "drop_last": False}
    with pytest.raises(NoPlan, match="last mini-batch of an epoch holds 10 samples") as caught:
        SamplePlan(_spec(batch=batch), _source(22), 3)
    assert caught.value.remedy == "Set batch.drop_last: true, or use 2 worker(s)."
    SamplePlan(_spec(batch=batch), _source(22), 2)
    SamplePlan(_spec(batch={**batch, "drop_last": True}), _source(22), 3)
