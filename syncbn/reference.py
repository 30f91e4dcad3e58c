"""Synchronized batch norm as its definition reads, in float64 and in one process: the truth that tests compare with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What each rank should hold after one training step of the layer, in float64.

    Attributes:
        outputs: y of each rank, shapes (N_r, C, *).
        grad_inputs: dx of each rank, shapes (N_r, C, *).
        grad_weights: Each rank's own part of dγ, shapes (C,); their sum is dγ of the whole batch.
        grad_biases: Each rank's own part of dβ, shapes (C,).
        running_mean: Shape (C,).
        running_var: Shape (C,).
    """

    outputs: list[torch.Tensor]
    grad_inputs: list[torch.Tensor]
    grad_weights: list[torch.Tensor]
    grad_biases: list[torch.Tensor]
    running_mean: torch.Tensor
    running_var: torch.Tensor


def reference_batch_norm(
    inputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Reference:
    """Concatenates the ranks, normalizes (Ioffe & Szegedy 2015, Algorithm 1), and lets autograd do the backward.

    Args:
        inputs: x of each rank, shapes (N_r, C, *); N_r may be 0 and spatial sizes may differ. At least two values
            per channel in all.
        grad_outputs: dy of each rank, shapes as `inputs`.
        weight: γ, shape (C,).
        bias: β, shape (C,).
        running_mean: Before the step, shape (C,); not modified.
        running_var: Before the step, shape (C,); not modified.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
    """
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    weights = [weight.detach().double().requires_grad_() for _ in inputs]
    biases = [bias.detach().double().requires_grad_() for _ in inputs]

    batch = torch.cat([x.transpose(0, 1).flatten(1) for x in leaves], dim=1)  # (C, n)
    n = batch.size(1)
    mean = batch.sum(1) / n
    var = (batch - mean[:, None]).square().sum(1) / n

    outputs = []
    for x, gamma, beta in zip(leaves, weights, biases, strict=True):
        shape = (1, -1, *[1] * (x.dim() - 2))
        normalized = (x - mean.view(shape)) / (var + eps).sqrt().view(shape)
        outputs.append(gamma.view(shape) * normalized + beta.view(shape))
    torch.autograd.backward(outputs, [dy.double() for dy in grad_outputs])

    return Reference(
        outputs=[y.detach() for y in outputs],
        grad_inputs=[_grad(x) for x in leaves],
        grad_weights=[_grad(gamma) for gamma in weights],
        grad_biases=[_grad(beta) for beta in biases],
        running_mean=(1 - momentum) * running_mean.double() + momentum * mean.detach(),
        running_var=(1 - momentum) * running_var.double() + momentum * var.detach() * n / (n - 1),
    )


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
