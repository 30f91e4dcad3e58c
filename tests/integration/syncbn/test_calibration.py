"""Recalibration across ranks: the statistics are those of everything that any rank's layer saw."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.calibration import recalibrate
from syncbn.errors import ArgumentError
from tests.ranks import run_ranks

# Sums of a few thousand float64 values, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def draw(sizes: list[list[int]]) -> list[list[torch.Tensor]]:
    """Batches by rank; every batch of its own mean and deviation."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            3 * rank + torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) * (1 + i)
            for i, n in enumerate(mine)
        ]
        for rank, mine in enumerate(sizes)
    ]


def truth(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)  # (C, all values)
    return values.mean(1), values.var(1)


def normalized_together(xs: list[torch.Tensor]) -> torch.Tensor:
    """What layers with γ = 1 and β = 0 make of the ranks' samples together."""
    x = torch.cat(xs)
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()


def _recalibrate(rank, kinds, sizes, process_group=None):
    """Two layers in a row; their statistics."""
    make = {
        "sync": lambda: SyncBatchNorm(3, dtype=torch.float64),
        "local": lambda: SyncBatchNorm(3, process_group="local", dtype=torch.float64),
        "plain": lambda: nn.BatchNorm2d(3, dtype=torch.float64),
    }
    net = nn.Sequential(*(make[kind]() for kind in kinds))
    recalibrate(net, iter(draw(sizes)[rank]), process_group=process_group)
    return [(layer.running_mean, layer.running_var, int(layer.num_batches_tracked)) for layer in net]


@pytest.mark.parametrize("sizes", [[[2, 3], [4, 1]], [[2, 1], [3, 0], [1, 4]]])
def test_statistics_of_synchronized_layers(sizes):
    results = run_ranks(len(sizes), _recalibrate, ("sync", "sync"), sizes)
    batches = draw(sizes)
    second = [normalized_together([mine[i] for mine in batches]) for i in range(2)]
    for (mean, var, count), inputs in zip(results[0], ([x for mine in batches for x in mine], second), strict=True):
        torch.testing.assert_close((mean, var), truth(inputs), **EXACT)
        assert count == 2
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("kind", ["local", "plain"])
def test_layers_that_do_not_synchronize_are_pooled_over_what_each_rank_has(kind):
    sizes = [[2, 3, 2], [4], []]
    batches = draw(sizes)
    results = run_ranks(3, _recalibrate, (kind,), sizes)
    for [(mean, var, count)] in results:
        torch.testing.assert_close((mean, var), truth([x for mine in batches for x in mine]), **EXACT)
        assert count == 3


def test_this_rank_alone():
    sizes = [[2, 3], [4]]
    batches = draw(sizes)
    for mine, [(mean, var, count)] in zip(batches, run_ranks(2, _recalibrate, ("plain",), sizes, "local"), strict=True):
        torch.testing.assert_close((mean, var), truth(mine), **EXACT)
        assert count == len(mine)


def test_ranks_that_synchronize_stop_together():
    sizes = [[2, 3, 1], [4], [2, 2]]
    batches = draw(sizes)
    for [(mean, var, count)] in run_ranks(3, _recalibrate, ("sync",), sizes):
        torch.testing.assert_close((mean, var), truth([mine[0] for mine in batches]), **EXACT)
        assert count == 1


def _with_a_mask(rank, sizes):
    batches = draw(sizes)[rank]
    layer = SyncBatchNorm(3, dtype=torch.float64)
    recalibrate(layer, batches, forward=lambda module, x: module(x, mask=x[:, 0] > rank))
    return layer.running_mean, layer.running_var


def test_masked_positions_count_on_no_rank():
    sizes = [[2, 3], [4, 1]]
    valid = [x.transpose(0, 1)[:, x[:, 0] > rank].unsqueeze(0) for rank, mine in enumerate(draw(sizes)) for x in mine]
    for statistics in run_ranks(2, _with_a_mask, sizes):
        torch.testing.assert_close(statistics, truth(valid), **EXACT)


def _too_small(rank):
    pair = [dist.new_group([0, 1]), dist.new_group([2])][rank // 2]
    with pytest.raises(ArgumentError, match=r"process_group: 0 synchronizes with ranks .* would wait"):
        recalibrate(nn.Sequential(SyncBatchNorm(3)), [torch.randn(2, 3)], process_group=pair)
    return True


def test_a_group_that_lacks_ranks_that_layers_synchronize_with_is_refused():
    assert all(run_ranks(3, _too_small))


def _nothing(rank):
    with pytest.raises(ArgumentError, match="batches: there was none on any rank"):
        recalibrate(SyncBatchNorm(3), [torch.randn(2, 3)] * rank)
    return True


def test_every_rank_hears_that_one_has_nothing():
    assert all(run_ranks(2, _nothing))
