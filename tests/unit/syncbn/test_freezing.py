"""Freezing and unfreezing. A failure here means that fine-tuning changes what it was told to leave alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.errors import ConversionError
from syncbn.freezing import freeze, unfreeze


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    net[1].bias.requires_grad_(False)
    return convert_sync_batchnorm(net)


def test_a_frozen_layer_normalizes_with_its_running_statistics():
    net = freeze(model()).train()
    assert net.training
    assert net[2][1].training
    layer = net[1]
    nn.init.normal_(layer.running_mean)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(2, 4, 5, 5)
    expected = (x - layer.running_mean.view(-1, 1, 1)) / (layer.running_var.view(-1, 1, 1) + layer.eps).sqrt()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)  # float32 rounding of values of order one
    net(torch.randn(2, 3, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_parameters_stop_requiring_a_gradient_and_get_it_back():
    net = model()
    assert freeze(net) is net
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, False, False, False]
    assert unfreeze(net) is net
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False, True, True]


def test_parameters_may_go_on_learning():
    net = freeze(model(), parameters=False)
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False, True, True]
    freeze(net)
    assert not net[1].weight.requires_grad
    assert unfreeze(net)[1].weight.requires_grad


def test_unfreezing_restores_what_was():
    net = model()
    attributes = [dict(vars(module)) for module in net.modules()]
    learning = [p.requires_grad for p in net.parameters()]
    freeze(freeze(net))  # twice is the same as once
    unfreeze(unfreeze(net))
    assert [p.requires_grad for p in net.parameters()] == learning
    assert [vars(module) for module in net.modules()] == attributes


@pytest.mark.parametrize("training", [True, False])
def test_a_thawed_layer_follows_the_module_it_belongs_to(training):
    net = freeze(model())
    net.train(training)
    unfreeze(net)
    assert net[1].training == net[2][0].training == training


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_alone_gets_its_own_mode_back(training):
    layer = SyncBatchNorm(4).train(training)
    assert not freeze(layer).train().training
    assert unfreeze(layer).training == training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_frozen_and_can_be_thawed(duplicate):
    clone = duplicate(freeze(model())).train()
    assert not clone[1].training
    unfreeze(clone)
    assert clone[1].training
    assert clone[1].weight.requires_grad
    assert not clone[1].bias.requires_grad


def test_a_part_can_be_frozen():
    net = model()
    freeze(net[2])
    assert net.train()[1].training
    assert not net[2][0].training


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.BatchNorm2d(4), "1: BatchNorm2d cannot be frozen; call convert_sync_batchnorm"),
        (lambda: SyncBatchNorm(4, track_running_stats=False), "1: has no running statistics"),
    ],
)
def test_what_cannot_be_frozen_is_refused_as_a_whole(layer, message):
    net = nn.Sequential(SyncBatchNorm(4), layer())
    with pytest.raises(ConversionError, match=message):
        freeze(net)
    assert net[0].training
    assert net[0].weight.requires_grad
