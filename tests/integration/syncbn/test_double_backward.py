"""Derivatives of the gradient: every term against finite differences in one process, and a gradient penalty on ranks.

If gradcheck fails, the first derivative out of plain operations is wrong; if only gradgradcheck fails, something in it
was taken for a constant. If only ranks fail, an all-reduce is missing from the second backward, or its adjoint.
"""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from syncbn import Renormalization, SyncBatchNorm, sync_batch_norm
from tests.integration.syncbn.whole_batch import draw, leaves, whole_batch_norm
from tests.ranks import run_ranks

CHANNELS = 3
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]


def _arguments(residual: bool, masked: bool, affine: bool = True):
    shape = (3, 2, 3)
    x, r = draw([shape], 0, spread=1)[0], draw([shape], 1)[0]
    weight, bias = torch.tensor([1.5, -0.7]).double(), torch.tensor([0.3, 0.2]).double()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]) == 1 if masked else None
    tensors = [x, weight if affine else None, bias if affine else None, r if residual else None]
    return [t if t is None else t.requires_grad_() for t in tensors], mask


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_both_derivatives_equal_finite_differences(activation, residual, masked):
    tensors, mask = _arguments(residual, masked)

    def layer(x, weight, bias, r=None):
        return sync_batch_norm(
            x, None, None, weight, bias, training=True, residual=r, activation=activation, negative_slope=0.3, mask=mask
        )

    given = [t for t in tensors if t is not None]
    assert gradcheck(layer, given)
    assert gradgradcheck(layer, given)


def test_without_weight_and_bias():
    (x, *_), _ = _arguments(residual=False, masked=False, affine=False)

    def layer(x):
        return sync_batch_norm(x, None, None, None, None, training=True, activation="silu")

    assert gradcheck(layer, [x])
    assert gradgradcheck(layer, [x])


def test_under_batch_renormalization():
    (x, weight, bias, _), _ = _arguments(residual=False, masked=False)
    mean, var = torch.tensor([0.4, -0.3]).double(), torch.tensor([2.0, 0.5]).double()

    def layer(x, weight, bias):
        # r and d are constants to the gradient but not to finite differences: limits that bite make them so.
        limits = Renormalization(r_max=1.01, d_max=0.01)
        return sync_batch_norm(x, mean.clone(), var.clone(), weight, bias, training=True, renormalization=limits)

    assert gradcheck(layer, [x, weight, bias])
    assert gradgradcheck(layer, [x, weight, bias])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_differentiable_gradient_equals_the_quick_one(activation):
    tensors, mask = _arguments(residual=True, masked=True)
    results = []
    for create_graph in (False, True):
        y = sync_batch_norm(
            tensors[0], None, None, *tensors[1:3], training=True, residual=tensors[3], activation=activation, mask=mask
        )
        results.append(torch.autograd.grad(y.sin().sum(), tensors, create_graph=create_graph))
    for quick, differentiable in zip(*results, strict=True):
        torch.testing.assert_close(differentiable, quick, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_padding_of_any_content_reaches_no_second_derivative(activation):
    (x, weight, bias, residual), mask = _arguments(residual=True, masked=True)
    results = []
    for garbage in (torch.nan, 0.0):
        padded = [torch.where(mask.unsqueeze(1), t.detach(), garbage).requires_grad_() for t in (x, residual)]
        dy = torch.where(mask.unsqueeze(1), draw([x.shape], 2)[0], garbage)
        y = sync_batch_norm(
            padded[0], None, None, weight, bias, training=True, residual=padded[1], activation=activation, mask=mask
        )
        wanted = [padded[0], weight, bias, padded[1]]
        first = torch.autograd.grad(y, wanted, dy, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        results.append([penalty.detach(), *torch.autograd.grad(penalty, wanted, materialize_grads=True)])
    for poisoned, clean in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-12, atol=1e-12)


SPLITS = [[2, 3], [1, 0, 4], [2, 1, 3]]


def _new_layer(options) -> SyncBatchNorm:
    torch.manual_seed(1)
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _penalty(rank, inputs, grads, options, masks):
    layer, x = _new_layer(options), inputs[rank].requires_grad_()
    y = layer(x, mask=None if masks is None else masks[rank])
    loss = (y.square() * grads[rank]).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    # One gradient per sample of the whole batch, so every rank's penalty depends on every rank's input.
    (loss + dx.square().sum()).backward()
    return dx.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.num_batches_tracked


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_gradient_penalty_over_ranks_is_the_whole_batch_s(split, activation, masked):
    options = {"activation": activation}
    shapes = [(n, CHANNELS, 4) for n in split]
    inputs, grads = draw(shapes, 0), draw(shapes, 1)
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(n, 4, generator=generator) < 0.7 for n in split] if masked else None
    results = run_ranks(len(split), _penalty, inputs, grads, options, masks)

    layer, xs = _new_layer({}), leaves(inputs)
    weight, bias = leaves([layer.weight, layer.bias])
    ys = whole_batch_norm(xs, weight, bias, masks=masks, **options).outputs
    loss = sum((y.square() * dy).sum() for y, dy in zip(ys, grads, strict=True))
    dxs = torch.autograd.grad(loss, xs, create_graph=True)
    (loss + sum(dx.square().sum() for dx in dxs)).backward()
    exact = {"rtol": 1e-10, "atol": 1e-9}  # float64; terms of up to 1e3 that partly cancel
    for rank, (dx, penalized, _, _, num_batches) in enumerate(results):
        torch.testing.assert_close(dx, dxs[rank].detach(), **exact)
        torch.testing.assert_close(penalized, xs[rank].grad, **exact)
        assert num_batches == 1
    torch.testing.assert_close(sum(r[2] for r in results), weight.grad, **exact)
    torch.testing.assert_close(sum(r[3] for r in results), bias.grad, **exact)


def _control(rank, inputs, grads):
    layer = SyncBatchNorm(CHANNELS, process_group="local", dtype=torch.float64)
    x = inputs[rank].requires_grad_()
    (dx,) = torch.autograd.grad((layer(x).square() * grads[rank]).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return x.grad


def test_control_a_local_penalty_differs():
    shapes = [(2, CHANNELS, 4), (3, CHANNELS, 4)]
    inputs, grads = draw(shapes, 0), draw(shapes, 1)
    xs = leaves(inputs)
    ys = whole_batch_norm(xs, None, None).outputs
    dxs = torch.autograd.grad(
        sum((y.square() * dy).sum() for y, dy in zip(ys, grads, strict=True)), xs, create_graph=True
    )
    sum(dx.square().sum() for dx in dxs).backward()
    for x, penalized in zip(xs, run_ranks(2, _control, inputs, grads), strict=True):
        assert (x.grad - penalized).abs().max() > 0.1


def _third(rank, inputs):
    layer, x = _new_layer({"activation": "silu"}), inputs[rank].requires_grad_()
    value = layer(x).square().sum()
    for _ in range(2):
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        value = dx.square().sum()
    value.backward()
    return x.grad


def test_a_third_derivative_over_ranks():
    inputs = draw([(2, CHANNELS), (3, CHANNELS)], 0)
    layer, xs = _new_layer({}), leaves(inputs)
    value = sum(y.square().sum() for y in whole_batch_norm(xs, layer.weight, layer.bias, activation="silu").outputs)
    for _ in range(2):
        value = sum(dx.square().sum() for dx in torch.autograd.grad(value, xs, create_graph=True))
    value.backward()
    for x, got in zip(xs, run_ranks(2, _third, inputs), strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-8, atol=1e-8)  # three orders of cancelling terms
