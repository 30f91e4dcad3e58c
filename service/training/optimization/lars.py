"""Layer-wise adaptive rate scaling, for large batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose rate each weight tensor scales for itself (You et al. 2017, algorithm 1).

    For a tensor w with gradient g, λ = trust_coefficient · ‖w‖ / (‖g‖ + weight_decay · ‖w‖ + eps), then
    v ← momentum · v + rate · λ · (g + weight_decay · w) and w ← w − v. Where ‖w‖ or ‖g‖ is zero, λ is 1.

    Args:
        parameters: or groups of them; a group with ``adapts: False`` has λ = 1, as norms and biases need it.
        lr: the global rate.
        momentum: of v.
        weight_decay: L2.
        trust_coefficient: how far a step may move a tensor, relative to its norm.
        eps: added to the denominator of λ.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapts": True,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step; nothing waits for the device.

        Args:
            closure: not taken; every optimizer has the parameter.
        """
        assert closure is None
        for group in self.param_groups:
            weights: list[torch.Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(weights, group)

    def _step(self, weights: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        updates = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        if group["adapts"]:
            weight_norms, gradient_norms = torch._foreach_norm(weights), torch._foreach_norm(gradients)
            for update, weight_norm, gradient_norm in zip(updates, weight_norms, gradient_norms, strict=True):
                denominator = gradient_norm + group["weight_decay"] * weight_norm + group["eps"]
                trust = group["trust_coefficient"] * weight_norm / denominator
                moves = (weight_norm > 0) & (gradient_norm > 0)
                update.mul_(torch.where(moves, trust, torch.ones_like(trust)))
        torch._foreach_mul_(updates, group["lr"])
        if group["momentum"]:
            velocities = [self._velocity(weight) for weight in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            updates = velocities
        torch._foreach_sub_(weights, updates)

    def _velocity(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: torch.Tensor = state["velocity"]
        return velocity
