"""The passes of `Backend` on Triton kernels: two launches forward, two backward, and nothing that waits for the device.

Batches that lie as NCHW or NHWC are read as they lie; any other costs a copy each way.
"""

import torch

from syncbn.activation import IDENTITY, Activation
from syncbn.kernels.backend import GradientSums, Meetings
from syncbn.kernels.triton import maps, reductions
from syncbn.kernels.triton.constants import CODES
from syncbn.kernels.triton.launch import arrivals, compute_type, launch, num_processors
from syncbn.kernels.triton.plan import Layout, Map, Reduction, layout_of, mapping, reduction
from syncbn.moments import RunningStatistics

_CHANNELS_PER_PROGRAM = 128  # of `finalize` alone


def saves_output(activation: Activation, *, has_residual: bool) -> bool:
    """As `Backend.saves_output`: without a residual the sign of y is that of what x gives again, to the bit."""
    return activation.saves_output and has_residual


def moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As `Backend.moments`; each thread's sums are about the mean of what it holds of a tile, in float64 from there."""
    x, layout = _dense(x)
    plan = _reduction(layout, x, mask, num_tensors=1)
    row = 2 * layout.num_channels + 1
    payload = x.new_empty(row, dtype=torch.float64)
    launch(
        reductions.moments,
        plan.num_programs,
        x,
        x,
        mask,
        payload,
        *_meeting_place(plan, x, row),
        *_extents(layout, plan),
        layout.is_planes,
        *_tiles(plan),
        compute_type(x.dtype),
    )
    return payload


def finalize(payload: torch.Tensor, eps: float, running: RunningStatistics | None) -> torch.Tensor:
    """As `Backend.finalize`."""
    statistics = torch.empty_like(payload)
    num_channels = payload.size(0) // 2
    launch(
        maps.finalize,
        -(-num_channels // _CHANNELS_PER_PROGRAM),
        payload,
        payload,
        statistics,
        *_running(running),
        eps,
        num_channels,
        _CHANNELS_PER_PROGRAM,
    )
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
    return _normalize(x, statistics, None, 0.0, None, weight, bias, residual, mask, activation)


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
    """As `Backend.finalize_and_normalize`, in one launch."""
    statistics = torch.empty_like(payload)
    return _normalize(x, payload, statistics, eps, running, weight, bias, residual, mask, activation), statistics


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
    """As `Backend.gradient_sums`.

    g is written down only where a residual wants it. Otherwise the second pass forms it again from dy and x, which it
    reads in any case.
    """
    has_residual = y is not None or residual is not None
    is_written = has_residual or (mask is not None and activation == IDENTITY)
    given = dy
    x, layout = _dense(x)
    dy, y, residual = _laid_out(dy, x), _laid_out_optional(y, x), _laid_out_optional(residual, x)
    grad = torch.empty_like(x) if is_written else None
    plan = _reduction(layout, x, mask, num_tensors=2 + has_residual)
    num_channels = layout.num_channels
    sums = x.new_empty((2, num_channels), dtype=torch.float64)
    grad_weight = None if weight is None else weight.new_empty(num_channels)
    grad_bias = None if bias is None else bias.new_empty(num_channels)
    launch(
        reductions.gradient_sums,
        plan.num_programs,
        x,
        dy,
        x,
        y,
        residual,
        mask,
        statistics,
        _contiguous(weight),
        _contiguous(bias),
        grad,
        sums,
        grad_weight,
        grad_bias,
        *_meeting_place(plan, x, 2 * num_channels),
        *_extents(layout, plan),
        CODES[activation.name],
        activation.negative_slope,
        layout.is_planes,
        *_tiles(plan),
        compute_type(x.dtype),
    )
    if grad is not None:
        return GradientSums(sums, grad, grad_weight, grad_bias)
    return GradientSums(sums, given if activation == IDENTITY else dy, grad_weight, grad_bias, activation)


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
    given = x
    x, layout = _dense(x)
    grad = _laid_out(grad, x)
    dx = torch.empty_like(x)
    plan = _map(layout, x, num_tensors=2)
    launch(
        maps.input_gradient,
        plan.num_programs,
        x,
        grad,
        x,
        mask,
        statistics,
        sums,
        _contiguous(weight),
        _contiguous(bias),
        dx,
        *_matrix(layout, plan),
        CODES[remaining.name],
        remaining.negative_slope,
        layout.is_planes,
        *_columns(plan),
        compute_type(x.dtype),
    )
    return _as_given(dx, given)


def layer(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running: RunningStatistics | None,
    eps: float,
    activation: Activation,
    meetings: Meetings | None,
) -> None:
    """No shortcut: the launches are what a small batch costs."""


def _normalize(
    x: torch.Tensor,
    reduced: torch.Tensor,
    statistics: torch.Tensor | None,
    eps: float,
    running: RunningStatistics | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    given = x
    x, layout = _dense(x)
    y = torch.empty_like(x)
    plan = _map(layout, x, num_tensors=1)
    launch(
        maps.normalize,
        plan.num_programs,
        x,
        x,
        _laid_out_optional(residual, x),
        mask,
        reduced,
        _contiguous(weight),
        _contiguous(bias),
        y,
        statistics,
        *_running(running),
        eps,
        *_matrix(layout, plan),
        CODES[activation.name],
        activation.negative_slope,
        statistics is not None,
        layout.is_planes,
        *_columns(plan),
        compute_type(x.dtype),
    )
    return _as_given(y, given)


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    layout = layout_of(x)
    if layout is None:
        x = x.contiguous()
        layout = layout_of(x)
        assert layout is not None
    return x, layout


def _laid_out(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As x lies in memory, by a copy where it does not: an expanded gradient, say."""
    if values.stride() == x.stride() or x.numel() == 0:
        return values
    return torch.empty_like(x).copy_(values)


def _laid_out_optional(values: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else _laid_out(values, x)


def _as_given(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In the layout that torch's element-wise operations would give for x."""
    if x.stride() == values.stride():
        return values
    return torch.empty_like(x).copy_(values)


def _contiguous(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.contiguous()


def _reduction(layout: Layout, x: torch.Tensor, mask: torch.Tensor | None, *, num_tensors: int) -> Reduction:
    return reduction(
        layout,
        x.element_size(),
        has_mask=mask is not None,
        num_tensors=num_tensors,
        num_processors=num_processors(x.device),
    )


def _map(layout: Layout, x: torch.Tensor, *, num_tensors: int) -> Map:
    return mapping(layout, x.element_size(), num_tensors=num_tensors, num_processors=num_processors(x.device))


def _meeting_place(plan: Reduction, x: torch.Tensor, row: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where programs that share a channel leave their sums, and how many have; None where none share one."""
    if plan.num_splits == 1:
        return None, None
    return x.new_empty(plan.num_splits * row, dtype=torch.float64), arrivals(x.device, plan.num_blocks)


def _extents(layout: Layout, plan: Reduction) -> tuple[int, ...]:
    return (
        layout.num_rows,
        layout.num_channels,
        plan.size_units,
        plan.samples_per_program,
        plan.chunks_per_part,
        plan.num_parts,
        plan.num_blocks,
        plan.num_splits,
    )


def _tiles(plan: Reduction) -> tuple[int | bool, ...]:
    return plan.unit, plan.vector, plan.along, plan.j, plan.r, plan.k, plan.num_splits > 1


def _matrix(layout: Layout, plan: Map) -> tuple[int, ...]:
    return (
        layout.num_rows,
        layout.num_channels,
        layout.size,
        plan.columns_units,
        plan.rows_per_program,
        plan.num_blocks,
    )


def _columns(plan: Map) -> tuple[int, ...]:
    return plan.unit, plan.j, plan.r, plan.k, plan.q


def _running(running: RunningStatistics | None) -> tuple[torch.Tensor | float | None, ...]:
    """The kernels' running_mean, running_var, num_batches, num_batches_before, num_nonfinite and momentum."""
    if running is None:
        return None, None, None, None, None, 0.0
    mean, var, num_batches, momentum, num_nonfinite = running
    if momentum is not None:
        return mean, var, num_batches, None, num_nonfinite, momentum
    assert num_batches is not None
    return mean, var, num_batches, num_batches.clone(), num_nonfinite, 0.0
