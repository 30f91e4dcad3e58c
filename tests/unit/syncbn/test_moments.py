"""The arithmetic of statistics, without batches or ranks.

A failure here with green kernels and collectives means that a formula is wrong: folding, packing, 1/σ or the update
of the running statistics.
"""

import pytest
import torch

from syncbn import moments
from syncbn.moments import Moments


def of(x: torch.Tensor) -> Moments:
    """The moments of (n, C)."""
    x = x.double()
    return Moments(
        count=torch.tensor(float(len(x)), dtype=torch.float64), sum=x.sum(0), sum_of_squares=x.square().sum(0)
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(23, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 3


def test_pack_lays_out_the_payload_and_unpack_inverts_it(x):
    whole = of(x)
    payload = moments.pack(whole)
    assert payload.dtype == torch.float64
    assert torch.equal(payload, torch.cat([x.sum(0), x.square().sum(0), torch.tensor([23.0], dtype=torch.float64)]))
    again = moments.unpack(payload)
    assert torch.equal(again.sum, whole.sum)
    assert torch.equal(again.sum_of_squares, whole.sum_of_squares)
    assert again.count.shape == ()
    assert again.count == 23


def test_the_sum_of_payloads_is_the_payload_of_the_merged_moments(x):
    parts = [of(x[:10]), moments.empty(5, x.device), of(x[10:])]
    summed = torch.stack([moments.pack(part) for part in parts]).sum(0)
    # The same float64 additions in another order.
    torch.testing.assert_close(summed, moments.pack(moments.merge(parts)), rtol=1e-14, atol=0)
    torch.testing.assert_close(summed, moments.pack(of(x)), rtol=1e-14, atol=0)


def test_from_tiles_moves_each_tile_back_from_its_pivot(x):
    tiles = [x[:10], x[10:11], x[11:]]
    pivots = torch.stack([tile.mean(0) for tile in tiles])
    folded = moments.from_tiles(
        torch.tensor([[10.0], [1.0], [12.0]]),
        pivots,
        torch.stack([(tile - pivot).sum(0) for tile, pivot in zip(tiles, pivots, strict=True)]),
        torch.stack([(tile - pivot).square().sum(0) for tile, pivot in zip(tiles, pivots, strict=True)]),
    )
    torch.testing.assert_close(moments.pack(folded), moments.pack(of(x)), rtol=1e-14, atol=0)


def test_finalize_gives_the_biased_variance(x):
    statistics = moments.finalize(of(x), eps=1e-3)
    # Cancellation of Σx² − n·mean² at mean/σ of 1.5 costs a few units of float64.
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.var, x.var(0, correction=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(statistics.invstd, (x.var(0, correction=0) + 1e-3).rsqrt(), rtol=1e-13, atol=0)


def test_finalize_of_a_constant_channel_is_not_negative():
    x = torch.full((7, 3), 0.1, dtype=torch.float64) * torch.tensor([1.0, 1e4, 1e8], dtype=torch.float64)
    assert (moments.finalize(of(x), eps=1e-5).var >= 0).all()


def test_finalize_of_no_samples_is_finite():
    statistics = moments.finalize(moments.empty(4, torch.device("cpu")), eps=1e-5)
    assert torch.equal(statistics.mean, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(statistics.var, torch.zeros(4, dtype=torch.float64))
    assert statistics.invstd.isfinite().all()


def test_update_running_uses_the_unbiased_variance(x):
    mean, var, counter = torch.full((5,), 2.0), torch.full((5,), 3.0), torch.tensor(6)
    moments.update_running(mean, var, counter, moments.finalize(of(x), 1e-5), momentum=0.25)
    # Rounded once, to float32.
    torch.testing.assert_close(mean, (0.75 * 2 + 0.25 * x.mean(0)).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(var, (0.75 * 3 + 0.25 * x.var(0, correction=1)).float(), rtol=1e-7, atol=0)
    assert counter == 7


def test_update_running_without_momentum_averages_all_batches(x):
    mean, var, counter = torch.zeros(5).double(), torch.ones(5).double(), torch.tensor(0)
    for part in x[:20].chunk(4):
        moments.update_running(mean, var, counter, moments.finalize(of(part), 1e-5), momentum=None)
    assert counter == 4
    torch.testing.assert_close(mean, x[:20].mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(var, torch.stack([p.var(0) for p in x[:20].chunk(4)]).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("batch", [torch.zeros(0, 2), torch.ones(1, 2), torch.full((1, 2), torch.nan)])
def test_update_running_leaves_everything_as_it_is_below_two_values(batch, momentum):
    mean, var, counter = torch.tensor([2.0, 4.0]), torch.tensor([3.0, 5.0]), torch.tensor(6)
    moments.update_running(mean, var, counter, moments.finalize(of(batch), 1e-5), momentum)
    assert mean.tolist() == [2.0, 4.0]
    assert var.tolist() == [3.0, 5.0]
    assert counter == 6


def test_affine_keeps_what_rounding_the_mean_loses():
    mean = torch.tensor([1e4 + 1e-4], dtype=torch.float64)
    invstd = torch.tensor([2.0], dtype=torch.float64)
    coefficients = moments.affine(mean, invstd, torch.tensor([3.0]), torch.tensor([0.5]), torch.float32)
    assert coefficients.pivot == 1e4  # float32 cannot hold the 1e-4
    # 6e-4 = 1e-4 · 3 · 2, rounded once to float32 at the size of the bias.
    torch.testing.assert_close(coefficients.shift.double(), torch.tensor([0.5 - 6e-4]).double(), rtol=0, atol=6e-8)
