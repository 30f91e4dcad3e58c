"""The monitor across ranks: its shares are the float64 formula's, and what layers compute stays as it is."""

import copy
import os

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm, diagnostics, steps
from syncbn.diagnostics import monitor
from tests.ranks import run_ranks

CHANNELS = 3


def draw(sizes: list[int], shift: float, seed: int = 0) -> list[torch.Tensor]:
    """A batch of each rank, whose values differ by `shift` from the rank before's; channel 1 does not differ."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, CHANNELS, 4, generator=generator, dtype=torch.float64)
        + torch.tensor([1, 0, -2]).view(-1, 1) * shift * rank
        for rank, n in enumerate(sizes)
    ]


def true_shares(values: list[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Σ n(μᵣ − μ)²/(Nσ²) of each channel, from each rank's values of shape (C, n), and its expectation."""
    values = [x for x in values if x.size(1)]
    together = torch.cat(values, dim=1)
    mean = together.mean(1)
    between = sum(x.size(1) * (x.mean(1) - mean).square() for x in values)
    total = (together - mean.unsqueeze(1)).square().sum(1)
    return between / total, (len(values) - 1) / (together.size(1) - 1)


def _watch(rank, inputs, masks=None, layer=None):
    """A forward of each batch of this rank under the monitor; the layer's report."""
    layer = layer or SyncBatchNorm(CHANNELS, dtype=torch.float64)
    with monitor(layer, every=1) as watch:
        for i, batch in enumerate(inputs):
            layer(batch[rank], mask=None if masks is None else masks[i][rank])
        return watch.report()["the module itself"]


@pytest.mark.parametrize("shift", [0, 0.5, 1e3])
@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 3], [3, 0, 2]])
def test_shares_are_those_of_the_formula(sizes, shift):
    inputs = [draw(sizes, shift, seed) for seed in range(2)]
    reports = run_ranks(len(sizes), _watch, inputs)
    shares, expected = zip(
        *(true_shares([x.transpose(0, 1).flatten(1) for x in batch]) for batch in inputs), strict=True
    )
    share = torch.stack(shares).mean(0)
    for report in reports:
        assert report.num_samples == 2
        # Raw sums in float64: (mean/σ)² · 2⁻⁵³, with a mean of 2000 σ of a rank's.
        assert report.raw_between_rank_share == pytest.approx(share.mean().item(), rel=1e-9)
        got = torch.tensor(report.between_rank_share_per_channel, dtype=torch.float64)
        torch.testing.assert_close(got, share - sum(expected) / 2, rtol=1e-9, atol=1e-9)
        assert report.between_rank_share == pytest.approx(got.mean().item(), rel=1e-9, abs=1e-12)
        assert report.sync_time_s > 0
        assert report.running_statistics_equal
    assert shift == 0 or reports[0].between_rank_share > 0.1


def test_masked_positions_do_not_count():
    inputs = draw([4, 2], 1.0)
    masks = [x[:, 0] > 0 for x in inputs]
    reports = run_ranks(2, _watch, [inputs], [masks])
    share, expected = true_shares([x.transpose(0, 1)[:, mask] for x, mask in zip(inputs, masks, strict=True)])
    for report in reports:
        torch.testing.assert_close(
            torch.tensor(report.between_rank_share_per_channel, dtype=torch.float64), share - expected
        )


def test_parts_of_one_batch_have_no_share_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    num_batches, num_values = 200, 12
    inputs = [
        list(torch.randn(num_values, CHANNELS, generator=generator, dtype=torch.float64).split([5, 4, 3]))
        for _ in range(num_batches)
    ]
    report = run_ranks(3, _watch, inputs)[0]
    expected = 2 / (num_values - 1)
    # For normal values the raw share has the beta distribution (1, 4.5) of variance 0.0229: in the mean over 600
    # independent ones the deviation is 0.0062. Four of them are allowed; without the expectation it would be 29.
    assert abs(report.between_rank_share) < 4 * 0.0062
    assert report.raw_between_rank_share > expected / 2


def test_a_constant_channel_has_no_share():
    inputs = [x.clone() for x in draw([3, 2], 1.0)]
    for x in inputs:
        x[:, 2] = 1 / 3
    report = run_ranks(2, _watch, [inputs])[0]
    expected = 1 / (5 * 4 - 1)
    assert report.between_rank_share_per_channel[2] == pytest.approx(-expected)


def test_a_layer_that_does_not_synchronize_has_share_zero():
    layer = SyncBatchNorm(CHANNELS, process_group="local", dtype=torch.float64)
    for report in run_ranks(2, _watch, [draw([4, 4], 5.0)], None, layer):
        assert report.between_rank_share == report.raw_between_rank_share == 0
        assert report.sync_time_s is None
        assert not report.running_statistics_equal  # each rank keeps those of its own values


def _steps(rank, watched):
    """Some training steps of a small net; its parameters, outputs and statistics."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(CHANNELS, 8, 1), SyncBatchNorm(8), nn.ReLU(), nn.Conv1d(8, 5, 1), SyncBatchNorm(5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watch = monitor(net, every=2) if watched else None
    outputs = []
    for seed in range(5):
        optimizer.zero_grad()
        outputs.append(net(draw([4, 2, 3], 1.0, seed)[rank].float()))
        outputs[-1].square().mean().backward()
        optimizer.step()
    if watch:
        assert watch.report()["1"].num_samples == 3
        watch.close()
    return [output.detach() for output in outputs], net.state_dict()


@pytest.mark.parametrize("world_size", [2, 3])  # of one host: shared memory sums in the order of the ranks
def test_what_is_computed_stays_the_same_to_the_last_bit(world_size):
    for (outputs, state), (watched_outputs, watched_state) in zip(
        run_ranks(world_size, _steps, False), run_ranks(world_size, _steps, True), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(outputs, watched_outputs, strict=True))
        assert all(torch.equal(state[name], watched_state[name]) for name in state)


def _count_collectives(rank):
    """The number of values in each collective, with a sample of every other forward."""
    sizes = []

    def counting(payload, group, label):
        sizes.append(payload.numel())
        original(payload, group, label)

    original = steps.all_reduce_sum
    steps.all_reduce_sum = diagnostics.all_reduce_sum = counting
    os.environ["SYNCBN_SHARED_MEMORY"] = "0"  # in shared memory a layer meets its peers in C++, out of sight
    try:
        layer = SyncBatchNorm(CHANNELS, dtype=torch.float64)
        with monitor(layer, every=2):
            for _ in range(4):
                layer(torch.randn(2, CHANNELS, dtype=torch.float64))
        layer(torch.randn(2, CHANNELS, dtype=torch.float64))
    finally:
        steps.all_reduce_sum = diagnostics.all_reduce_sum = original
        del os.environ["SYNCBN_SHARED_MEMORY"]
    return sizes


def test_every_forward_has_one_collective():
    usual = 2 * CHANNELS + 1
    sampled = usual + CHANNELS + 1
    assert run_ranks(2, _count_collectives) == [[sampled, usual, sampled, usual, usual]] * 2


def _diverge(rank):
    net = nn.Sequential(SyncBatchNorm(2), SyncBatchNorm(2), SyncBatchNorm(2, track_running_stats=False))
    same = copy.deepcopy(net)
    if rank == 1:
        net[1].running_var[1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    with monitor(net) as watch, monitor(same) as watch_same:
        return [[report.running_statistics_equal for report in each.report().values()] for each in (watch, watch_same)]


def test_a_bit_that_differs_between_ranks_is_seen():
    assert run_ranks(3, _diverge) == [[[True, False, None], [True, True, None]]] * 3
