"""How long forward and backward of one layer take on CPU, in one process, beside `F.batch_norm` and others.

    python -m benchmarks.cpu_kernels
    python -m benchmarks.cpu_kernels --dtype bfloat16
    python -m benchmarks.cpu_kernels --quick   # a few small calls; nothing is written

No ranks, so no collective: this is the arithmetic alone. Results are compared with float64 first. Then all schemes take
turns, round after round in one process; a turn is one call to warm up and as many timed ones as `F.batch_norm` makes in
5 ms. Times are medians over rounds, ratios are medians of the ratio to `F.batch_norm` in the same round.

The block is what residual networks make of a layer: norm, += residual, ReLU; one by one in place, as torchvision writes
it, and fused.

glibc gives large blocks back to the kernel, which zeroes them anew at every call: that costs more than the arithmetic
and depends on what ran before. So the script starts itself again with thresholds that keep all memory, for every scheme
alike.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F

from benchmarks import results
from benchmarks.backends import backends, using
from benchmarks.peers import Step, detectron2_naive, ours, plain_sums, torch_local
from syncbn import sync_batch_norm

TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"
REFERENCE = "F.batch_norm"
TURN_S = 0.005
# Mean error over mean size, before anything is timed: tells a wrong formula from rounding, no more
# (`benchmarks.numerics` looks closer). The mean, since rounding may turn single values of ReLU's gradient on or off.
# F.batch_norm in NHWC is 2e-4 off with a million values to a channel; bfloat16 rounds to 2e-3.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


class Workload(NamedTuple):
    """The shape and memory layout of a batch."""

    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))}) {self.layout}".strip()

    def tensor(self, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """Normally distributed values."""
        values = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        channels_last = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
        return values.contiguous(memory_format=channels_last if self.layout == "NHWC" else torch.contiguous_format)


IMAGES = [(2, 64, 56, 56), (8, 256, 28, 28), (8, 2048, 7, 7), (2, 16, 64, 96, 96)]
FULL = [*(Workload(shape, layout) for shape in IMAGES for layout in ("NCHW", "NHWC")), Workload((32, 512), "")]
QUICK = [*(Workload((2, 8, 6, 6), layout) for layout in ("NCHW", "NHWC")), Workload((8, 16), "")]
# Largest ratio to F.batch_norm in float32, by backend and layout, and least gain of the fused block over one by one.
TARGETS: dict[tuple[str, str | None], float] = {
    ("ours, native", "NCHW"): 0.7,
    ("ours, native", "NHWC"): 1.25,
    ("ours, native", ""): 1.2,
    ("ours, eager", "NCHW"): 2,
    ("ours, eager", "NHWC"): 4,
}
FUSED_TARGET = 1.3


class Scheme(NamedTuple):
    """A way to compute the layer, or the block where a residual is given."""

    name: str
    function: Callable[[Step, torch.Tensor | None], torch.Tensor]
    backend: str


def one_by_one(norm: Callable[[Step], torch.Tensor], step: Step, residual: torch.Tensor | None) -> torch.Tensor:
    """The layer; then += residual and ReLU."""
    y = norm(step)
    return y if residual is None else F.relu(y.add_(residual), inplace=True)


def fused(step: Step, residual: torch.Tensor | None) -> torch.Tensor:
    """The block in one pass."""
    x, weight, bias, running_mean, running_var, *_ = step
    return sync_batch_norm(
        x, running_mean, running_var, weight, bias, training=True, residual=residual, activation="relu"
    )


class Call(NamedTuple):
    """One forward and backward; each scheme has running statistics of its own."""

    scheme: Scheme
    step: Step
    residual: torch.Tensor | None
    grad_output: torch.Tensor

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What to differentiate with respect to."""
        return [*self.step[:3], *([] if self.residual is None else [self.residual])]

    def run(self) -> list[torch.Tensor]:
        """The output and the gradients."""
        output = self.scheme.function(self.step, self.residual)
        return [output, *torch.autograd.grad(output, self.inputs, self.grad_output)]

    def saved(self) -> float:
        """Memory kept for the backward, the input's own included, over the input's; what shares memory counts once."""
        storages = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _output = self.scheme.function(self.step, self.residual)  # holds them, so that no address comes twice
        return sum(storages.values()) / self.step.x.nbytes


class Timing(NamedTuple):
    """Of a scheme on a workload.

    Attributes:
        times_s: Of one forward and backward, by round.
        saved: Memory kept for the backward, over the input's.
    """

    times_s: list[float]
    saved: float

    def over(self, other: "Timing") -> float:
        """How many times as long as the other it takes: the median over rounds."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times_s, other.times_s, strict=True))


class Row(NamedTuple):
    """What was measured on a workload, by scheme."""

    num_threads: int
    workload: Workload
    layer: dict[str, Timing]
    block: dict[str, Timing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a few small calls; nothing is written")
    arguments = parser.parse_args()
    if os.environ.get("GLIBC_TUNABLES") != TUNABLES:
        command = [sys.executable, "-m", "benchmarks.cpu_kernels", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "GLIBC_TUNABLES": TUNABLES})
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    rounds, threads = (3, [1]) if arguments.quick else (arguments.rounds, arguments.threads)
    layer, block = layer_schemes(), block_schemes()
    rows = []
    for num_threads in threads:
        torch.set_num_threads(num_threads)
        for workload in QUICK if arguments.quick else FULL:
            print(f"{num_threads} thread(s), {workload}", file=sys.stderr, flush=True)
            alone = measure(calls(layer, workload, dtype, with_residual=False), rounds)
            rows.append(
                Row(num_threads, workload, alone, measure(calls(block, workload, dtype, with_residual=True), rounds))
            )
    report = "\n\n".join(
        [
            f"{arguments.dtype}, `GLIBC_TUNABLES={TUNABLES}` for every scheme. Median ms and ratio to `{REFERENCE}`; "
            "targets, for one thread and float32, in parentheses.",
            *(
                times_table(
                    [row for row in rows if row.num_threads == num_threads],
                    with_targets=num_threads == 1
                    and dtype == torch.float32
                    and not arguments.quick,  # its shapes are tiny
                )
                for num_threads in threads
            ),
            f"Memory kept for the backward, the input included, over the input's size:\n\n{memory_table(rows)}",
        ]
    )
    if arguments.quick:
        print(report)
        return
    configuration = {"dtype": arguments.dtype, "rounds": rounds, "turn_s": TURN_S, "GLIBC_TUNABLES": TUNABLES}
    result = {"configuration": configuration, "cells": [as_json(row) for row in rows]}
    suffix = "" if dtype == torch.float32 else f"_{arguments.dtype}"
    results.record(f"cpu_kernels{suffix}", result, report)


def layer_schemes() -> list[Scheme]:
    """The reference first."""
    return [
        Scheme(REFERENCE, partial(one_by_one, torch_local), "eager"),
        *(Scheme(f"ours, {backend}", partial(one_by_one, ours), backend) for backend in backends()),
        Scheme("Σ, Σ² in torch operators", partial(one_by_one, plain_sums), "eager"),
        Scheme("detectron2 Naive", partial(one_by_one, detectron2_naive), "eager"),
    ]


def block_schemes() -> list[Scheme]:
    """The reference first; each of ours one by one, then fused."""
    schemes = [Scheme(REFERENCE, partial(one_by_one, torch_local), "eager")]
    for backend in backends():
        schemes.append(Scheme(f"ours, {backend}, one by one", partial(one_by_one, ours), backend))
        schemes.append(Scheme(f"ours, {backend}, fused", fused, backend))
    return schemes


def calls(schemes: list[Scheme], workload: Workload, dtype: torch.dtype, with_residual: bool) -> list[Call]:
    """The schemes on the same tensors."""
    channels = workload.shape[1]
    generator = torch.Generator().manual_seed(channels)
    weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    x, residual = workload.tensor(0, dtype).requires_grad_(), workload.tensor(1, dtype).requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    grad_output = workload.tensor(2, dtype).add_(x.detach(), alpha=0.5).add_(0.3)  # so that every term of dx counts
    return [
        Call(
            scheme,
            Step(x, weight, bias, torch.zeros(channels), torch.ones(channels)),
            residual if with_residual else None,
            grad_output,
        )
        for scheme in schemes
    ]


def measure(calls: list[Call], rounds: int) -> dict[str, Timing]:
    """Checks every scheme, then lets them take turns; the first is what the others are compared with."""
    truth = _truth(calls[0])
    saved = []
    for call in calls:
        with using(call.scheme.backend):
            _check(call, truth)
            saved.append(call.saved())
    repetitions = max(1, round(TURN_S / min(_time(calls[0], 1) for _ in range(3))))
    times_s: list[list[float]] = [[] for _ in calls]
    gc.disable()
    try:
        for turn in range(rounds):
            for offset in range(len(calls)):  # another one first every time: the first meets a colder cache
                index = (turn + offset) % len(calls)
                with using(calls[index].scheme.backend):
                    times_s[index].append(_time(calls[index], repetitions))
    finally:
        gc.enable()
    return {call.scheme.name: Timing(times, share) for call, times, share in zip(calls, times_s, saved, strict=True)}


def _time(call: Call, repetitions: int) -> float:
    call.run()
    started = time.perf_counter()
    for _ in range(repetitions):
        call.run()
    return (time.perf_counter() - started) / repetitions


def _truth(call: Call) -> list[torch.Tensor]:
    x, weight, bias, residual = (
        None if tensor is None else tensor.detach().double().requires_grad_()
        for tensor in (*call.step[:3], call.residual)
    )
    assert x is not None
    assert weight is not None
    assert bias is not None
    step = Step(x, weight, bias, torch.zeros_like(weight), torch.ones_like(weight))
    scheme = Scheme(REFERENCE, partial(one_by_one, torch_local), "eager")
    return Call(scheme, step, residual, call.grad_output.double()).run()


def _check(call: Call, truth: list[torch.Tensor]) -> None:
    for result, true in zip(call.run(), truth, strict=True):
        error = ((result - true).abs().mean() / true.abs().mean()).item()
        tolerance = TOLERANCE[call.step.x.dtype]
        assert error <= tolerance, f"{call.scheme.name}: {error:.1e} wrong on {tuple(call.step.x.shape)}"


def times_table(rows: list[Row], *, with_targets: bool) -> str:
    """Layer and block with one number of threads."""
    layers = [[str(row.workload), *_cells(row.layer, row.workload.layout if with_targets else None)] for row in rows]
    blocks = [
        [str(row.workload), *_cells(row.block), *(f"{gain(row, backend):.2f}×" for backend in backends())]
        for row in rows
    ]
    gains = [
        f"fused gain, {backend}" + (f" (≥ {FUSED_TARGET:g})" if with_targets and backend == "native" else "")
        for backend in backends()
    ]
    threads = f"{rows[0].num_threads} thread{'s' if rows[0].num_threads > 1 else ''}"
    return "\n\n".join(
        [
            results.table([f"layer, {threads}", *rows[0].layer], layers),
            results.table([f"block, {threads}", *rows[0].block, *gains], blocks),
        ]
    )


def memory_table(rows: list[Row]) -> str:
    """What layer and block keep for the backward; threads and layouts make no difference, so each shape comes once."""
    by_shape = {row.workload.shape: row for row in rows}
    body = [
        [str(shape), *(f"{timing.saved:.2f}" for timing in [*row.layer.values(), *row.block.values()])]
        for shape, row in by_shape.items()
    ]
    header = ["", *rows[0].layer, *(f"block: {name}" for name in rows[0].block)]
    return results.table(header, body)


def gain(row: Row, backend: str) -> float:
    """How many times as fast the fused block is as the same done one by one."""
    return row.block[f"ours, {backend}, one by one"].over(row.block[f"ours, {backend}, fused"])


def _cells(timings: dict[str, Timing], layout: str | None = None) -> list[str]:
    cells = []
    for scheme, timing in timings.items():
        target = TARGETS.get((scheme, layout))
        limit = "" if target is None else f" (≤ {target:g})"
        ratio = timing.over(timings[REFERENCE])
        cells.append(f"{statistics.median(timing.times_s) * 1e3:.3f} {ratio:.2f}×{limit}")
    return cells


def as_json(row: Row) -> dict[str, object]:
    """The row in plain types."""
    timings = {
        what: {
            scheme: {
                "median_s": statistics.median(timing.times_s),
                "min_s": min(timing.times_s),
                "ratio": timing.over(of[REFERENCE]),
                "saved": timing.saved,
            }
            for scheme, timing in of.items()
        }
        for what, of in (("layer", row.layer), ("block", row.block))
    }
    return {"threads": row.num_threads, "shape": row.workload.shape, "layout": row.workload.layout, **timings}


if __name__ == "__main__":
    main()
