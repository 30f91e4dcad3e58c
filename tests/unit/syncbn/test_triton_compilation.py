"""What the Triton kernels are compiled into: wide loads, no spills, loops whose threads do not wait, 64-bit offsets.

A process of its own, without the interpreter, compiles what training steps would launch, for GPUs that need not be
there. A failure on odd planes alone points to how vectors reach over a plane's ends, in one layout alone to how tiles
lie on threads, on one GPU alone to the assembler.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
import triton
import triton.language as tl

from tests.compilation import Gpu, Variant, compile_kernel, compile_step, examine

# The compiler takes a minute and a half for all of them, and longer beside other tests.
pytestmark = pytest.mark.timeout(600)

GPUS = {
    "sm_90": (Gpu(capability=90, num_processors=132), ("float32", "bfloat16", "float16")),
    "sm_80": (Gpu(capability=80, num_processors=108), ("float32", "bfloat16")),
}
BATCHES = {
    "planes": {"shape": (2, 64, 200, 334)},
    "planes of 7 × 7": {"shape": (32, 2048, 7, 7)},
    "planes of 25 × 42": {"shape": (2, 64, 25, 42)},
    "rows": {"shape": (8, 256, 28, 28), "layout": "NHWC"},
}
STEPS = [f"{gpu}, {batch}, {dtype}" for gpu, (_, dtypes) in GPUS.items() for batch in BATCHES for dtype in dtypes]
MAX_REGISTERS = 168  # 12 warps to a multiprocessor


@triton.jit
def crooked(x, sums, num_rows, size, K: tl.constexpr):
    """Does what no kernel of ours may: odd rows, 32-bit offsets, threads that wait for each other in the loop."""
    total = tl.zeros([K], tl.float32)
    for row in range(tl.program_id(0), num_rows):
        values = tl.load(x + (row * size + tl.arange(0, K)))
        total += values - tl.sum(values, 0)
    tl.store(sums + tl.arange(0, K), total)


def compile_all() -> None:
    """Prints what became of every kernel, by step; in the process of its own."""
    compiled = {}
    for name, (gpu, dtypes) in GPUS.items():
        for batch, options in BATCHES.items():
            for dtype in dtypes:
                step = Variant(gpu=gpu, dtype=dtype, activation="relu", has_residual=True, **options)
                compiled[f"{name}, {batch}, {dtype}"] = compile_step(step)
    x, sums = torch.empty(7 * 4096, device="meta"), torch.empty(4096, device="meta")
    compiled["crooked"] = [compile_kernel(GPUS["sm_90"][0], crooked, x, sums, 7, 4097, 4096, maxnreg=32)]
    report = {
        step: [asdict(examine(kernel, is_thorough=False)) for kernel in kernels] for step, kernels in compiled.items()
    }
    print(json.dumps(report))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from {compile_all.__module__} import compile_all; compile_all()"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(params=STEPS)
def kernels(request, compiled) -> dict[str, dict[str, Any]]:
    """Of a step, by name."""
    return {kernel["name"]: kernel for kernel in compiled[request.param]}


@pytest.fixture
def passes(kernels) -> dict[str, dict[str, Any]]:
    """The kernels that go over the batch."""
    assert set(kernels) == {"moments", "finalize", "normalize", "gradient_sums", "input_gradient"}
    return {name: kernel for name, kernel in kernels.items() if name != "finalize"}


def test_every_load_and_store_of_the_batch_is_as_wide_as_can_be(passes):
    assert {name: list(kernel["bits"]) for name, kernel in passes.items()} == {name: ["128"] for name in passes}


def test_the_loop_over_the_batch_spills_nothing(passes):
    assert {name: kernel["loop_spills"] for name, kernel in passes.items()} == dict.fromkeys(passes, 0)
    assert all(kernel["spilled_bytes"] <= 16 for kernel in passes.values())  # around it
    assert all(
        kernel["loop_instructions"] for kernel in passes.values() if kernel["has_loop"] and kernel["spilled_bytes"]
    )


def test_there_are_registers_for_three_programs_of_four_warps(kernels):
    assert {name: kernel["registers"] for name, kernel in kernels.items() if kernel["registers"] > MAX_REGISTERS} == {}


def test_no_thread_waits_for_another_in_the_loop_over_the_batch(passes):
    assert passes["moments"]["has_loop"]
    assert passes["gradient_sums"]["has_loop"]
    waits = {name: (kernel["loop_barriers"], kernel["loop_shuffles"]) for name, kernel in passes.items()}
    assert waits == dict.fromkeys(passes, (0, 0))


def test_a_kernel_that_does_all_of_that_is_seen_to(compiled):
    (kernel,) = compiled["crooked"]
    assert list(kernel["bits"]) == ["32"]
    assert kernel["spilled_bytes"] > 16
    assert kernel["loop_spills"] > 0
    assert kernel["loop_barriers"] > 0
    assert kernel["loop_shuffles"] > 0
