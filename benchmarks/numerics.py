"""How accurate the statistics, the output and the input's gradient are, beside other implementations.

    python -m benchmarks.numerics
    python -m benchmarks.numerics --quick   # fewer and smaller batches; nothing is written

Real ranks (gloo), each with its own part of the batch. Every figure is the largest error over all channels, values and
ranks, against float64 formulas on the whole batch:

- var: relative error of the variance;
- y: error of the output in σ, that is over |γ|;
- dx: error of the input's gradient over |γ|/σ · rms(dy).

The input is what its dtype holds. Where that is a half type, the rounding of y and dx to it (half a unit in the last
place) is no error. `F.batch_norm` normalizes the whole batch in one process. "rounded truth" is the float64 result
rounded to float32, or to the half type: nothing can be expected to come closer. Exits with 1 if a target is missed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.backends import backends, using
from benchmarks.peers import Step, detectron2_naive, ours, plain_sums, torch_local, torch_sync
from tests.ranks import run_ranks

NUM_RANKS = 4
EPS = 1e-5
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
TORCH_SYNC = "torch SyncBatchNorm's formula"
ROUNDED = "rounded truth"


class Errors(NamedTuple):
    """The largest of each; NaN where the scheme produced one."""

    var: float
    y: float
    dx: float


# By how much ours may exceed torch's formula before it counts as worse: what two equally good ways differ by. Both
# round several times, in different places: the variance to 24 bits (6e-8) on its way through running_var, y and dx at
# the end to half a unit in the last place of 4 to 8 (2.4e-7), where the largest of millions of values lie.
ROUNDING = Errors(var=1e-7, y=2.4e-7, dx=2.4e-7)


UP_TO_1E4 = Errors(1e-6, 1e-6, 1e-6)  # targets by mean/std: raw sums in float64 lose its square · 2⁻⁵³ of the variance
AT_1E5 = Errors(1e-4, 1e-5, 1e-5)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the batch holds: values from N(mean, std²), rounded to the dtype.

    Attributes:
        name: For the tables.
        mean: Of the values.
        std: Of the values.
        dtype: Of input, output and their gradients.
        border: Rows and columns at each edge of an image that are exactly 0.
        targets: The largest errors allowed.
    """

    name: str
    mean: float
    std: float
    dtype: torch.dtype = torch.float32
    border: int = 0
    targets: Errors = UP_TO_1E4


CASES = (
    Case(name="(0, 1)", mean=0, std=1),
    Case(name="(1e3, 1)", mean=1e3, std=1),
    Case(name="(1e4, 1)", mean=1e4, std=1),
    Case(name="(1e5, 1)", mean=1e5, std=1, targets=AT_1E5),
    Case(name="(1e3, 1e-2)", mean=1e3, std=1e-2, targets=AT_1E5),
    Case(name="(100, 1), border of zeros", mean=100, std=1, border=3),
    Case(name="(0, 1) bfloat16", mean=0, std=1, dtype=torch.bfloat16),
    Case(name="(100, 4) bfloat16", mean=100, std=4, dtype=torch.bfloat16),
    Case(name="(0, 1) float16", mean=0, std=1, dtype=torch.float16),
    Case(name="(1e3, 4) float16", mean=1e3, std=4, dtype=torch.float16),
)


class Size(NamedTuple):
    """Of the whole batch."""

    channels: int
    extent: int  # of an image, in both directions
    splits: dict[str, tuple[int, ...]]  # images on each rank


FULL = Size(channels=64, extent=32, splits={"even": (16, 16, 16, 16), "uneven": (2, 10, 20, 32)})
QUICK = Size(channels=8, extent=16, splits={"uneven": (1, 3, 4, 8)})


class Cell(NamedTuple):
    """One batch, and every scheme's errors on it."""

    case: Case
    layout: str
    split: str
    errors: dict[str, Errors]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller batches; nothing is written")
    quick = parser.parse_args().quick
    size = QUICK if quick else FULL
    cells = [
        Cell(case, layout, split, measure(case, layout, images, size))
        for case in (CASES[::3] if quick else CASES)
        for layout in LAYOUTS
        for split, images in size.splits.items()
    ]
    missed = [line for cell in cells for line in misses(cell)]
    report = f"{tables(cells, size)}\n\n{chr(10).join(missed) if missed else 'Every target is met.'}"
    if quick:
        print(report)
    else:
        configuration = {"ranks": NUM_RANKS, **size._asdict(), "rounding_allowed": ROUNDING._asdict()}
        result = {"configuration": configuration, "cells": [as_json(cell) for cell in cells], "missed": missed}
        results.record("numerics", result, report)
    return 1 if missed else 0


def measure(case: Case, layout: str, images: tuple[int, ...], size: Size) -> dict[str, Errors]:
    """Every scheme's errors; those of the ranks together."""
    ranks = run_ranks(NUM_RANKS, errors_of_rank, case, layout, images, size, timeout_s=120)
    return {scheme: _worst(errors[scheme] for errors in ranks if scheme in errors) for scheme in ranks[0]}


def errors_of_rank(rank: int, case: Case, layout: str, images: tuple[int, ...], size: Size) -> dict[str, Errors]:
    """The errors on this rank's part; rank 0 also runs on the whole batch what knows one process only."""
    x, dy = _part(rank, case, layout, images, size)
    batch = _batch(x, dy)
    measure = partial(
        _errors, x=x, dy=dy, truth=Truth(x, dy, batch), num_values=batch.num_values, group=dist.group.WORLD
    )
    errors = {}
    for backend in backends():
        with using(backend):
            errors[f"ours, {backend}"] = measure(ours)
    errors[TORCH_SYNC] = measure(torch_sync)
    errors["Σ, Σ² in float32"] = measure(plain_sums)
    weighted = len(set(images)) > 1
    errors["detectron2 Naive"] = measure(partial(detectron2_naive, weighted=weighted), unbiased=False)
    if rank == 0:
        parts = [_part(other, case, layout, images, size) for other in range(NUM_RANKS)]
        x, dy = (torch.cat(part).contiguous(memory_format=LAYOUTS[layout]) for part in zip(*parts, strict=True))
        truth = Truth(x, dy, batch)
        errors["F.batch_norm"] = _errors(torch_local, x, dy, truth, batch.num_values, None)
        errors[ROUNDED] = truth.errors(truth.var.float(), truth.y.to(x.dtype), truth.dx.to(x.dtype))
    return errors


class Truth:
    """What x and dy have to give, in float64 (Ioffe & Szegedy 2015, Algorithm 1 and section 3).

    Args:
        x: This part of the batch, shape (N, C, H, W).
        dy: The same shape.
        batch: Statistics of the whole batch.
    """

    def __init__(self, x: torch.Tensor, dy: torch.Tensor, batch: "Batch") -> None:
        weight, bias = (parameter.double() for parameter in _parameters(x.size(1)))
        invstd = (batch.var + EPS).rsqrt()
        xhat = (x.double() - _per_channel(batch.mean)) * _per_channel(invstd)
        slope = dy.double() - _per_channel(batch.mean_dy) - xhat * _per_channel(batch.mean_dy_xhat)
        self.var = batch.var
        self.y = xhat * _per_channel(weight) + _per_channel(bias)
        self.dx = slope * _per_channel(weight * invstd)
        self.unit_y = weight.abs()
        self.unit_dx = self.unit_y * invstd * batch.rms_dy

    def errors(self, var: torch.Tensor, y: torch.Tensor, dx: torch.Tensor) -> Errors:
        """Those of a scheme's results."""
        return Errors(
            var=((var.double() - self.var) / self.var).abs().max().item(),
            y=(_distance(y, self.y) / _per_channel(self.unit_y)).max().item(),
            dx=(_distance(dx, self.dx) / _per_channel(self.unit_dx)).max().item(),
        )


class Batch(NamedTuple):
    """Statistics of what all ranks hold, each of shape (C,), float64."""

    mean: torch.Tensor
    var: torch.Tensor
    mean_dy: torch.Tensor
    mean_dy_xhat: torch.Tensor
    rms_dy: torch.Tensor
    num_values: int


def _batch(x: torch.Tensor, dy: torch.Tensor) -> Batch:
    """Two passes over this rank's x and dy, each summed over the ranks."""
    x, dy, dims = x.double(), dy.double(), [0, 2, 3]
    num_values = round(_summed(x.new_tensor([x.numel() / x.size(1)])).item())
    mean = _summed(x.sum(dims)) / num_values
    centered = x - _per_channel(mean)
    var = _summed(centered.square().sum(dims)) / num_values
    return Batch(
        mean=mean,
        var=var,
        mean_dy=_summed(dy.sum(dims)) / num_values,
        mean_dy_xhat=_summed((dy * centered).sum(dims)) / num_values * (var + EPS).rsqrt(),
        rms_dy=(_summed(dy.square().sum(dims)) / num_values).sqrt(),
        num_values=num_values,
    )


def _errors(
    scheme: Callable[[Step], torch.Tensor],
    x: torch.Tensor,
    dy: torch.Tensor,
    truth: Truth,
    num_values: int,
    group: dist.ProcessGroup | None,
    *,
    unbiased: bool = True,
) -> Errors:
    x = x.detach().requires_grad_()
    weight, bias = (parameter.requires_grad_() for parameter in _parameters(x.size(1)))
    running_mean, running_var = torch.zeros(x.size(1)), torch.zeros(x.size(1))
    y = scheme(Step(x, weight, bias, running_mean, running_var, momentum=1, eps=EPS, group=group))
    (dx,) = torch.autograd.grad(y, x, dy)
    var = running_var.double() * ((num_values - 1) / num_values if unbiased else 1)
    return truth.errors(var, y.detach(), dx)


def _part(rank: int, case: Case, layout: str, images: tuple[int, ...], size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's x and dy; dy correlates with x, so that every term of dx counts."""
    generator = torch.Generator().manual_seed(rank)
    shape = (images[rank], size.channels, size.extent, size.extent)
    noise, dy = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    dy += 0.5 * noise + 0.3
    x = (noise.double() * case.std + case.mean).to(case.dtype)
    if case.border:
        inside = slice(case.border, -case.border)
        bordered = torch.zeros_like(x)
        bordered[:, :, inside, inside] = x[:, :, inside, inside]
        x = bordered
    memory_format = LAYOUTS[layout]
    return x.contiguous(memory_format=memory_format), dy.to(case.dtype).contiguous(memory_format=memory_format)


def _parameters(num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.rand(2, num_channels, generator=generator)
    return 0.75 + weight / 2, bias - 0.5


def _distance(result: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    distance = (result.double() - truth).abs()
    if result.dtype != torch.float32:
        distance = (distance - truth.abs() * (torch.finfo(result.dtype).eps / 2)).clamp_min(0)
    return distance


def _summed(local: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(local)
    return local


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, 1, 1)


def _worst(errors: Iterable[Errors]) -> Errors:
    return Errors(*(math.nan if any(map(math.isnan, column)) else max(column) for column in zip(*errors, strict=True)))


def misses(cell: Cell) -> list[str]:
    """What is worse than its target or than torch's formula, a line each."""
    lines = []
    for scheme, errors in cell.errors.items():
        if not scheme.startswith("ours"):
            continue
        peer = cell.errors[TORCH_SYNC]
        for what, error, target, theirs, rounding in zip(
            Errors._fields, errors, cell.case.targets, peer, ROUNDING, strict=True
        ):
            where = f"{scheme}, {cell.case.name}, {cell.layout}, {cell.split}: {what} {error:.1e}"
            if not error <= target:
                lines.append(f"MISSED: {where}, target {target:.0e}")
            if not error <= theirs + rounding:
                lines.append(f"MISSED: {where}, torch's formula {theirs:.1e}")
    return lines


def tables(cells: list[Cell], size: Size) -> str:
    """One table for each kind of error: the worst over splits, and over layouts but for F.batch_norm."""
    rows: dict[Case, dict[str, list[Errors]]] = {}
    for cell in cells:
        for scheme, errors in cell.errors.items():
            column = f"{scheme} {cell.layout}" if scheme == "F.batch_norm" else scheme
            rows.setdefault(cell.case, {}).setdefault(column, []).append(errors)
    titles = {"var": "Relative error of the variance", "y": "Error of y in σ", "dx": "Error of dx in |γ|/σ · rms(dy)"}
    sizes = f"{size.channels} channels, {size.extent} × {size.extent}, images on {NUM_RANKS} ranks: " + " or ".join(
        "+".join(map(str, images)) for images in size.splits.values()
    )
    parts = [f"{sizes}. Largest of both layouts and all splits."]
    for what, title in titles.items():
        columns = sorted(next(iter(rows.values())), key=lambda column: column == ROUNDED)
        body = [
            [case.name, f"{getattr(case.targets, what):.0e}"]
            + [f"{getattr(_worst(by_scheme[column]), what):.1e}" for column in columns]
            for case, by_scheme in rows.items()
        ]
        parts.append(f"{title}:\n\n{results.table(['(mean, std)', 'target', *columns], body)}")
    return "\n\n".join(parts)


def as_json(cell: Cell) -> dict[str, object]:
    """The cell in plain types."""
    case = {**asdict(cell.case), "dtype": str(cell.case.dtype), "targets": cell.case.targets._asdict()}
    errors = {scheme: errors._asdict() for scheme, errors in cell.errors.items()}
    return {"case": case, "layout": cell.layout, "split": cell.split, "errors": errors}


if __name__ == "__main__":
    sys.exit(main())
