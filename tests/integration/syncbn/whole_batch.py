"""The layer's whole contract in one process, in float64 and in differentiable operations: the truth of these tests.

Plain formulas on the values of all ranks together, from which autograd makes derivatives of any order. It shares no
code with the library; `test_the_truth_is_torch_s_batch_norm` holds it against torch.nn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Correction(NamedTuple):
    """r and d of batch renormalization, constants, shape (C,)."""

    r: torch.Tensor
    d: torch.Tensor


class WholeBatch(NamedTuple):
    """What the ranks should compute together.

    Attributes:
        outputs: y of each rank, shapes (N_r, C, *).
        mean: Shape (C,).
        var: Biased, shape (C,).
        count: Values per channel.
    """

    outputs: list[torch.Tensor]
    mean: torch.Tensor
    var: torch.Tensor
    count: int


def whole_batch_norm(
    inputs: Sequence[torch.Tensor],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    residuals: Sequence[torch.Tensor] | None = None,
    masks: Sequence[torch.Tensor] | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    eps: float = 1e-5,
    correction: Correction | None = None,
) -> WholeBatch:
    """Normalizes all ranks' values together (Ioffe & Szegedy 2015, Algorithm 1).

    Args:
        inputs: x of each rank, shapes (N_r, C, *), float64.
        weight: γ, shape (C,).
        bias: β, shape (C,).
        residuals: Of each rank, added before the activation.
        masks: Of each rank, what is valid, shapes (N_r, *).
        activation: As the layer's.
        negative_slope: As the layer's.
        eps: Added to the variance.
        correction: Of batch renormalization (Ioffe 2017, Algorithm 1).
    """
    if masks is None:
        masks = [torch.ones(x.shape[:1] + x.shape[2:], dtype=torch.bool) for x in inputs]
    values = torch.cat([x.movedim(1, 0)[:, mask] for x, mask in zip(inputs, masks, strict=True)], dim=1)  # (C, n)
    mean = values.mean(1)
    var = (values - mean[:, None]).square().mean(1)
    sigma = (var + eps).sqrt()
    outputs = []
    for rank, (x, mask) in enumerate(zip(inputs, masks, strict=True)):
        shape = (1, -1, *[1] * (x.dim() - 2))
        valid = mask.unsqueeze(1)
        z = (torch.where(valid, x, 0) - mean.view(shape)) / sigma.view(shape)
        if correction is not None:
            z = z * correction.r.view(shape) + correction.d.view(shape)
        if weight is not None:
            z = z * weight.view(shape)
        if bias is not None:
            z = z + bias.view(shape)
        if residuals is not None:
            z = z + torch.where(valid, residuals[rank], 0)
        outputs.append(torch.where(valid, activate(z, activation, negative_slope), 0))
    return WholeBatch(outputs, mean, var, values.size(1))


def activate(z: torch.Tensor, activation: str | None, negative_slope: float = 0.01) -> torch.Tensor:
    """f(z) by torch.nn.functional."""
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return z if activation is None else getattr(F, activation)(z)


def draw(shapes: Sequence[Sequence[int]], seed: int = 0, spread: float = 3.0) -> list[torch.Tensor]:
    """A tensor of each rank, float64: every sample has a mean of its own, so that local statistics are far off."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in shapes:
        means = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=torch.float64)
        drawn.append(torch.randn(*shape, generator=generator, dtype=torch.float64) + spread * means)
    return drawn


def leaves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fresh float64 leaves that require a gradient."""
    return [t.detach().double().clone().requires_grad_() for t in tensors]


def folded(running: torch.Tensor, batch: torch.Tensor, momentum: float = 0.1) -> torch.Tensor:
    """Running statistics after one batch (Ioffe & Szegedy 2015, Algorithm 2)."""
    return (1 - momentum) * running.double() + momentum * batch.detach()
