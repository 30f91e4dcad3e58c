"""What the layer returns on a GPU, beside float64. A failure here is a wrong result, or one that is not accurate."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from syncbn import SyncBatchNorm, sync_batch_norm
from syncbn.activation import IDENTITY
from syncbn.errors import SingleValueError
from syncbn.kernels import backend_for

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# Rounding to a half type moves a value by 2⁻⁸ of it at the most with 8 bits, by 2⁻¹¹ with 11. Results in float32 are
# rounded a few times on their way; those in float64 as often as the truth itself.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def distance(result: torch.Tensor, true: torch.Tensor) -> float:
    return ((result.double() - true.double()).norm() / true.double().norm()).item()


def batch(shape: tuple[int, ...], dtype: torch.dtype, layout: str, gpu: torch.device) -> list[torch.Tensor]:
    """X, dy and a residual."""
    noise, slope, residual = (torch.randn(shape, device=gpu) for _ in range(3))
    values = noise * 2 + 3, slope + 0.5 * noise + 0.3, residual
    return [value.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for value in values]


def parameters(num_channels: int, dtype: torch.dtype, gpu: torch.device) -> list[torch.Tensor]:
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        (torch.rand(num_channels, device=gpu) + 0.5).to(dtype).requires_grad_(),
        torch.randn(num_channels, device=gpu).to(dtype).requires_grad_(),
    ]


# The last have planes that start anywhere in a vector, channels that fill none, and a single position.
SHAPES = [(8, 64, 28, 28), (2, 256, 50, 84), (3, 19, 5, 7), (4, 3, 33, 35), (5, 7, 1, 1), (32, 2048, 7, 7)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer_agrees_with_batch_norm_in_float64(layout: str, dtype: torch.dtype, gpu: torch.device) -> None:
    for shape in SHAPES:
        x, dy, _ = batch(shape, dtype, layout, gpu)
        weight, bias = parameters(shape[1], dtype, gpu)
        running = [torch.zeros_like(weight), torch.ones_like(weight)]
        x.requires_grad_()
        y = sync_batch_norm(x, *running, weight, bias, training=True)
        found = [y, *torch.autograd.grad(y, [x, weight, bias], dy), *running]
        x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (x, weight, bias))
        true_running = [torch.zeros_like(weight), torch.ones_like(weight)]
        true_y = F.batch_norm(x, *true_running, weight, bias, training=True)
        true = [true_y, *torch.autograd.grad(true_y, [x, weight, bias], dy.double()), *true_running]
        assert found[0].stride() == found[1].stride() == dy.stride()
        for name, result, right in zip(("y", "dx", "dγ", "dβ", "mean", "var"), found, true, strict=True):
            tolerance = TOLERANCE[dtype] if name in ("y", "dx") else TOLERANCE.get(result.dtype, 2e-6)
            assert distance(result, right) <= tolerance, (shape, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_fused_block_agrees_with_its_parts_in_float64(
    layout: str, activation: str, has_residual: bool, gpu: torch.device
) -> None:
    for shape in SHAPES:
        x, dy, residual = batch(shape, torch.float32, layout, gpu)
        inputs = [x, *parameters(shape[1], torch.float32, gpu), residual][: 4 if has_residual else 3]
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        true_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        z = F.batch_norm(true_inputs[0], None, None, *true_inputs[1:3], training=True)
        z = z + true_inputs[3] if has_residual else z
        true_y = F.leaky_relu(z, 0.01) if activation == "leaky_relu" else getattr(F, activation)(z)
        dy = dy * (z.abs() > 1e-5)  # within rounding of relu's zero, the gradient of either side is right
        y = sync_batch_norm(
            *(inputs[0], None, None, *inputs[1:3]),
            training=True,
            residual=inputs[3] if has_residual else None,
            activation=activation,
        )
        found = [y, *torch.autograd.grad(y, inputs, dy)]
        true = [true_y, *torch.autograd.grad(true_y, true_inputs, dy.double())]
        for number, (result, right) in enumerate(zip(found, true, strict=True)):
            assert distance(result, right) <= TOLERANCE[torch.float32], (shape, number)


HUGE = {
    "NHWC": (33, 64, 1024, 1024),
    "NCHW": (33, 64, 1024, 1024),
    "NCHW, one sample": (1, 65, 32768, 1024),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "case",
    [
        "NHWC",
        "NCHW",
        "NCHW, one sample",
    ],
)
def test_more_than_2_to_the_31_values_are_counted_and_indexed_exactly(case: str, gpu: torch.device) -> None:
    """Whole numbers, whose sums come out nearly exact: one value too many or too few would be seen."""
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < 40 << 30:
        pytest.skip(f"needs 40 GB of GPU memory, and {free_bytes >> 30} are free")
    shape = HUGE[case]
    assert math.prod(shape) > 2**31
    x, dy = (_few_bits(shape, LAYOUTS[case[:4]], seed, gpu) for seed in range(2))
    n = x.numel() // x.size(1)
    x_sum, x2_sum, dy_sum, product_sum = _channel_sums(x, dy)
    backend = backend_for(x)

    payload = backend.moments(x, None)
    assert payload[-1].item() == n
    torch.testing.assert_close(payload[:-1], torch.cat([x_sum, x2_sum]), rtol=0, atol=0.5)

    y, statistics = backend.finalize_and_normalize(x, payload, 1e-5, None, None, None, None, None, IDENTITY)
    mean, invstd = statistics[:-1].view(2, -1)
    for part, values in _parts(y, x):
        assert distance(part, _per_channel(values.float(), mean, invstd)) <= TOLERANCE[torch.bfloat16]
    del y

    sums, grad, _, _, remaining = backend.gradient_sums(dy, x, statistics, *[None] * 5, IDENTITY)
    torch.testing.assert_close(sums[0], dy_sum, rtol=0, atol=0.5)
    torch.testing.assert_close(sums[1], product_sum - mean * dy_sum, rtol=0, atol=1e-6 * n)
    dx = backend.input_gradient(grad, x, statistics, sums, None, None, None, remaining)
    for part, values, gradients in _parts(dx, x, dy):
        xhat = _per_channel(values.float(), mean, invstd)
        true = gradients.float() - _broadcast(dy_sum / n) - xhat * _broadcast(sums[1] * invstd / n)
        assert distance(part, true * _broadcast(invstd)) <= TOLERANCE[torch.bfloat16]


def _few_bits(shape: tuple[int, ...], memory_format: torch.memory_format, seed: int, gpu: torch.device) -> torch.Tensor:
    """Whole numbers from 0 to 3."""
    values = torch.empty(shape, dtype=torch.bfloat16, device=gpu, memory_format=memory_format)
    generator = torch.Generator(gpu).manual_seed(seed)
    for (part,) in _parts(values):
        part.copy_(torch.randint(0, 4, part.shape, generator=generator, device=gpu, dtype=torch.uint8))
    return values


def _parts(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The same piece of each, small enough for a few copies in higher precision."""
    pieces = itertools.product(range(tensors[0].size(0)), range(0, tensors[0].size(2), 1024))
    return [tuple(tensor[n : n + 1, :, h : h + 1024] for tensor in tensors) for n, h in pieces]


def _channel_sums(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Σx, Σx², Σdy and Σdy·x, (4, C), exact."""
    total = torch.zeros(4, x.size(1), dtype=torch.float64, device=x.device)
    for values, gradients in _parts(x, dy):
        values, gradients = values.double(), gradients.double()
        terms = values, values.square(), gradients, gradients * values
        total += torch.stack([term.sum((0, 2, 3)) for term in terms])
    return total


def _per_channel(values: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor) -> torch.Tensor:
    return (values - _broadcast(mean)) * _broadcast(invstd)


def _broadcast(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(1, -1, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_layer_agrees_with_the_eager_one(layout: str, gpu: torch.device) -> None:
    x, dy, _ = batch((4, 16, 14, 14), torch.float32, layout, gpu)
    eager, compiled = (SyncBatchNorm(16, device=gpu) for _ in range(2))
    run = torch.compile(compiled, fullgraph=True)
    for _ in range(2):
        results = []
        for layer, call in ((eager, eager), (compiled, run)):
            given = x.clone().requires_grad_()
            y = call(given)
            y.backward(dy)
            assert given.grad is not None
            results.append([y, given.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert compiled.num_batches_tracked.item() == 2


def test_autocast_keeps_the_dtype_of_what_comes_in(gpu: torch.device) -> None:
    x, _, _ = batch((4, 8, 14, 14), torch.float32, "NHWC", gpu)
    convolution, layer = torch.nn.Conv2d(8, 16, 3, device=gpu), SyncBatchNorm(16, device=gpu)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inner = convolution(x)
        y = layer(inner)
        y.square().mean().backward()
    assert inner.dtype == y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    true = F.batch_norm(inner.detach().double(), None, None, training=True)
    assert distance(y, true) <= TOLERANCE[torch.bfloat16]


def test_a_single_value_gives_the_bias_and_in_debug_mode_an_error(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SyncBatchNorm(4, device=gpu)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 4, 1, 1, device=gpu)
    assert torch.equal(layer(x).flatten(), layer.bias)
    assert layer.running_mean is not None
    assert torch.equal(layer.running_mean, torch.zeros(4, device=gpu))
    monkeypatch.setenv("SYNCBN_DEBUG", "1")
    with pytest.raises(SingleValueError):
        layer(x)
