"""How the passes over a batch are cut into programs and tiles: pure decisions, from shapes to numbers.

The configurations are a small fixed set, chosen by shape; nothing is timed, so that no first step waits for a search.
"""

import functools
import math
from typing import NamedTuple

NUM_WARPS = 4
_NUM_THREADS = 32 * NUM_WARPS
_VECTOR_BYTES = 16  # what a thread loads at once
_PROGRAMS_PER_PROCESSOR = 8
_WELL_USED = 0.75  # share of a tile's values that exist; a narrower tile costs more instructions for each
_MAX_STEPS = 8  # of a program of the second pass: enough to pay for forming its columns' coefficients


class Layout(NamedTuple):
    """How a batch lies in memory.

    Attributes:
        is_planes: Whether a channel's values of a sample lie together, (N, C, S); else rows (M, C) hold every channel.
        num_rows: N or M.
        num_channels: C.
        size: S, or 1.
    """

    is_planes: bool
    num_rows: int
    num_channels: int
    size: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.num_rows * self.num_channels * self.size


@functools.lru_cache(maxsize=4096)  # a training step comes with the same ones
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    """The layout of a dense batch, or None for one that has to be copied first.

    Args:
        shape: (N, C, *).
        strides: As many.
    """
    num_samples, num_channels, *sizes = shape
    if math.prod(shape) == 0:
        return Layout(is_planes=False, num_rows=0, num_channels=num_channels, size=1)
    size = math.prod(sizes)
    if size > 1 and _is_contiguous(shape, strides):
        return Layout(is_planes=True, num_rows=num_samples, num_channels=num_channels, size=size)
    if _is_contiguous((num_samples, *sizes, num_channels), (strides[0], *strides[2:], strides[1])):
        return Layout(is_planes=False, num_rows=num_samples * size, num_channels=num_channels, size=1)
    return None


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True


class Reduction(NamedTuple):
    """Programs and tiles of a first pass; `reductions.moments` says what each number means."""

    num_programs: int
    num_splits: int
    num_blocks: int
    size_units: int
    samples_per_program: int
    chunks_per_part: int
    num_parts: int
    unit: int
    vector: int
    along: bool
    j: int
    r: int
    k: int


def reduction(layout: Layout, itemsize: int, *, has_mask: bool, num_tensors: int, num_processors: int) -> Reduction:
    """How to cut a first pass.

    Args:
        layout: Of the batch.
        itemsize: Bytes of a value.
        has_mask: Whether there is one; a mask is not read by vectors that reach into a neighbouring plane.
        num_tensors: How many tensors of the batch's size a tile reads.
        num_processors: Of the GPU.
    """
    num_programs = _PROGRAMS_PER_PROCESSOR * num_processors
    widest = _VECTOR_BYTES // itemsize
    extent = layout.size if layout.is_planes else layout.num_channels
    unit = vector = _unit(extent, widest)
    lead = 0
    if layout.is_planes and unit < widest and not has_mask and layout.numel % widest == 0:
        unit, vector, lead = 1, widest, widest - unit  # vectors reach into neighbouring planes
    sweep = _NUM_THREADS * vector
    j = max(1, 32 // (vector * _power_of_two_from(num_tensors))) if layout.is_planes else max(2, 8 // num_tensors)
    if layout.is_planes:
        k = _tile_width(extent + lead, sweep, 8 * vector)
        r = min(sweep // k, _power_of_two_from(layout.num_channels))
        num_blocks = _ceil(layout.num_channels, r)
        chunks = _ceil(extent + lead, k)
        j_along, j_across = _tile_width(chunks, j, 1), _tile_width(layout.num_rows, j, 1)
        along, j = j_along >= j_across, max(j_along, j_across)
        # Tiles of a block of channels: so many one below another, so many along the planes.
        below, beside = (layout.num_rows, _ceil(chunks, j)) if along else (_ceil(layout.num_rows, j), chunks)
        wanted = _ceil(num_programs, num_blocks)
        samples_per_program = max(1, below // wanted) * (1 if along else j)
        tiles_per_part = _ceil(beside, max(1, wanted // below))
        chunks_per_part = tiles_per_part * (j if along else 1)
        num_parts = _ceil(chunks, chunks_per_part)
    else:
        # Blocks of 128 bytes of a row, or of 64: the fewer programs share one, the sooner the last has folded.
        if vector == widest:
            num_programs = max(1, num_programs // 4)
        k = _tile_width(extent, 8 * widest if extent > 16 * widest else 4 * widest, 2 * widest)
        num_blocks = _ceil(extent, k)
        r = min(sweep // k, _power_of_two_from(layout.num_rows))
        j = min(j, _power_of_two_from(_ceil(layout.num_rows, r)))
        tiles = max(1, _ceil(layout.num_rows, r * j))
        num_splits = min(tiles, _ceil(num_programs, num_blocks))
        samples_per_program = _ceil(tiles, num_splits) * r * j
        chunks_per_part = num_parts = 1
        along = False
    num_splits = max(1, _ceil(layout.num_rows, samples_per_program)) * num_parts
    return Reduction(
        num_programs=num_splits * num_blocks,
        num_splits=num_splits,
        num_blocks=num_blocks,
        size_units=extent // unit,
        samples_per_program=samples_per_program,
        chunks_per_part=chunks_per_part,
        num_parts=num_parts,
        unit=unit,
        vector=vector,
        along=along,
        j=j,
        r=r,
        k=k,
    )


class Map(NamedTuple):
    """Programs and tiles of a second pass; `maps.normalize` says what each number means."""

    num_programs: int
    num_blocks: int
    columns_units: int
    steps_per_program: int
    unit: int
    along: bool
    j: int
    r: int
    k: int
    q: int


def mapping(layout: Layout, itemsize: int, *, num_tensors: int, num_processors: int) -> Map:
    """How to cut a second pass.

    Args:
        layout: Of the batch.
        itemsize: Bytes of a value.
        num_tensors: How many tensors of the batch's size a tile reads.
        num_processors: Of the GPU.
    """
    columns = layout.num_channels * layout.size
    widest = _VECTOR_BYTES // itemsize
    unit = _unit(columns, widest)
    sweep = _NUM_THREADS * widest
    j = min(4 if num_tensors == 1 else 2, _power_of_two_from(layout.num_rows))
    if layout.is_planes:
        k = min(2 * sweep if j == 1 else sweep, _power_of_two_from(columns))
    else:
        k = _tile_width(columns, min(sweep, 64 * widest), 8 * widest)
    r = min(max(1, sweep // k), _power_of_two_from(_ceil(layout.num_rows, j)))
    side_by_side, one_below_another = _ceil(columns, k), max(1, _ceil(layout.num_rows, j * r))
    along = layout.is_planes and one_below_another < _MAX_STEPS
    # Where rows hold every channel, each thread forms the coefficients of its own ones: fewer programs then.
    programs_per_processor = _PROGRAMS_PER_PROCESSOR if layout.is_planes else max(1, _PROGRAMS_PER_PROCESSOR // 2)
    steps = side_by_side * one_below_another // (programs_per_processor * num_processors)
    steps = max(1, min(steps, _MAX_STEPS, side_by_side if along else one_below_another))
    if along:
        if layout.size >= k:  # no more than two channels, if that leaves enough
            steps = min(steps, max(layout.size // k, _MAX_STEPS // 2))
        side_by_side = _ceil(side_by_side, steps)
    else:
        one_below_another = _ceil(one_below_another, steps)
    width = steps * k if along else k
    q = (2 if layout.size >= width else _power_of_two_from(width // layout.size + 2)) if layout.is_planes else k
    return Map(
        num_programs=side_by_side * one_below_another,
        num_blocks=side_by_side,
        columns_units=columns // unit,
        steps_per_program=steps,
        unit=unit,
        along=along,
        j=j,
        r=r,
        k=k,
        q=q,
    )


def _tile_width(extent: int, widest: int, narrowest: int) -> int:
    """The widest power of two of which little is left over at the end; of those that leave much, the best."""
    width = min(widest, _power_of_two_from(extent))
    candidates = [width]
    while width > narrowest:
        width //= 2
        candidates.append(width)
    used = {width: extent / _rounded_up(extent, width) for width in candidates}
    return next(
        (width for width in candidates if used[width] >= _WELL_USED), max(candidates, key=lambda width: used[width])
    )


def _unit(extent: int, widest: int) -> int:
    """The largest power of two that divides it, up to what a thread loads at once."""
    return min(widest, extent & -extent)


def _power_of_two_from(n: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(0, n - 1).bit_length()


def _ceil(n: int, step: int) -> int:
    return -(-n // step)


def _rounded_up(n: int, step: int) -> int:
    return _ceil(n, step) * step
