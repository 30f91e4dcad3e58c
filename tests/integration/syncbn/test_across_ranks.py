"""SyncBatchNorm on real gloo ranks against the float64 truth on the concatenated batch.

The tensor that is off localises the fault: outputs, the forward's payload or 1/σ; outputs right but running_var wrong,
the global n/(n − 1); only dx wrong, the backward's payload or a division by the world size instead of N; dγ or dβ too
large by a factor of the world size, sums taken after the all-reduce instead of before.
"""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.errors import ArgumentError, CollectiveError, SingleValueError
from syncbn.reference import Reference, reference_batch_norm
from tests.ranks import run_ranks

CHANNELS = 5
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :CHANNELS],
    "every_other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "expanded": lambda x: x[:, :, :1].expand(x.shape),  # the same row again and again: stride 0
}
IN_LAYOUTS = [(4, layout) for layout in LAYOUTS if layout != "channels_last_3d"] + [
    (5, layout) for layout in LAYOUTS if layout != "channels_last"
]

# Relative to values of order one. float64: reordered sums. float32: one rounding each of x − p, the scale and the
# sum, at outputs of at most 5. Narrow types: half a unit in the last place of the output, since all before is float32.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 2e-6},
    torch.float16: {"rtol": 2**-11, "atol": 2e-6},
}


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    """x and dy of each rank: every sample its own mean, so that local statistics would be far off."""
    generator = torch.Generator().manual_seed(0)
    inputs, grads = [], []
    for shape in shapes:
        sample_means = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=torch.float64)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 3 * sample_means
        inputs.append(x.to(dtype))
        grads.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
    return inputs, grads


def new_layer(dtype: torch.dtype, **kwargs) -> SyncBatchNorm:
    torch.manual_seed(1)
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, **kwargs)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if layer.track_running_stats:
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var)
    return layer


def _step(rank, inputs, grads, layout="contiguous", layer=None):
    """One forward and backward; what the truth can be compared with."""
    x = LAYOUTS[layout](inputs[rank])
    x.requires_grad_()
    layer = layer or new_layer(x.dtype)
    y = layer(x)
    y.backward(LAYOUTS[layout](grads[rank]))
    assert y.dtype == x.grad.dtype == x.dtype
    assert y.stride() == x.grad.stride() == torch.empty_like(x).stride()
    return {
        "output": y.detach(),
        "grad_input": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
    }


def truth_of(inputs: list[torch.Tensor], grads: list[torch.Tensor]) -> Reference:
    layer = new_layer(inputs[0].dtype)
    return reference_batch_norm(inputs, grads, layer.weight, layer.bias, layer.running_mean, layer.running_var)


def assert_equal_to_truth(results: list[dict], inputs: list, grads: list) -> None:
    truth, dtype = truth_of(inputs, grads), inputs[0].dtype
    for rank, got in enumerate(results):
        expected = {
            "output": truth.outputs[rank],
            "grad_input": truth.grad_inputs[rank],
            "grad_weight": truth.grad_weights[rank],
            "grad_bias": truth.grad_biases[rank],
            "running_mean": truth.running_mean,
            "running_var": truth.running_var,
        }
        for name, value in expected.items():
            # Parameters and buffers of narrow inputs are float32, and sums of up to 200 gradients of order one.
            tolerance = TOLERANCE[dtype if name in ("output", "grad_input") else got[name].dtype]
            atol = tolerance["atol"] * (10 if name.startswith("grad_") else 1)
            torch.testing.assert_close(
                got[name].double(),
                value,
                rtol=tolerance["rtol"],
                atol=atol,
                msg=lambda text, name=name, rank=rank: f"{name} of rank {rank}: {text}",
            )
        assert got["num_batches_tracked"] == 1


SPLITS = {
    "alone": [3],
    "even": [2, 2],
    "uneven": [3, 1, 2],
    "one_empty": [3, 0, 2],
    "only_one_filled": [0, 4],
    "one_sample_each": [1, 1, 1, 1],
    "four": [2, 1, 0, 3],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("spatial", [(), (7,), (4, 6), (3, 4, 2)], ids=lambda s: f"{len(s) + 2}-D")
def test_every_split_gives_the_whole_batch_s_result(split, spatial):
    inputs, grads = draw([(n, CHANNELS, *spatial) for n in SPLITS[split]])
    assert_equal_to_truth(run_ranks(len(inputs), _step, inputs, grads), inputs, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", ["uneven", "one_empty"])
def test_every_precision(dtype, split):
    inputs, grads = draw([(n, CHANNELS, 6, 7) for n in SPLITS[split]], dtype)
    assert_equal_to_truth(run_ranks(len(inputs), _step, inputs, grads), inputs, grads)


@pytest.mark.parametrize(("dim", "layout"), IN_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_layout(dim, layout, dtype):
    spatial = (4, 6, 3)[: dim - 2]
    inputs, grads = draw([(3, CHANNELS, *spatial), (1, CHANNELS, *spatial)], dtype)
    results = run_ranks(2, _step, inputs, grads, layout)
    inputs, grads = [LAYOUTS[layout](x) for x in inputs], [LAYOUTS[layout](dy) for dy in grads]
    assert_equal_to_truth(results, inputs, grads)


def _step_with_gradient_of_another_layout(rank, inputs, grads):
    x = inputs[rank].contiguous(memory_format=torch.channels_last).requires_grad_()
    residual = torch.zeros_like(x, memory_format=torch.contiguous_format).requires_grad_()
    layer = new_layer(x.dtype)
    layer(x, residual).backward(grads[rank])
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    return x.grad, residual.grad, layer.weight.grad


def test_gradient_and_residual_may_have_another_layout_than_the_input():
    inputs, grads = draw([(3, CHANNELS, 4, 6), (2, CHANNELS, 4, 6)])
    truth = truth_of(inputs, grads)
    for rank, (dx, dresidual, dweight) in enumerate(run_ranks(2, _step_with_gradient_of_another_layout, inputs, grads)):
        torch.testing.assert_close(dx, truth.grad_inputs[rank], **TOLERANCE[torch.float64])
        torch.testing.assert_close(dresidual, grads[rank], rtol=0, atol=0)
        torch.testing.assert_close(dweight, truth.grad_weights[rank], rtol=1e-12, atol=1e-11)


def test_ranks_may_hold_images_of_different_sizes():
    inputs, grads = draw([(2, CHANNELS, 8, 6), (1, CHANNELS, 3, 3)])
    assert_equal_to_truth(run_ranks(2, _step, inputs, grads), inputs, grads)


def _local_step(rank, inputs, grads):
    return _step(rank, inputs, grads, layer=_as_local(new_layer(torch.float64)))


def _as_local(layer: SyncBatchNorm) -> nn.Module:
    local = nn.BatchNorm2d(CHANNELS).double()
    local.load_state_dict(layer.state_dict())
    return local


def test_control_local_batch_norm_fails_this_comparison():
    inputs, grads = draw([(2, CHANNELS, 4, 6), (2, CHANNELS, 4, 6)])
    results = run_ranks(2, _local_step, inputs, grads)
    truth = truth_of(inputs, grads)
    for rank in range(2):
        assert (results[rank]["output"] - truth.outputs[rank]).abs().max() > 0.1
        assert (results[rank]["grad_input"] - truth.grad_inputs[rank]).abs().max() > 0.01
    with pytest.raises(AssertionError, match="output of rank 0"):
        assert_equal_to_truth(results, inputs, grads)


def test_every_rank_empty_leaves_the_running_statistics():
    inputs, grads = draw([(0, CHANNELS, 4, 6)] * 2)
    before = new_layer(torch.float64)
    for got in run_ranks(2, _step, inputs, grads):
        assert got["output"].shape == got["grad_input"].shape == (0, CHANNELS, 4, 6)
        assert torch.equal(got["grad_weight"], torch.zeros(CHANNELS).double())
        assert torch.equal(got["grad_bias"], torch.zeros(CHANNELS).double())
        assert torch.equal(got["running_mean"], before.running_mean)
        assert torch.equal(got["running_var"], before.running_var)
        assert got["num_batches_tracked"] == 0


def _single_value(rank, spatial):
    layer = SyncBatchNorm(CHANNELS)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(SingleValueError, match="the whole group holds one"):
        layer(torch.randn(int(rank == 1), CHANNELS, *spatial))
    layer(torch.randn(1, CHANNELS, *spatial))  # one on each rank is enough, and the ranks are still together
    return all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("spatial", [(), (1, 1)], ids=str)
def test_a_single_value_over_all_ranks_is_refused_on_each(spatial):
    # Refused before anything was folded in, and folded in afterwards.
    assert run_ranks(3, _single_value, spatial) == [False] * 3


def _single_value_leaves_the_buffers(rank):
    layer = SyncBatchNorm(CHANNELS, momentum=None, skip_nonfinite=True)
    before = copy.deepcopy(list(layer.buffers()))
    with pytest.raises(SingleValueError):
        layer(torch.randn(1 - rank, CHANNELS))
    return all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_a_refused_value_leaves_the_buffers():
    assert run_ranks(2, _single_value_leaves_the_buffers) == [True, True]


# The bound of the variance is the library's promise; that of the output is in units of σ and holds the rounding of y
# itself (outputs up to 5: 3e-7). The naive forms are off by 25 and 6e-4 here.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_accuracy_far_from_zero(mean, layout):
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(2, CHANNELS, 32, 32, generator=generator) + mean).float() for _ in range(4)]
    grads = [torch.randn(2, CHANNELS, 32, 32, generator=generator) for _ in range(4)]
    layer = SyncBatchNorm(CHANNELS, eps=0, momentum=1.0)
    results = run_ranks(4, _step, inputs, grads, layout, layer)
    zeros, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    truth = reference_batch_norm(inputs, grads, ones, zeros, zeros, ones, momentum=1.0, eps=0)
    for rank, got in enumerate(results):
        assert ((got["running_var"] - truth.running_var).abs() / truth.running_var).max() <= 1e-6
        assert (got["output"] - truth.outputs[rank]).abs().max() <= 1e-6
        assert (got["grad_input"] - truth.grad_inputs[rank]).abs().max() <= 1e-6
        # A sum of 2048 products of order one: √2048 · 2⁻²⁴ · a few.
        assert (got["grad_weight"] - truth.grad_weights[rank]).abs().max() <= 5e-5


def _count_collectives(rank, options):
    layer = SyncBatchNorm(CHANNELS, **options)
    x = torch.randn(2 * rank, CHANNELS, 3, requires_grad=True)
    layer(x).sum().backward()  # a group's first meeting may set up how it exchanges
    return [
        _collectives(lambda: layer(x)),
        _collectives(layer(x).sum().backward),
        _collectives(lambda: layer.eval()(x)),
    ]


def _collectives(call) -> list[str]:
    with torch.autograd.profiler.profile() as profile:
        call()
    names = (event.name for event in profile.function_events)
    return [ALL_REDUCES.get(name, name) for name in names if name in ALL_REDUCES or name.startswith("c10d::")]


ALL_REDUCES = {"c10d::allreduce_": "all-reduce", "syncbn_native::exchange_all_reduce_sum": "all-reduce"}


@pytest.mark.parametrize(
    ("options", "in_evaluation"),
    [({}, 0), ({"affine": False, "momentum": None}, 0), ({"track_running_stats": False}, 1)],
)
def test_one_all_reduce_each_way(options, in_evaluation):
    one = ["all-reduce"]
    assert run_ranks(2, _count_collectives, options) == [[one, one, one * in_evaluation]] * 2


def _without_input_gradient(rank):
    layer = SyncBatchNorm(CHANNELS)
    layer(torch.randn(3, CHANNELS)).sum().backward()
    layer.weight.grad = None
    backward = layer(torch.randn(3, CHANNELS)).square().sum().backward
    return _collectives(backward), layer.weight.grad.shape


def test_the_backward_meets_where_the_input_needs_no_gradient():
    assert run_ranks(2, _without_input_gradient) == [(["all-reduce"], (CHANNELS,))] * 2


def _evaluate_without_statistics(rank, inputs):
    return SyncBatchNorm(CHANNELS, track_running_stats=False, dtype=torch.float64).eval()(inputs[rank]).detach()


def test_evaluation_without_running_statistics_is_synchronized():
    inputs, _ = draw([(3, CHANNELS, 4), (1, CHANNELS, 4)])
    plain = nn.BatchNorm1d(CHANNELS, track_running_stats=False).double().eval()
    expected = plain(torch.cat(inputs)).detach()
    got = torch.cat(run_ranks(2, _evaluate_without_statistics, inputs))
    torch.testing.assert_close(got, expected, **TOLERANCE[torch.float64])


def _cumulative(rank, batches):
    layer = SyncBatchNorm(CHANNELS, momentum=None, dtype=torch.float64)
    for batch in batches:
        layer(batch[rank])
    return layer.state_dict()


def test_the_cumulative_average_skips_batches_that_are_empty_everywhere():
    full, _ = draw([(3, CHANNELS, 4), (1, CHANNELS, 4)])
    empty, _ = draw([(0, CHANNELS, 4)] * 2)
    plain = nn.BatchNorm1d(CHANNELS, momentum=None).double()
    for batch in (full, [x + 1 for x in full]):
        plain(torch.cat(batch))
    for state in run_ranks(2, _cumulative, [full, empty, [x + 1 for x in full]]):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, **TOLERANCE[torch.float64])


def _in_groups(rank, inputs, grads):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, other = groups[rank // 2], groups[1 - rank // 2]
    layer = new_layer(torch.float64, process_group=mine)
    clone = copy.deepcopy(layer)
    assert clone.process_group is mine
    assert pickle.loads(pickle.dumps(layer)).process_group is None
    assert convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS), mine).process_group is mine
    with pytest.raises(ArgumentError, match=f"process_group: global rank {rank} is not a member"):
        SyncBatchNorm(CHANNELS, process_group=other)(torch.randn(2, CHANNELS))
    return _step(rank, inputs, grads, layer=clone)


def test_groups_of_ranks_normalize_apart():
    inputs, grads = draw([(2, CHANNELS, 4), (1, CHANNELS, 4), (3, CHANNELS, 4), (2, CHANNELS, 4)])
    results = run_ranks(4, _in_groups, inputs, grads)
    for half in (slice(0, 2), slice(2, 4)):
        assert_equal_to_truth(results[half], inputs[half], grads[half])


def _lose_a_peer_before_the_backward(rank):
    layer = SyncBatchNorm(CHANNELS)
    loss = layer(torch.randn(3, CHANNELS)).sum()
    if rank == 1:
        dist.destroy_process_group()
        return "gone"
    with pytest.raises(
        CollectiveError, match=r"backward of a SyncBatchNorm \(5 channels, torch.float32\).* rank 0 of 2"
    ):
        loss.backward()
    return "told"


def test_a_lost_peer_is_an_error_that_says_where():
    assert run_ranks(2, _lose_a_peer_before_the_backward) == ["told", "gone"]


def _miss_a_collective(rank):
    from datetime import timedelta

    group = dist.new_group([0, 1], timeout=timedelta(seconds=0.3))
    if rank == 1:
        return "elsewhere"
    with pytest.raises(
        CollectiveError, match=r"forward of a SyncBatchNorm \(5 channels, torch.float32\).* rank 0 of 2"
    ):
        SyncBatchNorm(CHANNELS, process_group=group)(torch.randn(3, CHANNELS))
    return "told"


def test_a_rank_that_stays_away_is_an_error_and_no_hang():
    assert run_ranks(2, _miss_a_collective) == ["told", "elsewhere"]


def _cast_automatically(rank, inputs, grads):
    torch.manual_seed(1)
    conv = nn.Conv2d(3, CHANNELS, 1)
    layer = new_layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = conv(inputs[rank])
        hidden.retain_grad()
        y = layer(hidden)
    assert hidden.dtype == y.dtype == torch.bfloat16
    y.backward(grads[rank])
    assert layer.weight.grad.dtype == layer.running_mean.dtype == torch.float32
    return {
        "input": hidden.detach(),
        "output": y.detach(),
        "grad_input": hidden.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "num_batches_tracked": layer.num_batches_tracked,
    }


def test_autocast_keeps_the_statistics_in_float32():
    images, _ = draw([(2, 3, 4, 6), (1, 3, 4, 6)], torch.float32)
    _, grads = draw([(2, CHANNELS, 4, 6), (1, CHANNELS, 4, 6)], torch.bfloat16)
    results = run_ranks(2, _cast_automatically, images, grads)
    assert_equal_to_truth(results, [got["input"] for got in results], grads)


def _without_parts(rank, inputs, grads, options):
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    x = inputs[rank].requires_grad_()
    outputs = []
    for _ in range(2):
        y = layer(x)
        y.backward(grads[rank])
        outputs.append(y.detach())
    outputs.append(layer.eval()(x).detach())
    return outputs, x.grad, layer.state_dict(), {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"bias": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0, "eps": 0.5},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
def test_every_option_equals_torch_on_the_whole_batch(options):
    inputs, grads = draw([(2, CHANNELS, 4), (0, CHANNELS, 4), (3, CHANNELS, 4)])
    plain = nn.BatchNorm1d(CHANNELS, dtype=torch.float64, **options)
    whole = torch.cat(inputs).requires_grad_()
    expected = []
    for _ in range(2):
        y = plain(whole)
        y.backward(torch.cat(grads))
        expected.append(y.detach())
    expected.append(plain.eval()(whole).detach())
    results = run_ranks(3, _without_parts, inputs, grads, options)
    for at, value in enumerate(expected):
        torch.testing.assert_close(
            torch.cat([outputs[at] for outputs, *_ in results]), value, **TOLERANCE[torch.float64]
        )
    torch.testing.assert_close(torch.cat([r[1] for r in results]), whole.grad, rtol=1e-12, atol=1e-11)
    for _, _, state, _ in results:
        assert state.keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, **TOLERANCE[torch.float64])
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(sum(r[3][name] for r in results), parameter.grad, rtol=1e-12, atol=1e-11)


def _activate_in_place(rank, inputs, grads):
    layer, x = new_layer(torch.float64), inputs[rank].requires_grad_()
    nn.functional.relu_(layer(x)).backward(grads[rank])
    return x.grad


def test_the_output_may_be_changed_in_place():
    # nn.ReLU(inplace=True) after a batch norm is in most vision models.
    inputs, grads = draw([(2, CHANNELS, 4), (1, CHANNELS, 4)])
    truth = truth_of(inputs, grads)
    kept = [dy * (y > 0) for dy, y in zip(grads, truth.outputs, strict=True)]
    truth = truth_of(inputs, kept)
    for rank, dx in enumerate(run_ranks(2, _activate_in_place, inputs, grads)):
        torch.testing.assert_close(dx, truth.grad_inputs[rank], **TOLERANCE[torch.float64])


def _frozen_parts(rank, inputs, grads, frozen):
    layer, x = new_layer(torch.float64), inputs[rank]
    for name in ("weight", "bias"):
        getattr(layer, name).requires_grad_(name not in frozen)
    x.requires_grad_("input" not in frozen)
    layer(x).backward(grads[rank])
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("frozen", [{"weight"}, {"bias"}, {"weight", "bias"}, {"input"}, {"input", "bias"}], ids=str)
def test_only_what_needs_a_gradient_gets_one(frozen):
    inputs, grads = draw([(2, CHANNELS, 4), (1, CHANNELS, 4)])
    truth = truth_of(inputs, grads)
    for rank, (dx, dweight, dbias) in enumerate(run_ranks(2, _frozen_parts, inputs, grads, frozen)):
        for name, got, expected in (
            ("input", dx, truth.grad_inputs[rank]),
            ("weight", dweight, truth.grad_weights[rank]),
            ("bias", dbias, truth.grad_biases[rank]),
        ):
            if name in frozen:
                assert got is None
            else:
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)


def _evaluate(rank, inputs, layout):
    layer = new_layer(inputs[rank].dtype, activation="leaky_relu").eval()
    before = copy.deepcopy(layer.state_dict())
    y = layer(LAYOUTS[layout](inputs[rank]))
    unchanged = all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    return y.detach(), y.stride(), unchanged


@pytest.mark.parametrize(("dim", "layout"), IN_LAYOUTS)
def test_evaluation_uses_the_running_statistics_in_every_layout(dim, layout):
    spatial = (4, 6, 3)[: dim - 2]
    inputs, _ = draw([(3, CHANNELS, *spatial), (0, CHANNELS, *spatial)])
    layer = new_layer(torch.float64)
    shape = (1, -1, *[1] * (dim - 2))
    for x, (y, stride, unchanged) in zip(inputs, run_ranks(2, _evaluate, inputs, layout), strict=True):
        x = LAYOUTS[layout](x)
        expected = (x - layer.running_mean.view(shape)) / (layer.running_var + 1e-5).sqrt().view(shape)
        expected = nn.functional.leaky_relu(expected * layer.weight.view(shape) + layer.bias.view(shape), 0.01)
        torch.testing.assert_close(y, expected.detach(), **TOLERANCE[torch.float64])
        assert stride == torch.empty_like(x).stride() or x.numel() == 0  # strides of nothing mean nothing
        assert unchanged


def _forward_twice_backward_in_reverse(rank, inputs, grads):
    layer = new_layer(torch.float64)
    xs = [batch[rank].requires_grad_() for batch in inputs]
    ys = [layer(x) for x in xs]
    # Autograd runs the graphs one after another, the last forward first, on every rank alike.
    torch.autograd.backward(list(reversed(ys)), [batch[rank] for batch in reversed(grads)])
    return [x.grad for x in xs], layer.state_dict()


def test_one_layer_called_twice_before_the_backward():
    first, second = draw([(2, CHANNELS, 4), (1, CHANNELS, 4)]), draw([(1, CHANNELS, 7), (3, CHANNELS, 7)])
    results = run_ranks(2, _forward_twice_backward_in_reverse, [first[0], second[0]], [first[1], second[1]])
    layer = new_layer(torch.float64)
    mean, var = layer.running_mean, layer.running_var
    for at, (inputs, grads) in enumerate((first, second)):
        truth = reference_batch_norm(inputs, grads, layer.weight, layer.bias, mean, var)
        mean, var = truth.running_mean, truth.running_var
        for rank in range(2):
            torch.testing.assert_close(results[rank][0][at], truth.grad_inputs[rank], **TOLERANCE[torch.float64])
    for _, state in results:
        torch.testing.assert_close(state["running_mean"], mean, **TOLERANCE[torch.float64])
        torch.testing.assert_close(state["running_var"], var, **TOLERANCE[torch.float64])
        assert state["num_batches_tracked"] == 2
