"""Ghost batches against one torch layer per chunk, batch renormalization against its paper's formula in float64.

Of the running statistics a wrong order of ghosts shows in the mean, a biased variance in the variance. Where batch
renormalization's output is right and its gradient wrong, r or d was not a constant.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import Renormalization, SyncBatchNorm
from syncbn.errors import ArgumentError, SingleValueError
from tests.integration.syncbn.whole_batch import Correction, draw, folded, leaves, whole_batch_norm
from tests.ranks import run_ranks

CHANNELS = 3
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64, sums in another order


def _init(layer):
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if layer.running_mean is not None:
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def ghosts_of(x, size):
    """As many whole ghosts as fit; the last one takes what is left over."""
    return x.tensor_split(list(range(size, size * max(1, len(x) // size), size)))


def assert_equals_torch_per_chunk(layer, x, dy):
    plain = nn.BatchNorm2d(CHANNELS, momentum=layer.momentum, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    (mine, theirs) = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    y = layer(mine)
    y.backward(dy)
    expected = torch.cat([plain(chunk) for chunk in ghosts_of(theirs, layer.ghost_size)])
    expected.backward(dy)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(mine.grad, theirs.grad, **EXACT)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, **EXACT)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), value, **EXACT)
    return y


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(("num_samples", "ghost_size"), [(6, 2), (7, 3), (5, 5), (4, 9), (3, 1)])
def test_ghosts_are_torch_s_layer_per_chunk(num_samples, ghost_size, momentum):
    shapes = [(num_samples, CHANNELS, 4, 2)]
    layer = _init(SyncBatchNorm(CHANNELS, ghost_size=ghost_size, momentum=momentum, dtype=torch.float64))
    assert_equals_torch_per_chunk(layer, draw(shapes, 0)[0], draw(shapes, 1)[0])
    assert layer.num_batches_tracked == max(1, num_samples // ghost_size)


def test_ghosts_keep_the_memory_format():
    x, dy = (draw([(5, CHANNELS, 4, 2)], seed)[0].contiguous(memory_format=torch.channels_last) for seed in (0, 1))
    layer = _init(SyncBatchNorm(CHANNELS, ghost_size=2, dtype=torch.float64))
    assert assert_equals_torch_per_chunk(layer, x, dy).is_contiguous(memory_format=torch.channels_last)


def _ghosts_on_ranks(rank, inputs, grads):
    layer = _init(SyncBatchNorm(CHANNELS, ghost_size=2, dtype=torch.float64))
    with torch.autograd.profiler.profile() as profile:
        assert_equals_torch_per_chunk(layer, inputs[rank], grads[rank])
    names = {event.name for event in profile.function_events}
    assert not {name for name in names if "allreduce" in name or "all_reduce" in name}
    dist.barrier()  # ranks had different numbers of ghosts, and nobody waits for anybody
    return layer.running_mean


def test_ghosts_communicate_nothing():
    shapes = [(6, CHANNELS, 4, 2), (3, CHANNELS, 4, 2)]
    first, second = run_ranks(2, _ghosts_on_ranks, draw(shapes, 0), draw(shapes, 1))
    assert not torch.equal(first, second)


def test_ghosts_with_residual_mask_and_activation():
    shapes = [(5, CHANNELS, 4)]
    (x,), (residual,), (dy,) = (draw(shapes, seed) for seed in (0, 1, 2))
    mask = torch.arange(4) < torch.tensor([4, 2, 1, 1, 3])[:, None]
    layer = _init(SyncBatchNorm(CHANNELS, ghost_size=2, activation="silu", dtype=torch.float64))
    mine, mine_residual = (t.clone().requires_grad_() for t in (x, residual))
    y = layer(mine, mine_residual, mask)
    y.backward(dy)
    xs, rs = leaves(ghosts_of(x, 2)), leaves(ghosts_of(residual, 2))
    weight, bias = leaves([layer.weight, layer.bias])
    outputs = [
        whole_batch_norm([a], weight, bias, residuals=[r], masks=[m], activation="silu").outputs[0]
        for a, r, m in zip(xs, rs, ghosts_of(mask, 2), strict=True)
    ]
    torch.cat(outputs).backward(dy)
    torch.testing.assert_close(y, torch.cat(outputs), **EXACT)
    torch.testing.assert_close(mine.grad, torch.cat([a.grad for a in xs]), **EXACT)
    torch.testing.assert_close(mine_residual.grad, torch.cat([r.grad for r in rs]), **EXACT)
    torch.testing.assert_close(layer.weight.grad, weight.grad, **EXACT)
    torch.testing.assert_close(layer.bias.grad, bias.grad, **EXACT)


def test_ghosts_of_an_empty_batch():
    layer = SyncBatchNorm(CHANNELS, ghost_size=2)
    x = torch.randn(0, CHANNELS, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(CHANNELS))
    assert layer.num_batches_tracked == 0


def test_ghosts_do_not_matter_in_evaluation():
    layer = _init(SyncBatchNorm(CHANNELS, ghost_size=2)).eval()
    x = torch.randn(5, CHANNELS, 4)
    plain = nn.BatchNorm1d(CHANNELS)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain.eval()(x))


def test_a_ghost_of_one_value_is_refused():
    with pytest.raises(SingleValueError):
        SyncBatchNorm(CHANNELS, ghost_size=1)(torch.randn(5, CHANNELS))


def test_what_is_left_over_makes_no_ghost_of_one_value():
    x = torch.randn(5, CHANNELS)
    assert torch.equal(SyncBatchNorm(CHANNELS, ghost_size=4)(x), SyncBatchNorm(CHANNELS)(x))


def test_ghosts_keep_a_permuted_layout():
    x = torch.randn(4, 2, 6, CHANNELS).permute(2, 3, 0, 1)
    assert SyncBatchNorm(CHANNELS, ghost_size=2)(x).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("wrong", ["residual", "mask"])
@pytest.mark.parametrize("num_samples", [3, 6])
def test_ghosts_still_refuse_arguments_of_another_size(wrong, num_samples):
    given = {"residual": torch.randn(num_samples, CHANNELS, 4), "mask": torch.ones(num_samples, 4, dtype=torch.bool)}
    layer = SyncBatchNorm(CHANNELS, ghost_size=2)
    with pytest.raises(ArgumentError, match=f"{wrong}: expected"):
        layer(torch.randn(4, CHANNELS, 4), **{wrong: given[wrong]})
    assert layer.num_batches_tracked == 0


SPLITS = [[5], [3, 2], [1, 0, 4]]
LIMITS = {"wide": (100.0, 100.0), "as in the paper": (3.0, 5.0), "tight": (1.05, 0.1), "batch norm": (1.0, 0.0)}


def _renormalize(rank, inputs, grads, limits, options):
    layer = _init(SyncBatchNorm(CHANNELS, renormalization=Renormalization(*limits), dtype=torch.float64, **options))
    x = inputs[rank].requires_grad_()
    y = layer(x)
    y.backward(grads[rank])
    return {
        "output": y.detach(),
        "input": x.grad,
        "parameters": [p.grad for p in layer.parameters()],
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_batch_renormalization_is_the_paper_s(split, limits, options):
    shapes = [(n, CHANNELS, 4) for n in split]
    inputs, grads = draw(shapes, 0), draw(shapes, 1)
    results = run_ranks(len(split), _renormalize, inputs, grads, limits, options)

    layer = _init(SyncBatchNorm(CHANNELS, dtype=torch.float64, **options))
    xs = leaves(inputs)
    weight, bias = (None if p is None else p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    batch = whole_batch_norm([x.detach() for x in xs], None, None)
    r_max, d_max = limits
    sigma = (layer.running_var + 1e-5).sqrt()
    r = ((batch.var + 1e-5).sqrt() / sigma).clamp(1 / r_max, r_max)
    d = ((batch.mean - layer.running_mean) / sigma).clamp(-d_max, d_max)
    if limits == LIMITS["tight"]:
        assert ((r == r_max) | (r == 1 / r_max) | (d.abs() == d_max)).any()
    if limits == LIMITS["wide"]:
        assert (r < r_max).all()
        assert (d.abs() < d_max).all()
    correction = Correction(r, d)
    whole = whole_batch_norm(xs, weight, bias, correction=correction, activation=options.get("activation"))
    torch.autograd.backward(whole.outputs, grads)
    unbiased = whole.var * whole.count / (whole.count - 1)
    for rank, got in enumerate(results):
        torch.testing.assert_close(got["output"], whole.outputs[rank].detach(), **EXACT)
        torch.testing.assert_close(got["input"], xs[rank].grad, **EXACT)
        torch.testing.assert_close(got["running_mean"], folded(layer.running_mean, whole.mean), **EXACT)
        torch.testing.assert_close(got["running_var"], folded(layer.running_var, unbiased), **EXACT)
    for at, parameter in enumerate(p for p in (weight, bias) if p is not None):
        torch.testing.assert_close(sum(got["parameters"][at] for got in results), parameter.grad, **EXACT)


def test_with_closed_limits_it_is_batch_norm():
    inputs, grads = draw([(5, CHANNELS, 4)], 0), draw([(5, CHANNELS, 4)], 1)
    closed = _renormalize(0, [x.clone() for x in inputs], grads, (1.0, 0.0), {})
    layer, x = _init(SyncBatchNorm(CHANNELS, dtype=torch.float64)), inputs[0].requires_grad_()
    y = layer(x)
    y.backward(grads[0])
    torch.testing.assert_close(closed["output"], y.detach(), **EXACT)
    torch.testing.assert_close(closed["input"], x.grad, **EXACT)


def test_with_open_limits_the_output_is_that_of_evaluation():
    layer = _init(SyncBatchNorm(CHANNELS, renormalization=Renormalization(1e6, 1e6), dtype=torch.float64))
    x = draw([(5, CHANNELS, 4)])[0]
    before = _init(SyncBatchNorm(CHANNELS, dtype=torch.float64)).eval()(x)
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_batch_renormalization_of_narrow_inputs(dtype):
    for parameters in (torch.float32, dtype):
        layer = _init(SyncBatchNorm(CHANNELS, renormalization=Renormalization()).to(parameters))
        x = torch.randn(8, CHANNELS, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype
        assert layer.weight.grad.dtype == parameters
        assert y.isfinite().all()


def test_limits_may_be_opened_as_training_goes_on():
    layer = _init(SyncBatchNorm(CHANNELS, renormalization=Renormalization(1.0, 0.0), dtype=torch.float64))
    x = draw([(5, CHANNELS, 4)])[0]
    first = layer(x)
    layer.renormalization = Renormalization(3.0, 5.0)
    assert (layer(x) - first).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renormalization": Renormalization(0.5, 1.0)}, "renormalization: r_max has to be at least 1"),
        ({"renormalization": Renormalization(2.0, -1.0)}, "renormalization: d_max has to be at least 0"),
        ({"renormalization": Renormalization(float("nan"), 1.0)}, "r_max"),
        ({"renormalization": Renormalization(), "track_running_stats": False}, "track_running_stats=True"),
        ({"ghost_size": 0}, "ghost_size: expected at least 1"),
    ],
)
def test_the_constructor_refuses_what_does_not_fit(options, message):
    with pytest.raises(ArgumentError, match=message):
        SyncBatchNorm(CHANNELS, **options)
