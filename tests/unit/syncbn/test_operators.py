"""The operators that torch.compile sees, each by torch's own checks: schema, fake, autograd registration, tracing.

A failure here names the operator whose declaration and behaviour differ; `test_compile` shows what comes of it.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from syncbn import native, operators
from syncbn.moments import finalize

CHANNELS = 3
FORMATS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat([x, x], 1)[:, :CHANNELS],
    "empty": lambda x: x[:0],
}


@pytest.fixture(params=["torch operations", "the fastest"])
def kernels(request, monkeypatch):
    """Which kernels run; the choice is made once per process, so it is made anew here."""
    if request.param == "torch operations":
        monkeypatch.setenv("SYNCBN_NATIVE", "0")
    native.available.cache_clear()
    yield
    native.available.cache_clear()


def tensors(dtype=torch.float32, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (FORMATS[layout](torch.randn(4, CHANNELS, 5, 2, generator=generator).to(dtype)) for _ in range(3))
    mask = torch.rand(x.size(0), 1, 5, 2, generator=generator) < 0.7
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.rand(2, CHANNELS, generator=generator).to(parameters)
    return x, weight.clone(), bias.clone(), residual, mask, dy


def statistics_of(x, mask):
    return finalize(operators.reduced_moments(x, mask, "", "a layer"), 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_reduced_moments(dtype, layout, masked):
    x, _, _, _, mask, _ = tensors(dtype, layout)
    opcheck(operators.reduced_moments, (x, mask if masked else None, None, "a layer"))


@pytest.mark.parametrize(
    ("counters", "momentum"), [((True, True), None), ((True, False), 0.1), ((False, False), 0.1)], ids=str
)
def test_track(counters, momentum):
    x, *_ = tensors()
    payload = operators.reduced_moments(x, None, None, "a layer")
    counted = [torch.tensor(2) if given else None for given in counters]
    opcheck(operators.track, (payload, torch.zeros(CHANNELS), torch.ones(CHANNELS), *counted, momentum, None))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_correction(dtype):
    x, *_ = tensors()
    running = torch.zeros(CHANNELS, dtype=dtype), torch.ones(CHANNELS, dtype=dtype)
    opcheck(operators.correction, (statistics_of(x, None), *running, 3.0, 5.0, 1e-5))


@pytest.mark.parametrize(
    ("layout", "activation"), list(zip(FORMATS, [None, "relu", "leaky_relu", "silu"], strict=True))
)
@pytest.mark.parametrize("with_all", [False, True], ids=["plain", "residual and mask"])
def test_normalize(with_all, layout, activation):
    x, weight, bias, residual, mask, _ = tensors(layout=layout)
    mask = mask if with_all else None
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    residual = residual.detach().requires_grad_() if with_all else None
    opcheck(
        operators.normalize,
        (*leaves, residual, mask, statistics_of(x, mask), activation, 0.01, None, "backward of a layer"),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_normalize_without_parameters(dtype):
    x, *_ = tensors(dtype)
    given = (x.requires_grad_(), None, None, None, None, statistics_of(x.detach(), None))
    opcheck(operators.normalize, (*given, None, 0.01, None, "backward of a layer"))


def backward_arguments(layout, grad_layout, activation, needs):
    x, weight, bias, residual, _, dy = tensors(layout=layout)
    # What sum() sends back has no strides at all.
    dy = dy.new_ones(()).expand(x.shape) if grad_layout == "expanded" else FORMATS[grad_layout](dy.contiguous())
    statistics = statistics_of(x, None)
    y = operators.normalize(x, weight, bias, residual, None, statistics, activation, 0.01, None, "")
    saved = residual if activation == "silu" else None, y if activation == "relu" else None
    options = activation, 0.01, None, "backward of a layer", needs
    return dy, x, weight, bias, *saved, None, statistics, *options


@pytest.mark.parametrize(
    ("layout", "activation", "needs"),
    [
        ("contiguous", None, [True] * 4),
        ("channels_last", "relu", [True, False, False, True]),
        ("sliced", "silu", [False, True, True, True]),
        ("empty", None, [True, False, True, False]),
    ],
)
def test_normalize_backward(layout, activation, needs):
    opcheck(operators.normalize_backward, backward_arguments(layout, "contiguous", activation, needs))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_gradients_have_the_strides_that_the_compiler_was_told(layout, grad_layout, activation):
    # opcheck looks at shapes; generated code relies on strides.
    arguments = backward_arguments(layout, grad_layout, activation, [True] * 4)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        told = [(t.shape, t.stride(), t.dtype) for t in operators.normalize_backward(*fakes)]
    assert [(t.shape, t.stride(), t.dtype) for t in operators.normalize_backward(*arguments)] == told
