"""What the Triton kernels move between memory and processors: every tensor of the batch's size as often as it has to.

The interpreter is watched: of each program the distinct sectors of 32 bytes are counted, which is what a GPU moves at
least, as long as a program's own repetitions hit its cache. A failure in the planes of 49 alone points to vectors that
programs share; in one pass alone, to a tensor that is read or written once more than its purpose asks.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from syncbn.activation import IDENTITY, Activation
from syncbn.kernels.triton import backend as kernels
from tests.interpreter import DEVICE
from tests.kernel_truth import EPS, LAYOUTS, parameters, random

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="only the interpreter can be watched")

SECTOR_BYTES = 32
FORWARD, BACKWARD = (0, 1), (2, 3)  # launches

RELU, SILU = Activation("relu"), Activation("silu")


class Kind(NamedTuple):
    """A layer, and how often it has to move a batch: each pass reads or writes each of its tensors once."""

    activation: Activation
    has_residual: bool
    has_mask: bool
    forward: int
    backward: int


KINDS = {
    "plain": Kind(IDENTITY, False, False, forward=3, backward=5),  # x | x, y; dy, x | dy, x, dx
    "relu": Kind(RELU, False, False, forward=3, backward=5),
    "masked relu": Kind(RELU, False, True, forward=3, backward=5),
    "residual": Kind(IDENTITY, True, False, forward=4, backward=5),  # whose gradient is dy
    "residual and relu": Kind(RELU, True, False, forward=4, backward=7),  # dy, x, y, g | g, x, dx
    "residual and silu": Kind(SILU, True, False, forward=4, backward=7),  # the residual in the place of y
}

# Large enough that what two programs share at their edges is little, and with channels that fill whole sectors where
# rows hold them.
BATCHES = {
    "planes of 49": ((8, 64, 7, 7), "contiguous"),
    "planes of 49, odd channels": ((8, 67, 7, 7), "contiguous"),
    "planes of 196": ((3, 64, 14, 14), "contiguous"),
    "planes of 4355": ((2, 4, 65, 67), "contiguous"),
    "rows": ((6, 64, 7, 7), "channels_last"),
    "rows of 96": ((6, 96, 7, 7), "channels_last"),
}


class Traffic:
    """Sectors that the programs of each launch touched, loads and stores apart."""

    def __init__(self) -> None:
        self.num_launches = 0
        self._sectors: dict[tuple[int, int, bool], list[np.ndarray]] = defaultdict(list)

    def start(self) -> None:
        self.num_launches += 1

    def add(self, program: int, addresses: np.ndarray, mask: np.ndarray, *, is_store: bool) -> None:
        touched = np.unique(addresses[np.broadcast_to(mask, addresses.shape)] // SECTOR_BYTES)
        self._sectors[self.num_launches - 1, program, is_store].append(touched)

    def accesses(
        self, tensors: list[torch.Tensor], launches: tuple[int, ...], *, between_programs: bool = False
    ) -> float:
        """How often those launches moved such a tensor, in all; what programs share counts once if it is said to."""
        ranges = [(t.data_ptr() // SECTOR_BYTES, -(-(t.data_ptr() + t.nbytes) // SECTOR_BYTES)) for t in tensors]
        touched = defaultdict(list)
        for (launch, program, is_store), sectors in self._sectors.items():
            if launch in launches:
                touched[launch, 0 if between_programs else program, is_store] += sectors
        moved = 0
        for parts in touched.values():
            sectors = np.unique(np.concatenate(parts))
            moved += sum(((sectors >= first) & (sectors < end)).sum() for first, end in ranges)
        return moved * SECTOR_BYTES / tensors[0].nbytes


@pytest.fixture
def traffic(monkeypatch):
    traffic, builder = Traffic(), interpreter.interpreter_builder

    class Watched(type(builder)):
        def set_grid_dim(self, *dims):
            traffic.start()
            return super().set_grid_dim(*dims)

        def create_masked_load(self, ptrs, mask, *rest):
            traffic.add(self.grid_idx[0], ptrs.data, mask.data, is_store=False)
            return super().create_masked_load(ptrs, mask, *rest)

        def create_masked_store(self, ptrs, value, mask, *rest):
            traffic.add(self.grid_idx[0], ptrs.data, mask.data, is_store=True)
            return super().create_masked_store(ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "__class__", Watched)
    return traffic


def step(shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: Kind) -> list[torch.Tensor]:
    """The launches of a forward and a backward; returns all tensors of the batch's size."""
    x, dy, residual = (LAYOUTS[layout](random(*shape, dtype=dtype, seed=seed)) for seed in range(3))
    residual = residual if kind.has_residual else None
    mask = random(shape[0], 1, *shape[2:], seed=5) > 0 if kind.has_mask else None
    weight, bias = parameters(shape[1], torch.float32).values()
    payload = kernels.moments(x, mask)
    y, statistics = kernels.finalize_and_normalize(x, payload, EPS, None, weight, bias, residual, mask, kind.activation)
    sums, grad, _, _, remaining = kernels.gradient_sums(
        dy,
        x,
        statistics,
        weight,
        bias,
        y if kernels.saves_output(kind.activation, has_residual=kind.has_residual) else None,
        residual if kind.activation.saves_residual else None,
        mask,
        kind.activation,
    )
    dx = kernels.input_gradient(grad, x, statistics, sums, weight, bias, mask, remaining)
    tensors = {t.data_ptr(): t for t in (x, dy, residual, y, grad, dx) if t is not None}
    assert all(address % SECTOR_BYTES == 0 for address in tensors)
    return list(tensors.values())


def check(traffic: Traffic, shape: tuple[int, ...], layout: str, dtype: torch.dtype, kind: Kind) -> None:
    tensors = step(shape, layout, dtype, kind)
    assert traffic.num_launches == len(FORWARD) + len(BACKWARD)
    for launches, least in ((FORWARD, kind.forward), (BACKWARD, kind.backward)):
        assert least <= traffic.accesses(tensors, launches) <= 1.05 * least, launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_tensor_is_moved_once_by_each_pass_that_needs_it(batch, dtype, traffic):
    check(traffic, *BATCHES[batch], dtype, KINDS["plain"])


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (batch, kind)
        for kind in KINDS
        # A mask is not read by vectors that reach into the next plane, so tiles of 49 hold two channels only.
        for batch in ("planes of 196" if kind == "masked relu" else "planes of 49", "rows")
        if kind != "plain"
    ],
)
def test_what_is_fused_costs_no_more_than_its_own_tensors(batch, kind, traffic):
    check(traffic, *BATCHES[batch], torch.bfloat16, KINDS[kind])


def test_what_programs_share_within_a_row_is_less_than_half_and_comes_from_memory_once(traffic):
    # 200 bytes to a row, in blocks of 64 that begin within sectors; programs of one row run beside each other.
    tensors = step((6, 100, 7, 7), "channels_last", torch.bfloat16, KINDS["plain"])
    for launch in (*FORWARD, *BACKWARD):
        once = traffic.accesses(tensors, (launch,), between_programs=True)
        assert round(once, 2) == {0: 1, 1: 2, 2: 2, 3: 3}[launch]
        assert traffic.accesses(tensors, (launch,)) <= 1.5 * once, launch


@pytest.mark.parametrize("difference", [-1, 1])
def test_one_access_more_or_less_would_show(difference, traffic):
    kind = KINDS["plain"]
    kind = kind._replace(forward=kind.forward + difference)
    with pytest.raises(AssertionError, match=r"\(0, 1\)"):
        check(traffic, (8, 8, 8, 8), "contiguous", torch.float32, kind)
