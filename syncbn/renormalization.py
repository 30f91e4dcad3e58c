from typing import NamedTuple

import torch

from syncbn.errors import ArgumentError
from syncbn.moments import split
from syncbn.tracking import Collector, is_recomputation


class Renormalization(NamedTuple):
    """Limits of batch renormalization (Ioffe 2017, "Batch Renormalization", Algorithm 1).

    r_max = 1 with d_max = 0 is batch norm; the paper starts there and opens the limits over the first thousands of
    steps (r_max to 3, d_max to 5): assign a layer's `renormalization` anew as training goes on.

    Attributes:
        r_max: The correction of the scale lies in [1/r_max, r_max]; at least 1.
        d_max: The correction of the shift lies in [−d_max, d_max], in σ; at least 0.
    """

    r_max: float = 3.0
    d_max: float = 5.0


def check_renormalization(limits: Renormalization, tracks_running_statistics: bool) -> None:
    """Raises ArgumentError if the limits are out of range, or there is nothing to correct towards."""
    if not isinstance(limits, Renormalization):
        raise ArgumentError(f"renormalization: expected None or Renormalization(r_max, d_max), got {limits!r}")
    if not limits.r_max >= 1:
        raise ArgumentError(f"renormalization: r_max has to be at least 1, got {limits.r_max}")
    if not limits.d_max >= 0:
        raise ArgumentError(f"renormalization: d_max has to be at least 0, got {limits.d_max}")
    if not tracks_running_statistics:
        raise ArgumentError(
            "renormalization: corrects towards the running statistics, and there are none; pass "
            "track_running_stats=True (running_mean and running_var), or renormalization=None"
        )


def refuse_recomputation(name: str, collector: Collector | None) -> None:
    """Raises ArgumentError if activation checkpointing runs the layer again and would correct it otherwise.

    Args:
        name: Of the layer.
        collector: Of the layer; while there is one, the running statistics stand still.
    """
    if collector is None and is_recomputation():
        raise ArgumentError(
            f"{name}: activation checkpointing runs a renormalized layer again after its running statistics, which "
            "correct it, have moved on; attach DeferredStatistics to the model, which moves them once a step, or leave "
            "the layer out of the checkpointed part"
        )


def correction(
    statistics: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, limits: Renormalization, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """R = σ_B/σ and d = (μ_B − μ)/σ, clipped (Ioffe 2017, Algorithm 1), constants to the gradient.

    μ and σ = √(running_var + eps) are the running statistics before this batch; the paper averages σ_B itself, which
    checkpoints of batch norm do not hold.

    Args:
        statistics: `[mean, 1/σ, n]` of the batch, shape (2C + 1,).
        running_mean: Shape (C,).
        running_var: Shape (C,).
        limits: Of r and d.
        eps: Added to the variance.

    Returns:
        r and d, shape (C,), float64 where the running statistics are, else float32.
    """
    mean, invstd, _ = split(statistics)
    running_invstd = (running_var.double() + eps).rsqrt()
    r = (running_invstd / invstd).clamp(1 / limits.r_max, limits.r_max)
    d = ((mean - running_mean.double()) * running_invstd).clamp(-limits.d_max, limits.d_max)
    dtype = torch.float64 if running_mean.dtype == torch.float64 else torch.float32
    return r.to(dtype), d.to(dtype)


def corrected(
    weight: torch.Tensor | None, bias: torch.Tensor | None, r: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """γ·r and β + γ·d, with which plain normalization gives γ(x̂·r + d) + β.

    Args:
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        r: Shape (C,).
        d: Shape (C,).
    """
    gamma = torch.ones_like(r) if weight is None else weight.to(r.dtype)
    shift = gamma * d
    return gamma * r, shift if bias is None else bias.to(r.dtype) + shift
