"""Masked positions take part in nothing, whatever they hold, on any rank.

The padding of these tests is NaN and Inf, so a position that leaks into a sum poisons everything after it. If only the
comparison with unpadded data fails, positions are counted wrongly.
"""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.errors import ArgumentError, SingleValueError
from tests.integration.syncbn.whole_batch import activate, draw, folded, leaves, whole_batch_norm
from tests.ranks import run_ranks

CHANNELS = 3
ACTIVATIONS = [None, "relu", "leaky_relu", "silu"]
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums in another order
# Half a unit in the last place of a bfloat16; g is stored as one as well, at up to 4 times γ/σ of up to 1.
NARROW = {"rtol": 2**-8, "atol": 2**-7}


def new_layer(dtype=torch.float64, **options) -> SyncBatchNorm:
    torch.manual_seed(1)
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def draw_masks(shapes, seed=7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((n, *spatial), generator=generator) < 0.6 for n, _, *spatial in shapes]


def poison(tensors, masks, value=torch.nan):
    """The tensors with `value` at every masked position."""
    return [
        torch.where(m.unsqueeze(1), t, torch.tensor(value, dtype=t.dtype)) for t, m in zip(tensors, masks, strict=True)
    ]


def _step(rank, inputs, residuals, masks, grads, options, with_channel_dim):
    layer = new_layer(inputs[rank].dtype, **options)
    x, residual = inputs[rank].requires_grad_(), residuals[rank].requires_grad_()
    mask = masks[rank].unsqueeze(1) if with_channel_dim else masks[rank]
    y = layer(x, residual, mask)
    y.backward(grads[rank])
    return {
        "output": y.detach(),
        "input": x.grad,
        "residual": residual.grad,
        "weight": layer.weight.grad,
        "bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
    }


def check(results, inputs, residuals, masks, grads, options, tolerance=EXACT):
    layer = new_layer(inputs[0].dtype)
    xs, rs = leaves(inputs), leaves(residuals)
    weight, bias = leaves([layer.weight, layer.bias])
    whole = whole_batch_norm(xs, weight, bias, residuals=rs, masks=masks, **options)
    torch.autograd.backward(
        whole.outputs, [torch.where(m.unsqueeze(1), dy.double(), 0) for dy, m in zip(grads, masks, strict=True)]
    )
    for rank, got in enumerate(results):
        for name, expected in (("output", whole.outputs[rank]), ("input", xs[rank].grad), ("residual", rs[rank].grad)):
            torch.testing.assert_close(
                got[name].double(),
                expected.detach(),
                **tolerance,
                msg=lambda text, name=name, rank=rank: f"{name} of rank {rank}: {text}",
            )
            hidden = ~masks[rank].unsqueeze(1).expand_as(got[name])
            assert not got[name][hidden].any()  # exactly zero, and no NaN
        unbiased = whole.var * whole.count / (whole.count - 1)
        per_channel = EXACT if tolerance is EXACT else {"rtol": 1e-6, "atol": 1e-6}
        old_mean, old_var = layer.running_mean, layer.running_var
        torch.testing.assert_close(got["running_mean"].double(), folded(old_mean, whole.mean), **per_channel)
        torch.testing.assert_close(got["running_var"].double(), folded(old_var, unbiased), **per_channel)
        assert got["num_batches_tracked"] == 1
    per_channel = EXACT if tolerance is EXACT else {"rtol": 1e-5, "atol": 1e-4}  # float32 sums of 100 products
    for name, parameter in (("weight", weight), ("bias", bias)):
        total = sum(got[name].double() for got in results)
        torch.testing.assert_close(total, parameter.grad, **per_channel)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spatial", [(), (9,), (4, 6), (3, 4, 2)], ids=lambda s: f"{len(s) + 2}-D")
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_padding_of_any_content_counts_nowhere(spatial, activation, garbage):
    shapes = [(4, CHANNELS, *spatial), (5, CHANNELS, *spatial), (0, CHANNELS, *spatial)]
    masks = draw_masks(shapes)
    inputs, residuals, grads = (poison(draw(shapes, seed), masks, garbage) for seed in (0, 1, 2))
    options = {"activation": activation, "negative_slope": 0.2}
    results = run_ranks(3, _step, inputs, residuals, masks, grads, options, True)
    check(results, inputs, residuals, masks, grads, options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_layout_and_a_mask_without_channels(dtype, memory_format):
    shapes = [(3, CHANNELS, 4, 6), (2, CHANNELS, 5, 5)]
    masks = draw_masks(shapes)
    inputs, residuals, grads = (
        [t.to(dtype, memory_format=memory_format) for t in poison(draw(shapes, seed), masks)] for seed in (0, 1, 2)
    )
    results = run_ranks(2, _step, inputs, residuals, masks, grads, {"activation": "relu"}, False)
    for got in results:
        assert got["output"].is_contiguous(memory_format=memory_format)
    check(results, inputs, residuals, masks, grads, {"activation": "relu"}, EXACT if dtype == torch.float64 else NARROW)


def test_a_rank_may_mask_all_it_has():
    shapes = [(3, CHANNELS, 4), (2, CHANNELS, 4)]
    masks = [torch.zeros(3, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)]
    inputs, residuals, grads = (poison(draw(shapes, seed), masks) for seed in (0, 1, 2))
    results = run_ranks(2, _step, inputs, residuals, masks, grads, {}, True)
    check(results, inputs, residuals, masks, grads, {})
    assert not results[0]["weight"].any()
    assert not results[0]["bias"].any()


def test_all_ranks_may_mask_all_they_have():
    shapes = [(3, CHANNELS, 4), (2, CHANNELS, 4)]
    masks = [torch.zeros(n, 4, dtype=torch.bool) for n in (3, 2)]
    inputs, residuals, grads = (poison(draw(shapes, seed), masks) for seed in (0, 1, 2))
    for got in run_ranks(2, _step, inputs, residuals, masks, grads, {"activation": "silu"}, True):
        for name in ("output", "input", "residual", "weight", "bias", "running_mean"):
            assert not got[name].any(), name
        assert got["num_batches_tracked"] == 0


def _one_valid_position(rank):
    layer, mask = SyncBatchNorm(CHANNELS), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = rank == 1
    with pytest.raises(SingleValueError, match="the whole group holds one"):
        layer(torch.randn(2, CHANNELS, 4), mask=mask)
    return layer.num_batches_tracked.item()


def test_one_valid_position_in_the_whole_group_is_refused_on_each_rank():
    assert run_ranks(2, _one_valid_position) == [0, 0]


def _ragged(rank, sequences, grads, padded):
    layer = new_layer(activation="leaky_relu")
    own, dys = sequences[rank], grads[rank]
    if padded:
        x = nn.utils.rnn.pad_sequence([s.T for s in own], batch_first=True, padding_value=torch.nan).mT
        dy = nn.utils.rnn.pad_sequence([s.T for s in dys], batch_first=True, padding_value=torch.nan).mT
        lengths = torch.tensor([s.size(1) for s in own])
        mask = torch.arange(x.size(2)) < lengths[:, None]
    else:
        x, dy, mask = torch.cat(own, 1)[None], torch.cat(dys, 1)[None], None
    x.requires_grad_()
    y = layer(x, mask=mask)
    y.backward(dy)
    if padded:
        y, dx = ([t[i, :, : len(m.nonzero())] for i, m in enumerate(mask)] for t in (y.detach(), x.grad))
        y, dx = torch.cat(y, 1), torch.cat(dx, 1)
    else:
        y, dx = y.detach()[0], x.grad[0]
    return [y, dx, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def test_padded_sequences_equal_the_sequences_without_padding():
    lengths = [[5, 9, 2], [7, 1]]
    sequences, grads = (
        [[draw([(CHANNELS, n)], seed + 10 * rank + n)[0] for n in of_rank] for rank, of_rank in enumerate(lengths)]
        for seed in (0, 1)
    )
    with_padding = run_ranks(2, _ragged, sequences, grads, True)
    without = run_ranks(2, _ragged, sequences, grads, False)
    for got, expected in zip(with_padding, without, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def _broadcast(rank, inputs, grads, shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(rank)) < 0.6
    full = mask.expand(inputs[rank].size(0), 1, *inputs[rank].shape[2:]).clone() if mask.dim() == 4 else None
    results = []
    for given in (mask, full):
        layer, x = new_layer(), inputs[rank].clone().requires_grad_()
        y = layer(x, mask=given)
        y.backward(grads[rank])
        results.append([y.detach(), x.grad, layer.weight.grad, layer.running_var])
    return results


@pytest.mark.parametrize("spatial", [(1, 1), (4, 1), (1, 6)], ids=str)
def test_a_mask_broadcasts_over_spatial_dimensions(spatial):
    shapes = [(3, CHANNELS, 4, 6)] * 2
    for short, full in run_ranks(2, _broadcast, draw(shapes, 0), draw(shapes, 1), (3, 1, *spatial)):
        assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_evaluation_hides_the_padding(activation, memory_format):
    shapes = [(3, CHANNELS, 4, 6)]
    (mask,) = masks = draw_masks(shapes)
    x, residual, dy = (
        poison(draw(shapes, seed), masks)[0].contiguous(memory_format=memory_format) for seed in (0, 1, 2)
    )
    layer = new_layer(activation=activation).eval()
    nn.init.normal_(layer.running_mean)
    x.requires_grad_()
    residual.requires_grad_()
    y = layer(x, residual, mask)
    y.backward(dy)
    assert y.is_contiguous(memory_format=memory_format)

    (x2, residual2), (weight, bias) = leaves([x, residual]), leaves([layer.weight, layer.bias])
    positions = mask.unsqueeze(1).expand_as(x)

    def per_channel(t):
        return t.view(1, -1, 1, 1).expand_as(x2)[positions]

    z = (x2[positions] - per_channel(layer.running_mean)) / per_channel(layer.running_var + 1e-5).sqrt()
    z = activate(z * per_channel(weight) + per_channel(bias) + residual2[positions], activation)
    z.backward(dy[positions])
    torch.testing.assert_close(y[positions], z, **EXACT)
    for got, expected in ((x, x2), (residual, residual2)):
        torch.testing.assert_close(got.grad[positions], expected.grad[positions], **EXACT)
        assert not got.grad[~positions].any()
    assert not y[~positions].any()
    torch.testing.assert_close(layer.weight.grad, weight.grad, **EXACT)
    torch.testing.assert_close(layer.bias.grad, bias.grad, **EXACT)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 1, 5, 6), r"mask: expected torch.bool, got torch.float32; .*mask != 0"),
        (torch.ones(4, 1, 5, 6, dtype=torch.uint8), "mask: expected torch.bool, got torch.uint8"),
        (torch.ones(4, 5, 6, dtype=torch.bool, device="meta"), r"mask: on meta, but input is on cpu; .*mask.to"),
        (
            torch.ones(4, 3, 5, 6, dtype=torch.bool),
            r"mask: expected shape \(4, 1, 5, 6\) or \(4, 5, 6\).*in all channels",
        ),
        (torch.ones(1, 1, 5, 6, dtype=torch.bool), r"mask: expected shape .*got \(1, 1, 5, 6\)"),
        (torch.ones(4, 1, 5, 7, dtype=torch.bool), "mask: expected shape"),
        (torch.ones(5, 6, dtype=torch.bool), "mask: expected shape"),
        (torch.ones(4, dtype=torch.bool), "mask: expected shape"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_does_not_fit_is_named(mask, message, training):
    with pytest.raises(ArgumentError, match=message):
        SyncBatchNorm(CHANNELS).train(training)(torch.randn(4, CHANNELS, 5, 6), mask=mask)
