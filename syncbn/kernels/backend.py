from typing import NamedTuple, Protocol

import torch

from syncbn.activation import IDENTITY, Activation
from syncbn.moments import RunningStatistics


class GradientSums(NamedTuple):
    """What the first pass of the backward finds, over this rank's samples.

    Attributes:
        sums: `[Σg, Σg·(x − mean)]`, shape (2, C), float64, for the all-reduce, which overwrites it.
        grad: g, the gradient before activation and mask, which is also the residual's: shape (N, C, *), the dtype
            and memory format of x. dy itself where there is neither activation nor mask, or where they remain.
        grad_weight: dγ = Σg·(x − mean)/σ, shape (C,), weight's dtype; None without a weight.
        grad_bias: dβ = Σg, shape (C,), bias's dtype; None without a bias.
        remaining: Activation that `input_gradient` still has to undo in `grad`, by x alone, and its mask with it;
            never where there was a residual.
    """

    sums: torch.Tensor
    grad: torch.Tensor
    grad_weight: torch.Tensor | None
    grad_bias: torch.Tensor | None
    remaining: Activation = IDENTITY


class Meetings(NamedTuple):
    """Where the ranks of a layer meet in shared memory.

    Attributes:
        exchange: Handle of the group's exchange.
        forward: Label of the forward's all-reduce.
        backward: Label of the backward's.
    """

    exchange: int
    forward: str
    backward: str


class Backend(Protocol):
    """The passes over a batch; a module of this package with these functions is a backend.

    Shapes: x, y, dy, grad, residual and what is returned for them (N, C, *), any strides, N ≥ 0, all of one dtype;
    mask (N, 1, *), contiguous, bool, or None where every position counts; payload and statistics (2C + 1,), float64,
    as `syncbn.moments` lays them out; weight and bias (C,) in the precision of x or in float32, or None.

    A masked position is left out by selection, never by multiplication: what it holds, NaN included, reaches no sum,
    and y, g and dx are 0 there.
    """

    def saves_output(self, activation: Activation, *, has_residual: bool) -> bool:
        """Whether `gradient_sums` is to be given y."""
        ...

    def moments(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The payload `[Σx, Σx², n]` over this rank's samples."""
        ...

    def finalize(self, payload: torch.Tensor, eps: float, running: RunningStatistics | None) -> torch.Tensor:
        """Statistics `[mean, 1/σ, n]` from the reduced payload; updates `running` in place, as `update_running`."""
        ...

    def normalize(
        self,
        x: torch.Tensor,
        statistics: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        activation: Activation,
    ) -> torch.Tensor:
        """Y = f(γ(x − mean)/σ + β + residual), in the dtype and memory format of x."""
        ...

    def finalize_and_normalize(
        self,
        x: torch.Tensor,
        payload: torch.Tensor,
        eps: float,
        running: RunningStatistics | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        activation: Activation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`finalize`, then `normalize`: y and the statistics."""
        ...

    def gradient_sums(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        statistics: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        y: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        activation: Activation,
    ) -> GradientSums:
        """The first pass of the backward; y is given where `saves_output` asks for it, the residual (if any) for silu.

        At relu's and leaky_relu's zero the gradient is that of the side below, and a NaN of y lets dy through, as in
        torch.nn.functional.
        """
        ...

    def input_gradient(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        statistics: torch.Tensor,
        sums: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        remaining: Activation,
    ) -> torch.Tensor:
        """Dx from what `gradient_sums` left and the reduced sums, in the dtype and memory format of x."""
        ...

    def layer(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        running: RunningStatistics | None,
        eps: float,
        activation: Activation,
        meetings: Meetings | None,
    ) -> torch.Tensor | None:
        """All of the training forward, differentiable; `meetings` is None for a rank without peers.

        It saves what the calls between the passes cost, which on small batches is more than the passes. None, before
        anything happened, from a backend that has no such shortcut, for x of a single value to a channel or none, and
        where shapes, dtypes or devices do not fit together: nothing has been checked before.

        Raises:
            CollectiveError: If the exchange with the other ranks fails, here or in the backward.
        """
        ...
