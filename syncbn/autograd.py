from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd.function import FunctionCtx

from syncbn import moments
from syncbn.collectives import all_reduce_sum
from syncbn.kernels import backend_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup

    from syncbn.activation import Activation
    from syncbn.moments import RunningStatistics


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    activation: Activation
    eps: float
    group: ProcessGroup | None
    label: str


class ToFinalize(NamedTuple):
    """Says that a batch comes with its payload, and its statistics are to be formed in the same pass.

    Attributes:
        running: Where to fold the batch in.
    """

    running: RunningStatistics | None


class Normalize(torch.autograd.Function):
    """Normalizes with given statistics; the gradient goes through the statistics of all ranks.

    The arguments are those of `Backend.normalize`, then eps, the group that the statistics come from, what to call the
    backward in errors, and whether the statistics are still those `[Σx, Σx², n]` that the group has reduced.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        mask: torch.Tensor | None,
        statistics: torch.Tensor,
        activation: Activation,
        eps: float,
        group: ProcessGroup | None,
        label: str,
        to_finalize: ToFinalize | None,
    ) -> torch.Tensor:
        """The output, shape (N, C, *)."""
        backend = backend_for(input)
        if to_finalize is None:
            output = backend.normalize(input, statistics, weight, bias, residual, mask, activation)
        else:
            output, statistics = backend.finalize_and_normalize(
                input, statistics, eps, to_finalize.running, weight, bias, residual, mask, activation
            )
        ctx.save_for_backward(
            input,
            weight,  # type: ignore[arg-type]
            bias,  # type: ignore[arg-type]
            residual if activation.saves_residual else None,  # type: ignore[arg-type]
            output if backend.saves_output(activation, has_residual=residual is not None) else None,  # type: ignore[arg-type]
            mask,  # type: ignore[arg-type]
            statistics,
        )
        ctx.activation, ctx.eps, ctx.group, ctx.label = activation, eps, group, label
        return output

    @staticmethod
    def backward(ctx: _Context, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the tensors among the arguments, in their order."""
        # Grad mode is on in a backward exactly where its result will be differentiated again (create_graph=True).
        input, weight, bias, residual, output, mask, statistics = ctx.saved_tensors
        saved = input, weight, bias, residual, output, mask, statistics, ctx.activation
        if torch.is_grad_enabled():
            gradients = differentiable_backward(grad_output, *saved, ctx.eps, ctx.group, ctx.label)
            gradients = tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))
        else:
            gradients = all_reduced_backward(grad_output, *saved, ctx.group, ctx.label, ctx.needs_input_grad[:4])
        return *gradients, None, None, None, None, None, None, None


def all_reduced_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: Activation,
    group: ProcessGroup | None,
    label: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of input, weight, bias and residual; None where `needs`, in the same order, is False."""
    backend = backend_for(input)
    if output is None and backend.saves_output(activation, has_residual=False):
        # Saved by another backend's rule, which a graph compiled elsewhere may have kept; there was no residual then.
        output = backend.normalize(input, statistics, weight, bias, None, mask, activation)
    sums, grad, grad_weight, grad_bias, remaining = backend.gradient_sums(
        grad_output, input, statistics, weight, bias, output, residual, mask, activation
    )
    # Always, even where this rank's input needs no gradient: another rank's may, and every rank has to come.
    all_reduce_sum(sums, group, label)
    needs_input, needs_weight, needs_bias, needs_residual = needs
    return (
        backend.input_gradient(grad, input, statistics, sums, weight, bias, mask, remaining) if needs_input else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad if needs_residual else None,
    )


def differentiable_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: Activation,
    eps: float,
    group: ProcessGroup | None,
    label: str,
) -> tuple[torch.Tensor | None, ...]:
    """The same gradients out of plain operations, so that autograd can differentiate them, to any order.

    The statistics are formed again, as a function of every rank's input; that costs one more all-reduce here, and one
    for each that autograd then runs backwards. The residual's gradient is given whether there was a residual or not.
    """
    dtype = moments.compute_dtype(input.dtype)
    dims = [0, *range(2, input.dim())]
    shape = (1, -1, *[1] * (input.dim() - 2))
    mean, _, count = moments.split(statistics)
    n = count.clamp_min(1)
    gamma = torch.ones_like(mean) if weight is None else weight.double()

    centered = input.to(dtype) - mean.to(dtype).view(shape)  # near zero, so that raw sums of it lose nothing
    if mask is not None:  # selected at the start: a NaN would come back in the derivative of what it is multiplied by
        centered, grad_output = torch.where(mask, centered, 0), torch.where(mask, grad_output, 0)
        residual = None if residual is None else torch.where(mask, residual, 0)
    raw = torch.stack([centered.sum(dims, dtype=torch.float64), centered.square().sum(dims, dtype=torch.float64)])
    first, second = _all_reduce(raw, group, label).unbind()  # (C,)
    invstd = (second / n - (first / n).square() + eps).rsqrt()
    normalized = (centered - (first / n).to(dtype).view(shape)) * invstd.to(dtype).view(shape)

    grad = grad_output.to(dtype)
    if activation.name is not None and output is None:
        z = normalized * gamma.to(dtype).view(shape)
        if bias is not None:
            z = z + bias.to(dtype).view(shape)
        if residual is not None:
            z = z + residual.to(dtype)
    if activation.name == "silu":
        sigmoid = z.sigmoid()
        grad = grad * (sigmoid * (1 + z * (1 - sigmoid)))
    elif activation.name is not None:
        slope = activation.negative_slope if activation.name == "leaky_relu" else 0
        grad = torch.where((z if output is None else output) <= 0, grad * slope, grad)
    if mask is not None:
        grad = torch.where(mask, grad, 0)  # silu's, where γ or β is a NaN

    local = torch.stack(
        [grad.sum(dims, dtype=torch.float64), (grad * normalized).sum(dims, dtype=torch.float64)]
    )  # (2, C): Σg, Σg·x̂
    grad_mean, grad_projection = (_all_reduce(local, group, label) / n).to(dtype).view(2, *shape).unbind()
    grad_input = (grad - grad_mean - normalized * grad_projection) * (gamma * invstd).to(dtype).view(shape)
    if mask is not None:
        grad_input = torch.where(mask, grad_input, 0)
    return (
        grad_input.to(input.dtype),
        None if weight is None else local[1].to(weight.dtype),
        None if bias is None else local[0].to(bias.dtype),
        grad.to(input.dtype),
    )


def _all_reduce(values: torch.Tensor, group: ProcessGroup | None, label: str) -> torch.Tensor:
    result: torch.Tensor = _AllReduce.apply(values, group, label)  # type: ignore[no-untyped-call]
    return result


class _ReduceContext(FunctionCtx):
    group: ProcessGroup | None
    label: str


class _AllReduce(torch.autograd.Function):
    """Σ over the ranks; its adjoint is itself, for what is differentiated is the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx: _ReduceContext, values: torch.Tensor, group: ProcessGroup | None, label: str) -> torch.Tensor:
        ctx.group, ctx.label = group, label
        total = values.clone()
        all_reduce_sum(total, group, label)
        return total

    @staticmethod
    def backward(ctx: _ReduceContext, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _AllReduce.apply(grad_output, ctx.group, ctx.label), None, None  # type: ignore[no-untyped-call]
