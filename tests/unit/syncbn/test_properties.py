"""However a batch is split over ranks, the reduced payload is that of the whole: the arithmetic, without processes.

Hypothesis shrinks a failure to the smallest batch and split that shows it.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from syncbn import moments
from syncbn.activation import IDENTITY
from syncbn.kernels import backend_for
from syncbn.moments import RunningStatistics

EPS = 1e-5


@st.composite
def split_batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64):
    """A batch (N, C, L) of any location and scale, and the samples of each of 1 to 4 ranks."""
    counts = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    assume(sum(counts) > 0)
    channels, length = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    location, scale = draw(st.sampled_from([0.0, 1.0, -30.0, 100.0])), draw(st.sampled_from([1e-3, 1.0, 10.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(sum(counts), channels, length, generator=generator, dtype=torch.float64) * scale + location
    return x.to(dtype), counts


def payload_of(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return backend_for(x).moments(x, mask)


def reduced(parts: list[torch.Tensor]) -> torch.Tensor:
    """What the all-reduce makes of the ranks' payloads, added up in the order given."""
    return torch.stack(parts).sum(0)


def mean_and_var(payload: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, invstd, _ = moments.split(moments.finalize(payload, EPS))
    return mean, invstd.square().reciprocal() - EPS


def assert_same_statistics(got: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Sums of up to 200 values in another order; Σx² − n·mean² cancels, by mean²/var."""
    got_mean, got_var = mean_and_var(got)
    size = (mean.square() + var + EPS).sqrt()
    assert ((got_mean - mean).abs() <= 1e-13 * size).all()
    assert ((got_var - var).abs() <= 1e-13 * size.square()).all()


@settings(max_examples=60, deadline=None)
@given(split_batches())
def test_a_split_has_the_statistics_of_the_whole(case):
    x, counts = case
    payload = reduced([payload_of(part) for part in x.split(counts)])
    assert payload[-1] == x.size(0) * x.size(2)
    values = x.transpose(0, 1).flatten(1)
    assert_same_statistics(payload, values.mean(1), values.var(1, correction=0))
    assert_same_statistics(payload, *mean_and_var(payload_of(x)))


@settings(max_examples=60, deadline=None)
@given(split_batches(), st.randoms(use_true_random=False))
def test_the_order_of_ranks_does_not_matter(case, random):
    x, counts = case
    parts = [payload_of(part) for part in x.split(counts)]
    in_order = mean_and_var(reduced(parts))
    random.shuffle(parts)
    assert_same_statistics(reduced(parts), *in_order)


@settings(max_examples=60, deadline=None)
@given(split_batches(), st.integers(0, 2**32 - 1))
def test_a_masked_split_has_the_statistics_of_what_is_valid(case, seed):
    x, counts = case
    mask = torch.rand(x.size(0), 1, x.size(2), generator=torch.Generator().manual_seed(seed)) < 0.5
    padded = torch.where(mask, x, torch.nan)
    parts = zip(padded.split(counts), mask.split(counts), strict=True)
    payload = reduced([payload_of(part, valid.contiguous()) for part, valid in parts])
    values = x.transpose(0, 1)[:, mask[:, 0]]  # (C, n)
    assert payload[-1] == values.size(1)
    if values.size(1):
        assert_same_statistics(payload, values.mean(1), values.var(1, correction=0))
    else:
        assert not payload.any()


@settings(max_examples=40, deadline=None)
@given(split_batches(torch.float32))
def test_a_split_normalizes_as_the_whole_does(case):
    x, counts = case
    backend, parts = backend_for(x), x.split(counts)
    whole = moments.finalize(payload_of(x), EPS)
    split = moments.finalize(reduced([payload_of(part) for part in parts]), EPS)
    y = backend.normalize(x, whole, None, None, None, None, IDENTITY)
    y_split = torch.cat([backend.normalize(part, split, None, None, None, None, IDENTITY) for part in parts])
    # float32 moments of a tile are good to a few 2⁻²⁴ of its spread, and outputs are at most √192.
    torch.testing.assert_close(y_split, y, rtol=2e-6, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(split_batches(), st.integers(0, 2**32 - 1))
def test_a_split_has_the_gradient_of_the_whole(case, seed):
    x, counts = case
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    backend, statistics = backend_for(x), moments.finalize(payload_of(x), EPS)
    whole = backend.gradient_sums(dy, x, statistics, None, None, None, None, None, IDENTITY)
    parts = [
        backend.gradient_sums(g, part, statistics, None, None, None, None, None, IDENTITY)
        for g, part in zip(dy.split(counts), x.split(counts), strict=True)
    ]
    sums = reduced([part.sums for part in parts])
    # Up to 192 products of an x of at most 150 and a dy of 5, in another order.
    torch.testing.assert_close(sums, whole.sums, rtol=1e-12, atol=1e-10)
    dx = backend.input_gradient(dy, x, statistics, sums, None, None, None, IDENTITY)
    # A constant added to x changes no output, so Σdx is 0, up to rounding at the size of dx's terms.
    invstd = moments.split(statistics)[1]
    assert (dx.sum((0, 2)).abs() <= 1e-11 * invstd * dy.abs().sum()).all()


@pytest.mark.parametrize("momentum", [0.3, None])
@settings(max_examples=30, deadline=None)
@given(case=split_batches())
def test_running_statistics_do_not_depend_on_the_split(momentum, case):
    x, counts = case
    values = x.transpose(0, 1).flatten(1)
    running = RunningStatistics(
        torch.zeros(len(values)).double(), torch.ones(len(values)).double(), torch.tensor(4), momentum, None
    )
    backend_for(x).finalize(reduced([payload_of(part) for part in x.split(counts)]), EPS, running)
    factor = 1 / 5 if momentum is None else momentum
    size = values.square().mean(1)
    assert ((running.mean - factor * values.mean(1)).abs() <= 1e-13 * size.sqrt()).all()
    assert ((running.var - (1 - factor) - factor * values.var(1)).abs() <= 1e-13 * (size + 1)).all()
    assert running.num_batches == 5


def payload_from(count: float, mean: float, var: float) -> torch.Tensor:
    """Of one channel: `[Σx, Σx², n]`."""
    return torch.tensor([count * mean, count * (mean**2 + var), count], dtype=torch.float64)


@given(st.lists(st.integers(2**31 - 2, 2**33), min_size=1, max_size=4))
def test_more_than_two_to_the_31_values_are_counted_exactly(counts):
    payload, n = reduced([payload_from(count, mean=2.0, var=4.0) for count in counts]), sum(counts)
    running = RunningStatistics(torch.zeros(1).double(), torch.zeros(1).double(), torch.tensor(0), 1.0, None)
    mean, invstd, count = moments.split(moments.finalize(payload, 0.0, running))
    assert count.item() == n
    # Small integers times n < 2⁵³ / 8: only the divisions and the root round.
    torch.testing.assert_close(mean.item(), 2.0, rtol=1e-15, atol=0)
    torch.testing.assert_close(invstd.item(), 0.5, rtol=1e-15, atol=0)
    torch.testing.assert_close(running.var.item(), 4 * (n / (n - 1)), rtol=1e-15, atol=0)


def test_one_value_more_than_float32_can_count():
    # 2²⁴ + 1 is the first count that float32 cannot hold.
    x = torch.zeros(1, 1, 2**24 + 1, dtype=torch.bfloat16)
    assert payload_of(x)[-1] == 2**24 + 1
