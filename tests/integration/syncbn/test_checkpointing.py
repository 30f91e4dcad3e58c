"""Activation checkpointing runs a forward twice; nothing but the memory may differ from running it once.

If outputs and gradients agree and only the buffers differ, a second forward was counted. If ranks hang, the second
forwards met in another order than the first ones.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from syncbn import DeferredStatistics, Renormalization, SyncBatchNorm
from syncbn.errors import ArgumentError
from tests.integration.syncbn.whole_batch import draw
from tests.ranks import run_ranks

CHANNELS = 4
OPTIONS = {
    "plain": {},
    "momentum=None": {"momentum": None},
    "skip_nonfinite": {"skip_nonfinite": True, "activation": "relu"},
    "silu": {"activation": "silu"},
    "ghosts": {"ghost_size": 2},
}


def new_model(options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3), SyncBatchNorm(CHANNELS, **options), nn.Tanh()),
        nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3), SyncBatchNorm(CHANNELS, **options), nn.Tanh()),
        nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3), SyncBatchNorm(CHANNELS, **options)),
    ).double()


def plainly(model, x):
    return model(x)


def reentrant(model, x):
    for block in model:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def not_reentrant(model, x):
    for block in model:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def nested(model, x):
    def inner(x):
        return model[1](checkpoint(model[0], x, use_reentrant=False))

    def outer(x):
        return model[2](checkpoint(inner, x, use_reentrant=False))

    return checkpoint(outer, x, use_reentrant=False)


def nested_reentrant(model, x):
    def inner(x):
        return model[1](checkpoint(model[0], x, use_reentrant=True))

    return model[2](checkpoint(inner, x, use_reentrant=True))


def without_early_stop(model, x):
    from torch.utils.checkpoint import set_checkpoint_early_stop

    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def in_segments(model, x):
    return checkpoint_sequential(model, 2, x, use_reentrant=False)


WAYS = [reentrant, not_reentrant, nested, nested_reentrant, without_early_stop, in_segments]


def _train(rank, inputs, way, options):
    model = new_model(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs, grads = [], []
    for step in range(2):
        x = (inputs[rank] + step).requires_grad_()
        y = way(model, x)
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
        outputs.append(y.detach())
        grads.append(x.grad)
    return outputs, grads, dict(model.named_parameters()), dict(model.named_buffers())


def assert_same(got, expected):
    for at in (0, 1):
        for a, b in zip(got[at], expected[at], strict=True):
            assert torch.equal(a, b)
    for at in (2, 3):
        assert got[at].keys() == expected[at].keys()
        for name in got[at]:
            assert torch.equal(got[at][name], expected[at][name]), name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_alone_nothing_differs(way, options):
    inputs = draw([(4, CHANNELS, 12)])
    # The same operations on the same values, so equal to the last bit.
    assert_same(_train(0, inputs, way, options), _train(0, inputs, plainly, options))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["plain", "momentum=None"])
def test_on_ranks_nothing_differs(way, name):
    inputs = draw([(4, CHANNELS, 12), (1, CHANNELS, 12)])
    expected = run_ranks(2, _train, inputs, plainly, OPTIONS[name])
    for got, plain in zip(run_ranks(2, _train, inputs, way, OPTIONS[name]), expected, strict=True):
        assert_same(got, plain)
        assert got[3]["0.1.num_batches_tracked"] == 2


RENORMALIZED = {"renormalization": Renormalization(3.0, 5.0)}


@pytest.mark.parametrize("way", [reentrant, not_reentrant], ids=lambda way: way.__name__)
def test_batch_renormalization_is_not_corrected_towards_what_has_moved_on(way):
    with pytest.raises(ArgumentError, match="attach DeferredStatistics"):
        _train(0, draw([(4, CHANNELS, 12)]), way, RENORMALIZED)


def _train_deferred(inputs, way):
    model = new_model(RENORMALIZED)
    x = inputs[0].clone().requires_grad_()
    with DeferredStatistics(model) as deferred:
        way(model, x).square().sum().backward()
        deferred.commit()
    return x.grad, dict(model.named_buffers())


@pytest.mark.parametrize("way", [reentrant, not_reentrant], ids=lambda way: way.__name__)
def test_batch_renormalization_corrects_alike_in_both_forwards_where_statistics_are_deferred(way):
    inputs = draw([(4, CHANNELS, 12)])
    torch.testing.assert_close(_train_deferred(inputs, way), _train_deferred(inputs, plainly), rtol=0, atol=0)


def test_a_forward_without_gradient_counts_in_training_mode():
    model = new_model({})
    with torch.no_grad():
        model(draw([(4, CHANNELS, 12)])[0])
    assert all(layer.num_batches_tracked == 1 for layer in model.modules() if isinstance(layer, SyncBatchNorm))
    assert model[0][1].running_mean.any()


def test_a_forward_after_a_backward_counts():
    layer = SyncBatchNorm(CHANNELS)
    for at in range(3):
        layer(torch.randn(4, CHANNELS)).sum().backward()
        assert layer.num_batches_tracked == at + 1


def test_a_backward_that_failed_leaves_forwards_counting():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError

    layer = SyncBatchNorm(CHANNELS)
    with pytest.raises(ZeroDivisionError):
        Fails.apply(layer(torch.randn(4, CHANNELS))).sum().backward()
    layer(torch.randn(4, CHANNELS))
    assert layer.num_batches_tracked == 2


def test_control_torch_s_layer_counts_twice():
    plain = nn.Sequential(nn.Conv1d(CHANNELS, CHANNELS, 3), nn.BatchNorm1d(CHANNELS)).double()
    not_reentrant([plain], draw([(4, CHANNELS, 12)])[0].requires_grad_()).sum().backward()
    assert plain[1].num_batches_tracked == 2


def test_evaluation_under_checkpointing_changes_nothing():
    model = new_model({}).eval()
    before = copy.deepcopy(model.state_dict())
    not_reentrant(model, draw([(4, CHANNELS, 12)])[0].requires_grad_()).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
