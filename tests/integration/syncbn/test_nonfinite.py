"""`skip_nonfinite`: one NaN on one rank must not end up in anybody's running statistics.

A failure of the controls means that the tests above them show nothing.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.errors import ArgumentError
from tests.ranks import run_ranks

CHANNELS = 4


def _run(rank, values, where, options):
    """One clean batch, one that holds `values` on rank `where`, one clean batch: the buffers after each."""
    layer = SyncBatchNorm(CHANNELS, dtype=torch.float64, **options)
    buffers, shows = [], []
    for at in range(3):
        x = torch.randn(3, CHANNELS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * at + rank))
        if at == 1 and rank == where:
            x[1, 2, 3] = values
        y = layer(x.requires_grad_())
        y.sum().backward()
        shows.append(bool(y.isfinite().all()))
        buffers.append({name: value.clone() for name, value in layer.named_buffers()})
    return buffers, shows, x.grad, layer.state_dict()


def expected_without(batch):
    layer = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    for at in (0, 1, 2):
        if at != batch:
            parts = [
                torch.randn(3, CHANNELS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * at + r))
                for r in range(3)
            ]
            layer(torch.cat(parts))
    return layer.state_dict()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_on_one_rank_leaves_the_running_statistics_of_all(value):
    results = run_ranks(3, _run, value, 1, {"skip_nonfinite": True})
    expected = expected_without(1)
    for buffers, shows, _, state in results:
        before, after, end = buffers
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(before[name], after[name])
        assert [b["num_nonfinite_batches"].item() for b in buffers] == [0, 1, 1]
        assert shows == [True, False, True]  # every rank sees it in its output
        assert list(state) == list(expected)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(end[name], expected[name], rtol=1e-12, atol=1e-12)


def test_control_without_it_the_running_statistics_are_poisoned():
    for buffers, shows, _, _ in run_ranks(3, _run, torch.nan, 1, {}):
        assert not buffers[-1]["running_mean"].isfinite().all()
        assert shows == [True, False, True]
        assert buffers[-1]["num_batches_tracked"] == 3


def test_the_cumulative_average_does_not_count_what_it_skips():
    for buffers, _, _, _ in run_ranks(3, _run, torch.nan, 1, {"skip_nonfinite": True, "momentum": None}):
        assert buffers[-1]["num_batches_tracked"] == 2
        assert buffers[-1]["running_mean"].isfinite().all()


def test_a_clean_channel_of_a_poisoned_batch_stays_clean_in_the_output():
    layer = SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    x = torch.randn(6, CHANNELS)
    x[0, 1] = torch.nan
    y = layer(x)
    assert y[:, [0, 2, 3]].isfinite().all()
    assert y[:, 1].isnan().all()


def test_masked_values_do_not_count_as_nonfinite():
    layer = SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    x, mask = torch.randn(6, CHANNELS), torch.ones(6, dtype=torch.bool)
    x[2], mask[2] = torch.nan, False
    layer(x, mask=mask)
    assert layer.num_nonfinite_batches == 0
    assert layer.num_batches_tracked == 1


def test_an_empty_batch_is_no_nonfinite_one():
    layer = SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    layer(torch.randn(0, CHANNELS))
    assert layer.num_nonfinite_batches == 0


def test_a_variance_beyond_float32_is_skipped_too():
    # Deviations above 2⁶⁴ have squares that float32 cannot hold: an infinite variance would be folded in.
    layer = SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    layer(torch.full((4, CHANNELS), 1e25) * torch.tensor([1, -1, 1, -1]).view(4, 1))
    assert layer.running_var.isfinite().all()
    assert layer.num_nonfinite_batches + layer.num_batches_tracked == 1


def test_the_counter_goes_where_the_layer_goes():
    layer = SyncBatchNorm(CHANNELS, skip_nonfinite=True)
    layer(torch.full((4, CHANNELS), torch.nan))
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to(torch.bfloat16)):
        assert clone.skip_nonfinite
        assert clone.num_nonfinite_batches == 1
        assert clone.num_nonfinite_batches.dtype == torch.int64
        assert "num_nonfinite_batches" not in clone.state_dict()
        dtype = clone.weight.dtype
        clone(torch.full((4, CHANNELS), torch.nan, dtype=dtype))
        assert clone.num_nonfinite_batches == 2
    assert layer.num_nonfinite_batches == 1
    assert layer.to("meta").num_nonfinite_batches.device.type == "meta"


def test_it_can_be_turned_on_and_off():
    layer = SyncBatchNorm(CHANNELS)
    keys = list(layer.state_dict())
    assert not layer.skip_nonfinite
    layer.skip_nonfinite = True
    layer(torch.full((4, CHANNELS), torch.nan))
    assert layer.num_nonfinite_batches == 1
    assert "skip_nonfinite=True" in repr(layer)
    assert list(layer.state_dict()) == keys
    layer.load_state_dict(nn.BatchNorm1d(CHANNELS).state_dict())
    layer.skip_nonfinite = False
    assert not layer.skip_nonfinite
    assert "num_nonfinite_batches" not in dict(layer.named_buffers())
    layer(torch.full((4, CHANNELS), torch.nan))
    assert layer.running_mean.isnan().all()


def test_without_running_statistics_there_is_nothing_to_protect():
    with pytest.raises(ArgumentError, match=r"skip_nonfinite: .*track_running_stats"):
        SyncBatchNorm(CHANNELS, track_running_stats=False, skip_nonfinite=True)
