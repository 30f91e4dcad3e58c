"""The Triton kernels, compiled for GPUs that need not be there; nothing is started.

Triton compiles only in a process without TRITON_INTERPRET in its environment.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from syncbn.activation import Activation, ActivationName
from syncbn.kernels.triton import backend, launch
from syncbn.moments import RunningStatistics
from tests.ptx import Ptx
from tests.sass import loop_of, num_loads

OF_BATCH_SIZE = {"x", "y", "dy", "residual", "grad", "dx"}  # the kernels' names for such tensors
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last, "NDHWC": torch.channels_last_3d}


class Gpu(NamedTuple):
    """What is compiled for.

    Attributes:
        capability: Major and minor version in one number.
        num_processors: Its streaming multiprocessors.
    """

    capability: int
    num_processors: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A training step of the layer.

    Attributes:
        gpu: What it is compiled for.
        shape: Of the batch, (N, C, *).
        layout: One of LAYOUTS.
        dtype: Of the batch, as torch names it.
        activation: What follows.
        has_residual: Whether one is added.
        has_mask: Whether there is one.
    """

    gpu: Gpu
    shape: tuple[int, ...]
    layout: str = "NCHW"
    dtype: str = "float32"
    activation: ActivationName | None = None
    has_residual: bool = False
    has_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a kernel became.

    Attributes:
        name: Of the kernel.
        registers: Of a thread.
        spilled_bytes: Of a thread: registers that lie in memory. The assembler does that at times before and after a
            loop, where it makes room for one more program.
        shared_bytes: Of a program.
        bits: How many loads and stores of tensors of the batch's size move how many bits at once, in all.
        loop_bits: The same in the loop over the batch.
        has_loop: Whether there is such a loop: a program of a single tile needs none.
        loop_spills: Instructions in it that move such registers.
        loop_barriers: Barriers in it.
        loop_shuffles: Exchanges between a warp's threads in it.
        loop_instructions: All of its instructions, of the binary; 0 where that was not disassembled.
        loop_values: Positions of the batch that a thread computes in as many.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    bits: dict[int, int]
    loop_bits: dict[int, int]
    has_loop: bool
    loop_spills: int
    loop_barriers: int
    loop_shuffles: int
    loop_instructions: int
    loop_values: float


def compile_step(variant: Variant) -> list[Any]:
    """What Triton compiles for a training step and its statistics alone, in the order of the launches."""
    memory_format = LAYOUTS[variant.layout]
    x = torch.empty(variant.shape, dtype=getattr(torch, variant.dtype), device="meta").to(memory_format=memory_format)
    weight, bias, mean, var = (x.new_empty(x.size(1), dtype=torch.float32) for _ in range(4))
    running = RunningStatistics(mean, var, x.new_empty((), dtype=torch.int64), 0.1, None)
    residual = torch.empty_like(x) if variant.has_residual else None
    mask = x.new_empty((x.size(0), 1, *x.shape[2:]), dtype=torch.bool) if variant.has_mask else None
    activation = Activation(variant.activation)
    with compiling(variant.gpu) as compiled:
        payload = backend.moments(x, mask)
        backend.finalize(payload, 1e-5, running)
        y, statistics = backend.finalize_and_normalize(
            x, payload, 1e-5, running, weight, bias, residual, mask, activation
        )
        sums, grad, _, _, remaining = backend.gradient_sums(
            torch.empty_like(x),
            x,
            statistics,
            weight,
            bias,
            y if backend.saves_output(activation, has_residual=variant.has_residual) else None,
            residual if activation.saves_residual else None,
            mask,
            activation,
        )
        backend.input_gradient(grad, x, statistics, sums, weight, bias, mask, remaining)
    return compiled


@contextmanager
def compiling(gpu: Gpu) -> Iterator[list[Any]]:
    """For the time being, what would start a kernel of `backend` on this GPU compiles it instead, into the list."""
    compiled: list[Any] = []
    forget()
    replaced = backend.Launch, backend.num_processors
    backend.Launch = lambda kernel, num_programs, device_index, *settled: (  # type: ignore[assignment, misc]
        lambda *arguments: compiled.append(compile_kernel(gpu, kernel, *arguments, *chain(*settled)))
    )
    backend.num_processors = lambda device_index: gpu.num_processors
    try:
        yield compiled
    finally:
        backend.Launch, backend.num_processors = replaced  # type: ignore[misc]
        forget()


def forget() -> None:
    """Empties the caches of launches."""
    for function in vars(backend).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def compile_kernel(gpu: Gpu, kernel: Any, *arguments: object, **options: object) -> Any:
    """What Triton compiles for these arguments, tensors of the meta device standing for aligned memory."""
    driver.set_active(_Driver(gpu))
    return kernel.warmup(*arguments, grid=(1,), **{**launch._OPTIONS, **options})


class _Driver:
    """Answers what Triton asks the GPU's driver for when it compiles."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._gpu.capability, 32)

    def get_current_device(self) -> int:
        return self._gpu.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def examine(compiled: Any, *, is_thorough: bool = True) -> Kernel:
    """What became of a kernel.

    Args:
        compiled: As Triton has it.
        is_thorough: Whether to disassemble it, which takes half a second, even where nothing spills.
    """
    ptx = Ptx(compiled.asm["ptx"])
    given = [(name, kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    value_bits = {
        number: int(kind.lstrip("*bfp")) for number, (name, kind) in enumerate(given) if name in OF_BATCH_SIZE
    }
    accesses = [access for access in ptx.accesses if access.parameter in value_bits]
    loop = ptx.loop_over(value_bits)
    inside = [access for access in accesses if access.block in loop]
    loads = [access for access in inside if not access.is_store]
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump(compiled, "--dump-resource-usage")))
    spilled_bytes = int(resources["STACK"]) + int(resources["LOCAL"])
    instructions: list[str] = []
    values = 0.0
    if loads and (is_thorough or spilled_bytes):
        widest = [access for access in loads if access.bits == max(access.bits for access in loads)]
        instructions = loop_of(cuobjdump(compiled, "-sass"), len(widest), widest[0].bits)
        unrolled = num_loads(instructions, widest[0].bits) / len(widest)
        of_one_tensor = [access for access in widest if access.parameter == widest[0].parameter]
        values = unrolled * sum(access.bits / value_bits[access.parameter] for access in of_one_tensor)
    return Kernel(
        name=compiled.name,
        registers=int(resources["REG"]),
        spilled_bytes=spilled_bytes,
        shared_bytes=compiled.metadata.shared,
        bits=dict(Counter(access.bits for access in accesses)),
        loop_bits=dict(Counter(access.bits for access in inside)),
        has_loop=bool(loop),
        loop_spills=sum(opcode.startswith(("STL", "LDL")) for opcode in instructions),
        loop_barriers=ptx.count("bar.", loop) + ptx.count("barrier.", loop),
        loop_shuffles=ptx.count("shfl.", loop),
        loop_instructions=len(instructions),
        loop_values=values,
    )


def cuobjdump(compiled: Any, *options: str) -> str:
    """What the disassembler says of a kernel's binary."""
    program = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [program, *options, cubin.name]
        environment = {"PATH": str(Path(program).parent)}  # where it finds nvdisasm
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
