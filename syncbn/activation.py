from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from syncbn.errors import ArgumentError

ActivationName = Literal["relu", "leaky_relu", "silu"]
NAMES: tuple[ActivationName, ...] = ("relu", "leaky_relu", "silu")


class Activation(NamedTuple):
    """What follows the normalization in the same pass: y = f(BN(x) + residual).

    Attributes:
        name: f, or None for the identity.
        negative_slope: Slope of leaky_relu below zero, at least 0; without meaning for the others.
    """

    name: ActivationName | None = None
    negative_slope: float = 0.01

    @property
    def saves_output(self) -> bool:
        """Whether the backward tells by the sign of y which side of zero a value was on."""
        return self.name in ("relu", "leaky_relu")

    @property
    def saves_residual(self) -> bool:
        """Whether the backward needs the value before the activation again, and therefore the residual."""
        return self.name == "silu"


IDENTITY = Activation()


def apply(z: torch.Tensor, activation: Activation) -> torch.Tensor:
    """f(z), differentiable to any order."""
    if activation.name == "relu":
        return F.relu(z)
    if activation.name == "leaky_relu":
        return F.leaky_relu(z, activation.negative_slope)
    if activation.name == "silu":
        return F.silu(z)
    return z


def check_activation(name: str | None, negative_slope: float) -> None:
    """Raises ArgumentError if there is no such activation or the slope is negative."""
    if name is not None and name not in NAMES:
        raise ArgumentError(f"activation: expected None, {', '.join(map(repr, NAMES))}, got {name!r}")
    if not negative_slope >= 0:
        raise ArgumentError(
            f"negative_slope: expected a number of at least 0, got {negative_slope}; the backward tells the side of "
            "zero by the sign of the output"
        )
