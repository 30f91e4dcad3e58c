"""How long gradients are."""

from collections.abc import Iterable

import torch
from torch import nn


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the L2 norm of the gradient of each part of a model, on the device.

    Returns:
        ``gradient_norm/PART`` for each child of the model that has gradients, and for the parameters of its own under
        the name ``self``; shape ().
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            child, dot, _ = name.partition(".")
            parts.setdefault(child if dot else "self", []).append(parameter.grad)
    return {f"gradient_norm/{part}": squared_norm(gradients).sqrt() for part, gradients in parts.items()}


@torch.no_grad()
def squared_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares, float64 (), on the device."""
    return torch.stack(torch._foreach_norm(list(gradients))).double().square().sum()
