"""The monitor in one process: what it watches, when it samples, and that it leaves the layers as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.diagnostics import monitor
from syncbn.errors import ArgumentError


def model() -> nn.Sequential:
    return convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    )


def test_a_rank_alone_has_nothing_to_differ_from():
    net = model()
    with monitor(net, every=2) as watch:
        for _ in range(5):
            net(torch.randn(2, 3, 6, 6))
        reports = watch.report()
    assert list(reports) == [report.name for report in reports.values()] == ["1", "2.0"]
    for report in reports.values():
        assert report.num_samples == 3  # of forwards 0, 2 and 4
        assert report.between_rank_share == report.raw_between_rank_share == 0
        assert report.between_rank_share_per_channel == (0,) * 4
        assert report.sync_time_s is None
        assert report.running_statistics_equal


def test_before_the_first_sample_there_is_no_figure():
    net = nn.Sequential(SyncBatchNorm(4, track_running_stats=False), SyncBatchNorm(4)).eval()
    with monitor(net) as watch:
        net[1](torch.randn(2, 4))  # evaluation reduces nothing
        for report in watch.report().values():
            assert report.num_samples == 0
            assert report.between_rank_share is None
            assert report.between_rank_share_per_channel is None
            assert report.raw_between_rank_share is None
        assert watch.report()["0"].running_statistics_equal is None
        assert watch.report()["1"].running_statistics_equal


@pytest.mark.parametrize(
    "x", [torch.full((3, 4), torch.nan), torch.empty(0, 4), torch.tensor([[1.0, torch.inf, 0, 0], [0, 0, 0, 0]])]
)
def test_batches_that_say_nothing_do_not_count(x):
    layer = SyncBatchNorm(4)
    with monitor(layer, every=1) as watch:
        layer(x)
        layer(torch.randn(3, 4))
        report = watch.report()["the module itself"]
    assert report.num_samples == 1
    assert report.between_rank_share == 0


def test_a_recomputed_forward_is_not_sampled_again():
    layer = SyncBatchNorm(4)
    with monitor(layer, every=1) as watch:
        checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=False).sum().backward()
        assert watch.report()["the module itself"].num_samples == 1


def test_closing_leaves_no_trace():
    net = model()
    before = [copy.copy(vars(module)) for module in net.modules()]
    watch = monitor(net)
    assert copy.deepcopy(net)[1]._probe is None
    watch.close()
    watch.close()
    assert [vars(module) for module in net.modules()] == before
    assert watch.report()["1"].num_samples == 0


def test_what_cannot_be_watched_is_refused():
    net = model()
    with pytest.raises(ArgumentError, match="every: expected at least 1"):
        monitor(net, every=0)
    with pytest.raises(ArgumentError, match="module: has no SyncBatchNorm"):
        monitor(nn.Sequential(nn.BatchNorm2d(3)))
    with monitor(net[2]), pytest.raises(ArgumentError, match=r"module: 2\.0 is being watched already"):
        monitor(net)
    assert net[1]._probe is None
    monitor(net).close()
