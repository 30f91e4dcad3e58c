"""Which kernels run on a GPU, and that the log says so once and why; what torch knows of the GPU is replaced."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from syncbn.kernels import backend_for, dispatch, eager
from syncbn.kernels.triton import availability

find_spec = importlib.util.find_spec


class Driver:
    """Of Triton, which works."""

    utils = None


class BrokenDriver:
    @property
    def utils(self) -> None:
        raise RuntimeError("no C compiler")


def set_driver(monkeypatch: pytest.MonkeyPatch, driver: object) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime import driver as config

    monkeypatch.setattr(config, "_active", driver)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    """A GPU that nothing speaks against; each test takes something away."""
    if find_spec("triton") is not None:
        set_driver(monkeypatch, Driver())
    monkeypatch.delenv("SYNCBN_TRITON", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    availability.available_backend.cache_clear()
    yield
    availability.available_backend.cache_clear()


@pytest.fixture
def asked_twice(caplog):
    """Asks twice for the kernels of a GPU; returns them and the one line that was logged."""

    def ask(device_index: int = 0) -> tuple[object, logging.LogRecord]:
        with caplog.at_level(logging.INFO, logger="syncbn"):
            first, again = (availability.available_backend(device_index) for _ in range(2))
        assert first is again
        (record,) = caplog.records
        return first, record

    return ask


def without_triton(name: str, *arguments: object) -> object:
    return None if name == "triton" else find_spec(name, *arguments)


def test_a_gpu_gets_the_triton_kernels(asked_twice):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    backend, record = asked_twice()
    assert backend.__name__ == "syncbn.kernels.triton.backend"
    assert record.levelno == logging.INFO
    assert record.getMessage() == f"GPU 0 kernels: Triton {triton.__version__}"


OBSTACLES = {
    "SYNCBN_TRITON=0": lambda m: m.setenv("SYNCBN_TRITON", "0"),
    "pip install triton": lambda m: m.setattr(importlib.util, "find_spec", without_triton),
    "torch finds no GPU": lambda m: m.setattr(torch.cuda, "is_available", lambda: False),
    "compute capability 6.1 is older than 7.0": lambda m: m.setattr(
        torch.cuda, "get_device_capability", lambda index: (6, 1)
    ),
    "AMD": lambda m: m.setattr(torch.version, "hip", "6.2"),
    "RuntimeError: no C compiler": lambda m: set_driver(m, BrokenDriver()),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_an_obstacle_is_named_in_a_warning(reason, asked_twice, monkeypatch):
    OBSTACLES[reason](monkeypatch)
    backend, record = asked_twice()
    assert backend is None
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("GPU 0 kernels: torch operations")
    assert reason in record.getMessage()


@pytest.mark.parametrize("set_to", ["1", ""])
def test_the_switch_is_on_unless_it_says_0(set_to, asked_twice, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("SYNCBN_TRITON", set_to)
    assert asked_twice()[0] is not None


@pytest.mark.parametrize(("capability", "is_new_enough"), [((7, 0), True), ((7, 5), True), ((6, 9), False)])
def test_volta_is_the_oldest(capability, is_new_enough, asked_twice, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert (asked_twice()[0] is not None) == is_new_enough


def test_each_gpu_is_judged_by_itself(monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 1 else (6, 0))
    with caplog.at_level(logging.INFO, logger="syncbn"):
        assert availability.available_backend(0) is None
        assert availability.available_backend(1) is not None
    assert [record.getMessage()[:5] for record in caplog.records] == ["GPU 0", "GPU 1"]


@pytest.fixture
def cuda(monkeypatch):
    """Makes tensors that are fake but go for plain ones."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(dispatch, "_PLAIN", (*dispatch._PLAIN, FakeTensor))
    with FakeTensorMode():
        yield lambda *shape: torch.empty(shape, device="cuda")


@pytest.mark.parametrize("switch", ["0", "1"])
def test_cuda_tensors_get_what_their_gpu_has(switch, cuda, monkeypatch):
    monkeypatch.setenv("SYNCBN_TRITON", switch)
    backend = backend_for(cuda(2, 3))
    assert (backend is eager) == (switch == "0")
    assert backend is (availability.available_backend(0) or eager)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2**12, 2**10, 2**10), True),  # 2³² values, but 2²² to a channel and 2²⁰ to a sample
        ((1, 2, 2**31), False),
        ((2**31, 2), False),
        # The last tile reaches beyond the end, where positions must not wrap either.
        ((1, 1, 2**31 - 1), False),
        ((2**31 - 1, 1), False),
        ((0, 2**10), True),
    ],
    ids=str,
)
def test_batches_whose_positions_32_bits_cannot_count_go_to_torch(shape, fits, cuda):
    assert (backend_for(cuda(*shape)) is not eager) == fits


def test_a_subclass_of_tensors_goes_to_torch(cuda, monkeypatch):
    monkeypatch.setattr(dispatch, "_PLAIN", (torch.Tensor, torch.nn.Parameter))  # a fake tensor is one
    assert backend_for(cuda(2, 3)) is eager


def test_the_package_is_imported_without_triton():
    # In a process of its own: here it has been imported.
    program = "import sys, syncbn, syncbn.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
