"""Residual and activation in the layer's pass against separate operations on the concatenated batch.

If only the gradients are off, the backward takes the wrong side of zero or forgets the residual; if only narrow types
are off, something is rounded that should stay in float32.
"""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from tests.integration.syncbn.whole_batch import draw, folded, leaves, whole_batch_norm
from tests.ranks import run_ranks

CHANNELS = 5
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]
SHAPES = [(3, CHANNELS, 4, 6), (0, CHANNELS, 4, 6), (1, CHANNELS, 2, 3)]
# Reordered float64 sums; one rounding each of x − p, scale and sum at outputs of up to 10 for float32; half a unit in
# the last place of what is stored for the narrow types.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 2e-6, "atol": 5e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 5e-6},
    torch.float16: {"rtol": 2**-11, "atol": 5e-6},
}


def new_layer(dtype: torch.dtype, **options) -> SyncBatchNorm:
    torch.manual_seed(1)
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _step(rank, inputs, residuals, grads, options, memory_format):
    layer = new_layer(inputs[rank].dtype, **options)
    x = inputs[rank].contiguous(memory_format=memory_format).requires_grad_()
    residual = None if residuals is None else residuals[rank].requires_grad_()
    y = layer(x, residual)
    assert y.dtype == x.dtype
    assert y.is_contiguous(memory_format=memory_format)
    y.backward(grads[rank])
    got = {"output": y.detach(), "input": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    if residual is not None:
        got["residual"] = residual.grad
    return got, layer.running_mean, layer.running_var


def expected_of(inputs, residuals, grads, options):
    layer = new_layer(inputs[0].dtype)
    xs, rs = leaves(inputs), None if residuals is None else leaves(residuals)
    whole = whole_batch_norm(xs, layer.weight.double(), layer.bias.double(), residuals=rs, **options)
    torch.autograd.backward(whole.outputs, [dy.double() for dy in grads], retain_graph=True)
    own = []  # each rank's own part of dγ and dβ
    for rank, dy in enumerate(grads):
        gamma, beta = leaves([layer.weight, layer.bias])
        output = whole_batch_norm(xs, gamma, beta, residuals=rs, **options).outputs[rank]
        own.append(torch.autograd.grad(output, [gamma, beta], dy.double()))
    return whole, xs, rs, own


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_pass_equals_separate_operations(dtype, activation, with_residual, memory_format):
    inputs, residuals, grads = ([t.to(dtype) for t in draw(SHAPES, seed)] for seed in (0, 1, 2))
    if not with_residual:
        residuals = None
    options = {"activation": activation, "negative_slope": 0.3}
    results = run_ranks(3, _step, inputs, residuals, grads, options, memory_format)
    whole, xs, rs, own = expected_of(inputs, residuals, grads, options)
    for rank, (got, running_mean, running_var) in enumerate(results):
        expected = {"output": whole.outputs[rank], "input": xs[rank].grad, "weight": own[rank][0], "bias": own[rank][1]}
        if rs is not None:
            expected["residual"] = rs[rank].grad
        for name, value in expected.items():
            assert got[name].dtype == (new_layer(dtype).weight.dtype if name in ("weight", "bias") else dtype)
            tolerance = dict(TOLERANCE[got[name].dtype])
            if name in ("weight", "bias"):
                tolerance["atol"] *= 20  # sums of 72 products of up to 10
            elif name == "input" and activation is not None:
                # g itself is stored in x's dtype: half a unit in the last place of up to 2, times γ/σ of up to 1.
                tolerance["atol"] += torch.finfo(dtype).eps
            torch.testing.assert_close(
                got[name].double(),
                value.detach(),
                **tolerance,
                msg=lambda text, name=name, rank=rank: f"{name} of rank {rank}: {text}",
            )
        unbiased = whole.var * whole.count / (whole.count - 1)
        zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        torch.testing.assert_close(running_mean.double(), folded(zeros, whole.mean), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(running_var.double(), folded(ones, unbiased), rtol=1e-6, atol=1e-6)


def test_the_truth_is_torch_s_batch_norm():
    inputs, residuals, grads = (draw([(3, CHANNELS, 4), (2, CHANNELS, 4)], seed) for seed in (0, 1, 2))
    plain = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    nn.init.normal_(plain.weight)
    x = torch.cat(inputs).requires_grad_()
    y = nn.functional.silu(plain(x) + torch.cat(residuals))
    y.backward(torch.cat(grads))
    xs, (weight, bias) = leaves(inputs), leaves([plain.weight, plain.bias])
    whole = whole_batch_norm(xs, weight, bias, residuals=residuals, activation="silu")
    torch.autograd.backward(whole.outputs, grads)
    for got, expected in (
        (torch.cat(whole.outputs), y),
        (torch.cat([leaf.grad for leaf in xs]), x.grad),
        (weight.grad, plain.weight.grad),
        (bias.grad, plain.bias.grad),
        (folded(torch.ones(CHANNELS), whole.var * whole.count / (whole.count - 1)), plain.running_var),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def _zeros_and_ties(rank, activation):
    layer = SyncBatchNorm(2, activation=activation, dtype=torch.float64)
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0]], dtype=torch.float64).requires_grad_()
    y = layer(x)  # the first channel is constant: every value is exactly at the activation's zero
    y.backward(torch.ones_like(y))
    return y.detach(), layer.bias.grad


@pytest.mark.parametrize(("activation", "slope_at_zero"), [("relu", 0.0), ("leaky_relu", 0.01), ("silu", 0.5)])
def test_the_slope_at_zero_is_torch_s(activation, slope_at_zero):
    for y, dbias in run_ranks(2, _zeros_and_ties, activation):
        assert torch.equal(y[:, 0], torch.zeros(2, dtype=torch.float64))
        assert dbias[0] == 2 * slope_at_zero
        z = torch.zeros((), dtype=torch.float64, requires_grad=True)
        getattr(nn.functional, activation)(z).backward()
        assert z.grad == slope_at_zero


def _residual_is_the_input(rank, inputs, grads):
    layer, x = new_layer(torch.float64, activation="silu"), inputs[rank].requires_grad_()
    layer(x, x).backward(grads[rank])
    return x.grad


def test_the_input_may_be_its_own_residual():
    inputs, grads = draw(SHAPES, 0), draw(SHAPES, 2)
    layer, xs = new_layer(torch.float64), leaves(inputs)
    whole = whole_batch_norm(xs, layer.weight, layer.bias, residuals=xs, activation="silu")
    torch.autograd.backward(whole.outputs, grads)
    for x, dx in zip(xs, run_ranks(3, _residual_is_the_input, inputs, grads), strict=True):
        torch.testing.assert_close(dx, x.grad, **TOLERANCE[torch.float64])
