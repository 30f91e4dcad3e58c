"""The four passes in plain torch operations, for any device and any strides.

Each pass walks the batch in tiles that stay in cache, so that a tile's few operations cost little more than one read
of memory, and no temporary has the size of the batch.
"""

from collections.abc import Iterator

import torch

from syncbn import moments as _moments
from syncbn.moments import Affine, InputGradient, Moments, compute_dtype

CPU_TILE_ELEMENTS = 1 << 18  # per thread: 1 MiB of float32; smaller tiles lose more to calls than they gain in cache
DEVICE_TILE_ELEMENTS = 1 << 24  # elsewhere a tile bounds the temporary's memory; launches cost more than cache


def moments(x: torch.Tensor) -> Moments:
    """Moments of each channel, each tile's about the tile's own mean.

    x − tile mean has no common offset left, so sums in the batch's precision are exact enough; the tiles are folded
    in float64. The mean of the whole tile, not one of its values: a border of zeros would make a poor pivot.

    Args:
        x: Shape (N, C, *).
    """
    if x.numel() == 0:
        return _moments.empty(x.size(1), x.device)
    dtype, dims = compute_dtype(x.dtype), reduced_dims(x)
    counts, pivots, sums, sums_of_squares = [], [], [], []
    for tile, scratch in tiles(x):
        values = x[tile]
        count = values.numel() // x.size(1)
        pivot = values.sum(dims, dtype=dtype).div_(count)  # (C,)
        centered = torch.sub(values, per_channel(pivot, x), out=scratch)
        counts.append(pivot.new_full((1,), count, dtype=torch.float64))  # filled there: a copy would wait
        pivots.append(pivot)
        sums.append(centered.sum(dims))
        sums_of_squares.append(centered.square_().sum(dims))
    return _moments.from_tiles(
        torch.stack(counts),
        torch.stack(pivots),
        torch.stack(sums),
        torch.stack(sums_of_squares),
    )


def normalize(x: torch.Tensor, affine: Affine) -> torch.Tensor:
    """The output (x − pivot) · scale + shift.

    Args:
        x: Shape (N, C, *).
        affine: Coefficients of shape (C,).

    Returns:
        Shape (N, C, *), the dtype and memory format of x.
    """
    y = torch.empty_like(x)
    pivot, scale, shift = (per_channel(t, x) for t in (affine.pivot, affine.scale, affine.shift))
    for tile, scratch in tiles(x):
        target = y[tile] if y.dtype == scratch.dtype else scratch
        torch.sub(x[tile], pivot, out=target).mul_(scale).add_(shift)
        if target is scratch:
            y[tile] = scratch
    return y


def gradient_sums(dy: torch.Tensor, x: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
    """`[Σdy, Σdy·(x − pivot)]`, shape (2, C), float64.

    Args:
        dy: Shape (N, C, *).
        x: Shape (N, C, *).
        pivot: Shape (C,), near the mean.
    """
    if x.numel() == 0:
        return torch.zeros(2, x.size(1), dtype=torch.float64, device=x.device)
    dtype, dims = compute_dtype(x.dtype), reduced_dims(x)
    sums = []
    for tile, scratch in tiles(x):
        gradient = dy[tile]
        products = torch.sub(x[tile], per_channel(pivot, x), out=scratch).mul_(gradient)
        sums.append(torch.stack([gradient.sum(dims, dtype=dtype), products.sum(dims)]))
    return torch.stack(sums).sum(0, dtype=torch.float64)  # (T, 2, C) -> (2, C)


def input_gradient(dy: torch.Tensor, x: torch.Tensor, coefficients: InputGradient) -> torch.Tensor:
    """The gradient dy · dy_scale + (x − pivot) · x_scale + shift.

    Args:
        dy: Shape (N, C, *).
        x: Shape (N, C, *).
        coefficients: Of shape (C,).

    Returns:
        Shape (N, C, *), the dtype and memory format of x.
    """
    dx = torch.empty_like(x)
    pivot, dy_scale, x_scale, shift = (
        per_channel(t, x) for t in (coefficients.pivot, coefficients.dy_scale, coefficients.x_scale, coefficients.shift)
    )
    for tile, scratch in tiles(x):
        torch.sub(x[tile], pivot, out=scratch).mul_(x_scale).add_(shift)
        if dx.dtype == scratch.dtype:
            torch.mul(dy[tile], dy_scale, out=dx[tile]).add_(scratch)
        else:
            dx[tile] = scratch.add_(dy[tile] * dy_scale)
    return dx


def reduced_dims(x: torch.Tensor) -> list[int]:
    """Every dimension but the channels'."""
    return [0, *range(2, x.dim())]


def per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shapes (C,) so that it broadcasts against (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def tiles(x: torch.Tensor) -> Iterator[tuple[tuple[slice, ...], torch.Tensor]]:
    """Cuts (N, C, *) into tiles that fit the cache, every channel in each.

    Whole samples go together while they fit; a larger sample is cut along its first spatial dimension.

    Yields:
        The tile's index into x, and a scratch tensor of its shape and strides in the compute precision. The same
        memory serves every tile, so that it stays in cache.
    """
    if x.numel() == 0:
        return
    limit = CPU_TILE_ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else DEVICE_TILE_ELEMENTS
    sample_elements = x.numel() // x.size(0)
    if sample_elements <= limit or x.dim() == 2:
        step = max(1, limit // sample_elements)
        indices: list[tuple[slice, ...]] = [(slice(n, n + step),) for n in range(0, x.size(0), step)]
    else:
        step = -(-x.size(2) // -(-sample_elements // limit))  # equal parts: a short last one is all overhead
        indices = [
            (slice(n, n + 1), slice(None), slice(d, d + step))
            for n in range(x.size(0))
            for d in range(0, x.size(2), step)
        ]
    scratch = torch.empty_like(x[indices[0]], dtype=compute_dtype(x.dtype))
    for index in indices:
        shape = x[index].shape
        yield index, scratch[: shape[0]] if len(index) == 1 else scratch[:, :, : shape[2]]
