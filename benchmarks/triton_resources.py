"""What the Triton kernels take of a GPU and what their loops over a batch consist of; needs no GPU.

    python -m benchmarks.triton_resources
    python -m benchmarks.triton_resources --quick   # few batches, one GPU; nothing is written

Compiles what training steps of the layer would launch. Every figure is the worst over the shapes, each of which may
have a specialization of its own; "128 bits" counts the loads and stores of tensors of the batch's size that move that
much at once, and the narrower ones. Barriers, shuffles and instructions are those in the loop over the batch. A value's
instructions are those of the binary, one thread's, with what they share of the loop; those that move half of a
vector or clear a register for a masked load count like any other.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import triton

from benchmarks import results
from tests.compilation import Gpu, Kernel, Variant, compile_step, examine

GPUS = {"sm_90": Gpu(capability=90, num_processors=132), "sm_80": Gpu(capability=80, num_processors=108)}
SHAPES = (
    (2, 64, 200, 334),
    (2, 256, 200, 334),
    (8, 256, 28, 28),
    (32, 256, 56, 56),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (2, 32, 64, 128, 128),
    (32, 512),
)
DTYPES = ("float32", "bfloat16")
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relu": {"activation": "relu"},
    "relu, residual": {"activation": "relu", "has_residual": True},
    "masked": {"has_mask": True},
}
REGISTERS = 65536  # of a multiprocessor, given out to warps by 256
MAX_WARPS = 64


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A kernel of a step.

    Attributes:
        gpu: What it is compiled for.
        step: Which of STEPS it belongs to.
        shape: Of the batch.
        layout: Of the batch.
        dtype: Of the batch.
        kernel: What became of it.
        resident_warps: That a multiprocessor has registers for.
    """

    gpu: str
    step: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    kernel: Kernel
    resident_warps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few batches, one GPU; nothing is written")
    quick = parser.parse_args().quick
    gpus, shapes = (("sm_90",), SHAPES[5:6]) if quick else (tuple(GPUS), SHAPES)
    found = findings(gpus, shapes)
    report = "\n\n".join(f"{gpu}:\n\n{table([finding for finding in found if finding.gpu == gpu])}" for gpu in gpus)
    if quick:
        print(report)
    else:
        configuration = {"gpus": {name: gpu._asdict() for name, gpu in GPUS.items()}, "triton": triton.__version__}
        result = {"configuration": configuration, "kernels": [asdict(finding) for finding in found]}
        results.record("triton_resources", result, report)
    return 0


def findings(gpus: Iterable[str], shapes: Iterable[tuple[int, ...]]) -> list[Finding]:
    """One for every kernel that Triton makes, of the first batch that it is made for."""
    seen = set()
    found = []
    for gpu, shape, dtype, (step, options) in product(gpus, shapes, DTYPES, STEPS.items()):
        for layout in layouts(shape):
            for compiled in compile_step(Variant(gpu=GPUS[gpu], shape=shape, layout=layout, dtype=dtype, **options)):
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                kernel = examine(compiled)
                found.append(
                    Finding(
                        gpu=gpu,
                        step=step,
                        shape=shape,
                        layout=layout,
                        dtype=dtype,
                        kernel=kernel,
                        resident_warps=resident_warps(kernel.registers, compiled.metadata.num_warps),
                    )
                )
    return found


def layouts(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Those that a batch of this shape can lie in."""
    return {2: ("NCHW",), 4: ("NCHW", "NHWC"), 5: ("NCHW", "NDHWC")}[len(shape)]


def resident_warps(registers: int, num_warps: int) -> int:
    """How many warps, in whole programs, a multiprocessor has registers for."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(MAX_WARPS, REGISTERS // per_warp // num_warps * num_warps)


def table(found: list[Finding]) -> str:
    """A row for each kernel, step, layout and dtype: the worst over the shapes."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in found:
        layout = "rows" if finding.layout != "NCHW" or len(finding.shape) == 2 else "planes"
        key = (finding.kernel.name, finding.step, layout, finding.dtype)
        groups.setdefault(("finalize", "", "", "") if finding.kernel.name == "finalize" else key, []).append(finding)
    header = ["kernel", "step", "layout", "dtype", "made", "registers", "warps", "spilled", "shared", "128 bits"]
    header += ["narrower", "barriers", "shuffles", "instructions/value"]
    return results.table(header, [[*key, *figures(group)] for key, group in sorted(groups.items())])


def figures(group: list[Finding]) -> list[str]:
    """The worst of these kernels."""
    kernels = [finding.kernel for finding in group]
    per_value = [kernel.loop_instructions / kernel.loop_values for kernel in kernels if kernel.loop_instructions]
    return [
        f"{len(kernels)}",
        f"{max(kernel.registers for kernel in kernels)}",
        f"{min(finding.resident_warps for finding in group)}",
        f"{max(kernel.spilled_bytes for kernel in kernels)} B",
        f"{max(kernel.shared_bytes for kernel in kernels)} B",
        f"{max(kernel.bits.get(128, 0) for kernel in kernels)}",
        f"{max(sum(number for bits, number in kernel.bits.items() if bits < 128) for kernel in kernels)}",
        f"{max(kernel.loop_barriers for kernel in kernels)}",
        f"{max(kernel.loop_shuffles for kernel in kernels)}",
        f"{min(per_value):.1f}–{max(per_value):.1f}" if per_value else "",
    ]


if __name__ == "__main__":
    sys.exit(main())
