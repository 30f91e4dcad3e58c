"""The Triton kernels, in one process, against the float64 formulas of `tests.kernel_truth`.

Where there is no GPU, Triton's interpreter runs them on the CPU: what it shows is arithmetic and addresses, not what a
compiler or a race makes of them. A failure in one layout alone points to how tiles lie, in one dtype alone to the width
of a vector, with a mask alone to how its positions are found. Outputs start as NaN, so a value that was never written
shows.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from syncbn import moments
from syncbn.activation import IDENTITY, Activation
from syncbn.kernels.triton import backend as kernels
from syncbn.kernels.triton import plan
from syncbn.moments import RunningStatistics
from tests import kernel_truth
from tests.interpreter import DEVICE
from tests.kernel_truth import DTYPES, EPS, LAYOUTS, Step, parameters, random

ACTIVATIONS = [IDENTITY, Activation("relu"), Activation("leaky_relu", 0.2), Activation("silu")]

# Values to a vector are 2, 4 and 8 for 8, 4 and 2 bytes; what a plane's size has of those factors decides whether
# vectors end with it, and the whole batch's size whether they may reach into the plane beside it.
SHAPES = {
    (5, 3): "rows of fewer than a vector",
    (33, 17): "more rows than a tile, C odd",
    (9, 64): "whole vectors of channels",
    (4, 3, 7): "three dimensions; vectors of 4 bytes' values reach into the next plane, of 2 bytes' not",
    (3, 5, 7): "no vector may reach anywhere",
    (2, 17, 18): "planes of a multiple of 2",
    (2, 3, 12): "of 4",
    (2, 2, 24): "of 8, not 16",
    (8, 5, 7, 7): "planes of 49, the batch a multiple of 8",
    (3, 17, 5, 7): "planes of 35",
    (2, 3, 33, 35): "planes of more than a tile's width",
    (3, 1, 6, 5): "one channel",
    (2, 64, 2, 2): "many channels of few values",
    (1, 2, 40, 40): "one sample, cut along its planes",
    (2, 3, 2, 3, 4): "five dimensions",
}


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    one = torch.ones(1, device=DEVICE)
    assert torch.stack([torch.empty(1, device=DEVICE), torch.empty_like(one), one.new_empty(1)]).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(step: Step) -> dict[str, torch.Tensor | None]:
    before = {name: t.clone() for name, t in vars(step).items() if isinstance(t, torch.Tensor)}
    got = kernel_truth.check(kernels, step, DEVICE)
    for name, value in before.items():
        assert torch.equal(getattr(step, name).nan_to_num(7), value.nan_to_num(7)), f"{name} was written to"
    return got


def run(step: Step) -> dict[str, torch.Tensor | None]:
    return kernel_truth.run(kernels, step, DEVICE)


def valid_positions(shape: tuple[int, ...]) -> torch.Tensor:
    mask = random(shape[0], 1, *shape[2:], seed=5) > -0.3
    mask[1] = False  # a sample that is padding throughout
    return mask


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (shape, layout)
        for shape in SHAPES
        for layout in ("contiguous", "channels_last")
        if layout == "contiguous" or len(shape) > 2  # the same memory
    ],
    ids=str,
)
def test_every_shape_in_both_layouts(shape, layout):
    for dtype in DTYPES:
        x, dy = (LAYOUTS[layout](random(*shape, dtype=dtype, seed=seed)) for seed in range(2))
        check(Step(x=x, dy=dy, **parameters(shape[1], dtype)))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: str(a.name))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_fusion(layout, activation, with_residual, masked):
    shape = (4, 6, 3, 5)  # 360 values: without a mask every vector but float64's reaches into the next plane
    for dtype in DTYPES:
        x, dy, residual = (LAYOUTS[layout](random(*shape, dtype=dtype, seed=seed)) for seed in range(3))
        mask = valid_positions(shape) if masked else None
        if mask is not None:
            for t in (x, dy, residual):
                t.masked_fill_(~mask, torch.nan)
        residual = residual if with_residual else None
        got = check(Step(x=x, dy=dy, residual=residual, mask=mask, activation=activation, **parameters(6, dtype)))
        if mask is not None:
            for name in ("y", "grad", "dx"):
                if name in got:
                    assert (got[name].masked_select(~mask) == 0).all(), (name, dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 33, 35), (2, 3, 16, 24), (3, 2, 7), (2, 70, 9)], ids=str)
def test_a_mask_lies_over_every_kind_of_tile(shape, layout):
    x, dy = (LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=seed)) for seed in range(2))
    mask = valid_positions(shape)
    for t in (x, dy):
        t.masked_fill_(~mask, torch.nan)
    check(Step(x=x, dy=dy, mask=mask, activation=Activation("relu"), **parameters(shape[1], torch.float32)))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("contiguous", "channels_last")])
def test_any_other_layout_is_copied_and_given_back(layout):
    shape = (3, 5, 4, 6)
    x = LAYOUTS[layout](random(*shape))
    check(Step(x=x, dy=random(*shape, seed=1), mask=valid_positions(shape), **parameters(5, torch.float64)))


@pytest.mark.parametrize("name", ["relu", "silu", None])  # which read y, the residual and neither in the backward
@pytest.mark.parametrize("others", LAYOUTS)
def test_what_goes_with_x_may_lie_otherwise(others, name):
    shape = (3, 5, 4, 6)
    dy, residual = (LAYOUTS[others](random(*shape, seed=seed)) for seed in (1, 2))
    x = LAYOUTS["contiguous" if "channels_last" in others else "channels_last"](random(*shape))
    check(Step(x=x, dy=dy, residual=residual, activation=Activation(name), **parameters(5, torch.float64)))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_batch_may_start_anywhere_in_memory(start):
    shape = (4, 3, 7)
    x, dy = (random(200, dtype=torch.float32, seed=seed)[start : start + 84].view(shape) for seed in range(2))
    check(Step(x=x, dy=dy, **parameters(3, torch.float32)))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_take_parameters_in_float32(half):
    x, dy = (random(4, 6, 5, 5, dtype=half, seed=seed) for seed in range(2))
    got = check(Step(x=x, dy=dy, **parameters(6, torch.float32)))
    assert got["grad_weight"].dtype == got["grad_bias"].dtype == torch.float32


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)], ids=str)
def test_weight_and_bias_may_be_missing(given):
    both = parameters(6, torch.float64)
    step = Step(x=random(4, 6, 5), dy=random(4, 6, 5, seed=1), activation=Activation("silu"))
    check(replace(step, **{name: both[name] for name in given}))


def test_parameters_need_not_be_contiguous():
    wide = random(6, 2)
    check(Step(x=random(4, 6, 5), dy=random(4, 6, 5, seed=1), weight=wide[:, 0], bias=wide[:, 1]))


@pytest.mark.parametrize("view", ["x", "dy", "residual"])
def test_a_negated_view_is_read_as_its_values(view):
    given = {name: random(3, 4, 6, seed=seed) for seed, name in enumerate(("x", "dy", "residual"))}
    given[view] = torch._neg_view(given[view])
    check(Step(**given, activation=Activation("silu"), **parameters(4, torch.float64)))


def test_zeros_without_memory_are_zeros():
    zeros = torch._efficientzerotensor((3, 4, 6), dtype=torch.float64)
    got = check(Step(x=random(3, 4, 6), dy=zeros, **parameters(4, torch.float64)))
    assert not got["dx"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_empty_batch_has_zero_sums_and_empty_results(shape, dtype):
    x, mask = torch.zeros(shape, dtype=dtype), torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
    for step in (Step(x=x, dy=x), Step(x=x, dy=x, residual=x, mask=mask, activation=Activation("silu"))):
        got = check(replace(step, **parameters(3, dtype)))
        assert got["payload"].tolist() == [0.0] * 7
        assert got["sums"].tolist() == [[0.0] * 3] * 2
        assert got["grad_weight"].tolist() == got["grad_bias"].tolist() == [0.0] * 3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mask_without_any_position_gives_zeros(layout):
    x = LAYOUTS[layout](torch.full((2, 3, 4), torch.nan))
    got = check(Step(x=x, dy=x, mask=torch.zeros(2, 1, 4, dtype=torch.bool), **parameters(3, torch.float32)))
    assert got["payload"].tolist() == [0.0] * 7
    assert not got["y"].any()
    assert not got["dx"].any()


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_a_single_value_is_its_channel_s_mean(shape):
    got = check(Step(x=random(*shape), dy=random(*shape, seed=1), **parameters(3, torch.float64)))
    torch.testing.assert_close(got["y"].flatten(), parameters(3, torch.float64)["bias"], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("activation", [IDENTITY, Activation("relu"), Activation("silu")], ids=lambda a: str(a.name))
@pytest.mark.parametrize(
    ("shape", "layout"), [((8, 5, 7, 7), "contiguous"), ((2, 3, 130), "contiguous"), ((8, 5, 3, 3), "channels_last")]
)
def test_what_is_not_finite_stays_in_its_channel(shape, layout, activation, bad):
    x, dy = (LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=seed)) for seed in range(2))
    step, channel = Step(x=x, dy=dy, activation=activation, **parameters(shape[1], torch.float32)), shape[1] // 2
    clean = run(step)
    for edge in (0, -1):  # of a plane, in vectors that the plane beside it reaches into
        x[(1, channel, *[edge] * (x.dim() - 2))] = bad
    got = run(step)
    assert got["y"][:, channel].isnan().any()
    others = [c for c in range(shape[1]) if c != channel]
    for name in ("y", "dx", "grad_weight", "grad_bias"):
        of_others = (slice(None), others) if name in ("y", "dx") else others
        assert torch.equal(got[name][of_others], clean[name][of_others]), name
    for name in ("payload", "sums"):
        was, now = (result[name].flatten()[: 2 * shape[1]].view(2, -1)[:, others] for result in (clean, got))
        assert torch.equal(now, was), name


def test_what_a_tile_holds_beyond_the_batch_reaches_no_sum():
    statistics = torch.tensor([3e36, 3e36, 300.0, 300.0, 5.0], dtype=torch.float64, device=DEVICE)
    for shape in ((1, 2, 5), (5, 2)):  # planes and rows
        x = torch.full(shape, 3e36, device=DEVICE)  # where silu's z overflows for what is not there
        g = kernels.gradient_sums(torch.ones_like(x), x, statistics, None, None, None, None, None, Activation("silu"))
        assert g.sums.isfinite().all(), shape


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_at_special_values(name, dtype):
    values = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 90.0, -90.0, -800.0, 1e-30, -1e-30, 3e38, -3e38]
    )
    z = values.to(dtype).view(1, 1, -1)
    statistics = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    activation = Activation(name, 0.1)
    x, dy, nothing = z.to(DEVICE), torch.ones_like(z, device=DEVICE), torch.zeros_like(z, device=DEVICE)
    y = kernels.normalize(x, statistics, None, None, None, None, activation)
    leaf = z.clone().requires_grad_()
    expected = {"relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "silu": F.silu}[name](leaf)
    # −90 and beyond: silu is 0 to within the smallest normal number, in torch and here.
    torch.testing.assert_close(y.cpu(), expected.detach(), rtol=4e-7, atol=1e-37, equal_nan=True)

    saved = (y, None) if activation.saves_output else (None, nothing)
    grad = kernels.gradient_sums(dy, x, statistics, None, None, *saved, None, activation).grad.cpu()
    expected.backward(torch.ones_like(z))
    where_defined = ~z.isnan() if activation.saves_output else torch.ones_like(z, dtype=torch.bool)
    torch.testing.assert_close(grad[where_defined], leaf.grad[where_defined], rtol=4e-7, atol=1e-36, equal_nan=True)
    if activation.saves_output:
        assert (grad[~where_defined] == 1).all()  # a NaN of y lets dy through


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_silu_is_accurate_everywhere(dtype):
    z = torch.linspace(-80, 80, 10_007, dtype=dtype, device=DEVICE).view(1, 1, -1)
    statistics = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    y = kernels.normalize(z, statistics, None, None, None, None, Activation("silu"))
    exact = F.silu(z.double())
    # A few roundings of the result, and those of the exponent of e^-z, which count z times.
    assert ((y.double() - exact).abs() / (exact.abs() * (1 + z.abs()))).max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number_survives_and_rounding_is_to_nearest_even(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1).to(DEVICE)
    identity = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    same = kernels.normalize(every, identity, None, None, None, None, IDENTITY)
    torch.testing.assert_close(same, every, rtol=0, atol=0, equal_nan=True)
    # 1 + 2^-9 is exact in float32 and the product has to be rounded, sometimes from midway between two neighbours.
    scale = torch.tensor([1 + 2.0**-9], device=DEVICE)
    scaled = kernels.normalize(every, identity, scale, None, None, None, IDENTITY)
    torch.testing.assert_close(scaled, (every.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


class TestAccuracyInFloat32:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [((8, 4, 24, 24), "contiguous"), ((2, 96, 7, 7), "contiguous"), ((8, 24, 9, 9), "channels_last")],
        ids=str,
    )
    @pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])  # in units of the standard deviation
    def test_variance_output_and_gradient_hold_far_from_zero(self, mean, shape, layout):
        x = LAYOUTS[layout]((random(*shape) + mean).float())
        dy = LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=1))
        dims, view = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        exact = x.double()
        exact_mean, var = exact.mean(dims), exact.var(dims, correction=0)
        x, dy = x.to(DEVICE), dy.to(DEVICE)

        statistics = kernels.finalize(kernels.moments(x, None), 0.0, None)
        # A thread's deviations from the mean of what it holds, summed in float32; raw float64 sums lose 1e-8.
        assert ((variance(statistics) / var - 1).abs()).max() <= 1e-6

        y = kernels.normalize(x, statistics, None, None, None, None, IDENTITY).cpu().double()
        expected = (exact - exact_mean.view(view)) / var.sqrt().view(view)
        # y is a float32 of up to 5σ: 3e-7 of rounding is its own, and x − pivot is exact.
        assert (y - expected).abs().max() <= 1e-6

        sums = kernels.gradient_sums(dy, x, statistics, None, None, None, None, None, IDENTITY).sums
        dx = kernels.input_gradient(dy, x, statistics, sums, None, None, None, IDENTITY).cpu().double()
        g, n = dy.cpu().double(), exact.numel() / exact.size(1)
        expected_dx = g - g.mean(dims, keepdim=True) - expected * (g * expected).sum(dims, keepdim=True) / n
        assert (dx * var.sqrt().view(view) - expected_dx).abs().max() <= 1e-6

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    @pytest.mark.parametrize("masked", [False, True], ids=["a border of zeros", "a masked border"])
    def test_what_surrounds_the_data_makes_no_poor_pivot(self, masked, layout):
        mean = 1e4 if masked else 100.0  # zeros that count are part of the spread
        x, mask = torch.zeros(3, 4, 34, 34), torch.zeros(3, 1, 34, 34, dtype=torch.bool)
        x[:, :, 1:-1, 1:-1] = random(3, 4, 32, 32, dtype=torch.float32) + mean
        mask[:, :, 1:-1, 1:-1] = True
        exact = (x[:, :, 1:-1, 1:-1] if masked else x).double().var((0, 2, 3), correction=0)
        payload = kernels.moments(LAYOUTS[layout](x).to(DEVICE), mask.to(DEVICE) if masked else None)
        assert (variance(kernels.finalize(payload, 0.0, None)) / exact - 1).abs().max() <= 1e-6

    @pytest.mark.parametrize("shape", [(1, 1, 1 << 16), (1 << 16, 1)], ids=str)
    def test_a_long_channel_does_not_add_up_rounding(self, shape):
        x = random(*shape, dtype=torch.float32).to(DEVICE) + 10
        payload = kernels.moments(x, None)
        # 2¹⁶ values of about 10, each thread's share about its mean.
        torch.testing.assert_close(payload[0], x.double().sum(), rtol=1e-9, atol=0)
        statistics = kernels.finalize(payload, 0.0, None)
        sums = kernels.gradient_sums(
            torch.full_like(x, 0.1), x, statistics, None, None, None, None, None, IDENTITY
        ).sums
        # A thread adds up at most 32 values in float32 before it folds them: a unit in the last place, not 2¹⁶.
        torch.testing.assert_close(sums[0].item(), 2**16 * torch.tensor(0.1).double().item(), rtol=1e-7, atol=0)


@pytest.fixture
def set_processors(monkeypatch):
    """Sets what the plans take for the GPU's number of processors; the plans are kept, so they are forgotten."""

    def forget() -> None:
        for function in vars(kernels).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    def set_processors(number: int) -> None:
        monkeypatch.setattr(kernels, "num_processors", lambda _: number)
        forget()

    yield set_processors
    forget()


SPLITS = {
    "samples of planes": ((20, 16, 7, 7), "contiguous"),
    "parts of a plane": ((1, 8, 50, 51), "contiguous"),
    "rows": ((300, 33), "contiguous"),
    "rows of images": ((18, 33, 4, 4), "channels_last"),
}


@pytest.mark.parametrize("case", SPLITS)
class TestSplits:
    """Programs that share a channel fold their sums in one order, whoever comes last."""

    def test_their_number_changes_rounding_alone(self, case, monkeypatch, set_processors):
        shape, layout = SPLITS[case]
        x, dy = (LAYOUTS[layout](random(*shape, seed=seed)) for seed in range(2))
        mask = random(shape[0], 1, *shape[2:], seed=5) > 0
        step = Step(x=x, dy=dy, mask=mask, activation=Activation("relu"), **parameters(shape[1], torch.float64))
        results, num_splits, reduction = [], [], kernels.reduction

        def recorded(*arguments, **options):
            num_splits.append(reduction(*arguments, **options).num_splits)
            return reduction(*arguments, **options)

        monkeypatch.setattr(kernels, "reduction", recorded)
        for number in (4, 1):
            if number == 1:  # each block of channels is one program's
                monkeypatch.setattr(plan, "_PROGRAMS_PER_PROCESSOR", 2)
            set_processors(number)
            results.append(check(step))
        assert len(num_splits) == 4  # of moments and gradient sums, each time
        assert min(num_splits[:2]) > 1
        assert max(num_splits[2:]) == 1
        for name, value in results[0].items():
            # Sums of at most 10⁴ products of float64 in another order.
            torch.testing.assert_close(results[1][name], value, rtol=1e-12, atol=1e-11, msg=name)

    def test_counters_are_zero_again_and_results_the_same_to_the_bit(self, case, monkeypatch, set_processors):
        shape, layout = SPLITS[case]
        x, dy = (LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=seed)) for seed in range(2))
        step = Step(x=x, dy=dy, **parameters(shape[1], torch.float32))
        counters, asked = torch.zeros(1 << 14, dtype=torch.int32, device=DEVICE), []  # shared, as on a stream
        monkeypatch.setattr(kernels, "arrivals", lambda _, num_blocks: asked.append(num_blocks) or counters)
        set_processors(4)
        first, again = run(step), run(step)
        assert len(asked) == 4
        assert not counters.any()
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_relu_rebuilt_from_x_is_on_the_side_of_zero_that_y_was():
    # Around each channel's zero of y, unit by unit in the last place of x, where rounding decides.
    num_channels = 64
    mean, invstd = random(num_channels, seed=1) * 10, random(num_channels, seed=2).abs() + 0.5
    both = parameters(num_channels, torch.float32)
    zero = (mean - both["bias"].double() / (invstd * both["weight"].double())).float()
    x = (zero.view(torch.int32) + torch.arange(-128, 128, dtype=torch.int32).view(-1, 1)).view(torch.float32)
    x = x.view(4, 64, num_channels).transpose(1, 2)
    statistics = torch.cat([mean, invstd, torch.tensor([256.0]).double()]).to(DEVICE)
    weight, bias = (both[name].to(DEVICE) for name in ("weight", "bias"))
    relu = Activation("relu")
    for layout in ("contiguous", "channels_last"):
        batch = LAYOUTS[layout](x).to(DEVICE)
        y = kernels.normalize(batch, statistics, weight, bias, None, None, relu)
        is_above = y > 0
        assert is_above.any()
        assert not is_above.all()
        ones = torch.ones_like(batch)
        left = kernels.gradient_sums(ones, batch, statistics, weight, bias, None, None, None, relu)
        assert torch.equal(left.sums[0], is_above.double().sum((0, 2)))
        assert left.remaining == relu
        dx = kernels.input_gradient(
            left.grad, batch, statistics, torch.zeros_like(left.sums), weight, bias, None, left.remaining
        )
        assert torch.equal(dx != 0, is_above)


def test_only_relu_and_leaky_relu_with_a_residual_ask_for_the_output():
    asks = {(a.name, r): kernels.saves_output(a, has_residual=r) for a in ACTIVATIONS for r in (False, True)}
    assert [case for case, asked in asks.items() if asked] == [("relu", True), ("leaky_relu", True)]


class TestFinalize:
    """Alone and in one pass with the normalization, against `syncbn.moments`."""

    def payload(self, kind: str, num_channels: int) -> torch.Tensor:
        x = random({"single": 1, "none": 0}.get(kind, 140), num_channels) + 3
        payload = torch.cat([x.sum(0), x.square().sum(0), torch.tensor([len(x)]).double()])
        if kind in ("nan", "inf"):
            payload[num_channels - 1] = float(kind)
        return payload

    def running(
        self, num_channels: int, dtype: torch.dtype, momentum: float | None, guarded: bool, device: str
    ) -> RunningStatistics:
        return RunningStatistics(
            mean=random(num_channels, dtype=dtype, seed=1).to(device),
            var=random(num_channels, dtype=dtype, seed=2).abs().to(device),
            num_batches=torch.tensor(3, device=device),
            momentum=momentum,
            num_nonfinite=torch.tensor(7, device=device) if guarded else None,
        )

    def assert_folded_in(self, got: RunningStatistics, payload: torch.Tensor, guarded: bool) -> None:
        expected = self.running(len(got.mean), got.mean.dtype, got.momentum, guarded, "cpu")
        moments.update_running(expected, payload)
        for name, value in expected._asdict().items():
            if isinstance(value, torch.Tensor):
                # Where a batch of Inf and NaN is folded in, either may come out.
                same, finite = getattr(got, name).cpu(), value.isfinite()
                assert torch.equal(same.isfinite(), finite), name
                # The same arithmetic in float64, of which the last place of the buffer's dtype may be another.
                torch.testing.assert_close(
                    same[finite], value[finite], rtol=torch.finfo(got.mean.dtype).eps, atol=1e-13, msg=name
                )

    @pytest.mark.parametrize(
        ("num_channels", "dtype"),
        # 600 are several programs, and their payload more than is looked through at once for what is not finite.
        [(5, torch.float64), (5, torch.float32), (5, torch.bfloat16), (600, torch.float32)],
        ids=str,
    )
    @pytest.mark.parametrize("momentum", [0.1, 1.0, None])
    @pytest.mark.parametrize("guarded", [False, True], ids=["", "guarded"])
    @pytest.mark.parametrize("kind", ["finite", "nan", "inf", "single", "none"])
    def test_alone(self, kind, guarded, momentum, dtype, num_channels):
        payload = self.payload(kind, num_channels)
        got = self.running(num_channels, dtype, momentum, guarded, DEVICE)
        statistics = kernels.finalize(payload.to(DEVICE), EPS, got).cpu()
        # 140 values of about 3: either side loses (mean/σ)² · 2^-53 = 1e-15 of the variance a few times.
        torch.testing.assert_close(statistics, moments.finalize(payload, EPS), rtol=1e-13, atol=1e-13, equal_nan=True)
        self.assert_folded_in(got, payload, guarded)
        if kind in ("single", "none") or (guarded and kind != "finite"):
            before = self.running(num_channels, dtype, momentum, guarded, DEVICE)
            assert torch.equal(got.mean, before.mean)
            assert torch.equal(got.var, before.var)
            assert got.num_batches == 3
        if guarded:
            assert got.num_nonfinite == (8 if kind in ("nan", "inf") else 7)

    @pytest.mark.parametrize(
        ("shape", "layout"), [((3, 70, 9), "contiguous"), ((2, 3, 24, 25), "contiguous"), ((70, 150), "contiguous")]
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("guarded", [False, True], ids=["", "guarded"])
    @pytest.mark.parametrize("kind", ["finite", "nan", "single"])
    def test_with_the_normalization_it_equals_the_two_steps(self, kind, guarded, momentum, shape, layout):
        x, num_channels = LAYOUTS[layout](random(*shape, dtype=torch.float32)).to(DEVICE), shape[1]
        payload = self.payload(kind, num_channels)
        weight, bias = (p.to(DEVICE) for p in parameters(num_channels, torch.float32).values())
        together, apart = (self.running(num_channels, torch.float32, momentum, guarded, DEVICE) for _ in range(2))
        y, statistics = kernels.finalize_and_normalize(
            x, payload.to(DEVICE), EPS, together, weight, bias, None, None, Activation("relu")
        )
        expected = kernels.finalize(payload.to(DEVICE), EPS, apart)
        torch.testing.assert_close(statistics, expected, rtol=0, atol=0, equal_nan=True)
        expected_y = kernels.normalize(x, expected, weight, bias, None, None, Activation("relu"))
        torch.testing.assert_close(y, expected_y, rtol=0, atol=0, equal_nan=True)
        for name, value in together._asdict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(apart, name), rtol=0, atol=0, equal_nan=True, msg=name)
        self.assert_folded_in(together, payload, guarded)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
    def test_an_empty_rank_keeps_the_same_running_statistics_as_its_peers(self, shape):
        payload, got = self.payload("finite", 3), self.running(3, torch.float32, 0.1, True, DEVICE)
        x = torch.zeros(shape, device=DEVICE)
        y, statistics = kernels.finalize_and_normalize(
            x, payload.to(DEVICE), EPS, got, None, None, None, None, IDENTITY
        )
        assert y.shape == shape
        torch.testing.assert_close(statistics.cpu(), moments.finalize(payload, EPS), rtol=1e-13, atol=1e-13)
        self.assert_folded_in(got, payload, guarded=True)

    def test_without_running_statistics_or_a_counter(self):
        payload = self.payload("finite", 5).to(DEVICE)
        y, _ = kernels.finalize_and_normalize(
            torch.zeros(2, 5, device=DEVICE), payload, EPS, None, None, None, None, None, IDENTITY
        )
        assert y.isfinite().all()
        got = RunningStatistics(torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE), None, 0.5, None)
        kernels.finalize(payload, EPS, got)
        torch.testing.assert_close(got.mean.double(), payload[:5] / 140 / 2, rtol=1e-7, atol=0)

    def test_running_statistics_may_be_strided(self):
        payload, wide = self.payload("finite", 5).to(DEVICE), torch.zeros(5, 2, device=DEVICE)
        kernels.finalize(payload, EPS, RunningStatistics(wide[:, 0], wide[:, 1], None, 1.0, None))
        expected = RunningStatistics(torch.zeros(5), torch.zeros(5), None, 1.0, None)
        moments.update_running(expected, payload.cpu())
        torch.testing.assert_close(wide.cpu(), torch.stack([expected.mean, expected.var], 1))

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_autograd_sees_that_the_buffers_changed(self, momentum):
        got = self.running(5, torch.float32, momentum, True, DEVICE)
        buffers = (got.mean, got.var, got.num_batches, got.num_nonfinite)
        before = [t._version for t in buffers]
        kernels.finalize(self.payload("finite", 5).to(DEVICE), EPS, got)
        assert all(t._version > was for t, was in zip(buffers, before, strict=True))


def variance(statistics: torch.Tensor) -> torch.Tensor:
    """The biased variance out of `[mean, 1/σ, n]` with an eps of 0, shape (C,)."""
    return moments.split(statistics.cpu())[1].pow(-2)
