"""Tensors that are not what their memory says, in the operator that runs a whole layer on memory as it is.

A failure here is a result of the wrong sign, or a crash.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from syncbn import SyncBatchNorm, native, sync_batch_norm
from syncbn.kernels import native as kernels

pytestmark = pytest.mark.skipif(not native.available(), reason="the C++ kernels are not there")


def negated(*shape):
    """A view whose memory holds the negative, as the imaginary part of a conjugate is."""
    values = torch.randn(*shape, dtype=torch.cfloat).conj().imag
    assert values.is_neg()
    return values


@pytest.fixture
def taken(monkeypatch):
    """Whether each call was taken by the operator."""
    calls = []
    original = kernels.layer
    monkeypatch.setattr(kernels, "layer", lambda *given: calls.append(original(*given)) or calls[-1])
    return calls


def test_plain_tensors_are_taken(taken):
    SyncBatchNorm(3)(torch.randn(4, 3))
    with torch.inference_mode():
        sync_batch_norm(torch.randn(4, 3), None, None, None, None, training=True)
    assert all(output is not None for output in taken)
    assert len(taken) == 2


@pytest.mark.parametrize("shape", [(8, 3), (8, 1), (4, 3, 5), (4, 1, 5)], ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_a_negated_view(name, shape, taken):
    arguments = {
        "input": torch.randn(shape),
        "weight": torch.randn(shape[1]),
        "bias": torch.randn(shape[1]),
        "residual": torch.randn(shape),
    }
    arguments[name] = negated(*arguments[name].shape)
    arguments = {key: value.requires_grad_() if key != name else value for key, value in arguments.items()}
    plain = {key: value.detach().resolve_neg().clone() for key, value in arguments.items()}

    def run(given):
        mean = torch.zeros(shape[1])
        return sync_batch_norm(running_mean=mean, running_var=torch.ones(shape[1]), training=True, **given), mean

    for got, expected in zip(run(arguments), run(plain), strict=True):
        assert torch.equal(got, expected)
    assert [output is not None for output in taken] == [False, True]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("create_graph", [False, True])
def test_the_gradient_that_a_conjugate_hands_back(channels, create_graph):
    gradients = []
    for conjugate in (torch.conj, lambda z: torch.complex(z.real, -z.imag)):
        torch.manual_seed(0)
        x = torch.randn(8, channels, requires_grad=True)
        z = conjugate(torch.complex(torch.zeros(8, channels), SyncBatchNorm(channels)(x)))
        loss = (torch.view_as_real(z.resolve_conj()) * torch.randn(8, channels, 2)).sum()
        gradients += torch.autograd.grad(loss, x, create_graph=create_graph)
    torch.testing.assert_close(*gradients)


def test_a_gradient_of_zeros_without_memory():
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(SyncBatchNorm(3)(x), x, torch._efficientzerotensor((4, 3)))
    assert torch.equal(gradient, torch.zeros(4, 3))


def test_a_tracer_sees_the_steps():
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3)
    traced = make_fx(lambda given: layer(given))(x)
    assert torch.equal(traced(x), layer(x))
