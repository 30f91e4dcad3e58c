"""SyncBatchNorm in one process, where it has to equal torch.nn.BatchNorm.

A failure here with green moments and kernels localises the layer: flags, buffers, state_dict, copies, or the gluing
of the backward.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from syncbn import DeferredStatistics, SyncBatchNorm, monitor
from syncbn.errors import ArgumentError, SingleValueError

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(8, 5), (4, 5, 6), (3, 5, 4, 6), (2, 5, 3, 4, 2)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 on both sides, sums in another order


def pair(dim: int, **kwargs) -> tuple[SyncBatchNorm, nn.Module]:
    """Our layer and torch's, in float64, with the same random parameters."""
    torch.manual_seed(0)
    ours, plain = SyncBatchNorm(5, **kwargs).double(), PLAIN[dim](5, **kwargs).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"momentum": 0.7, "eps": 0.1},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_training_and_evaluation_equal_torch(shape, kwargs):
    ours, plain = pair(len(shape), **kwargs)
    assert str(plain).partition("(")[2] == str(ours).partition("(")[2]
    for _ in range(3):
        x, dy = torch.randn(2, *shape, dtype=torch.float64) + 1
        for got, expected in zip(step(ours, x, dy), step(plain, x, dy), strict=True):
            torch.testing.assert_close(got, expected, **EXACT)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), **EXACT)


@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_evaluation_takes_any_batch_size_bit_for_bit(num_samples):
    ours, plain = pair(4)
    ours.eval(), plain.eval()
    x = torch.randn(num_samples, 5, 1, 1, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))


def test_evaluation_and_training_without_tracking_leave_the_buffers():
    ours, _ = pair(2)
    before = copy.deepcopy(ours.state_dict())
    ours.eval()(torch.randn(4, 5, dtype=torch.float64))
    ours.train().track_running_stats = False
    ours(torch.randn(4, 5, dtype=torch.float64))
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("other", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("track_running_stats", [True, False])
def test_checkpoints_load_both_ways(other, track_running_stats):
    kwargs = {"affine": True, "track_running_stats": track_running_stats}
    ours, theirs = SyncBatchNorm(3, **kwargs), other(3, **kwargs)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    fresh = SyncBatchNorm(3, **kwargs)
    fresh.load_state_dict(theirs.state_dict())
    assert list(fresh.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), ours.state_dict().values(), strict=True))


def test_buffers_are_updated_in_place():
    ours, _ = pair(2)
    buffers = list(ours.buffers())
    ours(torch.randn(4, 5, dtype=torch.float64))
    assert all(a is b for a, b in zip(buffers, ours.buffers(), strict=True))
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradient_keep_dtype_and_memory_format(dtype, memory_format):
    layer = SyncBatchNorm(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(2, 3, 4, 5).to(dtype, memory_format=memory_format).requires_grad_()
    y = layer(x)
    y.sum().backward()
    for t in (y, x.grad):
        assert t.dtype == dtype
        assert t.is_contiguous(memory_format=memory_format)


def test_a_layer_in_bfloat16_keeps_its_dtypes():
    layer = SyncBatchNorm(3, dtype=torch.bfloat16)
    layer(torch.randn(8, 3, dtype=torch.bfloat16)).sum().backward()
    assert {t.dtype for t in (layer.weight.grad, layer.bias.grad, layer.running_mean)} == {torch.bfloat16}


@pytest.mark.parametrize("running", [torch.float32, torch.bfloat16], ids=lambda d: f"running statistics in {d}")
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=lambda d: f"parameters in {d}")
def test_parameters_and_running_statistics_may_differ_in_precision(parameters, running):
    # FSDP's mixed precision casts parameters and leaves buffers.
    layer = SyncBatchNorm(3, dtype=parameters)
    for name in ("running_mean", "running_var"):
        setattr(layer, name, getattr(layer, name).to(running))
    x = torch.randn(6, 3, 4, 4, dtype=torch.bfloat16)
    for training in (True, False):
        layer.train(training).zero_grad()
        y = layer(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == parameters
        assert layer.running_mean.dtype == running
    expected = nn.functional.batch_norm(x.float(), layer.running_mean.float(), layer.running_var.float())
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-6)  # half a unit in the last place of bfloat16


def test_a_graph_may_be_run_backwards_twice():
    layer = SyncBatchNorm(5, activation="relu", dtype=torch.float64)
    x, residual, dy = (torch.randn(4, 5, 3, dtype=torch.float64) for _ in range(3))
    wanted = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
    y, before = layer(x, residual), dy.clone()
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(dy, before)


def test_a_forward_in_inference_mode_counts_and_training_goes_on():
    layer = SyncBatchNorm(5)
    with torch.inference_mode():
        layer(torch.randn(4, 5))
    layer(torch.randn(4, 5)).sum().backward()
    assert layer.num_batches_tracked == 2


def test_buffers_and_parameters_may_be_those_of_a_functional_call():
    layer = SyncBatchNorm(5)
    given = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    torch.func.functional_call(layer, given, (torch.randn(4, 5),))
    assert (layer.num_batches_tracked, given["num_batches_tracked"]) == (0, 1)
    assert given["running_mean"].any()


def test_a_single_value_per_channel_is_refused_and_changes_nothing():
    layer = SyncBatchNorm(5)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(SingleValueError, match=r"more than one value per channel.*\(1, 5, 1, 1\).*eval\(\)"):
        layer(torch.randn(1, 5, 1, 1))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_an_empty_batch_gives_zero_gradients_and_changes_no_buffer():
    layer = SyncBatchNorm(5)
    before = copy.deepcopy(list(layer.buffers()))
    x = torch.randn(0, 5, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(5))
    assert torch.equal(layer.bias.grad, torch.zeros(5))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_copies_and_pickles_keep_everything():
    layer = SyncBatchNorm(5, momentum=None)
    layer(torch.randn(4, 5))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for clone in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stream, weights_only=False),
    ):
        assert clone.weight is not layer.weight
        assert all(
            torch.equal(a, b) for a, b in zip(clone.state_dict().values(), layer.state_dict().values(), strict=True)
        )
        assert clone.momentum is None
        clone(torch.randn(4, 5)).sum().backward()
        assert clone.num_batches_tracked == 2
    assert layer.num_batches_tracked == 1


def test_the_gradient_can_be_differentiated():
    ours, plain = pair(2)
    x, dy = torch.randn(2, 6, 5, dtype=torch.float64)
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad((layer(leaf).square() * dy).sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        results.append((dx.detach(), leaf.grad, layer.weight.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)  # float64; larger terms that partly cancel


@pytest.mark.parametrize(("kwargs", "named"), [({"num_features": 0}, "num_features"), ({"eps": -1.0}, "eps")])
def test_the_constructor_names_a_bad_argument(kwargs, named):
    with pytest.raises(ArgumentError, match=named):
        SyncBatchNorm(**{"num_features": 4, **kwargs})


def test_shapes_can_be_followed_without_data():
    layer = SyncBatchNorm(5, device="meta")
    assert layer(torch.empty(4, 5, 3, 3, device="meta")).shape == (4, 5, 3, 3)


def test_a_reset_takes_the_counter_of_nonfinite_batches_along():
    layer = SyncBatchNorm(3, skip_nonfinite=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.num_nonfinite_batches == 0
    layer(torch.full((2, 3), torch.nan))
    assert layer.num_nonfinite_batches == 1
    layer.reset_running_stats()
    assert layer.num_nonfinite_batches == 0


def test_a_shallow_copy_shares_parameters_but_not_what_watches_the_layer():
    layer = SyncBatchNorm(3, process_group="local")
    with monitor(layer), DeferredStatistics(layer):
        clone = copy.copy(layer)
        assert clone.weight is layer.weight
        assert clone.process_group == "local"
        clone(torch.randn(2, 3))
    assert layer.num_batches_tracked == 1  # the buffer is shared, and the clone folds in at once
    assert clone._collector is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"skip_nonfinite": True, "track_running_stats": False}, "skip_nonfinite: protects the running statistics"),
        ({"renormalization": (3, 5)}, r"renormalization: expected None or Renormalization\(r_max, d_max\)"),
        ({"activation": "gelu"}, "activation: expected None, 'relu'"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, "negative_slope"),
    ],
    ids=str,
)
def test_the_constructor_refuses_options_that_do_not_fit(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        SyncBatchNorm(3, **kwargs)
