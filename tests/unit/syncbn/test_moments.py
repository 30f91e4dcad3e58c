"""The arithmetic of statistics, without batches or ranks.

A failure here with green kernels and collectives means that a formula is wrong: folding tiles, 1/σ, the update of the
running statistics or the coefficients of output and gradient.
"""

import pytest
import torch

from syncbn import moments
from syncbn.moments import RunningStatistics


def payload_of(x: torch.Tensor) -> torch.Tensor:
    """`[Σx, Σx², n]` of (n, C)."""
    x = x.double()
    return torch.cat([x.sum(0), x.square().sum(0), torch.tensor([len(x)], dtype=torch.float64)])


def payload_from(mean: float, var: float, n: float, num_channels: int = 1) -> torch.Tensor:
    channel = torch.ones(num_channels, dtype=torch.float64)
    return torch.cat([channel * (n * mean), channel * (n * (var + mean**2)), torch.tensor([n], dtype=torch.float64)])


def running(
    dtype: torch.dtype = torch.float32,
    *,
    num_batches: int | None = 6,
    momentum: float | None = 0.25,
    guarded: bool = False,
    num_channels: int = 5,
) -> RunningStatistics:
    return RunningStatistics(
        torch.full((num_channels,), 2.0, dtype=dtype),
        torch.full((num_channels,), 3.0, dtype=dtype),
        None if num_batches is None else torch.tensor(num_batches),
        momentum,
        torch.tensor(0) if guarded else None,
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(23, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 3


class TestFromTiles:
    @pytest.mark.parametrize("lengths", [[23], [10, 1, 12], [10, 0, 13]], ids=str)
    def test_each_tile_is_moved_back_from_its_pivot(self, x, lengths):
        counts, parts = [], []
        for tile in x.split(lengths):
            pivot = tile.sum(0) / max(1, len(tile)) + 0.1
            counts.append(torch.tensor([len(tile)], dtype=torch.float64))
            parts += [pivot, (tile - pivot).sum(0), (tile - pivot).square().sum(0)]
        # float64 sums of 23 values in another order
        torch.testing.assert_close(moments.from_tiles(counts, parts), payload_of(x), rtol=1e-14, atol=1e-14)

    def test_float32_parts_are_folded_in_float64(self):
        n, pivot = torch.tensor([3.0], dtype=torch.float64), torch.tensor([10000.001])
        parts = [pivot, torch.tensor([0.5]), torch.tensor([2.0])]
        p = pivot.double()  # not 10000.001: exactly what was subtracted
        want = torch.cat([3 * p + 0.5, 2 + p * (3 * p + 1), n])
        torch.testing.assert_close(moments.from_tiles([n], parts), want, rtol=1e-15, atol=0)


class TestFinalize:
    def test_the_variance_is_biased(self, x):
        mean, invstd, n = moments.split(moments.finalize(payload_of(x), eps=1e-3))
        # Cancellation of Σx² − n·mean² at mean/σ of 1.5 costs a few units of float64.
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(invstd, (x.var(0, correction=0) + 1e-3).rsqrt(), rtol=1e-13, atol=0)
        assert n.tolist() == [23]

    def test_split_lays_out_mean_and_invstd_and_count(self):
        mean, invstd, n = moments.split(torch.arange(7.0))
        assert (mean.tolist(), invstd.tolist(), n.tolist()) == ([0, 1, 2], [3, 4, 5], [6])

    def test_a_constant_channel_has_no_negative_variance(self):
        payload = payload_of(torch.linspace(0.1, 1e8, 200, dtype=torch.float64).expand(7, -1))
        sums, squares, n = moments.split(payload)
        assert (squares - sums * (sums / n) < 0).any()  # else this test shows nothing
        _, invstd, _ = moments.split(moments.finalize(payload, eps=1e-30))
        assert invstd.isfinite().all()

    def test_no_samples_give_mean_0_and_variance_0(self):
        statistics = moments.finalize(torch.zeros(9, dtype=torch.float64), eps=1e-5)
        want = torch.tensor([0.0] * 4 + [1e-5**-0.5] * 4 + [0.0], dtype=torch.float64)
        torch.testing.assert_close(statistics, want, rtol=1e-15, atol=0)

    @pytest.mark.parametrize("n", [2.0**31 + 1, 2.0**40, 2.0**53])
    def test_counts_beyond_32_bits(self, n):
        mean, invstd, count = moments.split(moments.finalize(payload_from(3.0, 4.0, n), eps=0.0))
        assert (mean.item(), invstd.item(), count.item()) == (3.0, 0.5, n)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite_stays_in_its_channel(self, x, value):
        x[3, 2] = value
        mean, invstd, _ = moments.split(moments.finalize(payload_of(x), eps=1e-5))
        assert invstd.isnan().nonzero().tolist() == [[2]]
        assert (~mean.isfinite()).nonzero().tolist() == [[2]]

    def test_the_payload_is_left_as_it_is(self, x):
        payload = payload_of(x)
        before = payload.clone()
        moments.finalize(payload, 1e-5, running())
        assert torch.equal(payload, before)

    def test_it_folds_in_what_update_running_folds_in(self, x):
        payload, at_once, alone = payload_of(x), running(), running()
        statistics = moments.finalize(payload, 1e-5, at_once)
        moments.update_running(alone, payload)
        assert torch.equal(statistics, moments.finalize(payload, 1e-5))
        for one, other in zip(at_once[:3], alone[:3], strict=True):
            assert torch.equal(one, other)


class TestUpdateRunning:
    @pytest.mark.parametrize("momentum", [0.25, 0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_it_uses_the_unbiased_variance(self, x, dtype, momentum):
        target = running(dtype, momentum=momentum)
        moments.update_running(target, payload_of(x))
        rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float64 else 1e-13  # rounded once, from float64
        for got, old, batch in ((target.mean, 2, x.mean(0)), (target.var, 3, x.var(0, correction=1))):
            torch.testing.assert_close(got.double(), (1 - momentum) * old + momentum * batch, rtol=rounding, atol=0)
        assert target.num_batches == 7

    def test_without_a_counter(self, x):
        target, counted = running(num_batches=None), running()
        moments.update_running(target, payload_of(x))
        moments.update_running(counted, payload_of(x))
        assert torch.equal(target.mean, counted.mean)
        assert torch.equal(target.var, counted.var)

    def test_it_writes_in_place_into_any_strides(self, x):
        wide, target = torch.zeros(5, 2).double(), running(torch.float64)
        moments.update_running(target, payload_of(x))
        wide[:, 0], wide[:, 1] = 2, 3
        strided = target._replace(mean=wide[:, 0], var=wide[:, 1])
        moments.update_running(strided, payload_of(x))
        assert torch.equal(wide, torch.stack([target.mean, target.var], 1))

    def test_without_momentum_it_averages_all_batches(self, x):
        target = running(torch.float64, num_batches=0, momentum=None)
        parts = x[:20].chunk(4)
        for part in parts:
            moments.update_running(target, payload_of(part))
        assert target.num_batches == 4
        torch.testing.assert_close(target.mean, x[:20].mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(target.var, torch.stack([p.var(0) for p in parts]).mean(0), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("guarded", [False, True])
    @pytest.mark.parametrize("momentum", [0.1, 1.0, None])
    @pytest.mark.parametrize("batch", [torch.zeros(0, 2), torch.ones(1, 2), torch.full((1, 2), torch.nan)])
    def test_below_two_values_it_leaves_everything_as_it_is(self, batch, momentum, guarded):
        target = RunningStatistics(
            torch.tensor([2.0, torch.inf]),  # what is not finite by itself has to survive as well
            torch.tensor([3.0, torch.nan]),
            torch.tensor(6),
            momentum,
            torch.tensor(1) if guarded else None,
        )
        moments.update_running(target, payload_of(batch))
        assert target.mean.tolist() == [2.0, torch.inf]
        assert target.var[0] == 3
        assert target.var[1].isnan()
        assert target.num_batches == 6
        if guarded:
            assert target.num_nonfinite == (2 if batch.isnan().any() else 1)

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_the_guard_leaves_out_a_batch_that_is_not_finite(self, x, value, momentum):
        target = running(guarded=True, momentum=momentum)
        x[7, 3] = value
        moments.update_running(target, payload_of(x))
        assert target.mean.tolist() == [2.0] * 5
        assert target.var.tolist() == [3.0] * 5
        assert target.num_batches == 6
        assert target.num_nonfinite == 1

    def test_the_guard_works_without_a_counter_of_batches(self, x):
        target = running(guarded=True, num_batches=None)
        x[7, 3] = torch.nan
        moments.update_running(target, payload_of(x))
        assert target.mean.tolist() == [2.0] * 5
        assert target.num_nonfinite == 1

    def test_the_guard_lets_finite_batches_through(self, x):
        guarded, plain = running(guarded=True), running()
        moments.update_running(guarded, payload_of(x))
        moments.update_running(plain, payload_of(x))
        assert torch.equal(guarded.mean, plain.mean)
        assert torch.equal(guarded.var, plain.var)
        assert guarded.num_batches == 7
        assert guarded.num_nonfinite == 0

    def test_without_the_guard_a_nan_reaches_its_channel(self, x):
        target = running()
        x[7, 3] = torch.nan
        moments.update_running(target, payload_of(x))
        assert target.mean.isnan().tolist() == target.var.isnan().tolist() == [False, False, False, True, False]
        assert target.num_batches == 7

    @pytest.mark.parametrize("n", [2.0**31 + 1, 2.0**40, 2.0**53])
    def test_counts_beyond_32_bits(self, n):
        target = running(torch.float64, num_channels=1, momentum=1.0)
        moments.update_running(target, payload_from(3.0, 4.0, n))
        assert target.mean.item() == 3
        assert target.var.item() == pytest.approx(4 * (n / (n - 1)), rel=1e-15)

    @pytest.mark.parametrize("num_batches", [2**31, 2**53 + 1])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_counters_stay_exact_integers(self, x, momentum, num_batches):
        target = running(num_batches=num_batches, momentum=momentum)
        moments.update_running(target, payload_of(x))
        assert target.num_batches.item() == num_batches + 1
        assert target.num_batches.dtype == torch.int64


class TestAffine:
    def test_it_keeps_what_rounding_the_mean_loses(self):
        statistics = torch.tensor([1e4 + 1e-4, 2.0, 10.0], dtype=torch.float64)
        pivot, scale, shift = moments.affine(statistics, torch.tensor([3.0]), torch.tensor([0.5]), torch.float32)
        assert pivot == 1e4  # float32 cannot hold the 1e-4
        assert scale == 6
        # 6e-4 = 1e-4 · 3 · 2, rounded once to float32 at the size of the bias.
        torch.testing.assert_close(shift.double(), torch.tensor([0.5 - 6e-4]).double(), rtol=0, atol=6e-8)

    @pytest.mark.parametrize("parameter_dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_none_stands_for_1_and_0(self, x, dtype, parameter_dtype):
        statistics = moments.finalize(payload_of(x), 1e-5)
        ones, zeros = torch.ones(5, dtype=parameter_dtype), torch.zeros(5, dtype=parameter_dtype)
        coefficients = moments.affine(statistics, ones, zeros, dtype)
        assert coefficients.dtype == dtype
        assert torch.equal(moments.affine(statistics, None, None, dtype), coefficients)
        assert torch.equal(moments.affine(statistics, ones, None, dtype), coefficients)
        assert torch.equal(moments.affine(statistics, None, zeros, dtype), coefficients)

    def test_the_pivot_is_what_the_gradient_subtracts(self, x):
        statistics = moments.finalize(payload_of(x), 1e-5)
        sums = torch.ones(2, 5, dtype=torch.float64)
        forward = moments.affine(statistics, None, None, torch.float32)
        backward = moments.input_gradient(statistics, sums, None, torch.float32)
        assert torch.equal(forward[0], backward[0])
        assert torch.equal(forward[0], moments.split(statistics)[0].float())


class TestGradients:
    @pytest.mark.parametrize("lengths", [[23], [10, 1, 12]], ids=str)
    def test_center_gradient_sums_folds_tiles_and_moves_to_the_mean(self, x, lengths):
        g, mean = torch.randn(23, 5, dtype=torch.float64), x.mean(0)
        pivot = mean + 0.3
        parts = []
        for tile, grad in zip(x.split(lengths), g.split(lengths), strict=True):
            parts += [grad.sum(0), (grad * (tile - pivot)).sum(0)]
        got = moments.center_gradient_sums(parts, mean - pivot)
        want = torch.stack([g.sum(0), (g * (x - mean)).sum(0)])
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)  # float64 sums of 23 values in another order

    @pytest.mark.parametrize("weight", [None, torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0])], ids=["", "weight"])
    def test_input_gradient_is_the_chain_rule(self, x, weight):
        g = torch.randn(23, 5, dtype=torch.float64)
        x.requires_grad_()
        gamma = torch.ones(5).double() if weight is None else weight.double()
        y = gamma * (x - x.mean(0)) * (x.var(0, correction=0) + 1e-3).rsqrt()
        (want,) = torch.autograd.grad(y, x, g)

        x = x.detach()
        statistics = moments.finalize(payload_of(x), 1e-3)
        sums = torch.stack([g.sum(0), (g * (x - x.mean(0))).sum(0)])
        before = sums.clone()
        pivot, x_factor, scale, shift = moments.input_gradient(statistics, sums, weight, torch.float64)
        got = (g + (x - pivot) * x_factor) * scale + shift
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        assert torch.equal(sums, before)

    def test_input_gradient_of_no_samples_is_finite(self):
        statistics = moments.finalize(torch.zeros(5, dtype=torch.float64), 1e-5)
        got = moments.input_gradient(statistics, torch.zeros(2, 2, dtype=torch.float64), None, torch.float32)
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_compute_dtype(dtype):
    assert moments.compute_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
