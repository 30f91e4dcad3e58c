"""The arithmetic of batch statistics: no communication, no pass over a batch, no branch on a tensor's value."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Raw moments of each channel over some samples, in float64.

    Raw sums are what one SUM all-reduce can merge. Their cancellation costs (mean/σ)² · 2⁻⁵³ of relative error in
    the variance: 1e-8 at mean/σ = 1e4.

    Attributes:
        count: Number of values per channel, shape ().
        sum: Σx, shape (C,).
        sum_of_squares: Σx², shape (C,).
    """

    count: torch.Tensor
    sum: torch.Tensor
    sum_of_squares: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What a normalization batch is normalized with, in float64.

    Attributes:
        count: Number of values per channel over the group, shape (); 0 if every rank was empty.
        mean: Mean, shape (C,).
        var: Biased variance, shape (C,).
        invstd: 1/√(var + eps), shape (C,).
    """

    count: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    invstd: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Affine:
    """y = (x − pivot) · scale + shift, each of shape (C,), in the precision the batch is computed in."""

    pivot: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class InputGradient:
    """dx = dy · dy_scale + (x − pivot) · x_scale + shift, each of shape (C,)."""

    pivot: torch.Tensor
    dy_scale: torch.Tensor
    x_scale: torch.Tensor
    shift: torch.Tensor


def from_tiles(
    counts: torch.Tensor, pivots: torch.Tensor, sums: torch.Tensor, sums_of_squares: torch.Tensor
) -> Moments:
    """Folds moments that each tile took about a pivot of its own into raw moments.

    With d = x − p: Σx = Σd + n·p and Σx² = Σd² + p·(Σx + Σd).

    Args:
        counts: Values per channel in each tile, shape (T, 1).
        pivots: p, exactly as it was subtracted, shape (T, C).
        sums: Σd, shape (T, C).
        sums_of_squares: Σd², shape (T, C).
    """
    n, p, d, d2 = (t.double() for t in (counts, pivots, sums, sums_of_squares))
    x = torch.addcmul(d, n, p)  # (T, C)
    x2 = torch.addcmul(d2, p, x + d)
    return Moments(count=n.sum(), sum=x.sum(0), sum_of_squares=x2.sum(0))


def empty(num_channels: int, device: torch.device) -> Moments:
    """The moments of no samples."""
    zeros = torch.zeros(2, num_channels, dtype=torch.float64, device=device)
    return Moments(count=zeros.new_zeros(()), sum=zeros[0], sum_of_squares=zeros[1])


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all samples of `parts` together; `parts` holds at least one."""
    return reduce(
        lambda a, b: Moments(
            count=a.count + b.count, sum=a.sum + b.sum, sum_of_squares=a.sum_of_squares + b.sum_of_squares
        ),
        parts,
    )


def pack(moments: Moments) -> torch.Tensor:
    """Lays moments out as the forward payload `[Σx, Σx², n]`, shape (2C + 1,), float64."""
    return torch.cat([moments.sum, moments.sum_of_squares, moments.count.reshape(1)])


def unpack(payload: torch.Tensor) -> Moments:
    """The inverse of `pack`; the fields are views of `payload`."""
    num_channels = payload.numel() // 2
    return Moments(
        count=payload[-1], sum=payload[:num_channels], sum_of_squares=payload[num_channels : 2 * num_channels]
    )


def finalize(moments: Moments, eps: float) -> Statistics:
    """Mean, biased variance and 1/σ (Ioffe & Szegedy 2015, Algorithm 1, lines 1-3).

    No samples give mean 0 and variance 0.

    Args:
        moments: Of the whole normalization batch.
        eps: Added to the variance.
    """
    n = moments.count.clamp_min(1)
    mean = moments.sum / n
    # Rounding may leave a constant channel slightly below zero.
    var = torch.addcmul(moments.sum_of_squares / n, mean, mean, value=-1).clamp_min_(0)
    return Statistics(count=moments.count, mean=mean, var=var, invstd=(var + eps).rsqrt_())


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor | None,
    statistics: Statistics,
    momentum: float | None,
) -> None:
    """Folds a batch into the running statistics, in place (Ioffe & Szegedy 2015, Algorithm 2, line 10).

    running ← running + f · (batch − running), with the unbiased variance var · n/(n − 1). f is `momentum`, or
    1/num_batches_tracked where that is None. A batch of fewer than two values per channel changes nothing, the
    counter included; that is decided on the device.

    Args:
        running_mean: Shape (C,).
        running_var: Shape (C,).
        num_batches_tracked: Counter of batches, shape (); required where `momentum` is None.
        statistics: Of the whole normalization batch.
        momentum: Weight of the batch, or None for the cumulative average.
    """
    n = statistics.count
    counts = n > 1
    factor: float | torch.Tensor
    if num_batches_tracked is not None:
        num_batches_tracked.add_(counts)
    if momentum is None:
        assert num_batches_tracked is not None
        factor = num_batches_tracked.clamp_min(1).double().reciprocal()
    else:
        factor = momentum
    unbiased_var = statistics.var * (n / (n - 1).clamp_min(1))
    for running, batch in ((running_mean, statistics.mean), (running_var, unbiased_var)):
        old = running.double()
        # where, not a factor of 0: that would let a NaN of the batch through.
        running.copy_(torch.where(counts, old + factor * (batch - old), old))


def affine(
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Affine:
    """Coefficients of y = γ(x − mean)/σ + β (Ioffe & Szegedy 2015, Algorithm 1, lines 4-5).

    x − mean is formed as (x − p) − (mean − p), where p is the mean rounded to `dtype`: x − p is exact for x near p,
    and the rest of the mean goes into the shift, in float64. y = x·a + b would lose mean/σ · 2⁻²⁴ of σ.
    """
    pivot = mean.to(dtype)
    scale = invstd if weight is None else invstd * weight.double()
    shift = (pivot.double() - mean) * scale
    if bias is not None:
        shift = shift + bias.double()
    return Affine(pivot=pivot, scale=scale.to(dtype), shift=shift.to(dtype))


def center_gradient_sums(sums: torch.Tensor, mean: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """Moves `[Σdy, Σdy·(x − pivot)]` to `[Σdy, Σdy·(x − mean)]`, shape (2, C), float64."""
    return torch.stack([sums[0], torch.addcmul(sums[1], mean - pivot.double(), sums[0], value=-1)])


def input_gradient(
    sums: torch.Tensor,
    count: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    weight: torch.Tensor | None,
    dtype: torch.dtype,
) -> InputGradient:
    """Coefficients of dx (the chain rule of Ioffe & Szegedy 2015, section 3, its three steps multiplied out).

    dx = γ/σ · (dy − Σdy/N − (x − mean) · Σdy·(x − mean) / (N·σ²)), with N and both sums over the whole group.

    Args:
        sums: Global `[Σdy, Σdy·(x − mean)]`, shape (2, C).
        count: N, shape ().
        mean: Shape (C,).
        invstd: Shape (C,).
        weight: γ, shape (C,), or None for 1.
        dtype: Precision the batch is computed in.
    """
    n = count.clamp_min(1)
    pivot = mean.to(dtype)
    dy_scale = invstd if weight is None else invstd * weight.double()
    x_scale = dy_scale * invstd.square() * sums[1] / -n
    shift = torch.addcmul(dy_scale * sums[0] / -n, pivot.double() - mean, x_scale)
    return InputGradient(pivot=pivot, dy_scale=dy_scale.to(dtype), x_scale=x_scale.to(dtype), shift=shift.to(dtype))


def compute_dtype(input_dtype: torch.dtype) -> torch.dtype:
    """The precision a batch is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if input_dtype == torch.float64 else torch.float32
