"""The steps of the layer as opaque operators, through which torch.compile and torch.export see without a graph break.

Eager calls do not come here: an operator defined in Python costs more than a small batch. What is decided at run time
(which backend, which group, whether statistics are deferred) is decided inside the operators, not while tracing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from syncbn import renormalization, steps, tracking
from syncbn.activation import NAMES, Activation, ActivationName
from syncbn.autograd import all_reduced_backward, differentiable_backward
from syncbn.collectives import group_of_exchange, raise_exchange_failure, resolve_group
from syncbn.groups import group_named
from syncbn.identity import layer_of
from syncbn.kernels import backend_for
from syncbn.moments import RunningStatistics
from syncbn.renormalization import Renormalization

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from syncbn.tracking import Collector


@torch.library.custom_op("syncbn::reduced_moments", mutates_args=())
def reduced_moments(
    input: torch.Tensor, mask: torch.Tensor | None, group: str | None, name: str, identity: torch.Tensor | None = None
) -> torch.Tensor:
    """The payload `[Σx, Σx², n]` over the group, shape (2C + 1,)."""
    return steps.reduced_moments(input, mask, _resolve(group), _name(name, identity), None)


@reduced_moments.register_fake
def _(
    input: torch.Tensor, mask: torch.Tensor | None, group: str | None, name: str, identity: torch.Tensor | None = None
) -> torch.Tensor:
    return input.new_empty(2 * input.size(1) + 1, dtype=torch.float64)


@torch.library.custom_op(
    "syncbn::track", mutates_args=("running_mean", "running_var", "num_batches_tracked", "num_nonfinite")
)
def track(
    payload: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: torch.Tensor | None,
    num_nonfinite: torch.Tensor | None,
    momentum: float | None,
    identity: torch.Tensor | None = None,
) -> None:
    """Folds the batch into the running statistics, or hands it to the collector that takes them for this layer."""
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum, num_nonfinite)
    tracking.track(running, payload, _collector(identity))


@torch.library.custom_op("syncbn::correction", mutates_args=())
def correction(
    statistics: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    r_max: float,
    d_max: float,
    eps: float,
    name: str = "",
    identity: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch renormalization's r and d, shape (C,); opaque, or a compiler would form them anew in the backward.

    By then the running statistics have changed.
    """
    renormalization.refuse_recomputation(_name(name, identity), _collector(identity))
    return renormalization.correction(statistics, running_mean, running_var, Renormalization(r_max, d_max), eps)


@correction.register_fake
def _(
    statistics: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if running_mean.dtype == torch.float64 else torch.float32
    return torch.empty_like(running_mean, dtype=dtype), torch.empty_like(running_mean, dtype=dtype)


@torch.library.custom_op("syncbn::normalize", mutates_args=())
def normalize(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: str | None,
    negative_slope: float,
    group: str | None,
    name: str,
    identity: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Backend.normalize`, shape (N, C, *)."""
    return backend_for(input).normalize(
        input, statistics, weight, bias, residual, mask, _activation(activation, negative_slope)
    )


@normalize.register_fake
def _(input: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(input)


@torch.library.custom_op("syncbn::normalize_backward", mutates_args=())
def normalize_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: str | None,
    negative_slope: float,
    group: str | None,
    name: str,
    needs: list[bool],
    identity: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dγ, dβ and the residual's gradient; an empty tensor where one is not needed."""
    gradients = all_reduced_backward(
        grad_output,
        input,
        weight,
        bias,
        residual,
        output,
        mask,
        statistics,
        _activation(activation, negative_slope),
        _resolve(group),
        steps.meeting("backward", _name(name, identity), input),
        needs,
    )
    dx, dgamma, dbeta, dresidual = (input.new_empty(0) if gradient is None else gradient for gradient in gradients)
    # Without activation and mask the residual's gradient is dy itself, in its own strides; an operator may return
    # neither its argument nor other strides than were promised.
    if dresidual is grad_output or (needs[3] and dresidual.stride() != torch.empty_like(input).stride()):
        dresidual = torch.empty_like(input).copy_(dresidual)
    return dx, dgamma, dbeta, dresidual


@normalize_backward.register_fake
def _(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *rest: object,
) -> tuple[torch.Tensor, ...]:
    needs = next(argument for argument in rest if isinstance(argument, list))
    return tuple(
        torch.empty_like(like) if needed and like is not None else input.new_empty(0)
        for like, needed in zip((input, weight, bias, input), needs, strict=True)
    )


class _Context(Protocol):
    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    options: tuple[str | None, float, str | None, str]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None: ...


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    input, weight, bias, residual, mask, statistics, activation, negative_slope, group, name, identity = inputs
    kind = _activation(activation, negative_slope)
    ctx.save_for_backward(
        input,
        weight,
        bias,
        residual if kind.saves_residual else None,
        output if backend_for(input).saves_output(kind, has_residual=residual is not None) else None,
        mask,
        statistics,
        identity,
    )
    ctx.options = activation, negative_slope, group, name


def _backward(ctx: _Context, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    *tensors, identity = ctx.saved_tensors
    gradients = normalize_backward(grad_output, *tensors, *ctx.options, needs, identity)
    return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 7


normalize.register_autograd(_backward, setup_context=_setup_context)


_library = torch.library.Library("syncbn", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "differentiable_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? output, Tensor? mask, Tensor statistics, int activation, float negative_slope, float eps, "
    "int exchange, str label) -> Tensor[]"
)
_library.define(  # type: ignore[no-untyped-call]
    "raise_exchange_failure(int exchange, int outcome, str label, int num_values) -> ()"
)
torch.library.impl(_library, "raise_exchange_failure", "CompositeImplicitAutograd")(raise_exchange_failure)


@torch.library.impl(_library, "differentiable_backward", "CompositeImplicitAutograd")
def _differentiable_backward(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    output: torch.Tensor | None,
    mask: torch.Tensor | None,
    statistics: torch.Tensor,
    activation: int,
    negative_slope: float,
    eps: float,
    exchange: int,
    label: str,
) -> list[torch.Tensor]:
    """What csrc/layer.cpp calls where its gradient is to be differentiated again; `exchange` is 0 without peers."""
    group = group_of_exchange(exchange) if exchange else None
    kind = Activation((None, *NAMES)[activation], negative_slope)
    gradients = differentiable_backward(
        grad_output, input, weight, bias, residual, output, mask, statistics, kind, eps, group, label
    )
    return [input.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _name(name: str, identity: torch.Tensor | None) -> str:
    return name if identity is None else layer_of(identity).name


def _collector(identity: torch.Tensor | None) -> Collector | None:
    return None if identity is None else layer_of(identity)._collector


def _resolve(name: str | None) -> ProcessGroup | None:
    return None if name is None else resolve_group(group_named(name))


def _activation(name: str | None, negative_slope: float) -> Activation:
    kind: ActivationName | None = name  # type: ignore[assignment]  # the schema of an operator knows only str
    return Activation(kind, negative_slope)
