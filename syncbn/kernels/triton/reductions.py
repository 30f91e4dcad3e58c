"""The first pass of each direction: sums per channel, over tiles (J, R, K) of a batch.

A tile has its K values in memory order; J is walked by each thread alone. Where channels are planes, R are channels, K
positions of a plane and J its further parts, or samples. Where rows hold every channel, R and J are rows, K channels.

Each thread sums what it holds of a tile in the batch's precision, about the mean of just that, and folds it into
float64 sums of its own: no thread waits for another before the program's end. The programs that share a channel leave
their sums in a workspace, and the last of them to arrive folds those, always in the same order.
"""

import triton
import triton.language as tl

from syncbn.kernels.triton.arithmetic import affine, undo_activation
from syncbn.kernels.triton.constants import SILU

_SILU = tl.constexpr(SILU)

# Not compiled in, whatever they are: UNIT says what the compiler has to know of them, and sizes that vary are common.
_EXTENTS = (
    "num_samples",
    "num_channels",
    "size_units",
    "samples_per_program",
    "chunks_per_part",
    "num_parts",
    "num_blocks",
    "num_splits",
)


@triton.jit(do_not_specialize=_EXTENTS)
def moments(
    x,
    mask,
    payload,
    partials,
    arrivals,
    num_samples,
    num_channels,
    size_units,
    samples_per_program,
    chunks_per_part,
    num_parts,
    num_blocks,
    num_splits,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`[Σx, Σx², n]` over this rank's samples.

    Args:
        x: The batch, planes (N, C, S) or rows (M, C), contiguous.
        mask: Valid positions (N, S) or (M,), or None.
        payload: Where to, (2C + 1,).
        partials: (num_splits, 2C + 1).
        arrivals: (num_blocks,), zeros, and zeros again afterwards.
        num_samples: N or M.
        num_channels: C.
        size_units: S / UNIT, or C / UNIT.
        samples_per_program: Samples, or rows, that one program walks.
        chunks_per_part: Chunks of K positions that one program walks of each plane.
        num_parts: Programs that share a plane.
        num_blocks: Blocks of channels.
        num_splits: Programs that share a block of channels.
        PLANES: Whether channels are planes.
        UNIT: A power of two that divides the contiguous extent.
        VECTOR: Values a thread loads at once.
        ALONG: Whether J is chunks of a plane instead of samples.
        J: Extent of a tile.
        R: Extent of a tile.
        K: Extent of a tile.
        SPLIT: Whether num_splits > 1.
        COMPUTE: Precision of a tile's sums.
    """
    block, split, first_sample, end_sample, first_chunk, end_chunk = _share(
        num_samples, samples_per_program, chunks_per_part, num_parts, num_blocks
    )
    size = size_units * UNIT
    if PLANES:
        channel = block * R + tl.arange(0, R)
        x_sum = tl.zeros([R, K // VECTOR], tl.float64)
        step: tl.constexpr = 1 if ALONG else J
        chunk_step: tl.constexpr = J if ALONG else 1
    else:
        channel = block * K + tl.arange(0, K)
        x_sum = tl.zeros([R, K], tl.float64)
        step: tl.constexpr = J * R
        chunk_step: tl.constexpr = 1
    x2_sum = x_sum
    count = x_sum
    for sample in range(first_sample, end_sample, step):
        for chunk in range(first_chunk, end_chunk, chunk_step):
            offsets, readable, valid, n = _tile(
                sample, end_sample, chunk, end_chunk, channel, num_channels, size, PLANES, UNIT, VECTOR, ALONG, J, R, K
            )
            values = _by_thread(tl.load(x + offsets, mask=readable, other=0.0).to(COMPUTE), PLANES, VECTOR, J, R, K)
            if mask is not None:
                valid = valid & _valid_positions(mask, sample, chunk, size, valid, PLANES, ALONG, J, R, K)
            valid = _by_thread(valid, PLANES, VECTOR, J, R, K)
            if mask is not None:
                n = _over_tile(valid.to(tl.int32), PLANES)
            if (mask is not None) | (PLANES & (UNIT < VECTOR)):
                values = tl.where(valid, values, 0.0)
            pivot = _over_tile(values, PLANES) / tl.maximum(n, 1).to(COMPUTE)
            deviations = tl.where(valid, values - _spread(pivot, PLANES), 0.0)
            rest = _over_tile(deviations, PLANES).to(tl.float64)
            squares = _over_tile(deviations * deviations, PLANES).to(tl.float64)
            n = n.to(tl.float64)
            pivot = pivot.to(tl.float64)
            total = n * pivot + rest  # as moments.from_tiles
            x_sum += total
            x2_sum += squares + pivot * (total + rest)
            if mask is not None:
                count += n
    first = _over_program(x_sum, PLANES)
    second = _over_program(x2_sum, PLANES)
    n = tl.cast(num_samples, tl.float64)
    if PLANES:
        n *= size
    exists = channel < num_channels
    is_counting = channel == 0  # the first channel's program counts for all
    row = 2 * num_channels + 1
    counted = _over_program(count, PLANES)
    if SPLIT:
        mine = partials + split.to(tl.int64) * row
        tl.store(mine + channel, first, mask=exists)
        tl.store(mine + num_channels + channel, second, mask=exists)
        if mask is not None:
            tl.store(mine + 2 * num_channels + channel, counted, mask=is_counting)
        is_last = _is_last(arrivals, block, num_splits)
        if is_last:
            first, second = _fold(partials, row, channel, num_channels + channel, exists, num_splits)
            if mask is not None:
                place = 2 * num_channels + channel
                counted, _ = _fold(partials, row, place, place, is_counting, num_splits)
        exists = exists & is_last
        is_counting = is_counting & is_last
    tl.store(payload + channel, first, mask=exists)
    tl.store(payload + num_channels + channel, second, mask=exists)
    n = counted if mask is not None else tl.cast(num_samples, tl.float64) * (size if PLANES else 1) + 0 * counted
    tl.store(payload + 2 * num_channels + channel, n, mask=is_counting)


@triton.jit(do_not_specialize=_EXTENTS)
def gradient_sums(
    dy,
    x,
    y,
    residual,
    mask,
    statistics,
    weight,
    bias,
    grad,
    sums,
    grad_weight,
    grad_bias,
    partials,
    arrivals,
    num_samples,
    num_channels,
    size_units,
    samples_per_program,
    chunks_per_part,
    num_parts,
    num_blocks,
    num_splits,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`[Σg, Σg·(x − mean)]` over this rank's samples, and the gradients of weight and bias.

    g is dy with activation and mask undone: by the sign of y where y is given, else by what the forward computed, which
    is computed again, to the bit.

    Args:
        dy: As x.
        x: As for `moments`.
        y: The output, as x, or None.
        residual: As x, or None.
        mask: As for `moments`.
        statistics: `[mean, 1/σ, n]`, (2C + 1,).
        weight: γ, (C,), or None.
        bias: β, (C,), or None.
        grad: Where g goes, as x; None where nobody asks for it.
        sums: Where to, (2, C).
        grad_weight: Where to, (C,), or None.
        grad_bias: Where to, (C,), or None.
        partials: (num_splits, 2, C).
        arrivals: As for `moments`, and all that follows.
        num_samples: N or M.
        num_channels: C.
        size_units: S / UNIT, or C / UNIT.
        samples_per_program: As for `moments`.
        chunks_per_part: As for `moments`.
        num_parts: As for `moments`.
        num_blocks: As for `moments`.
        num_splits: As for `moments`.
        ACTIVATION: Which to undo, one of `constants`.
        SLOPE: Of leaky_relu.
        PLANES: As for `moments`.
        UNIT: As for `moments`.
        VECTOR: As for `moments`.
        ALONG: As for `moments`.
        J: As for `moments`.
        R: As for `moments`.
        K: As for `moments`.
        SPLIT: As for `moments`.
        COMPUTE: As for `moments`.
    """
    block, split, first_sample, end_sample, first_chunk, end_chunk = _share(
        num_samples, samples_per_program, chunks_per_part, num_parts, num_blocks
    )
    size = size_units * UNIT
    if PLANES:
        channel = block * R + tl.arange(0, R)
        grad_sum = tl.zeros([R, K // VECTOR], tl.float64)
        step: tl.constexpr = 1 if ALONG else J
        chunk_step: tl.constexpr = J if ALONG else 1
    else:
        channel = block * K + tl.arange(0, K)
        grad_sum = tl.zeros([R, K], tl.float64)
        step: tl.constexpr = J * R
        chunk_step: tl.constexpr = 1
    product_sum = grad_sum
    exists = channel < num_channels
    mean = tl.load(statistics + channel, mask=exists, other=0.0)
    invstd = tl.load(statistics + num_channels + channel, mask=exists, other=0.0)
    pivot, scale, shift = affine(mean, invstd, weight, bias, channel, exists, COMPUTE)
    for sample in range(first_sample, end_sample, step):
        for chunk in range(first_chunk, end_chunk, chunk_step):
            offsets, readable, valid, _ = _tile(
                sample, end_sample, chunk, end_chunk, channel, num_channels, size, PLANES, UNIT, VECTOR, ALONG, J, R, K
            )
            # A vector that two planes share is written by both, with the same: with y, g depends on no channel.
            is_written = readable if y is not None else valid
            if mask is not None:
                valid = valid & _valid_positions(mask, sample, chunk, size, valid, PLANES, ALONG, J, R, K)
            g = tl.load(dy + offsets, mask=readable, other=0.0).to(COMPUTE)
            centered = tl.load(x + offsets, mask=readable, other=0.0).to(COMPUTE) - _by_channel(pivot, PLANES)
            if ACTIVATION != 0:
                if y is not None:
                    z = tl.load(y + offsets, mask=readable, other=0.0).to(COMPUTE)
                else:
                    z = tl.fma(centered, _by_channel(scale, PLANES), _by_channel(shift, PLANES))
                    if residual is not None:
                        z += tl.load(residual + offsets, mask=readable, other=0.0).to(COMPUTE)
                g = undo_activation(g, z, ACTIVATION, SLOPE)
            if grad is not None:
                if mask is not None:
                    g = tl.where(valid, g, 0.0)
                tl.store(grad + offsets, g.to(grad.dtype.element_ty), mask=is_written)
            if (mask is not None) | (PLANES & (UNIT < VECTOR)):
                g = tl.where(valid, g, 0.0)
                centered = tl.where(valid, centered, 0.0)  # x may be NaN there, which a factor of 0 would let through
            elif ACTIVATION == _SILU:
                g = tl.where(valid, g, 0.0)  # z may have overflowed
            grad_sum += _over_tile(_by_thread(g, PLANES, VECTOR, J, R, K), PLANES).to(tl.float64)
            product_sum += _over_tile(_by_thread(g * centered, PLANES, VECTOR, J, R, K), PLANES).to(tl.float64)
    first = _over_program(grad_sum, PLANES)
    second = _over_program(product_sum, PLANES)
    row = 2 * num_channels
    if SPLIT:
        mine = partials + split.to(tl.int64) * row
        tl.store(mine + channel, first, mask=exists)
        tl.store(mine + num_channels + channel, second, mask=exists)
        is_last = _is_last(arrivals, block, num_splits)
        if is_last:
            first, second = _fold(partials, row, channel, num_channels + channel, exists, num_splits)
        exists = exists & is_last
    second -= (mean - pivot.to(tl.float64)) * first  # as moments.center_gradient_sums
    tl.store(sums + channel, first, mask=exists)
    tl.store(sums + num_channels + channel, second, mask=exists)
    if grad_weight is not None:
        tl.store(grad_weight + channel, (second * invstd).to(grad_weight.dtype.element_ty), mask=exists)
    if grad_bias is not None:
        tl.store(grad_bias + channel, first.to(grad_bias.dtype.element_ty), mask=exists)


@triton.jit
def _share(num_samples, samples_per_program, chunks_per_part, num_parts, num_blocks):
    # Programs in the order of memory: parts of a plane, blocks of channels, samples.
    program = tl.program_id(0)
    part = program % num_parts
    block = (program // num_parts) % num_blocks
    outer = program // (num_parts * num_blocks)
    first_sample = outer * samples_per_program
    end_sample = tl.minimum(first_sample + samples_per_program, num_samples)
    first_chunk = part * chunks_per_part
    return block, outer * num_parts + part, first_sample, end_sample, first_chunk, first_chunk + chunks_per_part


@triton.jit
def _tile(
    sample,
    end_sample,
    chunk,
    end_chunk,
    channel,
    num_channels,
    size,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    VECTOR: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """Offsets (J, R, K), which of them may be read, which belong to the tile, and how many of those a thread holds.

    The number is calculated from where a thread's vectors start: to sum what is valid would move it between threads.
    """
    j = tl.arange(0, J)[:, None, None]
    if PLANES:
        c = channel[None, :, None]
        position = chunk * K + tl.arange(0, K)[None, None, :]
        first = (chunk * K + tl.arange(0, K // VECTOR) * VECTOR)[None, None, :]
        if ALONG:
            plane = tl.cast(sample, tl.int64) * num_channels + c
            exists = (c < num_channels) & (chunk + j < end_chunk)
            position += j * K
            first += j * K
        else:
            plane = (sample + j).to(tl.int64) * num_channels + c
            exists = (c < num_channels) & (sample + j < end_sample)
        start = plane * size
        if UNIT >= VECTOR:
            valid = exists & (position < size)
            readable = valid
            n = tl.where(exists & (first < size), VECTOR, 0)
        else:
            # Planes do not start where a thread's vectors do: read from the vector that a plane starts in to the one
            # that it ends in, and leave out what belongs to its neighbours.
            lead = (start % VECTOR).to(tl.int32)
            start = (start // VECTOR) * VECTOR
            readable = exists & (position // VECTOR * VECTOR < size + lead)
            valid = exists & (position >= lead) & (position < size + lead)
            n = tl.minimum(first + VECTOR, size + lead) - tl.maximum(first, lead)
            n = tl.where(exists, tl.maximum(n, 0), 0)
        offsets = start + position
    else:
        row = sample + j * R + tl.arange(0, R)[None, :, None]
        valid = (row < end_sample) & (channel < size)[None, None, :]
        readable = valid
        offsets = row.to(tl.int64) * size + channel[None, None, :]
        n = (row < end_sample).to(tl.int32)
    return offsets, readable, valid, tl.sum(n, 0)


@triton.jit
def _valid_positions(
    mask,
    sample,
    chunk,
    size,
    exists,
    PLANES: tl.constexpr,
    ALONG: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    j = tl.arange(0, J)[:, None, None]
    k = tl.arange(0, K)[None, None, :]
    if not PLANES:
        offsets = sample + j * R + tl.arange(0, R)[None, :, None]
    elif ALONG:
        offsets = tl.cast(sample, tl.int64) * size + ((chunk + j) * K + k)
    else:
        offsets = (sample + j).to(tl.int64) * size + (chunk * K + k)
    return tl.load(mask + tl.broadcast_to(offsets, [J, R, K]), mask=exists, other=False)


@triton.jit
def _by_thread(values, PLANES: tl.constexpr, VECTOR: tl.constexpr, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """A tile of planes, (J, R, K), so that what one thread holds lies along dimensions of its own, the outer ones."""
    if PLANES:
        values = tl.reshape(values, [J, R, K // VECTOR, VECTOR])
    return values


@triton.jit
def _over_tile(values, PLANES: tl.constexpr):
    """Sums what one thread holds: (J, R, K/VECTOR, VECTOR) → (R, K/VECTOR) of planes, (J, R, K) → (R, K) of rows."""
    if PLANES:
        values = tl.sum(values, 3)
    return tl.sum(values, 0)


@triton.jit
def _spread(values, PLANES: tl.constexpr):
    """Hands each thread's value to all that it holds."""
    return values[None, :, :, None] if PLANES else values[None, :, :]


@triton.jit
def _by_channel(values, PLANES: tl.constexpr):
    """Per channel, (R,) or (K,), so that it broadcasts against (J, R, K)."""
    return values[None, :, None] if PLANES else values[None, None, :]


@triton.jit
def _over_program(values, PLANES: tl.constexpr):
    """The program's sum for each of its channels, (R,) of planes, (K,) of rows."""
    return tl.sum(values, 1 if PLANES else 0)


@triton.jit
def _is_last(arrivals, block, num_splits):
    tl.debug_barrier()  # every thread has stored its part
    arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel")
    is_last = arrived == num_splits - 1
    if is_last:
        tl.store(arrivals + block, 0)
    return is_last


@triton.jit
def _fold(partials, row, first_column, second_column, exists, num_splits):
    """Σ over the splits, of two columns for each channel. Past the L1, which may hold what the memory was before."""
    WIDTH: tl.constexpr = first_column.shape[0]
    # As many loads at once as there are registers for: what the others left is on its way only then.
    P: tl.constexpr = 256 if WIDTH <= 4 else 16 if WIDTH >= 64 else 1024 // WIDTH
    splits = tl.arange(0, P)[:, None]
    first = tl.zeros([P, WIDTH], tl.float64)
    second = first
    for start in range(0, num_splits, P):
        split = start + splits
        from_there = partials + split.to(tl.int64) * row
        is_there = (split < num_splits) & exists[None, :]
        first += tl.load(from_there + first_column[None, :], mask=is_there, other=0.0, cache_modifier=".cg")
        second += tl.load(from_there + second_column[None, :], mask=is_there, other=0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)
