"""The compiled passes, in one process, against the float64 formulas of `tests.kernel_truth`.

A failure in one layout alone points to strides, in one dtype alone to a conversion, in odd sizes alone to the lanes at
the end of a span, with two threads alone to how the work is cut. Outputs start as NaN, so a value that was never
written shows.
"""

import functools
import logging
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from syncbn import moments, native
from syncbn.activation import IDENTITY, Activation
from syncbn.kernels import backend_for, eager
from syncbn.kernels import native as kernels
from syncbn.moments import RunningStatistics
from tests import kernel_truth
from tests.kernel_truth import DTYPES, EPS, LAYOUTS, Step, parameters, random

pytestmark = pytest.mark.skipif(os.environ.get("SYNCBN_NATIVE") == "0", reason="SYNCBN_NATIVE=0")


@pytest.fixture(autouse=True)
def _library():
    """Never skipped where it is missing: what runs the suite has to have built it."""
    assert native.available()


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads={n}")
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Lanes are 2 to 16, blocks of channels 4 to 64, tiles 4096 positions: below, at and above each.
SHAPES = [(3, 5), (33, 67), (2, 3, 7), (3, 17, 5, 7), (2, 64, 4, 4), (2, 131, 3, 1), (1, 1, 70, 61), (2, 5, 3, 4, 5)]


run, check = (functools.partial(function, kernels) for function in (kernel_truth.run, kernel_truth.check))


def test_it_is_chosen_for_cpu_tensors():
    assert backend_for(torch.zeros(2, 3)) is kernels
    assert backend_for(torch.zeros(2, 3, device="meta")) is eager


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_layout_and_dtype(shape, layout):
    for dtype in DTYPES:
        x = LAYOUTS[layout](random(*shape, dtype=dtype))
        check(Step(x=x, dy=random(*shape, dtype=dtype, seed=1), **parameters(shape[1], dtype)))


@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice_channels_last", "batch_inside"])
@pytest.mark.parametrize("name", ["silu", None])
def test_what_goes_with_x_may_lie_otherwise(layout, others, name):
    shape = (3, 17, 5, 7)
    x = LAYOUTS[layout](random(*shape))
    dy, residual = (LAYOUTS[others](random(*shape, seed=seed)) for seed in (1, 2))
    check(Step(x=x, dy=dy, residual=residual, activation=Activation(name), **parameters(17, torch.float64)))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    "activation",
    [IDENTITY, Activation("relu"), Activation("leaky_relu", 0.2), Activation("silu")],
    ids=lambda a: str(a.name),
)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((3, 19, 5, 7), "contiguous"),
        ((3, 19, 5, 7), "channels_last"),
        ((2, 67, 9), "channels_last"),
        ((40, 19), "contiguous"),
    ],
    ids=str,
)
def test_every_fusion(shape, layout, activation, with_residual, masked):
    for dtype in DTYPES:
        x, dy, residual = (LAYOUTS[layout](random(*shape, dtype=dtype, seed=seed)) for seed in range(3))
        mask = None
        if masked:
            mask = random(shape[0], 1, *shape[2:], seed=5) > -0.3
            mask[1] = False  # a sample that is padding throughout
            for t in (x, dy, residual):
                t.masked_fill_(~mask, torch.nan)
        got = check(
            Step(
                x=x,
                dy=dy,
                residual=residual if with_residual else None,
                mask=mask,
                activation=activation,
                **parameters(shape[1], dtype),
            )
        )
        if mask is not None:
            for name in ("y", "grad", "dx"):
                value = got[name]
                assert value is not None
                assert (value.masked_select(~mask) == 0).all(), (name, dtype)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_take_parameters_in_float32(half):
    x, dy = (random(4, 6, 5, 5, dtype=half, seed=seed) for seed in range(2))
    got = check(Step(x=x, dy=dy, **parameters(6, torch.float32)))
    assert got["grad_weight"].dtype == got["grad_bias"].dtype == torch.float32


@pytest.mark.parametrize("given", [(), ("weight",), ("bias",)], ids=str)
def test_weight_and_bias_may_be_missing(given):
    both = parameters(6, torch.float64)
    check(Step(x=random(4, 6, 5, 5), dy=random(4, 6, 5, 5, seed=1), **{name: both[name] for name in given}))


def test_parameters_need_not_be_contiguous():
    wide = random(6, 2)
    check(Step(x=random(4, 6, 5), dy=random(4, 6, 5, seed=1), weight=wide[:, 0], bias=wide[:, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_empty_batch_has_zero_sums_and_empty_results(shape, dtype):
    x, mask = torch.zeros(shape, dtype=dtype), torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool)
    for step in (Step(x=x, dy=x), Step(x=x, dy=x, residual=x, mask=mask, activation=Activation("silu"))):
        got = check(replace(step, **parameters(3, dtype)))
        assert got["payload"].tolist() == [0.0] * 7
        assert got["sums"].tolist() == [[0.0] * 3] * 2
        assert got["grad_weight"].tolist() == got["grad_bias"].tolist() == [0.0] * 3


def test_a_mask_without_any_position_gives_zeros():
    x = torch.full((2, 3, 4), torch.nan)
    got = check(Step(x=x, dy=x, mask=torch.zeros(2, 1, 4, dtype=torch.bool), **parameters(3, torch.float32)))
    assert got["payload"].tolist() == [0.0] * 7


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 3, 250, 170), (2, 64, 41, 41), (9, 200, 7, 7), (300, 301)], ids=str)
@pytest.mark.parametrize("activation", [IDENTITY, Activation("relu")], ids=lambda a: str(a.name))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_large_batches_are_cut_between_threads(num_threads, shape, layout, activation, masked):
    x, dy = (LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=seed)) for seed in range(2))
    mask = random(shape[0], 1, *shape[2:], seed=5) > 0 if masked else None
    step = Step(x=x, dy=dy, mask=mask, activation=activation, **parameters(shape[1], torch.float32))
    first, again = check(step), run(step)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name  # whichever thread was first


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("channels", [63, 64, 1023, 1024, 1025, 1100, 2050])  # rows of which two go side by side
@pytest.mark.parametrize("other_strides", [False, True], ids=["same strides", "other strides"])
def test_short_and_long_rows(channels, other_strides, masked):
    shape = (2, channels, 3, 3)
    x, dy, residual = (LAYOUTS["channels_last"](random(*shape, dtype=torch.float32, seed=seed)) for seed in range(3))
    if other_strides:
        wide = LAYOUTS["channels_last"](random(2, channels + 5, 3, 3, dtype=torch.float32, seed=1))
        dy = wide[:, 2 : channels + 2]
    mask = random(2, 1, 3, 3, seed=5) > 0 if masked else None
    for activation in (IDENTITY, Activation("relu"), Activation("silu")):
        check(
            Step(x=x, dy=dy, residual=residual, mask=mask, activation=activation, **parameters(channels, torch.float32))
        )


def test_lanes_beyond_a_short_plane_reach_no_sum():
    x = torch.full((1, 2, 5), 3e36)  # where silu's z overflows for what is not there
    statistics = torch.tensor([3e36, 3e36, 300.0, 300.0, 5.0], dtype=torch.float64)
    g = kernels.gradient_sums(x * 0 + 1, x, statistics, None, None, None, None, None, Activation("silu"))
    assert g.sums.isfinite().all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_at_special_values(name, dtype):
    values = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 90.0, -90.0, -800.0, 1e-30, -1e-30, 3e38, -3e38]
    )
    z = values.to(dtype).repeat(3).view(1, 1, -1)  # the same in full and in part vectors
    statistics = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    activation = Activation(name, 0.1)
    y = kernels.normalize(z, statistics, None, None, None, None, activation)
    leaf = z.clone().requires_grad_()
    expected = {"relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1), "silu": F.silu}[name](leaf)
    # −90 and beyond: silu is 0 to within the smallest normal number, in torch and here.
    torch.testing.assert_close(y, expected.detach(), rtol=4e-7, atol=1e-37, equal_nan=True)

    dy = torch.ones_like(z)
    grad = kernels.gradient_sums(
        dy, z, statistics, None, None, y if activation.saves_output else None, None, None, activation
    ).grad
    expected.backward(dy)
    where_defined = ~z.isnan() if activation.saves_output else torch.ones_like(z, dtype=torch.bool)
    torch.testing.assert_close(grad[where_defined], leaf.grad[where_defined], rtol=4e-7, atol=1e-36, equal_nan=True)
    if activation.saves_output:
        assert (grad[~where_defined] == 1).all()  # a NaN of y lets dy through


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_silu_is_accurate_everywhere(dtype):
    z = torch.linspace(-80, 80, 100_003, dtype=dtype).view(1, 1, -1)
    y = kernels.normalize(
        z, torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), None, None, None, None, Activation("silu")
    )
    exact = F.silu(z.double())
    # float32: e^-z to 1 ulp, 1 + it, the quotient: 2.5 ulp of 2^-24 and a little. float64's truth has the same error.
    assert ((y.double() - exact).abs() / exact.abs().clamp_min(1e-300)).max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_number_survives_and_rounding_is_to_nearest_even(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, -1)
    identity = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    same = kernels.normalize(every, identity, None, None, None, None, IDENTITY)
    assert torch.equal(
        same.nan_to_num(nan=1.0, posinf=2.0, neginf=3.0), (every + 0).nan_to_num(nan=1.0, posinf=2.0, neginf=3.0)
    )
    assert torch.equal(same.isnan(), every.isnan())
    # 1 + 2^-7 k is exact in float32 and has to be rounded, half of them from the middle between two neighbours.
    scale = torch.tensor([1 + 2.0**-9])
    scaled = kernels.normalize(every, identity, scale, None, None, None, IDENTITY)
    expected = (every.float() * scale).to(dtype)
    assert torch.equal(scaled.isnan(), expected.isnan())
    assert torch.equal(scaled.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e3, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e2, 1e-2), (1e5, 1.0)])
@pytest.mark.parametrize("shape", [(8, 16, 32, 32), (4, 512, 7, 7), (4096, 24)], ids=str)
def test_variance_and_output_hold_far_from_zero(shape, layout, mean, std):
    x = LAYOUTS[layout]((random(*shape) * std + mean).float())
    dy = LAYOUTS[layout](random(*shape, dtype=torch.float32, seed=1))
    dims, view = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    far = abs(mean) / std > 5e4
    exact = x.double()
    exact_mean, var = exact.mean(dims), exact.var(dims, correction=0)

    payload = kernels.moments(x, None)
    statistics = kernels.finalize(payload, 0.0, None)
    _, invstd, _ = moments.split(statistics)
    error = (invstd.pow(-2) / var - 1).abs().max()
    # float32 sums of a tile's deviations; at 1e5, the cancellation of float64's raw sums, (mean/σ)² · 2^-53 = 1e-6.
    assert error <= (1e-4 if far else 1e-6)

    y = kernels.normalize(x, statistics, None, None, None, None, IDENTITY)
    expected = (exact - exact_mean.view(view)) / var.sqrt().view(view)
    # y is a float32 of up to 5σ: 3e-7 of rounding is its own.
    assert (y.double() - expected).abs().max() <= (1e-5 if far else 1e-6)

    sums = kernels.gradient_sums(dy, x, statistics, None, None, None, None, None, IDENTITY).sums
    dx = kernels.input_gradient(dy, x, statistics, sums, None, None, None, IDENTITY)
    g, n = dy.double(), exact.numel() / exact.size(1)
    expected_dx = (
        g - g.mean(dims, keepdim=True) - expected * (g * expected).sum(dims, keepdim=True) / n
    ) / var.sqrt().view(view)
    assert ((dx.double() - expected_dx) * var.sqrt().view(view)).abs().max() <= (1e-5 if far else 1e-6)


def test_a_border_of_zeros_does_not_spoil_the_variance():
    x = torch.zeros(4, 8, 34, 34)
    x[:, :, 1:-1, 1:-1] = random(4, 8, 32, 32, dtype=torch.float32) + 100
    exact = x.double().var((0, 2, 3), correction=0)
    for layout in ("contiguous", "channels_last"):
        _, invstd, _ = moments.split(kernels.finalize(kernels.moments(LAYOUTS[layout](x), None), 0.0, None))
        assert (invstd.pow(-2) / exact - 1).abs().max() <= 1e-6


class TestFinalize:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
    @pytest.mark.parametrize("guarded", [False, True], ids=["", "guarded"])
    @pytest.mark.parametrize("kind", ["finite", "nan", "inf", "single", "none"])
    def test_it_equals_the_arithmetic_of_moments(self, dtype, momentum, guarded, kind):
        payload = kernels.moments(random(4, 5, 6) + 3, None)
        if kind in ("nan", "inf"):
            payload[7] = float(kind)
        elif kind in ("single", "none"):
            payload = kernels.moments(random(1 if kind == "single" else 0, 5), None)

        def running() -> RunningStatistics:
            return RunningStatistics(
                mean=random(5, dtype=dtype, seed=1),
                var=random(5, dtype=dtype, seed=2).abs(),
                num_batches=torch.tensor(3),
                momentum=momentum,
                num_nonfinite=torch.tensor(7) if guarded else None,
            )

        got, expected = running(), running()
        before = [t._version for t in (got.mean, got.var, got.num_batches)]
        statistics = kernels.finalize(payload, EPS, got)
        # 140 values of about 3: either side loses (mean/σ)² · 2^-53 = 1e-15 of the variance a few times.
        torch.testing.assert_close(statistics, moments.finalize(payload, EPS), rtol=1e-13, atol=1e-13, equal_nan=True)
        moments.update_running(expected, payload)
        for name, value in expected._asdict().items():
            if isinstance(value, torch.Tensor):
                # Where a batch of Inf and NaN is folded in, either may come out.
                same, finite = getattr(got, name), value.isfinite()
                assert torch.equal(same.isfinite(), finite), name
                torch.testing.assert_close(same[finite], value[finite], rtol=torch.finfo(dtype).eps, atol=1e-13)
        if kind == "finite":
            after = [t._version for t in (got.mean, got.var, got.num_batches)]
            assert all(a > b for a, b in zip(after, before, strict=True))  # autograd has to see that they changed

    def test_without_a_counter_the_momentum_is_enough(self):
        payload = kernels.moments(random(4, 5), None)
        got = RunningStatistics(torch.zeros(5), torch.ones(5), None, 0.5, None)
        kernels.finalize(payload, EPS, got)
        torch.testing.assert_close(got.mean, random(4, 5).mean(0).float() / 2)

    def test_running_statistics_may_be_strided(self):
        wide = torch.zeros(5, 2)
        kernels.finalize(
            kernels.moments(random(4, 5), None), EPS, RunningStatistics(wide[:, 0], wide[:, 1], None, 1.0, None)
        )
        torch.testing.assert_close(wide[:, 0], random(4, 5).mean(0).float())
        torch.testing.assert_close(wide[:, 1], random(4, 5).var(0).float())


class TestArguments:
    def test_a_tensor_that_does_not_fit_is_named(self):
        x, statistics = torch.zeros(2, 3, 4), torch.zeros(7, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="residual: expected"):
            kernels.normalize(x, statistics, None, None, torch.zeros(2, 3, 5), None, IDENTITY)
        with pytest.raises(RuntimeError, match="mask: expected contiguous bool"):
            kernels.moments(x, torch.ones(2, 1, 5, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="weight: expected shape"):
            kernels.normalize(x, statistics, torch.ones(4), None, None, None, IDENTITY)
        with pytest.raises(RuntimeError, match="statistics: expected 7"):
            kernels.normalize(x, statistics[:5], None, None, None, None, IDENTITY)
        with pytest.raises(RuntimeError, match="x: expected float64"):
            kernels.moments(x.int(), None)


VALUES = "every_fusion or special_values or half_number or (layout_and_dtype and not (slice or crop or same or sample))"
LEVELS = ["default", "avx2", "avx512"]  # as ATEN_CPU_CAPABILITY names them
LESSER = (
    LEVELS[: LEVELS.index(torch.backends.cpu.get_cpu_capability().lower())] if platform.machine() == "x86_64" else []
)


@pytest.mark.parametrize("level", LESSER)
def test_lesser_instruction_sets(level):
    """The tests of values again, in a process where torch, and so the kernels, take the processor for a lesser one."""
    if "ATEN_CPU_CAPABILITY" in os.environ:
        return  # this is that process
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", VALUES],
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


class TestWithoutTheLibrary:
    @pytest.fixture
    def line(self, monkeypatch, caplog):
        """Asks twice which kernels run; they have to be torch's, and to have been announced once. Returns how."""

        def line(library: Path = native.PATH) -> str:
            monkeypatch.setattr(native, "PATH", library)
            with caplog.at_level(logging.INFO, logger="syncbn"):
                assert backend_for(torch.zeros(2, 2)) is eager
                assert backend_for(torch.zeros(2, 2)) is eager
            (record,) = caplog.records
            return record.getMessage()

        native.available.cache_clear()
        yield line
        native.available.cache_clear()

    def test_the_environment_turns_it_off(self, line, monkeypatch):
        monkeypatch.setenv("SYNCBN_NATIVE", "0")
        assert "SYNCBN_NATIVE=0" in line()

    def test_a_missing_library_is_named(self, line, tmp_path):
        said = line(tmp_path / "_native.so")
        assert f"there is no {tmp_path}" in said
        assert "pip install --no-build-isolation" in said

    def test_a_library_for_another_torch_is_not_loaded(self, line, tmp_path):
        marker = f"native for torch {torch.__version__};".encode()
        contents = native.PATH.read_bytes()
        assert contents.count(marker) == 1
        other = tmp_path / "_native.so"
        other.write_bytes(contents.replace(marker, marker.replace(b"torch ", b"torch 0", 1)[:-2] + b";"))
        assert "was not built for torch" in line(other)

    def test_a_broken_library_is_reported(self, line, tmp_path):
        other = tmp_path / "_native.so"
        other.write_bytes(f"syncbn native for torch {torch.__version__};".encode())
        assert "does not load" in line(other)
