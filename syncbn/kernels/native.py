"""The passes as compiled operators, for CPU tensors; `syncbn.native` says whether those are there.

NCHW-like and NHWC-like batches are read as they lie, slices of channels and of samples included, and so are gradients
that autograd expanded. Any other layout costs a copy.
"""

import torch

from syncbn.activation import Activation
from syncbn.kernels.backend import GradientSums, Meetings
from syncbn.kernels.eager import saves_output
from syncbn.moments import RunningStatistics

__all__ = [
    "finalize",
    "finalize_and_normalize",
    "gradient_sums",
    "input_gradient",
    "layer",
    "moments",
    "normalize",
    "saves_output",
]

_operators = torch.ops.syncbn_native
_CODES = {None: 0, "relu": 1, "leaky_relu": 2, "silu": 3}  # Activation of csrc/kernels.h


def moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As `Backend.moments`; each tile's sums are about the tile's own mean, in float64 from there on."""
    payload: torch.Tensor = _operators.moments(x, mask)
    return payload


def finalize(payload: torch.Tensor, eps: float, running: RunningStatistics | None) -> torch.Tensor:
    """As `Backend.finalize`."""
    statistics: torch.Tensor
    if running is None:
        statistics = _operators.finalize(payload, eps, None, None, None, None, None)
    else:
        mean, var, num_batches, momentum, num_nonfinite = running
        statistics = _operators.finalize(payload, eps, mean, var, num_batches, momentum, num_nonfinite)
    return statistics


def normalize(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """As `Backend.normalize`."""
    name, slope = activation
    y: torch.Tensor = _operators.normalize(x, statistics, weight, bias, residual, mask, _CODES[name], slope)
    return y


def finalize_and_normalize(
    x: torch.Tensor,
    payload: torch.Tensor,
    eps: float,
    running: RunningStatistics | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: Activation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Backend.finalize_and_normalize`."""
    statistics = finalize(payload, eps, running)
    return normalize(x, statistics, weight, bias, residual, mask, activation), statistics


def gradient_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: Activation,
) -> GradientSums:
    """As `Backend.gradient_sums`; `grad` is a copy of dy where dy has a layout that is neither NCHW- nor NHWC-like."""
    name, slope = activation
    sums, grad, grad_weight, grad_bias = _operators.gradient_sums(
        dy, x, statistics, weight, bias, y, residual, mask, _CODES[name], slope
    )
    return GradientSums(sums, dy if grad is None else grad, grad_weight, grad_bias)


def input_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    sums: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    remaining: Activation,
) -> torch.Tensor:
    """As `Backend.input_gradient`."""
    dx: torch.Tensor = _operators.input_gradient(grad, x, statistics, sums, weight, mask)
    return dx


def layer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running: RunningStatistics | None,
    eps: float,
    activation: Activation,
    meetings: Meetings | None,
) -> torch.Tensor | None:
    """As `Backend.layer`."""
    name, slope = activation
    mean, var, num_batches, momentum, num_nonfinite = running or _NOTHING_RUNS
    y: torch.Tensor | None = _operators.layer(
        x,
        weight,
        bias,
        residual,
        mean,
        var,
        num_batches,
        num_nonfinite,
        momentum,
        eps,
        _CODES[name],
        slope,
        *(meetings or _NOBODY_MEETS),
    )
    return y


_NOTHING_RUNS = (None, None, None, None, None)
_NOBODY_MEETS = (0, "", "")
