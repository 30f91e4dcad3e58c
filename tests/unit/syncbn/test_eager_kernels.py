"""The passes over a batch in plain torch operations, in one process, against their definition in float64.

A failure here with green moments localises a kernel: tiles that overlap or miss samples, a wrong stride, a scratch
that leaks between tiles, padding that reaches a sum, sums in too narrow a type.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from syncbn import activation as activations
from syncbn import moments
from syncbn.activation import IDENTITY, Activation
from syncbn.kernels import eager
from syncbn.moments import RunningStatistics

EPS = 1e-5
# float64 throughout: whatever is beyond reordered sums of at most 420 values is a bug, not rounding.
EXACT = {"rtol": 1e-11, "atol": 1e-11}

ACTIVATIONS = {
    "identity": IDENTITY,
    "relu": Activation("relu"),
    "leaky_relu": Activation("leaky_relu", 0.2),
    "silu": Activation("silu"),
}


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Every second channel of twice as many."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=2).flatten(1, 2)[:, ::2]


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "half_the_channels": _wide,
    "expanded": lambda x: x[:1].expand_as(x),
}
SHAPES = [(12, 3), (4, 3, 7), (4, 3, 5, 7), (2, 3, 5, 2, 7), (5, 3, 1, 1), (1, 3, 6, 7), (6, 1, 4, 5)]


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 60, eager.CPU_TILE_ELEMENTS], ids=lambda n: f"tile={n}")
def tile_elements(request, monkeypatch):
    """From a row of the image to the whole batch in a tile."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(eager, "CPU_TILE_ELEMENTS", request.param)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(kw_only=True)
class Batch:
    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    activation: Activation = IDENTITY
    eps: float = EPS


@dataclass(kw_only=True)
class Step:
    payload: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor
    grad_weight: torch.Tensor | None
    grad_bias: torch.Tensor | None
    grad_residual: torch.Tensor


def run(batch: Batch) -> Step:
    """The kernels, as the layer calls them."""
    payload = eager.moments(batch.x, batch.mask)
    statistics = eager.finalize(payload, batch.eps, None)
    y = eager.normalize(batch.x, statistics, batch.weight, batch.bias, batch.residual, batch.mask, batch.activation)
    sums, grad, grad_weight, grad_bias, remaining = eager.gradient_sums(
        batch.dy,
        batch.x,
        statistics,
        batch.weight,
        batch.bias,
        y if batch.activation.saves_output else None,
        batch.residual if batch.activation.saves_residual else None,
        batch.mask,
        batch.activation,
    )
    dx = eager.input_gradient(grad, batch.x, statistics, sums, batch.weight, batch.bias, batch.mask, remaining)
    return Step(payload=payload, y=y, dx=dx, grad_weight=grad_weight, grad_bias=grad_bias, grad_residual=grad)


def truth(batch: Batch) -> Step:
    """The definition in float64 (Ioffe & Szegedy 2015, Algorithm 1), differentiated by autograd."""
    shape = (1, -1, *[1] * (batch.x.dim() - 2))
    dims = [0, *range(2, batch.x.dim())]
    mask = torch.ones_like(batch.x[:, :1], dtype=torch.bool) if batch.mask is None else batch.mask
    num_channels = batch.x.size(1)
    x = torch.where(mask, batch.x.double(), 0).requires_grad_()
    residual = torch.zeros_like(x) if batch.residual is None else torch.where(mask, batch.residual.double(), 0)
    residual = residual.detach().requires_grad_()
    weight = torch.ones(num_channels) if batch.weight is None else batch.weight
    bias = torch.zeros(num_channels) if batch.bias is None else batch.bias
    weight, bias = (t.double().detach().requires_grad_() for t in (weight, bias))

    n = mask.sum().double()
    mean = x.sum(dims, keepdim=True) / n
    centered = torch.where(mask, x - mean, 0)
    invstd = (centered.square().sum(dims, keepdim=True) / n + batch.eps).rsqrt()
    z = centered * invstd * weight.view(shape) + bias.view(shape) + residual
    y = torch.where(mask, activations.apply(z, batch.activation), 0)
    dy = torch.where(mask, batch.dy.double(), 0)
    dx, grad_weight, grad_bias, grad_residual = torch.autograd.grad(y, (x, weight, bias, residual), dy)
    return Step(
        payload=torch.cat([x.sum(dims), x.square().sum(dims), n.view(1)]).detach(),
        y=y.detach(),
        dx=torch.where(mask, dx, 0),
        grad_weight=None if batch.weight is None else grad_weight,
        grad_bias=None if batch.bias is None else grad_bias,
        grad_residual=grad_residual,
    )


def assert_equal(got: Step, want: Step, **tolerance: float) -> None:
    for name, wanted in vars(want).items():
        value = getattr(got, name)
        if wanted is None:
            assert value is None, name
        else:
            torch.testing.assert_close(value.double(), wanted, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def valid_positions(x: torch.Tensor) -> torch.Tensor:
    """About half of the positions; of the first sample none."""
    mask = torch.rand(x[:, :1].shape, generator=torch.Generator().manual_seed(9)) < 0.5
    if x.size(0) > 1:
        mask[0] = False
    return mask


@pytest.mark.usefixtures("tile_elements")
class TestEveryTilingAndLayout:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [
            (shape, layout)
            for shape in SHAPES
            for layout in LAYOUTS
            # Channels would be constant: 1/σ then magnifies the cancellation of Σx² − n·mean² by mean²/eps.
            if layout != "expanded" or math.prod(shape[2:]) > 1
        ],
        ids=str,
    )
    def test_a_step(self, shape, layout):
        x, num_channels = LAYOUTS[layout](random(*shape) * 2 + 3), shape[1]
        batch = Batch(
            x=x, dy=random(*shape, seed=1), weight=random(num_channels, seed=2), bias=random(num_channels, seed=3)
        )
        got = run(batch)
        assert_equal(got, truth(batch), **EXACT)
        assert got.y.stride() == got.dx.stride() == torch.empty_like(x).stride()
        assert got.grad_residual is batch.dy

    @pytest.mark.parametrize("dy_layout", LAYOUTS)
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_inside"])
    def test_what_comes_in_another_layout_than_x(self, layout, dy_layout):
        x, dy, residual = (random(4, 3, 5, 7, seed=seed) for seed in range(3))
        batch = Batch(
            x=LAYOUTS[layout](x),
            dy=LAYOUTS[dy_layout](dy),
            residual=LAYOUTS[dy_layout](residual),
            activation=ACTIVATIONS["silu"],
        )
        got = run(batch)
        assert_equal(got, truth(batch), **EXACT)
        assert got.grad_residual.stride() == torch.empty_like(batch.x).stride()

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
    @pytest.mark.parametrize("added", [False, True], ids=["", "residual"])
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    def test_activation_mask_and_residual(self, layout, added, masked, activation):
        x, dy, residual = (random(4, 3, 5, 7, seed=seed) + 1 for seed in range(3))
        mask = valid_positions(x) if masked else None
        if mask is not None:
            x, dy, residual = (torch.where(mask, t, torch.nan) for t in (x, dy, residual))
        batch = Batch(
            x=LAYOUTS[layout](x),
            dy=LAYOUTS[layout](dy),
            weight=random(3, seed=4),
            bias=random(3, seed=5),
            residual=residual if added else None,
            mask=mask,
            activation=ACTIVATIONS[activation],
        )
        before = [t.clone() for t in (batch.x, batch.dy, residual)]
        got = run(batch)
        assert_equal(got, truth(batch), **EXACT)
        assert got.y.stride() == got.dx.stride() == torch.empty_like(batch.x).stride()
        for was, now in zip(before, (batch.x, batch.dy, residual), strict=True):
            assert torch.equal(was.nan_to_num(7), now.nan_to_num(7))  # the arguments are left as they are


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
def test_without_weight_or_bias(has_weight, has_bias):
    batch = Batch(
        x=random(4, 3, 5, 7),
        dy=random(4, 3, 5, 7, seed=1),
        weight=random(3, seed=2) if has_weight else None,
        bias=random(3, seed=3) if has_bias else None,
    )
    assert_equal(run(batch), truth(batch), **EXACT)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 2, 2, 2)], ids=str
)
def test_an_empty_batch_has_zero_sums_and_empty_results(shape, activation, masked):
    x = torch.zeros(shape)
    got = run(
        Batch(
            x=x,
            dy=x,
            weight=torch.ones(3),
            bias=torch.ones(3),
            residual=x,
            mask=torch.ones_like(x[:, :1], dtype=torch.bool) if masked else None,
            activation=ACTIVATIONS[activation],
        )
    )
    assert got.payload.tolist() == [0.0] * 7
    assert got.y.shape == got.dx.shape == got.grad_residual.shape == shape
    assert got.grad_weight.tolist() == got.grad_bias.tolist() == [0.0] * 3


def test_a_mask_that_leaves_nothing_is_an_empty_batch():
    nan = torch.full((2, 3, 4), torch.nan)
    got = run(Batch(x=nan, dy=nan, weight=torch.ones(3), mask=torch.zeros(2, 1, 4, dtype=torch.bool)))
    assert got.payload.tolist() == [0.0] * 7
    assert not got.y.any()
    assert not got.dx.any()
    assert got.grad_weight.tolist() == [0.0] * 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype, layout, parameter_dtype, activation):
    parameter_dtype = parameter_dtype or dtype
    batch = Batch(
        x=LAYOUTS[layout](random(8, 3, 9, 7, dtype=dtype) * 2 + 3),
        dy=LAYOUTS[layout](random(8, 3, 9, 7, seed=1, dtype=dtype)),
        weight=random(3, seed=2, dtype=parameter_dtype),
        bias=random(3, seed=3, dtype=parameter_dtype),
        residual=random(8, 3, 9, 7, seed=4, dtype=dtype),
        activation=ACTIVATIONS[activation],
    )
    got, want = run(batch), truth(batch)
    assert got.y.dtype == got.dx.dtype == got.grad_residual.dtype == dtype
    assert got.grad_weight.dtype == got.grad_bias.dtype == parameter_dtype
    # float32 arithmetic on values of about 10, rounded once to the batch's dtype.
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.y.double(), want.y, rtol=rounding, atol=4e-6)
    torch.testing.assert_close(got.payload, want.payload, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(got.grad_residual.double(), want.grad_residual, rtol=rounding, atol=4e-6)
    # Sums of 504 products of at most 20, in float32 however narrow the batch, rounded once to the parameter's dtype.
    rounding_of_sums = max(torch.finfo(parameter_dtype).eps / 2, 1e-6)
    for gradient, wanted in ((got.grad_weight, want.grad_weight), (got.grad_bias, want.grad_bias)):
        torch.testing.assert_close(gradient.double(), wanted, rtol=rounding_of_sums, atol=5e-5)
    # g is stored in the batch's dtype before it is used here.
    torch.testing.assert_close(got.dx.double(), want.dx, rtol=2 * rounding, atol=4 * rounding + 1e-6)


def test_half_precision_sums_neither_overflow_nor_round():
    x = (random(64, 3, 8, 8) * 0.1 + 100).half()  # Σx of a channel is 4e5, beyond float16
    payload = eager.moments(x, None)
    exact = x.double().transpose(0, 1).flatten(1)
    statistics = moments.finalize(payload, 0.0)
    mean, invstd, _ = moments.split(statistics)
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-9, atol=0)
    # float32 sums of centred values
    torch.testing.assert_close(invstd.pow(-2), exact.var(1, correction=0), rtol=1e-6, atol=0)


class TestAccuracyInFloat32:
    """The bounds that the package promises, and never worse than torch's own by more than a rounding."""

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_inside"])
    @pytest.mark.parametrize(
        ("mean", "std"), [(0.0, 1.0), (1e3, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e2, 1e-2), (1e5, 1.0)]
    )
    def test_far_from_zero(self, mean, std, layout):
        x = LAYOUTS[layout]((random(8, 16, 32, 32) * std + mean).float())
        dy = LAYOUTS[layout](random(8, 16, 32, 32, seed=1, dtype=torch.float32) + 1)
        batch = Batch(x=x, dy=dy, weight=torch.ones(16), bias=torch.zeros(16), eps=1e-12)
        got, want = run(batch), truth(batch)
        var = x.double().var((0, 2, 3), correction=0)
        sigma = var.sqrt().view(1, -1, 1, 1)
        var_error = ((_var(got.payload) - var).abs() / var).max().item()
        y_error = (got.y - want.y).abs().max().item()
        dx_error = ((got.dx - want.dx) * sigma).abs().max().item()
        far = abs(mean / std) > 1e4
        assert var_error <= (1e-4 if far else 1e-6)
        assert y_error <= (1e-5 if far else 1e-6)
        assert dx_error <= (1e-5 if far else 1e-6)

        leaf, running_var = x.clone().requires_grad_(), torch.zeros(16)
        y = F.batch_norm(leaf, torch.zeros(16), running_var, batch.weight, batch.bias, True, 1.0, batch.eps)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        n = x.numel() // 16
        # float32 rounds the variance by 6e-8, and a y and dx of 5 by 5e-7.
        assert var_error <= ((running_var.double() * (n - 1) / n - var).abs() / var).max().item() + 1.2e-7
        assert y_error <= (y.detach() - want.y).abs().max().item() + 5e-7
        assert dx_error <= ((dx - want.dx) * sigma).abs().max().item() + 5e-7

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.usefixtures("tile_elements")
    def test_zeros_around_the_data_do_not_make_a_poor_pivot(self, layout):
        x = torch.zeros(4, 8, 34, 34)
        x[1:, :, 1:-1, 1:-1] = random(3, 8, 32, 32, dtype=torch.float32) + 100  # the first sample is padding alone
        exact = x.double().var((0, 2, 3), correction=0)
        got = _var(eager.moments(LAYOUTS[layout](x), None))
        assert ((got - exact).abs() / exact).max() <= 1e-6

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_padding_beyond_a_mask_does_not_make_a_poor_pivot(self, layout):
        mask = torch.zeros(4, 1, 34, 34, dtype=torch.bool)
        mask[:, :, 1:-1, 1:-1] = True
        values = random(4, 8, 34, 34, dtype=torch.float32) + 1e4
        x = LAYOUTS[layout](torch.where(mask, values, 0))
        exact = values[:, :, 1:-1, 1:-1].double().var((0, 2, 3), correction=0)
        assert ((_var(eager.moments(x, mask)) - exact).abs() / exact).max() <= 1e-6

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_a_long_row_does_not_add_up_rounding(self, layout):
        x = LAYOUTS[layout](random(1, 2, 1 << 20, dtype=torch.float32) + 10)
        exact = x.double().var((0, 2), correction=0)
        assert ((_var(eager.moments(x, None)) - exact).abs() / exact).max() <= 1e-6
        statistics = moments.finalize(eager.moments(x, None), EPS)
        sums = eager.gradient_sums(torch.ones_like(x), x, statistics, None, None, None, None, None, IDENTITY).sums
        torch.testing.assert_close(sums[0], torch.full((2,), 2.0**20, dtype=torch.float64), rtol=1e-6, atol=0)
        # Σ(x − mean), which is 0: 2²⁰ values of about 1 that float32 rounded.
        assert sums[1].abs().max() <= 1e-6 * 2**20


class TestActivationGradient:
    """Which side of zero a value was on is told by y: zeros are below, as in torch.nn.functional."""

    Y = torch.tensor([-1.0, -0.0, 0.0, 1.0, torch.nan])

    def grad(self, activation: Activation, dy: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        y = self.Y.view(5, 1).to(dtype)
        statistics = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
        x = torch.zeros(5, 1, dtype=dtype)
        return eager.gradient_sums(
            dy.view(5, 1).to(dtype), x, statistics, None, None, y, None, None, activation
        ).grad.flatten()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_relu(self, dtype):
        assert self.grad(ACTIVATIONS["relu"], torch.full((5,), 3.0), dtype).tolist() == [0, 0, 0, 3, 3]

    def test_relu_cuts_off_what_is_infinite(self):
        got = self.grad(ACTIVATIONS["relu"], torch.tensor([torch.inf, torch.nan, -torch.inf, 1.0, 1.0]))
        assert got.tolist() == [0, 0, 0, 1, 1]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_leaky_relu(self, dtype):
        got = self.grad(Activation("leaky_relu", 0.25), torch.full((5,), 4.0), dtype)
        assert got.tolist() == [1, 1, 1, 4, 4]

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_nan_of_x_reaches_its_channel_and_no_other(self, activation):
        x = random(4, 2, 3)
        x[1, 0, 2] = torch.nan
        got = run(Batch(x=x, dy=random(4, 2, 3, seed=1), activation=ACTIVATIONS[activation]))
        assert got.y[:, 0].isnan().all()
        assert got.dx[:, 0].isnan().all()
        assert got.y[:, 1].isfinite().all()
        assert got.dx[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parameter_gradients_do_not_share_memory_with_the_sums(dtype):
    x, statistics = random(4, 3, 5, dtype=dtype), torch.ones(7, dtype=torch.float64)
    ones = torch.ones(3, dtype=dtype)
    result = eager.gradient_sums(x + 1, x, statistics, ones, ones, None, None, None, IDENTITY)
    kept = result.grad_weight.clone(), result.grad_bias.clone()
    result.sums.fill_(torch.nan)  # as the all-reduce overwrites it
    assert torch.equal(result.grad_weight, kept[0])
    assert torch.equal(result.grad_bias, kept[1])


def test_finalize_folds_the_batch_into_the_running_statistics():
    payload = eager.moments(random(4, 3, 5), None)
    got, want = (
        RunningStatistics(torch.ones(3).double(), torch.ones(3).double(), torch.tensor(2), 0.3, torch.tensor(0))
        for _ in range(2)
    )
    statistics = eager.finalize(payload, EPS, got)
    moments.update_running(want, payload)
    assert torch.equal(statistics, moments.finalize(payload, EPS))
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.var, want.var)
    assert got.num_batches == want.num_batches == 3


def test_autocast_changes_nothing():
    batch = Batch(
        x=random(4, 3, 5, 7, dtype=torch.float32),
        dy=random(4, 3, 5, 7, seed=1, dtype=torch.float32),
        weight=random(3, seed=2, dtype=torch.float32),
        activation=ACTIVATIONS["silu"],
    )
    alone = run(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(batch)
    for name, value in vars(alone).items():
        assert value is None or torch.equal(getattr(under, name), value), name


def _var(payload: torch.Tensor) -> torch.Tensor:
    """The biased variance, shape (C,)."""
    _, invstd, _ = moments.split(moments.finalize(payload, 0.0))
    return invstd.pow(-2)
