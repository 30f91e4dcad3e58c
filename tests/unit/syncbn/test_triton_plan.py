"""How batches are cut for the GPU: every value exactly once, no address outside, enough programs.

The kernels' arithmetic of indices is written out again here, for all programs at once; that the kernels do the same
shows in `test_triton_kernels`. Hypothesis shrinks a failure to the smallest batch that is cut wrongly.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from syncbn.kernels import dispatch
from syncbn.kernels.triton.plan import Layout, Map, Reduction, layout_of, mapping, reduction

MAX_VALUES = 50_000  # of a batch whose every address is looked at
MAX_TILE = 8192  # 64 to each of 128 threads

ITEMSIZES = st.sampled_from([2, 4, 8])
PROCESSORS = st.sampled_from([1, 2, 7, 40, 132])
SIZES = st.one_of(st.integers(2, 64), st.sampled_from([49, 121, 196, 256, 784, 1155, 3136, 12544]))
CHANNELS = st.one_of(st.integers(1, 70), st.sampled_from([8, 16, 64, 96, 128, 255, 256, 512]))
NUM_ROWS = st.one_of(st.integers(1, 2000), st.sampled_from([1, 2, 8, 32, 33, 64, 2000]))


@st.composite
def layouts(draw: st.DrawFn, max_values: int = MAX_VALUES) -> Layout:
    is_planes = draw(st.booleans())
    size = draw(SIZES) if is_planes else 1
    num_channels = min(draw(CHANNELS), max_values // size)
    num_rows = min(draw(NUM_ROWS), max_values // (size * num_channels))
    return Layout(is_planes=is_planes, num_rows=num_rows, num_channels=num_channels, size=size)


@st.composite
def reductions(draw: st.DrawFn) -> tuple[Layout, int, Reduction]:
    layout, itemsize = draw(layouts()), draw(ITEMSIZES)
    return cut(layout, itemsize, draw(st.booleans()), draw(st.integers(1, 3)), draw(PROCESSORS))


def cut(
    layout: Layout, itemsize: int, has_mask: bool, num_tensors: int, num_processors: int
) -> tuple[Layout, int, Reduction]:
    plan = reduction(layout, itemsize, has_mask=has_mask, num_tensors=num_tensors, num_processors=num_processors)
    return layout, itemsize, plan


# Planes of 49 values whose vectors reach into their neighbours, as samples one after another and as parts of a plane.
REACHING = (
    cut(Layout(is_planes=True, num_rows=64, num_channels=12, size=49), 4, False, 1, 132),
    cut(Layout(is_planes=True, num_rows=2, num_channels=4, size=49 * 49), 2, False, 1, 132),
)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Layout, int, Map]:
    layout, itemsize = draw(layouts()), draw(ITEMSIZES)
    plan = mapping(layout, itemsize, num_tensors=draw(st.integers(1, 2)), num_processors=draw(PROCESSORS))
    return layout, itemsize, plan


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Of every program, one after another, all of shape (programs, steps of the walk, J, R, K) or broadcast to it.

    Attributes:
        offsets: Into the batch.
        readable: Which of them are read.
        valid: Which of them belong to the program.
        channel: Whose sum they go into, or whose coefficients they get.
    """

    offsets: np.ndarray
    readable: np.ndarray
    valid: np.ndarray
    channel: np.ndarray


def tiles_of_reduction(layout: Layout, plan: Reduction) -> Tiles:
    """As `_share` and `_tile` of reductions.py."""
    size = plan.size_units * plan.unit
    assert size == (layout.size if layout.is_planes else layout.num_channels)
    program = axis(np.arange(plan.num_programs), 0)
    part = program % plan.num_parts
    block = program // plan.num_parts % plan.num_blocks
    outer = program // (plan.num_parts * plan.num_blocks)
    end_sample = np.minimum((outer + 1) * plan.samples_per_program, layout.num_rows)
    end_chunk = (part + 1) * plan.chunks_per_part
    j, r, k = axis(np.arange(plan.j), 2), axis(np.arange(plan.r), 3), axis(np.arange(plan.k), 4)
    if not layout.is_planes:
        steps = axis(np.arange(0, plan.samples_per_program, plan.j * plan.r), 1)
        row = outer * plan.samples_per_program + steps + j * plan.r + r
        channel = block * plan.k + k
        valid = (row < end_sample) & (channel < size)
        return Tiles(offsets=row * size + channel, readable=valid, valid=valid, channel=channel)
    samples = np.arange(0, plan.samples_per_program, 1 if plan.along else plan.j)
    chunks = np.arange(0, plan.chunks_per_part, plan.j if plan.along else 1)
    walk = np.stack(np.meshgrid(samples, chunks, indexing="ij")).reshape(2, -1)
    sample = outer * plan.samples_per_program + axis(walk[0], 1)
    chunk = part * plan.chunks_per_part + axis(walk[1], 1)
    channel = block * plan.r + r
    if plan.along:
        chunk = chunk + j
    else:
        sample = sample + j
    exists = (channel < layout.num_channels) & (sample < end_sample) & (chunk < end_chunk)
    start, position = (sample * layout.num_channels + channel) * size, chunk * plan.k + k
    lead = 0 * start if plan.unit >= plan.vector else start % plan.vector
    readable = exists & (position // plan.vector * plan.vector < size + lead)
    valid = exists & (position >= lead) & (position < size + lead)
    return Tiles(offsets=start - lead + position, readable=readable, valid=valid, channel=channel + 0 * position)


def tiles_of_map(layout: Layout, plan: Map) -> Tiles:
    """As `_share`, `_tile` and `_channel_of_column` of maps.py."""
    columns = plan.columns_units * plan.unit
    assert columns == layout.num_channels * layout.size
    program = axis(np.arange(plan.num_programs), 0)
    tile_rows, steps = plan.j * plan.r, axis(np.arange(plan.steps_per_program), 1)
    width, height = width_of(plan), height_of(plan)
    first_row, column = program // plan.num_blocks * height, program % plan.num_blocks * width
    row = first_row + axis(np.arange(plan.j), 2) * plan.r + axis(np.arange(plan.r), 3)
    k = axis(np.arange(plan.k), 4)
    if plan.along:
        k = k + steps * plan.k
    else:
        row = row + steps * tile_rows
    exists = (row < np.minimum(first_row + height, layout.num_rows)) & (column + k < columns)
    if layout.is_planes:
        place = column % layout.size + k
        if plan.q == 2:
            of_column = (place >= layout.size).astype(np.int64)
        else:
            of_column = ((place.astype(np.float32) + np.float32(0.5)) / np.float32(layout.size)).astype(np.int64)
        channel = column // layout.size + of_column
    else:
        of_column, channel = k, column + k
    assert (exists <= ((of_column >= 0) & (of_column < plan.q))).all()
    return Tiles(offsets=row * columns + column + k, readable=exists, valid=exists, channel=channel)


def axis(values: np.ndarray, at: int) -> np.ndarray:
    """Along one of the five dimensions of all tiles."""
    return values.reshape([-1 if dim == at else 1 for dim in range(5)])


def assert_each_value_once_in_its_channel(layout: Layout, tiles: Tiles) -> None:
    offsets, valid, channel = np.broadcast_arrays(tiles.offsets, tiles.valid, tiles.channel)
    offsets, channel = offsets[valid], channel[valid]
    assert np.array_equal(np.sort(offsets), np.arange(layout.numel))
    assert np.array_equal(channel, offsets // layout.size % layout.num_channels)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def test_the_examples_reach():
    assert [(plan.unit < plan.vector, plan.along) for _, _, plan in REACHING] == [(True, False), (True, True)]


@settings(max_examples=300, deadline=None)
@given(reductions())
@example(REACHING[0])
@example(REACHING[1])
def test_a_first_pass_sums_every_value_once_in_its_channel(case):
    layout, _, plan = case
    assert_each_value_once_in_its_channel(layout, tiles_of_reduction(layout, plan))


@settings(max_examples=300, deadline=None)
@given(reductions())
@example(REACHING[0])
@example(REACHING[1])
def test_vectors_of_a_first_pass_are_whole_aligned_and_inside_the_batch(case):
    layout, itemsize, plan = case
    tiles = tiles_of_reduction(layout, plan)
    assert (tiles.valid <= tiles.readable).all()
    offsets, readable = np.broadcast_arrays(tiles.offsets, tiles.readable)
    inside = (offsets >= 0) & (offsets < layout.numel)
    assert inside[readable].all()
    if layout.is_planes or layout.num_channels % plan.vector == 0:
        vectors = readable.reshape(*readable.shape[:-1], -1, plan.vector)
        assert (vectors.all(-1) == vectors.any(-1)).all()
        assert (offsets[..., :: plan.vector][vectors.all(-1)] % plan.vector == 0).all()
    assert plan.vector * itemsize <= 16


@settings(max_examples=300, deadline=None)
@given(reductions())
@example(REACHING[0])
@example(REACHING[1])
def test_the_programs_of_a_first_pass_leave_one_part_for_each_block_and_split(case):
    layout, _, plan = case
    program = np.arange(plan.num_programs)
    block = program // plan.num_parts % plan.num_blocks
    split = program // (plan.num_parts * plan.num_blocks) * plan.num_parts + program % plan.num_parts
    pairs = np.sort(block * plan.num_splits + split)
    assert np.array_equal(pairs, np.arange(plan.num_blocks * plan.num_splits))
    tiles = tiles_of_reduction(layout, plan)
    idle = ~np.broadcast_to(tiles.valid, np.broadcast_shapes(tiles.valid.shape, tiles.offsets.shape)).any((1, 2, 3, 4))
    # Planes that begin within a vector may need a chunk more than those that do not.
    is_spare = (program % plan.num_parts == plan.num_parts - 1) & (plan.unit < plan.vector)
    assert not (idle & ~is_spare).any()


@settings(max_examples=300, deadline=None)
@given(maps())
def test_a_second_pass_gives_every_value_once_the_coefficients_of_its_channel(case):
    layout, _, plan = case
    assert_each_value_once_in_its_channel(layout, tiles_of_map(layout, plan))


@settings(max_examples=300, deadline=None)
@given(maps())
def test_every_channel_s_values_are_written_by_one_program_of_a_second_pass(case):
    layout, _, plan = case
    width = width_of(plan)
    column = (np.arange(plan.num_blocks) * width)[:, None]  # of the programs that have the first row
    channel = column // layout.size + np.arange(plan.q)
    first_column = channel * layout.size
    is_owned = (channel < layout.num_channels) & (first_column >= column) & (first_column < column + width)
    assert np.array_equal(np.sort(channel[is_owned]), np.arange(layout.num_channels))


@settings(max_examples=300, deadline=None)
@given(layouts(max_values=2**31), ITEMSIZES, st.booleans(), st.integers(1, 3), PROCESSORS)
def test_tiles_are_powers_of_two_that_fit_a_program_s_threads(layout, itemsize, has_mask, num_tensors, num_processors):
    first = reduction(layout, itemsize, has_mask=has_mask, num_tensors=num_tensors, num_processors=num_processors)
    second = mapping(layout, itemsize, num_tensors=min(num_tensors, 2), num_processors=num_processors)
    for plan in (first, second):
        assert all(is_power_of_two(n) for n in (plan.j, plan.r, plan.k, plan.unit)), plan
        assert plan.j * plan.r * plan.k <= MAX_TILE, plan
    assert is_power_of_two(first.vector)
    assert is_power_of_two(second.q)
    assert first.k % first.vector == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(layouts(max_values=2**31), ITEMSIZES, st.booleans(), st.integers(1, 3), PROCESSORS)
@example(Layout(is_planes=True, num_rows=32, num_channels=64, size=112 * 112), 4, False, 1, 132)
@example(Layout(is_planes=True, num_rows=8, num_channels=16, size=112 * 112), 4, False, 1, 132)
@example(Layout(is_planes=True, num_rows=8, num_channels=3, size=224 * 224), 4, False, 2, 132)
@example(Layout(is_planes=True, num_rows=1, num_channels=1, size=2**22), 2, False, 2, 132)
@example(Layout(is_planes=False, num_rows=2**20, num_channels=3, size=1), 4, False, 1, 132)
@example(Layout(is_planes=False, num_rows=64, num_channels=2**16, size=1), 4, False, 1, 132)
def test_large_batches_get_a_program_for_every_processor(layout, itemsize, has_mask, num_tensors, num_processors):
    assume(layout.numel >= MAX_TILE * num_processors)
    first = reduction(layout, itemsize, has_mask=has_mask, num_tensors=num_tensors, num_processors=num_processors)
    second = mapping(layout, itemsize, num_tensors=min(num_tensors, 2), num_processors=num_processors)
    for plan in (first, second):
        assert plan.num_programs >= num_processors, plan


@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_an_empty_batch_gets_programs_that_find_nothing_to_do(itemsize):
    layout = Layout(is_planes=False, num_rows=0, num_channels=5, size=1)
    first = reduction(layout, itemsize, has_mask=False, num_tensors=1, num_processors=132)
    second = mapping(layout, itemsize, num_tensors=1, num_processors=132)
    assert first.num_splits == 1
    assert not tiles_of_reduction(layout, first).valid.any()
    assert not tiles_of_map(layout, second).valid.any()
    assert first.num_programs == second.num_programs == 1  # which writes zeros, or the statistics


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("is_planes", [True, False], ids=["planes", "rows"])
def test_no_position_of_the_largest_batch_wraps(is_planes, itemsize):
    largest = dispatch._MAX_INDEX  # positions of a channel, and values of a sample
    extents = itertools.product((0, 1, 10**5, 10**6 + 1), (1, 2, 3), (1, 40, 132), (False, True))
    for below, num_tensors, num_processors, has_mask in extents:
        length = largest - below
        layout = Layout(
            is_planes=is_planes,
            num_rows=1 if is_planes else length,
            num_channels=1,
            size=length if is_planes else 1,
        )
        options = {"num_tensors": num_tensors, "num_processors": num_processors}
        first = reduction(layout, itemsize, has_mask=has_mask, **options)
        second = mapping(layout, itemsize, **options)
        if is_planes:
            ends = first.num_parts * first.chunks_per_part * first.k, (second.num_blocks + 1) * width_of(second)
        else:
            ends = length + first.j * first.r, length + 2 * height_of(second)
        assert max(ends) <= 2**31, (first, second)


def width_of(plan: Map) -> int:
    return plan.k * (plan.steps_per_program if plan.along else 1)


def height_of(plan: Map) -> int:
    return plan.j * plan.r * (1 if plan.along else plan.steps_per_program)


class TestLayout:
    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (1, 3, 4), (2, 1, 4)])
    def test_it_names_what_memory_holds(self, shape):
        x = torch.empty(shape)
        rows = x.movedim(1, -1).contiguous().movedim(-1, 1)
        planes, rows = (layout_of(t.shape, t.stride()) for t in (x, rows))
        num_samples, num_channels, size = shape[0], shape[1], x[0, 0].numel()
        as_rows = Layout(is_planes=False, num_rows=num_samples * size, num_channels=num_channels, size=1)
        as_planes = Layout(is_planes=True, num_rows=num_samples, num_channels=num_channels, size=size)
        assert planes == (as_planes if size > 1 else as_rows)
        assert rows in ((as_rows, as_planes) if num_channels == 1 else (as_rows,))  # the same memory

    @given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.randoms(use_true_random=False))
    def test_nothing_else_is_taken_for_either(self, shape, random):
        dims = list(range(len(shape)))
        random.shuffle(dims)
        x = torch.arange(torch.Size(shape).numel()).view(shape).permute(dims)
        if random.random() < 0.3:
            x = x[:, ::2]
        layout = layout_of(x.shape, x.stride())
        if layout is None:
            assert not x.is_contiguous()
            assert not x.movedim(1, -1).is_contiguous()
            return
        memory = torch.as_strided(x, (layout.numel,), (1,))
        expected = x.flatten() if layout.is_planes else x.movedim(1, -1).flatten()
        assert torch.equal(memory, expected)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
    def test_nothing_is_no_rows(self, shape):
        x = torch.empty(shape)
        assert layout_of(x.shape, x.stride()) == Layout(is_planes=False, num_rows=0, num_channels=3, size=1)
