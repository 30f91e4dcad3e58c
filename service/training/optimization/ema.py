"""An exponential moving average of a model's weights and running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Ema:
    """Averages what a model's ``state_dict`` holds in floating point: weights and running statistics alike.

    After update n (from 0), average ← d · average + (1 − d) · model with d = min(decay, (1 + n) / (10 + n)), as
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: so the initial weights are soon forgotten, however
    near 1 ``decay`` is.

    Args:
        model: whose values to average; its present ones are the first average. Its tensors must stay the same objects.
        decay: in (0, 1).

    Attributes:
        decay: as given.
        num_updates: so far.
    """

    decay: float
    num_updates: int

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._live = _averaged(model)
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Fold in the model's present values, after a step that changed them."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)
        self.num_updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the averaged values, in place, and its own back at the end, even after an error."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint; its tensors are the live ones, by the names of the model's state."""
        return {"num_updates": self.num_updates, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state that ``state_dict`` returned.

        Args:
            state: of an average over the same model.
        """
        assert state["average"].keys() == self._average.keys()
        for name, value in state["average"].items():
            self._average[name].copy_(value)
        self.num_updates = state["num_updates"]

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            value = live.clone()
            live.copy_(self._average[name])
            self._average[name].copy_(value)


def _averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the floating-point tensors of a model's state, each once, also where it has several names."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensors.setdefault(id(tensor), (name, tensor))
    return dict(tensors.values())
