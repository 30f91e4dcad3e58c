"""Recalibration in one process: the statistics are those of everything that a layer saw, and nothing else changes."""

import copy
import logging

import pytest
import torch
from torch import nn

from syncbn import DeferredStatistics, Renormalization, SyncBatchNorm, convert_sync_batchnorm
from syncbn.calibration import recalibrate
from syncbn.diagnostics import monitor
from syncbn.errors import ArgumentError
from syncbn.freezing import freeze

# Sums of a few thousand float64 values, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Net(nn.Module):
    """Two batch norms in a row, dropout, and one that is never reached."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.bn1 = SyncBatchNorm(3, dtype=torch.float64, **options)
        self.dropout = nn.Dropout()
        self.conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
        self.bn2 = nn.BatchNorm2d(4, dtype=torch.float64)
        self.unreached = SyncBatchNorm(4, dtype=torch.float64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.bn2(self.conv(self.dropout(self.bn1(x, mask=mask)))).relu()


def draw(sizes: tuple[int, ...] = (4, 1, 3)) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [5 + torch.randn(n, 3, 6, 6, dtype=torch.float64) * (i + 1) for i, n in enumerate(sizes)]


def truth(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], dim=1)  # (C, all values)
    return values.mean(1), values.var(1)


def assert_statistics(layer: nn.Module, inputs: list[torch.Tensor], num_batches: int) -> None:
    mean, var = truth(inputs)
    torch.testing.assert_close(layer.running_mean, mean, **EXACT)
    torch.testing.assert_close(layer.running_var, var, **EXACT)
    assert layer.num_batches_tracked == num_batches


def normalized(x: torch.Tensor) -> torch.Tensor:
    """What a layer with γ = 1 and β = 0 makes of a batch on its own."""
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()


def test_statistics_are_those_of_every_input_together():
    net, batches = Net(), draw()
    nn.init.constant_(net.bn1.running_mean, torch.nan)  # is no part of the result
    before = copy.deepcopy(net.unreached.state_dict())
    assert recalibrate(net, batches) is net
    assert_statistics(net.bn1, batches, 3)
    assert_statistics(net.bn2, [net.conv(normalized(x)) for x in batches], 3)
    assert all(torch.equal(value, before[name]) for name, value in net.unreached.state_dict().items())


def test_a_layer_that_was_not_reached_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        recalibrate(Net(), draw())
    assert [record.getMessage() for record in caplog.records] == [
        "unreached met fewer than two values per channel; its running statistics stay as they were"
    ]


def test_float32_inputs_keep_float64_accuracy():
    torch.manual_seed(0)
    batches = [1e3 + torch.randn(8, 3, 5, 5) for _ in range(4)]
    layer = recalibrate(SyncBatchNorm(3), batches)
    mean, var = truth([x.double() for x in batches])
    half_unit = 2**-24  # the statistics are float32
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1.01 * half_unit, atol=0)
    # d² in float32 about a tile's mean, 200 values to a tile at most.
    torch.testing.assert_close(layer.running_var.double(), var, rtol=4e-6, atol=0)


def test_modes_hooks_and_attributes_are_as_before():
    net = Net(renormalization=Renormalization())
    net.conv.eval()
    net.bn2.eval()
    attributes = [copy.copy(vars(module)) for module in net.modules()]
    modes_inside = []

    def forward(module, batch):
        modes_inside.append({name for name, m in module.named_modules() if m.training})
        return module(batch)

    recalibrate(net, draw(), forward=forward)
    assert modes_inside[0] == {"bn1", "bn2", "unreached"}
    for module, before in zip(net.modules(), attributes, strict=True):
        # What the layer sees of its inputs belongs to conversion.
        assert {**vars(module), "_input_dims": None} == {**before, "_input_dims": None}
        assert not module._forward_pre_hooks


def test_renormalization_does_not_let_the_old_statistics_in():
    net, batches = Net(renormalization=Renormalization(3, 5)), draw()
    nn.init.constant_(net.bn1.running_mean, 100)
    recalibrate(net, batches)
    assert_statistics(net.bn2, [net.conv(normalized(x)) for x in batches], 3)


def test_ghost_batches_are_pooled():
    net, batches = Net(ghost_size=2), draw((4, 2))
    recalibrate(net, batches)
    assert_statistics(net.bn1, batches, 2)
    ghosts = [normalized(ghost) for x in batches for ghost in x.split(2)]
    assert_statistics(net.bn2, [net.conv(ghost) for ghost in ghosts], 2)


def test_masked_positions_do_not_count():
    net, batches = Net(), draw()
    masks = [torch.rand(x.size(0), 6, 6) < 0.5 for x in batches]
    recalibrate(net, list(zip(batches, masks, strict=True)), forward=lambda module, batch: module(batch[0], batch[1]))
    valid = [x.transpose(0, 1)[:, mask].unsqueeze(0) for x, mask in zip(batches, masks, strict=True)]
    assert_statistics(net.bn1, valid, 3)


def test_a_batch_of_inputs_and_targets():
    net, batches = Net(), draw()
    recalibrate(net, [[x, torch.zeros(x.size(0))] for x in batches])
    assert_statistics(net.bn1, batches, 3)


def test_no_more_batches_are_drawn_than_asked_for():
    net, batches = Net(), draw()
    iterator = iter(batches)
    recalibrate(net, iterator, num_batches=2)
    assert_statistics(net.bn1, batches[:2], 2)
    assert torch.equal(next(iterator), batches[2])


def test_frozen_layers_and_layers_without_statistics_are_left_alone():
    net = nn.Sequential(
        freeze(SyncBatchNorm(3, dtype=torch.float64)),
        SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64),
        nn.BatchNorm2d(3, dtype=torch.float64),
    )
    nn.init.constant_(net[0].running_mean, 2)
    batches = draw()
    recalibrate(net, batches)
    assert torch.equal(net[0].running_mean, torch.full((3,), 2.0, dtype=torch.float64))
    assert not net[0].training
    assert_statistics(net[2], [normalized((x - 2) / (1 + 1e-5) ** 0.5) for x in batches], 3)


def test_a_model_without_statistics_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3, track_running_stats=False))
    recalibrate(net, [])


def test_who_watches_or_collects_otherwise_is_not_disturbed():
    net, batches = Net(), draw()
    with monitor(net, every=1) as watch, DeferredStatistics(net) as deferred:
        net(batches[0])
        recalibrate(net, batches[1:])
        assert_statistics(net.bn1, batches[1:], 2)
        assert watch.report()["bn1"].num_samples == 1
        deferred.commit()
        assert net.bn1.num_batches_tracked == 3
        net(batches[1])
        assert watch.report()["bn1"].num_samples == 2


class Activated(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def test_converted_subclasses_are_reached():
    net, batches = convert_sync_batchnorm(nn.Sequential(Activated(3))).double(), draw()
    recalibrate(net, batches)
    assert_statistics(net[0], batches, 3)


def test_a_compiled_model_is_reached():
    net, batches = Net(), draw((2, 2))
    recalibrate(torch.compile(net, backend="eager"), batches)
    assert_statistics(net.bn1, batches, 2)


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interruption])
def test_after_an_error_everything_is_as_before(error):
    net = Net().train()
    net.conv.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]

    def forward(module, batch):
        module(batch)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        recalibrate(net, draw(), forward=forward)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(draw()[0])
    assert net.bn1.num_batches_tracked == net.bn2.num_batches_tracked == 1  # training tracks again


def test_a_nan_is_refused_and_nothing_is_set():
    net, batches = Net(), draw()
    before = copy.deepcopy(net.state_dict())
    batches[1][0, 0] = torch.nan
    with pytest.raises(ArgumentError, match="batches: the input of bn1 held a NaN or an Inf"):
        recalibrate(net, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_layers_that_skip_nonfinite_batches_skip_them_here():
    layer, batches = SyncBatchNorm(3, dtype=torch.float64, skip_nonfinite=True), draw()
    layer(torch.full((2, 3, 4, 4), torch.inf, dtype=torch.float64))
    batches[1][0, 0] = torch.nan
    recalibrate(layer, batches)
    assert_statistics(layer, [batches[0], batches[2]], 3)
    assert layer.num_nonfinite_batches == 1  # of training


def test_no_batch_at_all_is_refused():
    with pytest.raises(ArgumentError, match="batches: there was none"):
        recalibrate(Net(), iter([]))
    with pytest.raises(ArgumentError, match="num_batches: expected at least 1"):
        recalibrate(Net(), draw(), num_batches=0)
