"""The order of samples. A failure here shows as curves that differ between worlds, or after a resume."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.domain.batch_plan import plan_batch
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
