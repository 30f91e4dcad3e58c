"""The second pass of each direction: every value from its channel's coefficients, over tiles (J, R, K) of a matrix.

The batch is a matrix whose columns belong to channels: samples (N, C·S) where channels are planes, rows (M, C) where
rows hold every channel. A program forms the coefficients of its channels once, while its first values are on their way,
and walks on along rows with them, or down the columns. Vectors are whole wherever C·S is a multiple of theirs, whatever
the planes' size.
"""

import triton
import triton.language as tl

from syncbn.kernels.triton.arithmetic import activate, affine, batch_statistics, undo_activation

# As in `reductions`.
_EXTENTS = ("num_rows", "num_channels", "size", "columns_units", "steps_per_program", "num_blocks")


@triton.jit(do_not_specialize=_EXTENTS)
def normalize(
    x,
    residual,
    mask,
    reduced,
    weight,
    bias,
    y,
    statistics,
    running_mean,
    running_var,
    num_batches,
    num_batches_before,
    num_nonfinite,
    momentum: tl.float64,
    eps: tl.float64,
    num_rows,
    num_channels,
    size,
    columns_units,
    steps_per_program,
    num_blocks,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    FINALIZE: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Y = f(γ(x − mean)/σ + β + residual); with FINALIZE it forms the statistics and folds the batch in as well.

    Args:
        x: The batch, (num_rows, columns), contiguous.
        residual: As x, or None.
        mask: Valid positions, (N, S) or (M,), or None.
        reduced: The payload `[Σx, Σx², n]` of the group with FINALIZE, else the statistics, (2C + 1,).
        weight: γ, (C,), or None.
        bias: β, (C,), or None.
        y: Where to, as x.
        statistics: Where `[mean, 1/σ, n]` goes with FINALIZE, (2C + 1,).
        running_mean: Updated in place with FINALIZE, (C,), or None.
        running_var: Updated in place with FINALIZE, (C,), or None.
        num_batches: Incremented, (), or None.
        num_batches_before: A copy of num_batches where momentum is None (programs read it while one writes the other).
        num_nonfinite: Incremented, (), or None.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        num_rows: N or M.
        num_channels: C.
        size: S, or 1.
        columns_units: C·S / UNIT, or C / UNIT.
        steps_per_program: Tiles that one program walks.
        num_blocks: Programs side by side.
        ACTIVATION: f, one of `constants`.
        SLOPE: Of leaky_relu.
        FINALIZE: Whether `reduced` is a payload.
        PLANES: Whether channels are planes.
        UNIT: A power of two that divides the columns.
        ALONG: Whether a program walks along its rows, instead of down its columns.
        J: Extent of a tile.
        R: Extent of a tile.
        K: Extent of a tile.
        Q: Channels that a program's columns may touch.
        COMPUTE: Precision of the arithmetic.
    """
    column, width, row, end_row, num_steps = _share(num_rows, steps_per_program, num_blocks, ALONG, J, R, K)
    columns = columns_units * UNIT
    offsets, exists = _tile(0, num_steps, row, end_row, column, columns, ALONG, J, R, K)
    values = tl.load(x + offsets, mask=exists, other=0.0)  # on its way while the coefficients are formed
    channel, is_channel, is_owned = _channels(column, width, row, num_channels, size, PLANES, Q)
    if FINALIZE:
        mean, deviations, invstd = batch_statistics(reduced, channel, is_channel, num_channels, eps)
        tl.store(statistics + channel, mean, mask=is_owned)
        tl.store(statistics + num_channels + channel, invstd, mask=is_owned)
        if (column == 0) & (row == 0):
            tl.store(statistics + 2 * num_channels, tl.load(reduced + 2 * num_channels))
        if running_mean is not None:
            if row == 0:
                fold_in(
                    reduced,
                    mean,
                    deviations,
                    channel,
                    is_owned,
                    num_channels,
                    running_mean,
                    running_var,
                    num_batches,
                    num_batches_before,
                    num_nonfinite,
                    momentum,
                    column == 0,
                )
    else:
        mean = tl.load(reduced + channel, mask=is_channel, other=0.0)
        invstd = tl.load(reduced + num_channels + channel, mask=is_channel, other=0.0)
    pivot, scale, shift = affine(mean, invstd, weight, bias, channel, is_channel, COMPUTE)
    if not ALONG:
        always = _channel_of_column(0, column, size, PLANES, ALONG, K, Q)
        pivot = _by_column(pivot, always, PLANES, Q)
        scale = _by_column(scale, always, PLANES, Q)
        shift = _by_column(shift, always, PLANES, Q)
    for step in range(num_steps):
        of_column = _channel_of_column(step, column, size, PLANES, ALONG, K, Q) if ALONG else always
        z = values.to(COMPUTE) - (_by_column(pivot, of_column, PLANES, Q) if ALONG else pivot)
        scale_here = _by_column(scale, of_column, PLANES, Q) if ALONG else scale
        z = tl.fma(z, scale_here, _by_column(shift, of_column, PLANES, Q) if ALONG else shift)
        here, is_here = offsets, exists
        offsets, exists = _tile(step + 1, num_steps, row, end_row, column, columns, ALONG, J, R, K)
        values = tl.load(x + offsets, mask=exists, other=0.0)
        if residual is not None:
            z += tl.load(residual + here, mask=is_here, other=0.0).to(COMPUTE)
        z = activate(z, ACTIVATION, SLOPE)
        if mask is not None:
            z = tl.where(_valid(mask, step, row, column, size, of_column, is_here, PLANES, ALONG, J, R, K), z, 0.0)
        tl.store(y + here, z.to(y.dtype.element_ty), mask=is_here)


@triton.jit(do_not_specialize=_EXTENTS)
def input_gradient(
    grad,
    x,
    mask,
    statistics,
    sums,
    weight,
    bias,
    dx,
    num_rows,
    num_channels,
    size,
    columns_units,
    steps_per_program,
    num_blocks,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Dx = γ/σ · (g − Σg/N − (x − mean)·Σg·(x − mean)/(N·σ²)); as `moments.input_gradient`.

    Args:
        grad: g, or dy where ACTIVATION is still to be undone, as x.
        x: As for `normalize`.
        mask: As for `normalize`.
        statistics: `[mean, 1/σ, N]`, (2C + 1,).
        sums: `[Σg, Σg·(x − mean)]` of the group, (2, C).
        weight: γ, (C,), or None.
        bias: β, (C,), or None; needed for the activation alone.
        dx: Where to, as x.
        num_rows: As for `normalize`.
        num_channels: As for `normalize`.
        size: As for `normalize`.
        columns_units: As for `normalize`.
        steps_per_program: As for `normalize`.
        num_blocks: As for `normalize`.
        ACTIVATION: Which to undo here.
        SLOPE: Of leaky_relu.
        PLANES: As for `normalize`, and all that follows.
        UNIT: As for `normalize`.
        ALONG: As for `normalize`.
        J: As for `normalize`.
        R: As for `normalize`.
        K: As for `normalize`.
        Q: As for `normalize`.
        COMPUTE: As for `normalize`.
    """
    column, width, row, end_row, num_steps = _share(num_rows, steps_per_program, num_blocks, ALONG, J, R, K)
    columns = columns_units * UNIT
    offsets, exists = _tile(0, num_steps, row, end_row, column, columns, ALONG, J, R, K)
    values = tl.load(x + offsets, mask=exists, other=0.0)
    gradients = tl.load(grad + offsets, mask=exists, other=0.0)
    channel, is_channel, _ = _channels(column, width, row, num_channels, size, PLANES, Q)
    mean = tl.load(statistics + channel, mask=is_channel, other=0.0)
    invstd = tl.load(statistics + num_channels + channel, mask=is_channel, other=0.0)
    one_nth = 1 / tl.maximum(tl.load(statistics + 2 * num_channels), 1.0)
    grad_mean = tl.load(sums + channel, mask=is_channel, other=0.0) * one_nth
    factor = tl.load(sums + num_channels + channel, mask=is_channel, other=0.0) * one_nth * (invstd * invstd)
    pivot, scale, shift = affine(mean, invstd, weight, bias, channel, is_channel, COMPUTE)
    x_shift = ((mean - pivot.to(tl.float64)) * factor - grad_mean).to(COMPUTE)
    x_factor = (-factor).to(COMPUTE)
    if not ALONG:
        always = _channel_of_column(0, column, size, PLANES, ALONG, K, Q)
        pivot = _by_column(pivot, always, PLANES, Q)
        scale = _by_column(scale, always, PLANES, Q)
        shift = _by_column(shift, always, PLANES, Q)
        x_shift = _by_column(x_shift, always, PLANES, Q)
        x_factor = _by_column(x_factor, always, PLANES, Q)
    for step in range(num_steps):
        of_column = _channel_of_column(step, column, size, PLANES, ALONG, K, Q) if ALONG else always
        centered = values.to(COMPUTE) - (_by_column(pivot, of_column, PLANES, Q) if ALONG else pivot)
        g = gradients.to(COMPUTE)
        here, is_here = offsets, exists
        offsets, exists = _tile(step + 1, num_steps, row, end_row, column, columns, ALONG, J, R, K)
        values = tl.load(x + offsets, mask=exists, other=0.0)
        gradients = tl.load(grad + offsets, mask=exists, other=0.0)
        scale_here = _by_column(scale, of_column, PLANES, Q) if ALONG else scale
        if ACTIVATION != 0:
            shift_here = _by_column(shift, of_column, PLANES, Q) if ALONG else shift
            g = undo_activation(g, tl.fma(centered, scale_here, shift_here), ACTIVATION, SLOPE)
        g = tl.fma(centered, _by_column(x_factor, of_column, PLANES, Q) if ALONG else x_factor, g)
        g = (g + (_by_column(x_shift, of_column, PLANES, Q) if ALONG else x_shift)) * scale_here
        if mask is not None:
            g = tl.where(_valid(mask, step, row, column, size, of_column, is_here, PLANES, ALONG, J, R, K), g, 0.0)
        tl.store(dx + here, g.to(dx.dtype.element_ty), mask=is_here)


@triton.jit(do_not_specialize=("num_channels",))
def finalize(
    payload,
    statistics,
    running_mean,
    running_var,
    num_batches,
    num_batches_before,
    num_nonfinite,
    momentum: tl.float64,
    eps: tl.float64,
    num_channels,
    K: tl.constexpr,
):
    """The statistics alone, and the batch folded in, for what needs them apart from the normalization.

    Args:
        payload: `[Σx, Σx², n]` of the group, (2C + 1,).
        statistics: Where `[mean, 1/σ, n]` goes, (2C + 1,).
        running_mean: As for `normalize`.
        running_var: As for `normalize`.
        num_batches: As for `normalize`.
        num_batches_before: As for `normalize`.
        num_nonfinite: As for `normalize`.
        momentum: As for `normalize`.
        eps: As for `normalize`.
        num_channels: C.
        K: Channels of a program.
    """
    channel = tl.program_id(0) * K + tl.arange(0, K)
    exists = channel < num_channels
    mean, deviations, invstd = batch_statistics(payload, channel, exists, num_channels, eps)
    tl.store(statistics + channel, mean, mask=exists)
    tl.store(statistics + num_channels + channel, invstd, mask=exists)
    if tl.program_id(0) == 0:
        tl.store(statistics + 2 * num_channels, tl.load(payload + 2 * num_channels))
    if running_mean is not None:
        fold_in(
            payload,
            mean,
            deviations,
            channel,
            exists,
            num_channels,
            running_mean,
            running_var,
            num_batches,
            num_batches_before,
            num_nonfinite,
            momentum,
            tl.program_id(0) == 0,
        )


@triton.jit
def fold_in(
    payload,
    mean,
    deviations,
    channel,
    is_owned,
    num_channels,
    running_mean,
    running_var,
    num_batches,
    num_batches_before,
    num_nonfinite,
    momentum,
    is_first,
):
    """Folds a batch into the running statistics of the channels that this program owns; as `update_running`."""
    n = tl.load(payload + 2 * num_channels)
    counts = n > 1
    if num_nonfinite is not None:
        is_finite = _is_finite(payload, 2 * num_channels + 1)
        if is_first:
            tl.store(num_nonfinite, tl.load(num_nonfinite) + tl.where(is_finite, 0, 1))
        counts = counts & is_finite
    if num_batches is not None:
        if is_first:
            before = num_batches if num_batches_before is None else num_batches_before
            tl.store(num_batches, tl.load(before) + tl.where(counts, 1, 0))
    factor = momentum
    if num_batches_before is not None:
        factor = 1 / tl.maximum(tl.load(num_batches_before) + tl.where(counts, 1, 0), 1).to(tl.float64)
    is_updated = is_owned & counts
    old = tl.load(running_mean + channel, mask=is_updated, other=0.0).to(tl.float64)
    new = old + factor * (mean - old)
    tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=is_updated)
    old = tl.load(running_var + channel, mask=is_updated, other=0.0).to(tl.float64)
    new = old + factor * (deviations / tl.maximum(n - 1, 1.0) - old)
    tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=is_updated)


@triton.jit
def _is_finite(payload, length):
    num_bad = tl.zeros([1024], tl.int32)
    for first in range(0, length, 1024):
        i = first + tl.arange(0, 1024)
        value = tl.load(payload + i, mask=i < length, other=0.0)
        num_bad += tl.where(value - value == 0, 0, 1)  # Inf − Inf is NaN
    return tl.sum(num_bad, 0) == 0


@triton.jit
def _share(
    num_rows,
    steps_per_program,
    num_blocks,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """First column, columns, first row, end of the rows and steps of this program."""
    # From the end of memory: what the first pass read last may still be in cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if ALONG:
        width = steps_per_program * K
        rows: tl.constexpr = J * R
    else:
        width = K
        rows = steps_per_program * (J * R)
    row = (program // num_blocks) * rows
    end_row = tl.minimum(row + rows, num_rows)
    num_steps = steps_per_program if ALONG else tl.cdiv(end_row - row, J * R)
    return (program % num_blocks) * width, width, row, end_row, num_steps


@triton.jit
def _tile(
    step,
    num_steps,
    row,
    end_row,
    column,
    columns,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Offsets (J, R, K) and which of them exist."""
    rows = row + tl.arange(0, J)[:, None, None] * R + tl.arange(0, R)[None, :, None]
    k = column + tl.arange(0, K)[None, None, :]
    if ALONG:
        k += step * K
        exists = (rows < end_row) & (k < columns) & (step < num_steps + 0 * k)
    else:
        rows += step * (J * R)
        exists = (rows < end_row) & (k < columns)
    return rows.to(tl.int64) * columns + k, exists


@triton.jit
def _channels(column, width, row, num_channels, size, PLANES: tl.constexpr, Q: tl.constexpr):
    """The Q channels that columns from `column` may touch; whether they exist; whether it is here to write them.

    A channel's values per channel are written by the first program to have its first column.
    """
    if PLANES:
        channel = column // size + tl.arange(0, Q)
        first_column = channel * size
        is_owned = (first_column >= column) & (first_column < column + width)
    else:
        channel = column + tl.arange(0, Q)
        is_owned = channel >= 0
    is_channel = channel < num_channels
    return channel, is_channel, is_owned & is_channel & (row == 0)


@triton.jit
def _channel_of_column(
    step,
    column,
    size,
    PLANES: tl.constexpr,
    ALONG: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
):
    """Which of the program's Q channels each of K columns belongs to, (K,)."""
    k = tl.arange(0, K)
    if PLANES:
        place = column % size + k
        if ALONG:
            place += step * K
        if Q == 2:
            k = (place >= size).to(tl.int32)
        else:
            # place is some thousands: the quotient is off by far less than what 0.5 keeps it from a whole number.
            k = ((place.to(tl.float32) + 0.5) / size.to(tl.float32)).to(tl.int32)
    return k


@triton.jit
def _by_column(values, of_column, PLANES: tl.constexpr, Q: tl.constexpr):
    """(Q,) → (1, 1, K)."""
    if PLANES:
        if Q == 2:
            q = tl.arange(0, 2)
            first = tl.sum(tl.where(q == 0, values, 0.0), 0)
            second = tl.sum(tl.where(q == 1, values, 0.0), 0)
            values = tl.where(of_column == 0, first, second)
        else:
            values = tl.gather(values, of_column, 0)
    return values[None, None, :]


@triton.jit
def _valid(
    mask,
    step,
    row,
    column,
    size,
    of_column,
    exists,
    PLANES: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    rows = row + tl.arange(0, J)[:, None, None] * R + tl.arange(0, R)[None, :, None]
    if not ALONG:
        rows += step * (J * R)
    offsets = rows.to(tl.int64)
    if PLANES:
        position = column % size + tl.arange(0, K) - of_column * size
        if ALONG:
            position += step * K
        offsets = offsets * size + position[None, None, :]
    return tl.load(mask + tl.broadcast_to(offsets, [J, R, K]), mask=exists, other=False)
