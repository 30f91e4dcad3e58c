"""The passes of `Backend` on Triton kernels: two launches forward, two backward, and nothing that waits for the device.

Batches that lie as NCHW or NHWC are read as they lie; any other costs a copy each way.
"""

import functools
from typing import NamedTuple

import torch
from torch.autograd.graph import increment_version

from syncbn import moments as _moments_of
from syncbn.activation import IDENTITY, Activation
from syncbn.kernels.backend import GradientSums, Meetings
from syncbn.kernels.triton import maps, reductions
from syncbn.kernels.triton.constants import CODES
from syncbn.kernels.triton.launch import Launch, arrivals, compute_type, num_processors
from syncbn.kernels.triton.plan import Layout, layout_of, mapping, reduction
from syncbn.moments import RunningStatistics

_CHANNELS_PER_PROGRAM = 128  # of `finalize` alone


def saves_output(activation: Activation, *, has_residual: bool) -> bool:
    """As `Backend.saves_output`: without a residual the sign of y is that of what x gives again, to the bit."""
    return activation.saves_output and has_residual


def moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As `Backend.moments`; each thread's sums are about the mean of what it holds of a tile, in float64 from there."""
    x, layout = _dense(x)
    pass_ = _moments(layout, x.dtype, x.get_device(), mask is not None)
    payload = x.new_empty(pass_.row, dtype=torch.float64)
    pass_.launch(x, mask, payload, *_meeting_place(pass_, x))
    return payload


def finalize(payload: torch.Tensor, eps: float, running: RunningStatistics | None) -> torch.Tensor:
    """As `Backend.finalize`."""
    if running is not None and not _is_updatable(running, payload):
        return _moments_of.finalize(payload, eps, running)
    statistics = torch.empty_like(payload)
    _finalize(payload.size(0) // 2, payload.get_device())(payload, statistics, *_running(running), eps)
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
    return _map_forward(x, statistics, None, 0.0, None, weight, bias, residual, mask, activation)


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
    if running is not None and not _is_updatable(running, payload):
        statistics = _moments_of.finalize(payload, eps, running)
        return normalize(x, statistics, weight, bias, residual, mask, activation), statistics
    statistics = torch.empty_like(payload)
    return _map_forward(x, payload, statistics, eps, running, weight, bias, residual, mask, activation), statistics


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
    is_written = has_residual or (mask is not None and activation == IDENTITY)  # then there may have been one
    x, layout = _dense(x)
    dy = _laid_out(dy, x)
    pass_ = _gradient_sums(layout, x.dtype, x.get_device(), mask is not None, has_residual, activation)
    grad = torch.empty_like(x) if is_written else None
    num_channels = layout.num_channels
    sums = x.new_empty((2, num_channels), dtype=torch.float64)
    grad_weight = None if weight is None else weight.new_empty(num_channels)
    grad_bias = None if bias is None else bias.new_empty(num_channels)
    pass_.launch(
        dy,
        x,
        None if y is None else _laid_out(y, x),
        None if residual is None else _laid_out(residual, x),
        mask,
        statistics,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        grad,
        sums,
        grad_weight,
        grad_bias,
        *_meeting_place(pass_, x),
    )
    if grad is None:
        return GradientSums(sums, dy, grad_weight, grad_bias, activation)
    return GradientSums(sums, grad, grad_weight, grad_bias)


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
    dx = torch.empty_like(x)
    _input_gradient(layout, x.dtype, x.get_device(), remaining)(
        _laid_out(grad, x),
        x,
        mask,
        statistics,
        sums,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        dx,
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


def _map_forward(
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
    _normalize(layout, x.dtype, x.get_device(), statistics is not None, activation)(
        x,
        None if residual is None else _laid_out(residual, x),
        mask,
        reduced,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        statistics,
        *_running(running),
        eps,
    )
    return _as_given(y, given)


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, Layout]:
    layout = layout_of(x.shape, x.stride())
    if layout is None or not _is_as_in_memory(x):
        x = x.clone()  # in the order of x's dimensions, where it has one
        if layout_of(x.shape, x.stride()) is None:
            x = x.contiguous()
        x = x.resolve_neg()
        layout = layout_of(x.shape, x.stride())
        assert layout is not None
    return x, layout


def _laid_out(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As x lies in memory, by a copy where it does not: an expanded gradient, say."""
    if _is_as_in_memory(values) and (values.stride() == x.stride() or _lie_alike(values, x)):
        return values
    return torch.empty_like(x).copy_(values)


def _lie_alike(values: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether both have the same strides, where those mean something."""
    return x.numel() == 0 or all(
        length == 1 or stride == other
        for length, stride, other in zip(x.shape, values.stride(), x.stride(), strict=True)
    )


def _is_as_in_memory(values: torch.Tensor) -> bool:
    """Whether it has the values that its memory has."""
    return not (values.is_neg() or values._is_zerotensor())


def _as_given(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In the layout that torch's element-wise operations would give for x."""
    if x.stride() == values.stride():
        return values
    like = torch.empty_like(x)
    return values if like.stride() == values.stride() else like.copy_(values)


class _Reduction(NamedTuple):
    """A first pass, ready to start.

    Attributes:
        launch: The kernel.
        row: Length of what a program leaves for the one that folds.
        num_splits: Programs that share a channel.
        num_blocks: Blocks of channels.
    """

    launch: Launch
    row: int
    num_splits: int
    num_blocks: int


def _meeting_place(pass_: _Reduction, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where programs that share a channel leave their sums, and how many have; None where none share one."""
    if pass_.num_splits == 1:
        return None, None
    return x.new_empty(pass_.num_splits * pass_.row, dtype=torch.float64), arrivals(x, pass_.num_blocks)


@functools.lru_cache(maxsize=4096)
def _moments(layout: Layout, dtype: torch.dtype, device_index: int, has_mask: bool) -> _Reduction:
    row = 2 * layout.num_channels + 1
    return _reduction(reductions.moments, layout, dtype, device_index, row, 1, has_mask, ())


@functools.lru_cache(maxsize=4096)
def _gradient_sums(
    layout: Layout, dtype: torch.dtype, device_index: int, has_mask: bool, has_residual: bool, activation: Activation
) -> _Reduction:
    row = 2 * layout.num_channels
    undone = CODES[activation.name], activation.negative_slope
    return _reduction(reductions.gradient_sums, layout, dtype, device_index, row, 2 + has_residual, has_mask, undone)


def _reduction(
    kernel: object,
    layout: Layout,
    dtype: torch.dtype,
    device_index: int,
    row: int,
    num_tensors: int,
    has_mask: bool,
    constants: tuple[object, ...],
) -> _Reduction:
    plan = reduction(
        layout,
        dtype.itemsize,
        has_mask=has_mask,
        num_tensors=num_tensors,
        num_processors=num_processors(device_index),
    )
    extents = (
        layout.num_rows,
        layout.num_channels,
        plan.size_units,
        plan.samples_per_program,
        plan.chunks_per_part,
        plan.num_parts,
        plan.num_blocks,
        plan.num_splits,
    )
    constants = (
        *constants,
        layout.is_planes,
        plan.unit,
        plan.vector,
        plan.along,
        plan.j,
        plan.r,
        plan.k,
        plan.num_splits > 1,
        compute_type(dtype),
    )
    launch = Launch(kernel, plan.num_programs, device_index, extents, constants)
    return _Reduction(launch, row, plan.num_splits, plan.num_blocks)


@functools.lru_cache(maxsize=4096)
def _normalize(
    layout: Layout, dtype: torch.dtype, device_index: int, finalizes: bool, activation: Activation
) -> Launch:
    constants = CODES[activation.name], activation.negative_slope, finalizes
    return _map(maps.normalize, layout, dtype, device_index, 1, constants)


@functools.lru_cache(maxsize=4096)
def _input_gradient(layout: Layout, dtype: torch.dtype, device_index: int, remaining: Activation) -> Launch:
    constants = CODES[remaining.name], remaining.negative_slope
    return _map(maps.input_gradient, layout, dtype, device_index, 2, constants)


def _map(
    kernel: object,
    layout: Layout,
    dtype: torch.dtype,
    device_index: int,
    num_tensors: int,
    constants: tuple[object, ...],
) -> Launch:
    plan = mapping(layout, dtype.itemsize, num_tensors=num_tensors, num_processors=num_processors(device_index))
    extents = (
        layout.num_rows,
        layout.num_channels,
        layout.size,
        plan.columns_units,
        plan.steps_per_program,
        plan.num_blocks,
    )
    constants = (
        *constants,
        layout.is_planes,
        plan.unit,
        plan.along,
        plan.j,
        plan.r,
        plan.k,
        plan.q,
        compute_type(dtype),
    )
    return Launch(kernel, plan.num_programs, device_index, extents, constants)


@functools.lru_cache(maxsize=4096)
def _finalize(num_channels: int, device_index: int) -> Launch:
    num_programs = -(-num_channels // _CHANNELS_PER_PROGRAM)
    return Launch(maps.finalize, num_programs, device_index, (num_channels,), (_CHANNELS_PER_PROGRAM,))


def _running(running: RunningStatistics | None) -> tuple[torch.Tensor | float | None, ...]:
    """The kernels' running_mean, running_var, num_batches, num_batches_before, num_nonfinite and momentum."""
    if running is None:
        return None, None, None, None, None, 0.0
    mean, var, num_batches, momentum, num_nonfinite = running
    increment_version([buffer for buffer in (mean, var, num_batches, num_nonfinite) if buffer is not None])
    if momentum is not None:
        return mean, var, num_batches, None, num_nonfinite, momentum
    assert num_batches is not None
    return mean, var, num_batches, num_batches.clone(), num_nonfinite, 0.0


def _is_updatable(running: RunningStatistics, payload: torch.Tensor) -> bool:
    """Whether the kernels may write to what they are handed the addresses of."""
    return all(
        buffer.is_contiguous() and buffer.device == payload.device
        for buffer in (running.mean, running.var, running.num_batches, running.num_nonfinite)
        if buffer is not None
    )
