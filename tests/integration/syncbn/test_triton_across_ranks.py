"""The whole layer on the Triton kernels, on real gloo ranks, against torch.nn on the concatenated batch in float64.

Where there is no GPU, Triton's interpreter runs the kernels. What fails here while the kernels are right by themselves
is what the layer gives them or makes of their results: what is saved for the backward, what the ranks reduce, what an
empty rank launches.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from syncbn import SyncBatchNorm
from syncbn.kernels import backend_for, dispatch
from syncbn.kernels.triton import backend as kernels
from tests.integration.syncbn.whole_batch import draw, folded, leaves, whole_batch_norm
from tests.interpreter import DEVICE
from tests.ranks import run_ranks

CHANNELS = 5
SPLITS = {"even": [2, 2], "uneven": [3, 1], "one empty": [3, 0]}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# float64: sums of at most 200 values of order one, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-11}


@contextmanager
def on_triton():
    """CPU tensors get the Triton kernels; tensors on a GPU have them already."""
    with mock.patch.multiple(dispatch, native_kernels=kernels, eager=kernels):
        assert backend_for(torch.zeros(1, device=DEVICE)) is kernels
        yield


def new_layer(**options) -> SyncBatchNorm:
    torch.manual_seed(1)
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var)
    return layer


def _step(rank, inputs, grads, residuals, masks, options, layout="contiguous"):
    """One forward and backward: all that they leave behind."""
    layer = new_layer(**options).to(DEVICE)
    x, dy = (batch[rank].to(DEVICE).contiguous(memory_format=LAYOUTS[layout]) for batch in (inputs, grads))
    residual = None if residuals is None else residuals[rank].to(DEVICE).requires_grad_()
    with on_triton():
        y = layer(x.requires_grad_(), residual, None if masks is None else masks[rank].to(DEVICE))
        y.backward(dy)
    assert y.stride() == x.grad.stride() == x.stride() or x.numel() == 0  # strides of nothing mean nothing
    buffers = dict(layer.named_buffers())
    return {
        "output": y.detach().cpu(),
        "dx": x.grad.cpu(),
        "dresidual": None if residual is None else residual.grad.cpu(),
        "dweight": layer.weight.grad.cpu(),
        "dbias": layer.bias.grad.cpu(),
        **{name: buffer.cpu() for name, buffer in buffers.items()},
    }


def batches(split: list[int], *spatial: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shapes = [(n, CHANNELS, *(spatial or (3, 4))) for n in split]
    return draw(shapes, 0), draw(shapes, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_step_is_batch_norm_s_on_the_whole_batch(split, layout):
    inputs, grads = batches(SPLITS[split])
    results = run_ranks(2, _step, inputs, grads, None, None, {}, layout)
    plain = nn.BatchNorm2d(CHANNELS).double()
    plain.load_state_dict(new_layer().state_dict())
    (x,) = leaves([torch.cat(inputs)])
    y = plain(x)
    y.backward(torch.cat(grads))
    torch.testing.assert_close(torch.cat([got["output"] for got in results]), y.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([got["dx"] for got in results]), x.grad, **EXACT)
    torch.testing.assert_close(sum(got["dweight"] for got in results), plain.weight.grad, **EXACT)
    torch.testing.assert_close(sum(got["dbias"] for got in results), plain.bias.grad, **EXACT)
    for got in results:
        for name, value in plain.named_buffers():
            torch.testing.assert_close(got[name], value, **EXACT)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fusions_and_masks(activation, with_residual, masked):
    inputs, grads = batches(SPLITS["uneven"])
    residuals = [dy.sin() for dy in grads] if with_residual else None
    masks = None
    if masked:
        masks = [torch.rand(x[:, 0].shape, generator=torch.Generator().manual_seed(5)) < 0.6 for x in inputs]
        for batch in (inputs, grads, *([residuals] if with_residual else [])):
            for t, mask in zip(batch, masks, strict=True):
                t.masked_fill_(~mask.unsqueeze(1), torch.nan)
    results = run_ranks(2, _step, inputs, grads, residuals, masks, {"activation": activation})

    layer, xs = new_layer(), leaves(inputs)
    weight, bias = leaves([layer.weight, layer.bias])
    rs = leaves(residuals) if with_residual else None
    truth = whole_batch_norm(xs, weight, bias, residuals=rs, masks=masks, activation=activation)
    torch.autograd.backward(truth.outputs, [dy.nan_to_num() for dy in grads])
    for rank, got in enumerate(results):
        torch.testing.assert_close(got["output"], truth.outputs[rank].detach(), **EXACT)
        torch.testing.assert_close(got["dx"], xs[rank].grad, **EXACT)
        if rs is not None:
            torch.testing.assert_close(got["dresidual"], rs[rank].grad, **EXACT)
        torch.testing.assert_close(got["running_mean"], folded(layer.running_mean, truth.mean), **EXACT)
        unbiased = truth.var * truth.count / (truth.count - 1)
        torch.testing.assert_close(got["running_var"], folded(layer.running_var, unbiased), **EXACT)
    torch.testing.assert_close(sum(got["dweight"] for got in results), weight.grad, **EXACT)
    torch.testing.assert_close(sum(got["dbias"] for got in results), bias.grad, **EXACT)


def _several_batches(rank, inputs, options):
    layer, states = new_layer(**options).to(DEVICE), []
    with on_triton():
        for batch in inputs:
            layer(batch[rank].to(DEVICE))
            states.append({name: buffer.clone().cpu() for name, buffer in layer.named_buffers()})
    return states


def test_the_cumulative_average_over_ranks_that_are_empty_at_times():
    first, last = batches(SPLITS["uneven"])[0], batches([0, 4])[0]
    nothing = batches([0, 0])[0]
    plain = nn.BatchNorm2d(CHANNELS, momentum=None).double()
    plain.load_state_dict(new_layer().state_dict())
    for batch in (first, last):
        plain(torch.cat(batch))
    for states in run_ranks(2, _several_batches, [first, nothing, last], {"momentum": None}):
        for name, value in plain.named_buffers():
            torch.testing.assert_close(states[-1][name], value, **EXACT)


def test_a_nan_on_one_rank_is_counted_on_each_and_left_out_on_each():
    good, bad = batches(SPLITS["even"])[0], batches(SPLITS["even"])[0]
    bad[1][0, 2, 1, 1] = torch.nan
    for states in run_ranks(2, _several_batches, [good, bad], {"skip_nonfinite": True}):
        before, after = states
        assert after.pop("num_nonfinite_batches") == before.pop("num_nonfinite_batches") + 1 == 1
        for name, value in before.items():
            assert torch.equal(after[name], value), name


def _penalty(rank, inputs, grads, options):
    layer, x = new_layer(**options).to(DEVICE), inputs[rank].to(DEVICE).requires_grad_()
    with on_triton():
        loss = (layer(x).square() * grads[rank].to(DEVICE)).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + dx.square().sum()).backward()
    return dx.detach().cpu(), x.grad.cpu(), layer.weight.grad.cpu(), layer.bias.grad.cpu()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])  # of which none saves an output here
def test_the_gradient_of_the_gradient_is_the_whole_batch_s(activation):
    inputs, grads = batches(SPLITS["uneven"], 4)
    results = run_ranks(2, _penalty, inputs, grads, {"activation": activation})
    layer, xs = new_layer(), leaves(inputs)
    weight, bias = leaves([layer.weight, layer.bias])
    ys = whole_batch_norm(xs, weight, bias, activation=activation).outputs
    loss = sum((y.square() * dy).sum() for y, dy in zip(ys, grads, strict=True))
    dxs = torch.autograd.grad(loss, xs, create_graph=True)
    (loss + sum(dx.square().sum() for dx in dxs)).backward()
    exact = {"rtol": 1e-10, "atol": 1e-9}  # terms of up to 1e3 that partly cancel
    for rank, (dx, penalized, _, _) in enumerate(results):
        torch.testing.assert_close(dx, dxs[rank].detach(), **exact)
        torch.testing.assert_close(penalized, xs[rank].grad, **exact)
    torch.testing.assert_close(sum(r[2] for r in results), weight.grad, **exact)
    torch.testing.assert_close(sum(r[3] for r in results), bias.grad, **exact)


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"momentum": None, "skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_traced_layer_computes_what_an_eager_one_does(options, masked):
    inputs, grads = batches([4])
    x, dy = inputs[0].to(DEVICE), grads[0].to(DEVICE)
    mask = x[:, 0] > -0.5 if masked else None
    results = []
    torch._dynamo.reset()
    with on_triton():
        for trace in (False, True):
            layer, leaf = new_layer(**options).to(DEVICE), x.clone().requires_grad_()
            call = torch.compile(layer, backend="aot_eager", fullgraph=True) if trace else layer
            y = call(leaf, None, mask)
            y.backward(dy)
            results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    torch._dynamo.reset()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, **EXACT)
