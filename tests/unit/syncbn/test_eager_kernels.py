"""The four passes over a batch, in one process.

A failure here with green moments localises a kernel: tiles that overlap or miss samples, a wrong stride, a scratch
that leaks between tiles, sums in too narrow a type.
"""

import pytest
import torch

from syncbn import moments
from syncbn.kernels import eager
from syncbn.moments import Affine, InputGradient

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.fixture(params=[1, 60, 1 << 18], ids=lambda n: f"tile={n}")
def tile_elements(request, monkeypatch):
    """From a row of the image to the whole batch in a tile."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(eager, "CPU_TILE_ELEMENTS", request.param)


@pytest.fixture(params=LAYOUTS, ids=str)
def x(request) -> torch.Tensor:
    x = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 3
    return LAYOUTS[request.param](x)


# float64 throughout: whatever is beyond a reordered sum of 140 values is a bug, not rounding.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.usefixtures("tile_elements")
class TestEveryTilingAndLayout:
    def test_moments(self, x):
        got = eager.moments(x)
        flat = x.transpose(0, 1).flatten(1)
        assert got.count == 140
        torch.testing.assert_close(got.sum, flat.sum(1), **EXACT)
        torch.testing.assert_close(got.sum_of_squares, flat.square().sum(1), **EXACT)

    def test_normalize(self, x):
        pivot, scale, shift = torch.randn(3, 3, dtype=torch.float64)
        y = eager.normalize(x, Affine(pivot=pivot, scale=scale, shift=shift))
        view = (1, 3, 1, 1)
        torch.testing.assert_close(y, (x - pivot.view(view)) * scale.view(view) + shift.view(view), **EXACT)
        assert y.stride() == torch.empty_like(x).stride()

    @pytest.mark.parametrize("dy_layout", LAYOUTS)
    def test_gradients(self, x, dy_layout):
        dy = LAYOUTS[dy_layout](torch.randn(4, 3, 5, 7, dtype=torch.float64))
        pivot, dy_scale, x_scale, shift = torch.randn(4, 3, dtype=torch.float64)
        p, a, b, c = (t.view(1, 3, 1, 1) for t in (pivot, dy_scale, x_scale, shift))

        sums = eager.gradient_sums(dy, x, pivot)
        torch.testing.assert_close(sums, torch.stack([dy.sum((0, 2, 3)), (dy * (x - p)).sum((0, 2, 3))]), **EXACT)

        dx = eager.input_gradient(dy, x, InputGradient(pivot=pivot, dy_scale=dy_scale, x_scale=x_scale, shift=shift))
        torch.testing.assert_close(dx, dy * a + (x - p) * b + c, **EXACT)
        assert dx.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch_has_zero_sums_and_empty_results(shape):
    x, zeros = torch.zeros(shape), torch.zeros(3)
    assert moments.pack(eager.moments(x)).tolist() == [0.0] * 7
    assert torch.equal(eager.gradient_sums(x, x, zeros), torch.zeros(2, 3, dtype=torch.float64))
    assert eager.normalize(x, Affine(pivot=zeros, scale=zeros, shift=zeros)).shape == shape
    coefficients = InputGradient(pivot=zeros, dy_scale=zeros, x_scale=zeros, shift=zeros)
    assert eager.input_gradient(x, x, coefficients).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_summed_in_float32_or_wider(dtype):
    x = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.1 + 100).to(dtype)
    got = moments.finalize(eager.moments(x), eps=0)
    exact = x.double().transpose(0, 1).flatten(1)
    # float32 sums of centred values: their rounding, not the 4e-3 of bfloat16 or the overflow of float16 at 65504.
    torch.testing.assert_close(got.mean, exact.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(got.var, exact.var(1, correction=0), rtol=1e-6, atol=0)
    assert eager.normalize(x, moments.affine(got.mean, got.invstd, None, None, torch.float32)).dtype == dtype


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e3, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e2, 1e-2)])
def test_the_variance_holds_far_from_zero(mean, std, memory_format):
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(8, 16, 32, 32, generator=generator, dtype=torch.float64) * std + mean).float()
    x = x.contiguous(memory_format=memory_format)
    exact = x.double().var((0, 2, 3), correction=0)
    got = moments.finalize(eager.moments(x), eps=0).var
    assert ((got - exact).abs() / exact).max() <= 1e-6


def test_a_border_of_zeros_does_not_spoil_the_variance():
    x = torch.zeros(4, 8, 34, 34)
    x[:, :, 1:-1, 1:-1] = torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(3)) + 100
    exact = x.double().var((0, 2, 3), correction=0)
    got = moments.finalize(eager.moments(x), eps=0).var
    assert ((got - exact).abs() / exact).max() <= 1e-6
