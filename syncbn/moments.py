"""The arithmetic of batch statistics: no communication, no pass over a batch, no branch on a tensor's value.

What ranks exchange is the payload `[Σx, Σx², n]` of raw moments, shape (2C + 1,), float64: raw sums are what one SUM
all-reduce can merge. Their cancellation costs (mean/σ)² · 2⁻⁵³ of relative error in the variance: 1e-8 at mean/σ =
1e4. What a batch is normalized with are the statistics `[mean, 1/σ, n]`, in the same layout.

All of this is small next to a batch, so its cost is the number of operations: tensors are split, stacked and cast
together wherever that saves some.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class RunningStatistics(NamedTuple):
    """Where a batch is folded in for inference, in place (Ioffe & Szegedy 2015, Algorithm 2).

    Attributes:
        mean: Shape (C,).
        var: Shape (C,), unbiased.
        num_batches: Number of batches folded in, shape (), int64; required where `momentum` is None.
        momentum: Weight of a batch, or None for the cumulative average over `num_batches`.
        num_nonfinite: Number of batches left out because they held a NaN or an Inf, shape (), int64; None to fold
            such batches in like any other.
    """

    mean: torch.Tensor
    var: torch.Tensor
    num_batches: torch.Tensor | None
    momentum: float | None
    num_nonfinite: torch.Tensor | None


def from_tiles(counts: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Folds moments that each tile took about a pivot of its own into the payload `[Σx, Σx², n]`.

    With d = x − p: Σx = Σd + n·p and Σx² = Σd² + p·(Σx + Σd).

    Args:
        counts: For each of T ≥ 1 tiles n, its values per channel, shape (1,), float64.
        parts: For each tile in turn p, exactly as it was subtracted, Σd and Σd², each of shape (C,).

    Returns:
        Shape (2C + 1,), float64.
    """
    folded = torch.stack(tuple(parts)).double()  # (3T, C)
    if len(counts) == 1:
        n = counts[0]
        p, d, d2 = folded.unbind()
    else:
        n = torch.stack(tuple(counts))  # (T, 1)
        p, d, d2 = folded.view(len(counts), 3, -1).unbind(1)  # each (T, C)
    x = torch.addcmul(d, n, p)
    x2 = torch.addcmul(d2, p, x + d)
    payload = torch.cat((x, x2, n), -1)
    return payload if len(counts) == 1 else payload.sum(0)


def finalize(payload: torch.Tensor, eps: float, running: RunningStatistics | None = None) -> torch.Tensor:
    """Mean and 1/√(var + eps) of the normalization batch (Ioffe & Szegedy 2015, Algorithm 1, lines 1-3).

    No samples give mean 0 and variance 0.

    Args:
        payload: `[Σx, Σx², n]` of the whole normalization batch, shape (2C + 1,).
        eps: Added to the variance.
        running: Where to fold the batch in as well, as `update_running` does, or None.

    Returns:
        The statistics `[mean, 1/σ, n]`, shape (2C + 1,), float64.
    """
    summary = _summarize(payload)
    if running is not None:
        _fold_in(running, payload, summary)
    mean, squared_deviations, n = summary
    return torch.cat((mean, (squared_deviations / n.clamp_min(1)).add_(eps).rsqrt_(), n))


def update_running(running: RunningStatistics, payload: torch.Tensor) -> None:
    """Folds a batch into the running statistics, in place (Ioffe & Szegedy 2015, Algorithm 2, line 10).

    running ← running + f · (batch − running), with the unbiased variance Σ(x − mean)²/(n − 1), in float64 and rounded
    once. f is the momentum, or 1/num_batches where that is None. A batch of fewer than two values per channel changes
    nothing, the counter included; nor does a batch with a NaN or an Inf in any channel where those are counted apart.
    Both are decided on the device, from reduced values, so that every rank decides alike.

    Args:
        running: Where to.
        payload: `[Σx, Σx², n]` of the whole normalization batch, shape (2C + 1,).
    """
    _fold_in(running, payload, _summarize(payload))


class _Summary(NamedTuple):
    mean: torch.Tensor  # (C,)
    squared_deviations: torch.Tensor  # Σ(x − mean)², (C,)
    n: torch.Tensor  # (1,)


def _summarize(payload: torch.Tensor) -> _Summary:
    sums, squares, n = split(payload)
    mean = sums / n.clamp_min(1)
    # Rounding may leave a constant channel slightly below zero.
    return _Summary(mean, torch.addcmul(squares, mean, sums, value=-1).clamp_min_(0), n)


def _fold_in(running: RunningStatistics, payload: torch.Tensor, summary: _Summary) -> None:
    mean, squared_deviations, n = summary
    counts = n > 1  # (1,)
    if running.num_nonfinite is not None:
        finite = payload.isfinite().all()
        running.num_nonfinite.add_(~finite)
        counts = counts & finite
    if running.num_batches is not None:
        running.num_batches.add_(counts.view(()))
    factor: float | torch.Tensor
    if running.momentum is None:
        assert running.num_batches is not None
        factor = running.num_batches.clamp_min(1).double().reciprocal_()
    else:
        factor = running.momentum
    batch = torch.stack((mean, squared_deviations / (n - 1).clamp_min_(1)))  # (2, C)
    old = torch.stack((running.mean, running.var)).double()
    # Selected, not weighted by 0: that would let a NaN of the batch through.
    new = torch.where(counts, torch.lerp(old, batch, factor), old)
    torch._foreach_copy_((running.mean, running.var), new.unbind())


def split(statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of `[mean, 1/σ, n]`: mean and 1/σ of shape (C,), n of shape (1,)."""
    num_channels = statistics.size(0) // 2
    mean, invstd, n = statistics.split_with_sizes((num_channels, num_channels, 1))
    return mean, invstd, n


def affine(
    statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Coefficients of y = γ(x − mean)/σ + β = (x − pivot) · scale + shift (Ioffe & Szegedy 2015, Algorithm 1).

    x − mean is formed as (x − p) − (mean − p), where p is the mean rounded to `dtype`: x − p is exact for x near p,
    and the rest of the mean goes into the shift, in float64. y = x·a + b would lose mean/σ · 2⁻²⁴ of σ.

    Args:
        statistics: `[mean, 1/σ, n]`, shape (2C + 1,).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        dtype: Precision the batch is computed in.

    Returns:
        `[pivot, scale, shift]`, shape (3, C), in `dtype`.
    """
    mean, invstd, _ = split(statistics)
    pivot = mean.to(dtype)
    scale = invstd if weight is None else invstd * weight
    rest = pivot - mean
    shift = rest * scale if bias is None else torch.addcmul(bias, rest, scale)
    return torch.stack((pivot, scale, shift)).to(dtype)


def center_gradient_sums(parts: Sequence[torch.Tensor], rest: torch.Tensor) -> torch.Tensor:
    """Folds the tiles' `[Σg, Σg·(x − pivot)]` into `[Σg, Σg·(x − mean)]`, shape (2, C), float64.

    Args:
        parts: For each tile in turn Σg and Σg·(x − pivot), each of shape (C,).
        rest: mean − pivot, the pivot exactly as it was subtracted, shape (C,), float64.
    """
    folded = torch.stack(tuple(parts)).double()
    if len(parts) > 2:
        folded = folded.view(-1, 2, rest.size(0)).sum(0)  # (T, 2, C) -> (2, C)
    grad_sum, product_sum = folded.unbind()
    product_sum.addcmul_(rest, grad_sum, value=-1)
    return folded


def input_gradient(
    statistics: torch.Tensor, sums: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Coefficients of dx = (g + (x − pivot) · x_factor) · scale + shift.

    dx = γ/σ · (g − Σg/N − (x − mean) · Σg·(x − mean) / (N·σ²)), with N and both sums over the whole group: the chain
    rule of Ioffe & Szegedy 2015, section 3, its three steps multiplied out. The pivot is that of `affine`.

    Args:
        statistics: `[mean, 1/σ, N]`, shape (2C + 1,).
        sums: Global `[Σg, Σg·(x − mean)]`, shape (2, C).
        weight: γ, shape (C,), or None for 1.
        dtype: Precision the batch is computed in.

    Returns:
        `[pivot, x_factor, scale, shift]`, shape (4, C), in `dtype`.
    """
    mean, invstd, count = split(statistics)
    grad_mean, projection = (sums / count.clamp_min(1).neg_()).unbind()  # both negative
    x_factor = (projection * invstd).mul_(invstd)
    pivot = mean.to(dtype)
    scale = invstd if weight is None else invstd * weight
    shift = torch.addcmul(grad_mean, pivot - mean, x_factor).mul_(scale)
    return torch.stack((pivot, x_factor, scale, shift)).to(dtype)


def compute_dtype(input_dtype: torch.dtype) -> torch.dtype:
    """The precision a batch is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if input_dtype == torch.float64 else torch.float32
