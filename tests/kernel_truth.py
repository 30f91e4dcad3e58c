"""The passes of a backend against float64 formulas that are written out here."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from syncbn.activation import IDENTITY, Activation
from syncbn.kernels import Backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Largest error of a tensor, relative to its largest value: a few roundings of the precision that it is computed in,
# and for the narrow types one rounding (2^-9, 2^-12) of g before dx and one of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 0.1  # large: where a layout repeats one value, 1/√eps multiplies the rounding of a variance of 0


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def padded(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values as a slice of a larger tensor whose other values are NaN."""
    nan = torch.full_like(x, torch.nan)
    return torch.cat([nan, x, nan], dim).narrow(dim, x.size(dim), x.size(dim))


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "channel_slice": lambda x: padded(x, 1),
    "channel_slice_channels_last": lambda x: padded(channels_last(x).movedim(1, -1), -1).movedim(-1, 1),
    "every_other_sample": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2],
    "every_other_sample_channels_last": lambda x: channels_last(
        torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)
    )[::2],
    "crop": lambda x: padded(x, -1),
    "crop_channels_last": lambda x: padded(channels_last(x).movedim(1, -1), -2).movedim(-1, 1),
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "same_sample": lambda x: x[:1].expand_as(x),
    "same_sample_channels_last": lambda x: channels_last(x)[:1].expand_as(x),
    "same_everywhere": lambda x: x.flatten()[0].expand_as(x),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What goes into one training step of the layer on one rank."""

    x: torch.Tensor
    dy: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    activation: Activation = IDENTITY


def parameters(channels: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "weight": random(channels, dtype=dtype, seed=11) * 0.5 + 1,
        "bias": random(channels, dtype=dtype, seed=12),
    }


def check(kernels: Backend, step: Step, device: torch.device | str = "cpu") -> dict[str, torch.Tensor | None]:
    """Runs the passes on a device and compares all that they give with the truth; returns what `run` does."""
    got, expected = run(kernels, step, device), truth(step)
    for name, value in got.items():
        exact = expected[name]
        if exact is None:
            assert value is None, name
            continue
        assert value is not None, name
        assert value.shape == exact.shape, name
        if exact.numel() == 0:
            continue
        # Sums of n values of float32 cancel; what is left is measured against the sum of their magnitudes, ~ n.
        scale = exact.abs().max().clamp_min(1 if name != "sums" else exact.size(-1))
        error = ((value.double() - exact).abs().max() / scale).item()
        assert error <= TOLERANCE[step.x.dtype] * (4 if name == "sums" else 1), (name, step.x.dtype, error)
    for name in ("y", "dx"):
        value = got[name]
        assert value is not None
        assert value.dtype == step.x.dtype
        assert value.stride() == torch.empty_like(step.x).stride(), name
    return got


def run(kernels: Backend, step: Step, device: torch.device | str = "cpu") -> dict[str, torch.Tensor | None]:
    """The passes as the layer calls them, on a device; the results on the CPU.

    Without "grad" where the activation or the mask remain to be undone in it.
    """
    x, dy, weight, bias, residual, mask = (
        None if t is None else _on(device, t)
        for t in (step.x, step.dy, step.weight, step.bias, step.residual, step.mask)
    )
    assert x is not None
    assert dy is not None
    activation = step.activation
    payload = kernels.moments(x, mask)
    statistics = kernels.finalize(payload, EPS, None)
    y = kernels.normalize(x, statistics, weight, bias, residual, mask, activation)
    sums, grad, grad_weight, grad_bias, remaining = kernels.gradient_sums(
        dy,
        x,
        statistics,
        weight,
        bias,
        y if kernels.saves_output(activation, has_residual=residual is not None) else None,
        residual if activation.saves_residual else None,
        mask,
        activation,
    )
    assert remaining in (IDENTITY, activation)
    results = {
        "payload": payload,
        "statistics": statistics,
        "y": y,
        "sums": sums,
        "grad": grad,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "dx": kernels.input_gradient(grad, x, statistics, sums, weight, bias, mask, remaining),
    }
    if remaining != IDENTITY:
        del results["grad"]
    return {name: None if value is None else value.cpu() for name, value in results.items()}


def _on(device: torch.device | str, t: torch.Tensor) -> torch.Tensor:
    """There, with the same strides: `Tensor.to` copies what is expanded or sliced into another layout."""
    if t.device == torch.device(device) or t.numel() == 0:
        return t.to(device)
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def truth(step: Step) -> dict[str, torch.Tensor | None]:
    """In float64, by autograd through the definition; mean and variance over the positions of the mask."""
    x = step.x.double()
    mask = torch.ones_like(x[:, :1], dtype=torch.bool) if step.mask is None else step.mask
    mask = mask.expand_as(x)
    dims, view = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    x = torch.where(mask, x, 0).requires_grad_()
    parameters = [None if p is None else p.detach().double().requires_grad_() for p in (step.weight, step.bias)]
    n = mask[:, 0].sum().double()
    mean = x.sum(dims) / n.clamp_min(1)
    centered = torch.where(mask, x - mean.view(view), 0)
    var = centered.square().sum(dims) / n.clamp_min(1)
    z = centered * (var + EPS).rsqrt().view(view)
    if parameters[0] is not None:
        z = z * parameters[0].view(view)
    if parameters[1] is not None:
        z = z + parameters[1].view(view)
    if step.residual is not None:
        z = z + torch.where(mask, step.residual.double(), 0)
    z.retain_grad()
    f = {
        None: lambda t: t,
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, step.activation.negative_slope),
        "silu": F.silu,
    }[step.activation.name]
    y = torch.where(mask, f(z), 0)
    y.backward(torch.where(mask, step.dy.double(), 0))
    assert z.grad is not None
    return {
        "payload": torch.cat([x.detach().sum(dims), x.detach().square().sum(dims), n.view(1)]),
        "statistics": torch.cat([mean, (var + EPS).rsqrt(), n.view(1)]).detach(),
        "y": y.detach(),
        "sums": torch.stack([z.grad.sum(dims), (z.grad * centered).sum(dims)]).detach(),
        "grad": z.grad,
        "grad_weight": None if parameters[0] is None else parameters[0].grad,
        "grad_bias": None if parameters[1] is None else parameters[1].grad,
        "dx": torch.where(mask, x.grad, 0),
    }
