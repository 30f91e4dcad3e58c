"""Running statistics of a step that held several normalization batches, against one process that ran them in order.

Wrong on all ranks alike: the order of folding. Different between ranks: the exchange. Wrong only with accumulation: the
counter of calls. float64 throughout; the statistics themselves are equal up to the order of sums.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import DeferredStatistics, SyncBatchNorm, new_sync_group
from syncbn.errors import ArgumentError
from tests.ranks import run_ranks

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def batches(count: int, size: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, count + 1, dtype=torch.float64)
    return [s + s * torch.randn(size, 3, 2, generator=generator, dtype=torch.float64) for s in scale]


class Net(nn.Module):
    def __init__(self, process_group=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first = SyncBatchNorm(3, dtype=torch.float64, process_group=process_group, **options)
        self.second = SyncBatchNorm(3, dtype=torch.float64, process_group=process_group, **options)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * 2 + 1)


def buffers(net):
    return {name: value.clone() for name, value in net.named_buffers()}


def in_order(data, steps=1, **options):
    net = Net(process_group="local", **options)
    for _ in range(steps):
        for x in data:
            net(x)
    return buffers(net)


def test_alone_committing_in_another_order_than_run_folds_in_sample_order():
    data = batches(3)
    net = Net()
    with DeferredStatistics(net) as deferred:
        for _ in range(2):
            for index in (2, 0, 1):
                with deferred.batch(index):
                    net(data[index])
            deferred.commit()
    torch.testing.assert_close(buffers(net), in_order(data, steps=2), **TOLERANCE)
    # That the order matters, or the test shows nothing.
    assert not torch.allclose(buffers(net)["first.running_mean"], in_order(data[::-1], steps=2)["first.running_mean"])


def test_nothing_changes_before_the_commit_or_after_a_discard():
    net = Net()
    before = buffers(net)
    with DeferredStatistics(net) as deferred:
        net(batches(1)[0])
        torch.testing.assert_close(buffers(net), before, rtol=0, atol=0)
        deferred.discard()
        deferred.commit()
        torch.testing.assert_close(buffers(net), before, rtol=0, atol=0)
    net(batches(1)[0])
    assert net.first.num_batches_tracked == 1  # detached: the layers fold in themselves again


@pytest.mark.parametrize("options", [{"momentum": None}, {"skip_nonfinite": True}], ids=str)
def test_the_rules_of_the_layer_hold_at_the_commit(options):
    data = batches(3)
    if "skip_nonfinite" in options:
        data[1][0, 0, 0] = torch.nan
    net = Net(**options)
    with DeferredStatistics(net) as deferred:
        for index, x in enumerate(data):
            with deferred.batch(index):
                net(x)
        deferred.commit()
    torch.testing.assert_close(buffers(net), in_order(data, **options), **TOLERANCE)
    if "skip_nonfinite" in options:
        assert net.first.num_nonfinite_batches == 1


def test_a_layer_that_runs_several_times_in_a_batch_folds_each_time_in():
    data = batches(2)
    expected = Net(process_group="local")
    for x in data:
        expected(expected(x))
    net = Net()
    with DeferredStatistics(net) as deferred:
        for index in (1, 0):
            with deferred.batch(index):
                net(net(data[index]))
        deferred.commit()
    torch.testing.assert_close(buffers(net), buffers(expected), **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_collected_once(reentrant):
    x = batches(1)[0].requires_grad_()
    net = Net()
    with DeferredStatistics(net) as deferred:
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()
        deferred.commit()
    torch.testing.assert_close(buffers(net), in_order([x.detach()]), **TOLERANCE)


def test_a_compiled_model_is_collected_too():
    torch._dynamo.reset()
    data = batches(2)
    net = Net()
    compiled = torch.compile(net, fullgraph=True)
    with DeferredStatistics(net) as deferred:
        for index in (1, 0):
            with deferred.batch(index):
                compiled(data[index])
        deferred.commit()
    torch.testing.assert_close(buffers(net), in_order(data), **TOLERANCE)


def test_a_copy_and_a_second_attachment():
    net = Net()
    with DeferredStatistics(net):
        copy.deepcopy(net)(batches(1)[0])  # the copy folds in by itself
        with pytest.raises(ArgumentError, match="close it first"):
            DeferredStatistics(net)
        assert net.first._collector is not None  # the first one is still attached
    assert net.first._collector is None
    with pytest.raises(ArgumentError, match="index"), DeferredStatistics(net) as deferred, deferred.batch(-1):
        pass


def _groups_side_by_side(rank, data, group_size, options):
    """World 4 in groups: group g runs normalization batches g, g + G, … one after another."""
    net = Net(process_group=new_sync_group(group_size), **options)
    group, place = divmod(rank, group_size)
    num_groups = dist.get_world_size() // group_size
    with DeferredStatistics(net) as deferred:
        for index in range(group, len(data), num_groups):
            with deferred.batch(index):
                net(data[index].chunk(group_size)[place])
        deferred.commit()
    return buffers(net)


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_groups_side_by_side_equal_one_process_in_sample_order(group_size, options):
    data = batches(4)
    for result in run_ranks(4, _groups_side_by_side, data, group_size, options):
        torch.testing.assert_close(result, in_order(data, **options), **TOLERANCE)


def _ghosts(rank, data):
    net = Net(ghost_size=2)
    with DeferredStatistics(net) as deferred:
        net(data[rank])
        deferred.commit()
    return buffers(net)


def test_ghost_batches_of_all_ranks_fold_in_in_sample_order():
    data = batches(2)
    expected = in_order([part for x in data for part in x.split(2)])
    for result in run_ranks(2, _ghosts, data):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def _accumulated(rank, data):
    calls = []
    gather = dist.all_gather_object
    dist.all_gather_object = lambda *args, **kwargs: calls.append(1) or gather(*args, **kwargs)
    net = Net()
    with DeferredStatistics(net) as deferred:
        for index in reversed(range(len(data))):
            with deferred.batch(index):
                net(data[index].chunk(2)[rank])
        deferred.commit()
    dist.all_gather_object = gather
    return buffers(net), len(calls)


def test_accumulation_over_all_ranks_needs_no_exchange():
    data = batches(3)
    for result, num_calls in run_ranks(2, _accumulated, data):
        torch.testing.assert_close(result, in_order(data), **TOLERANCE)
        assert num_calls == 0
