"""What a training step asks of a GPU: two launches and one collective each way, and nothing else.

Tensors on the meta device stand for those on a GPU: they have no values, so whatever would wait for one raises, and
every operation on them can be watched. Launches are noted instead of started. A failure here with green kernels is a
layer that grew an operation, a copy or a wait between its kernels.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from syncbn import SyncBatchNorm, autograd, functional, steps
from syncbn.kernels import dispatch
from syncbn.kernels.triton import backend as kernels

CHANNELS = 64
SHAPE = (64, CHANNELS, 14, 14)  # large enough for programs to share channels, and so to need somewhere to meet
FORWARD, BACKWARD = ["moments", "all-reduce", "normalize"], ["gradient_sums", "all-reduce", "input_gradient"]
NO_WORK = {"new_empty", "empty_like", "detach", "unsqueeze", "expand"}  # allocations and views

# Options, whether there is a residual, and a mask.
FORMS = {
    "plain": ({}, False, False),
    "without affine": ({"affine": False}, False, False),
    "without running statistics": ({"track_running_stats": False}, False, False),
    "relu": ({"activation": "relu"}, False, False),
    "residual": ({}, True, False),
    "residual and relu": ({"activation": "relu"}, True, False),
    "masked": ({}, False, True),
    "masked residual and silu": ({"activation": "silu"}, True, True),
    "skip_nonfinite": ({"skip_nonfinite": True}, False, False),
    "momentum=None": ({"momentum": None}, False, False),
}


class Watch(TorchDispatchMode):
    """Notes operations that are neither allocations nor views, with their results' sizes; others note the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.operations: list[tuple[str, int]] = []
        self.num_meetings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace != "prim" and name not in NO_WORK:
            self.operations.append((name, result.numel() if isinstance(result, torch.Tensor) else 0))
        return result

    def clear(self) -> None:
        self.events.clear()
        self.operations.clear()


@pytest.fixture
def watch(monkeypatch):
    """The layer as on a rank with peers and a GPU of 132 processors."""
    watch = Watch()

    class Launch:
        def __init__(self, kernel, num_programs, device_index, extents, constants):
            self.kernel, self.settled = kernel, (*extents, *constants)

        def __call__(self, *arguments):
            assert len(arguments) + len(self.settled) == len(self.kernel.arg_names)
            assert all(t.device.type != "cpu" for t in arguments if isinstance(t, torch.Tensor))
            watch.events.append(self.kernel.__name__)

    def all_reduce_sum(payload, group, label):
        if group is not None:
            watch.events.append("all-reduce")

    def arrivals(x, num_blocks):
        watch.num_meetings += 1
        return x.new_empty(num_blocks, dtype=torch.int32)  # which on a GPU is kept

    def forget():
        for function in vars(kernels).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    monkeypatch.setattr(kernels, "Launch", Launch)
    monkeypatch.setattr(kernels, "arrivals", arrivals)
    monkeypatch.setattr(kernels, "num_processors", lambda _: 132)
    monkeypatch.setattr(dispatch, "eager", kernels)  # for what is neither on a CPU nor on a GPU, or not really
    monkeypatch.setattr(steps, "all_reduce_sum", all_reduce_sum)
    monkeypatch.setattr(autograd, "all_reduce_sum", all_reduce_sum)
    monkeypatch.setattr(functional, "resolve_group", lambda group: "all ranks")
    forget()
    yield watch
    forget()


def batch(memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    return torch.empty(SHAPE, device="meta", memory_format=memory_format).requires_grad_()


def forward(watch: Watch, form: str, memory_format: torch.memory_format, **more: object):
    """The output, and what it can be differentiated by."""
    options, has_residual, has_mask = FORMS[form]
    layer = SyncBatchNorm(CHANNELS, device="meta", **options, **more)
    x, residual = batch(memory_format), batch(memory_format) if has_residual else None
    mask = torch.empty(SHAPE[:1] + SHAPE[2:], dtype=torch.bool, device="meta") if has_mask else None
    with watch:
        y = layer(x, residual, mask)
    return y, [t for t in (x, residual, *layer.parameters()) if t is not None]


def backward(watch: Watch, y: torch.Tensor, inputs: list[torch.Tensor], dy: torch.Tensor | None = None) -> None:
    dy = torch.empty_like(y) if dy is None else dy
    with watch:
        torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_two_launches_and_a_collective_each_way(form, memory_format, watch):
    y, inputs = forward(watch, form, memory_format)
    assert watch.events == FORWARD
    # The number of batches before this one, of which programs form the weight while another counts on.
    assert watch.operations == ([("clone", 1)] if form == "momentum=None" else [])
    watch.clear()
    backward(watch, y, inputs)
    assert watch.events == BACKWARD
    assert watch.operations == []
    assert watch.num_meetings == 2


@pytest.mark.parametrize("form", ["plain", "residual and relu"])
def test_a_rank_without_peers_does_the_same_but_meet(form, watch, monkeypatch):
    monkeypatch.setattr(functional, "resolve_group", lambda group: None)
    y, inputs = forward(watch, form, torch.contiguous_format)
    backward(watch, y, inputs)
    assert watch.events == [event for event in FORWARD + BACKWARD if event != "all-reduce"]
    assert watch.operations == []


def test_where_the_input_needs_no_gradient_the_last_pass_is_left_out(watch):
    layer = SyncBatchNorm(CHANNELS, device="meta", activation="relu")
    with watch:
        y = layer(batch().detach())
    watch.clear()
    backward(watch, y, list(layer.parameters()))
    assert watch.events == BACKWARD[:-1]


@pytest.mark.parametrize("form", FORMS)
def test_autograd_keeps_the_input_and_what_else_the_activation_needs(form, watch):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, inputs = forward(watch, form, torch.contiguous_format)
    options, has_residual, has_mask = FORMS[form]
    sizes = [t.numel() for t in kept if t.numel() >= y.numel()]
    # With a residual relu needs the output's sign, and silu what was added.
    assert sizes == [y.numel()] * (1 + (has_residual and "activation" in options))
    assert any(t is inputs[0] for t in kept)
    assert sum(t.dtype == torch.bool for t in kept) == has_mask


@pytest.mark.parametrize("form", ["plain", "relu", "residual and relu"])
def test_a_gradient_that_lies_otherwise_is_copied_once(form, watch):
    y, inputs = forward(watch, form, torch.channels_last)
    backward(watch, y, inputs, torch.empty(SHAPE, device="meta"))
    assert watch.operations == [("copy_", y.numel())]


def test_a_copy_would_show(watch):
    layer = SyncBatchNorm(CHANNELS, device="meta")
    with watch:
        layer(torch.empty(SHAPE[0], 2 * CHANNELS, *SHAPE[2:], device="meta")[:, ::2])
    assert ("clone", torch.Size(SHAPE).numel()) in watch.operations


def test_a_wait_for_a_value_would_raise(watch, monkeypatch):
    monkeypatch.setattr(steps, "all_reduce_sum", lambda payload, *_: payload[-1].item())
    with pytest.raises(RuntimeError, match="meta"):
        forward(watch, "plain", torch.contiguous_format)


@torch.no_grad()
def test_fake_cuda_tensors_go_the_same_way(watch, monkeypatch):
    # Autograd takes no such tensors where torch was built without CUDA.
    with FakeTensorMode():
        layer, x = SyncBatchNorm(CHANNELS, device="cuda"), torch.empty(SHAPE, device="cuda")
        with watch:
            layer(x)
        assert watch.events == FORWARD
        assert watch.operations == []
        monkeypatch.setattr(steps, "all_reduce_sum", lambda payload, *_: payload.sum().item())
        with pytest.raises(DataDependentOutputException):
            layer(x)
