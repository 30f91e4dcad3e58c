"""The passes in plain torch operations, for any device and any strides.

Each pass walks the batch in tiles that stay in cache, so that a tile's few operations cost little more than one read
of memory, and no temporary has the size of a large batch. A small batch is one tile, and then the number of
operations is what a pass costs. Operations that go through matmul are left out on purpose: autocast and the float32
matmul precision would round what they are given.
"""

from collections.abc import Iterable
from itertools import repeat

import torch
from torch.nn import functional as F

from syncbn import moments as _moments
from syncbn.activation import Activation
from syncbn.kernels.backend import GradientSums, Meetings
from syncbn.moments import RunningStatistics, compute_dtype

CPU_TILE_ELEMENTS = 1 << 19  # per thread: 2 MiB of float32; smaller tiles lose more to calls than they gain in cache
DEVICE_TILE_ELEMENTS = 1 << 24  # elsewhere a tile bounds the temporary's memory; launches cost more than cache


def saves_output(activation: Activation, *, has_residual: bool) -> bool:
    """As `Backend.saves_output`: to form the output's sign again would be one more pass's arithmetic."""
    return activation.saves_output


def moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`[Σx, Σx², n]`, each tile's moments taken about the tile's own mean.

    x − tile mean has no common offset left, so sums in the batch's precision are exact enough; the tiles are folded
    in float64. The mean of the whole tile, not one of its values: a border of zeros would make a poor pivot.

    Args:
        x: Shape (N, C, *).
        mask: Shape (N, 1, *), or None.
    """
    tiling = _Tiling(x)
    counts: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    scratch = None
    for tile, valid in zip(tiling.cut(x), tiling.cut_optional(mask), strict=False):
        if valid is None:
            num_values = tile.numel() // x.size(1)
            count = x.new_full((1,), num_values, dtype=torch.float64)  # not torch.tensor: its copy would wait
            pivot = tiling.sum(tile).div_(max(1, num_values))
            scratch = torch.sub(tile, tiling.per_channel(pivot), out=_fitting(scratch, tile))
        else:
            count = valid.sum(dtype=torch.float64).view(1)
            pivot = tiling.sum(torch.where(valid, tile, 0)).div_(count.clamp_min(1))
            scratch = torch.sub(tile, tiling.per_channel(pivot), out=_fitting(scratch, tile)).masked_fill_(~valid, 0)
        counts.append(count)
        parts += (pivot, tiling.sum(scratch), tiling.sum(scratch.mul_(scratch)))
    return _moments.from_tiles(counts, parts)


def finalize(payload: torch.Tensor, eps: float, running: RunningStatistics | None) -> torch.Tensor:
    """The statistics `[mean, 1/σ, n]`; folds the batch into `running`.

    Args:
        payload: Reduced `[Σx, Σx², n]`, shape (2C + 1,).
        eps: Added to the variance.
        running: Updated in place.
    """
    return _moments.finalize(payload, eps, running)


def normalize(
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """The output f((x − pivot) · scale + shift + residual).

    Args:
        x: Shape (N, C, *).
        statistics: `[mean, 1/σ, n]`, shape (2C + 1,).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        residual: Shape (N, C, *), or None.
        mask: Shape (N, 1, *), or None; the output is 0 where it is False.
        activation: f.

    Returns:
        Shape (N, C, *), the dtype and memory format of x.
    """
    y = torch.empty_like(x)
    tiling = _Tiling(x)
    pivot, scale, shift = tiling.per_channel(_moments.affine(statistics, weight, bias, tiling.dtype)).unbind()
    z = None
    for tile, out, added, valid in zip(
        tiling.cut(x), tiling.cut(y), tiling.cut_optional(residual), tiling.cut_optional(mask), strict=False
    ):
        z = torch.sub(tile, pivot, out=out if out.dtype == tiling.dtype else _fitting(z, tile))
        tiling.scale_(z, scale, shift)
        if added is not None:
            z.add_(added)
        if activation.name == "relu":
            z.relu_()
        elif activation.name == "leaky_relu":
            F.leaky_relu_(z, activation.negative_slope)
        elif activation.name == "silu":
            F.silu(z, inplace=True)
        if valid is not None:
            z.masked_fill_(~valid, 0)
        if z is not out:
            out.copy_(z)
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
    """Undoes activation and mask, and sums what is left over this rank's samples.

    Args:
        dy: Shape (N, C, *).
        x: Shape (N, C, *).
        statistics: `[mean, 1/σ, n]`, shape (2C + 1,).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        y: The output, shape (N, C, *), for relu and leaky_relu.
        residual: Shape (N, C, *), for silu where there was one.
        mask: Shape (N, 1, *), or None.
        activation: f.
    """
    tiling = _Tiling(x)
    mean, invstd, _ = _moments.split(statistics)
    rounded_mean = mean.to(tiling.dtype)
    pivot = tiling.per_channel(rounded_mean)
    if activation.name == "silu":
        _, scale, shift = tiling.per_channel(_moments.affine(statistics, weight, bias, tiling.dtype)).unbind()
    changes = activation.name is not None or mask is not None
    grad = torch.empty_like(x) if changes else dy
    parts: list[torch.Tensor] = []
    scratch = None
    for tile, g, given, out, added, valid in zip(
        tiling.cut(x),
        tiling.cut(grad),
        tiling.cut_optional(dy if changes else None),
        tiling.cut_optional(y),
        tiling.cut_optional(residual),
        tiling.cut_optional(mask),
        strict=False,
    ):
        scratch = torch.sub(tile, pivot, out=_fitting(scratch, tile))
        gradient = g
        if given is not None:
            given = given.to(tiling.dtype)
            # What is stored is rounded to x's dtype, what is summed here is not.
            gradient = g if g.dtype == tiling.dtype else torch.empty_like(g, dtype=tiling.dtype)
            if activation.name == "relu":
                torch.ops.aten.threshold_backward(given, out, 0, grad_input=gradient)
            elif activation.name == "leaky_relu":
                assert out is not None
                torch.where(out <= 0, given * activation.negative_slope, given, out=gradient)
            elif activation.name == "silu":
                z = torch.mul(scratch, scale).add_(shift)
                if added is not None:
                    z.add_(added)
                torch.ops.aten.silu_backward(given, z, grad_input=gradient)
            else:
                gradient.copy_(given)
            if valid is not None:
                gradient.masked_fill_(~valid, 0)
                scratch.masked_fill_(~valid, 0)  # x may be NaN there, which a factor of 0 would let through
            if gradient is not g:
                g.copy_(gradient)
        parts += (tiling.sum(gradient), tiling.sum(scratch.mul_(gradient)))
    sums = _moments.center_gradient_sums(parts, mean - rounded_mean)
    grad_bias, centered_sum = sums.unbind()
    return GradientSums(
        sums=sums,
        grad=grad,
        grad_weight=None if weight is None else (centered_sum * invstd).to(weight.dtype),
        grad_bias=None if bias is None else grad_bias.to(bias.dtype, copy=True),  # the all-reduce overwrites sums
    )


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
    """The gradient (g + (x − pivot) · x_factor) · scale + shift.

    Args:
        grad: g, shape (N, C, *).
        x: Shape (N, C, *).
        statistics: `[mean, 1/σ, n]`, shape (2C + 1,).
        sums: Reduced `[Σg, Σg·(x − mean)]`, shape (2, C).
        weight: γ, shape (C,), or None for 1.
        bias: Not needed where nothing remains.
        mask: Shape (N, 1, *), or None; the gradient is 0 where it is False.
        remaining: Nothing, as `gradient_sums` leaves it.

    Returns:
        Shape (N, C, *), the dtype and memory format of x.
    """
    dx = torch.empty_like(x)
    tiling = _Tiling(x)
    coefficients = _moments.input_gradient(statistics, sums, weight, tiling.dtype)
    pivot, x_factor, scale, shift = tiling.per_channel(coefficients).unbind()
    z = None
    for tile, g, out, valid in zip(
        tiling.cut(x), tiling.cut(grad), tiling.cut(dx), tiling.cut_optional(mask), strict=False
    ):
        z = torch.sub(tile, pivot, out=out if out.dtype == tiling.dtype else _fitting(z, tile))
        tiling.scale_(z, x_factor, g)
        tiling.scale_(z, scale, shift)
        if valid is not None:
            z.masked_fill_(~valid, 0)
        if z is not out:
            out.copy_(z)
    return dx


class _Tiling:
    """How a batch (N, C, *) is cut into tiles, every channel in each, and which operations suit its layout.

    Whole samples go together while they fit; a larger sample is cut along its first spatial dimension.
    """

    def __init__(self, x: torch.Tensor) -> None:
        on_cpu = x.device.type == "cpu"
        num_samples, num_dims, size = x.size(0), x.dim(), x.numel()
        self.dtype = compute_dtype(x.dtype)
        self._channel_shape = (-1, x.size(1), *[1] * (num_dims - 2))
        self._reduced_dims = (0, *range(2, num_dims))
        # On CPU operations slow down where an innermost loop does not run over channels: addcmul is not vectorized
        # if it broadcasts within, and a sum over two dimensions takes twice as long as two sums over one.
        self._planes = on_cpu and num_dims > 2 and x.stride(1) != 1
        limit = CPU_TILE_ELEMENTS * torch.get_num_threads() if on_cpu else DEVICE_TILE_ELEMENTS
        self._num_parts, self._num_parts_of_sample = 1, 1
        if size > limit:
            sample_size = size // num_samples
            self._num_parts = -(-num_samples // max(1, limit // sample_size))
            self._num_parts_of_sample = -(-sample_size // limit) if num_dims > 2 else 1

    def cut(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tiles of a tensor of shape (N, C, *) or (N, 1, *), in parts of equal lengths or nearly."""
        if self._num_parts == self._num_parts_of_sample == 1:
            return (values,)
        tiles = values.chunk(self._num_parts)
        if self._num_parts_of_sample == 1:
            return tiles
        return tuple(part for sample in tiles for part in sample.chunk(self._num_parts_of_sample, 2))

    def cut_optional(self, values: torch.Tensor | None) -> Iterable[torch.Tensor | None]:
        """As `cut`; None for each tile where there is nothing to cut."""
        return repeat(None) if values is None else self.cut(values)

    def per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """Shapes (C,) or (k, C) so that it, or each of its rows, broadcasts against a tile."""
        return values.view(self._channel_shape)

    def sum(self, tile: torch.Tensor) -> torch.Tensor:
        """Σ over all but the channels, shape (C,)."""
        if self._planes and tile.size(0) > 1:
            return tile.sum(self._reduced_dims[1:], dtype=self.dtype).sum(0)
        return tile.sum(self._reduced_dims, dtype=self.dtype)

    def scale_(self, z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Z · scale + shift, in place."""
        if self._planes:
            z.mul_(scale).add_(shift)
        else:
            torch.addcmul(shift, z, scale, out=z)


def _fitting(scratch: torch.Tensor | None, tile: torch.Tensor) -> torch.Tensor | None:
    """The memory of an earlier tile, still in cache, where it has this tile's shape."""
    return scratch if scratch is not None and scratch.shape == tile.shape else None


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
    """No shortcut: what is called between the passes is little beside what they call themselves."""
