"""What a kept kernel is started with is what Triton itself would start it with, and only where that is the same.

A process of its own, without the interpreter, compiles for a GPU that is not there: the driver that would load and
start the kernels is replaced by one that takes notes.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import json, sys, warnings
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

starts = []


class Utils:
    def load_binary(self, name, binary, shared, device):
        return object(), f"function of {name}", 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def unload_module(self, *_):
        pass


class Driver:
    utils = Utils()

    def launcher_cls(self, source, metadata):
        return lambda *arguments: starts.append(arguments)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Driver())
torch._C._cuda_getDevice = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda index: 7

from syncbn.kernels.triton import backend, launch, maps

launch.num_processors.__globals__["_num_processors"][0] = 132


def plain(argument):
    return str(argument.data_ptr() if isinstance(argument, torch.Tensor) else argument).partition(" object at ")[0]


def start(kernel, *arguments):
    starts.clear()
    kernel(*arguments)
    (got,) = starts
    return [plain(argument) for argument in got]


def arguments(x, **given):
    C = x.size(1)
    statistics = torch.ones(2 * C + 1, dtype=torch.float64)
    weight = given.get("weight", torch.ones(C))
    return x, None, None, statistics, weight, torch.ones(C), torch.empty_like(x), None, *[None] * 5, 0.0, 1e-5


from syncbn.activation import IDENTITY
from syncbn.kernels.triton.plan import layout_of

shape = (4, 64, 7, 7)
kernel = backend._normalize(layout_of(shape, torch.empty(shape).stride()), torch.float32, 0, False, IDENTITY)
jitted = []
run = type(maps.normalize).run
type(maps.normalize).run = lambda self, *a, **k: (jitted.append(self), run(self, *a, **k))[1]
report = {}
aligned = arguments(torch.zeros(shape))
report["first"], report["jitted first"] = start(kernel, *aligned), len(jitted)
report["again"], report["jitted again"] = start(kernel, *aligned), len(jitted)
triton.knobs.runtime.launch_enter_hook.add(print)
report["listened to"] = start(kernel, *aligned)
triton.knobs.runtime.launch_enter_hook.remove(print)
other = arguments(torch.zeros(shape))
report["other tensors"], report["jitted for other tensors"] = start(kernel, *other), len(jitted)
report["their addresses"] = [plain(argument) for argument in other]
crooked = arguments(torch.zeros(4 * 64 * 49 + 1)[1:].view(shape))
start(kernel, *crooked)
report["jitted for a crooked address"] = len(jitted)
start(kernel, *crooked)
report["jitted for it again"] = len(jitted)
start(kernel, *arguments(torch.zeros(shape), weight=torch.ones(64, dtype=torch.bfloat16)))
report["jitted for another dtype"] = len(jitted)
report["kept"] = len(kernel._compiled)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report() -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)],
        capture_output=True, text=True, env=environment, timeout=100, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    result: dict[str, object] = json.loads(ran.stdout)
    return result


def test_a_kept_kernel_gets_what_triton_would_give_it(report):
    assert report["jitted first"] == report["jitted again"] == 1
    assert report["again"][:6] == report["first"][:6]
    assert report["again"][6:9] == ["None"] * 3  # neither metadata nor hooks, where nobody listens
    assert report["again"][9:] == report["first"][9:]
    assert report["listened to"] == report["first"]


def test_other_tensors_change_nothing_but_the_addresses(report):
    assert report["jitted for other tensors"] == 1
    first, other, addresses = report["first"], report["other tensors"], report["their addresses"]
    start = 9  # after the grid, the stream, the kernel and the hooks
    assert other[start : start + len(addresses)] == addresses
    assert other[:6] + other[start + len(addresses) :] == first[:6] + first[start + len(addresses) :]


def test_an_address_that_is_not_aligned_goes_through_triton_and_is_not_kept(report):
    assert report["jitted for a crooked address"] == 2
    assert report["jitted for it again"] == 3
    assert report["kept"] == 2


def test_another_dtype_is_another_kernel(report):
    assert report["jitted for another dtype"] == 4
