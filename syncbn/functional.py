from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from syncbn import moments
from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import ArgumentError, SingleValueError, UnsupportedDeviceError
from syncbn.kernels import backend_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sync_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: ProcessGroup | None = None,
    num_batches_tracked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Batch norm over the samples of every rank of a group (Ioffe & Szegedy 2015, Algorithm 1).

    With `training`, all ranks of the group must call together, each with its own samples; one all-reduce in the
    forward and one in the backward exchange sums per channel. Ranks weigh by what they hold: sample counts and
    spatial sizes may differ, and a rank may be empty (N = 0; it still takes part in both collectives, and its
    parameter gradients are zeros). Where every rank is empty the running statistics stay as they are. The gradients
    of weight and bias are this rank's own part, as data-parallel wrappers expect.

    Whether the backward runs is decided by autograd on each rank alone. So requires_grad of input, weight and bias
    has to agree between ranks, and either all ranks or none may use the output in what they differentiate;
    otherwise some ranks wait in the backward's collective until the group's timeout. Add `0 * output.sum()` to
    the loss of a rank that has no use for it.

    Without `training` the running statistics normalize, and nothing is communicated.

    Args:
        input: Shape (N, C, *), float64, float32, bfloat16 or float16, any strides. Statistics are computed in at
            least float32 and reduced in float64.
        running_mean: Shape (C,), updated in place if `training`; None to keep no running statistics.
        running_var: Shape (C,), updated in place if `training` with the unbiased variance n/(n − 1).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        training: Whether to normalize with the batch's statistics.
        momentum: Weight of the batch in the running statistics (the exponential average factor); None for the
            cumulative average over `num_batches_tracked`.
        eps: Added to the variance, in the units of x².
        process_group: Group to synchronize over; None for the default one. Without torch.distributed this
            process is alone.
        num_batches_tracked: Counter of the batches in the running statistics, shape (), int64, incremented in place.

    Returns:
        Shape (N, C, *), the dtype and memory format of `input`.

    Raises:
        ArgumentError: If an argument does not fit; the message names it. Peers that did not raise wait for this
            rank until the group's timeout.
        SingleValueError: On CPU, if the whole group holds a single value per channel. Elsewhere reading the count
            would wait for the device: the output is then the bias, and the running statistics stay as they are.
        UnsupportedDeviceError: If the device has no float64.
        CollectiveError: If the exchange with the other ranks fails.
    """
    _check_arguments(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training=False, eps=eps)

    group = resolve_group(process_group)
    with torch.no_grad():
        payload = moments.pack(backend_for(input).moments(input))
        all_reduce_sum(payload, group, "the forward's batch statistics")
        statistics = moments.finalize(moments.unpack(payload), eps)
        if input.device.type == "cpu" and statistics.count.item() == 1:
            raise SingleValueError(
                "batch statistics need more than one value per channel, but the whole group holds one (this rank's "
                f"input has shape {tuple(input.shape)}); use a larger batch, or eval() to normalize with the running "
                "statistics"
            )
        if running_mean is not None and running_var is not None:
            moments.update_running(running_mean, running_var, num_batches_tracked, statistics, momentum)
    output: torch.Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, statistics.mean, statistics.invstd, statistics.count, group
    )
    return output


class _Context(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    group: ProcessGroup | None
    bias_dtype: torch.dtype | None


class _Normalize(torch.autograd.Function):
    """Normalizes with given statistics; the gradient goes through the statistics of all ranks."""

    @staticmethod
    def forward(
        ctx: _Context,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        invstd: torch.Tensor,
        count: torch.Tensor,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(
            input,
            weight,  # type: ignore[arg-type]
            mean,
            invstd,
            count,
        )
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        return backend_for(input).normalize(
            input, moments.affine(mean, invstd, weight, bias, moments.compute_dtype(input.dtype))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, invstd, count = ctx.saved_tensors
        backend, dtype = backend_for(input), moments.compute_dtype(input.dtype)
        pivot = mean.to(dtype)
        local_sums = moments.center_gradient_sums(backend.gradient_sums(grad_output, input, pivot), mean, pivot)

        # Always, even where this rank's input needs no gradient: another rank's may, and every rank has to come.
        sums = local_sums.clone()
        all_reduce_sum(sums, ctx.group, "the backward's gradient sums")

        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            coefficients = moments.input_gradient(sums, count, mean, invstd, weight, dtype)
            grad_input = backend.input_gradient(grad_output, input, coefficients)
        if ctx.needs_input_grad[1]:
            grad_weight = (local_sums[1] * invstd).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = local_sums[0].to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None, None


_INPUT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES_WITHOUT_FLOAT64 = ("mps",)


def _check_arguments(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: torch.Tensor | None,
) -> None:
    if input.dim() < 2 or input.size(1) == 0:
        raise ArgumentError(
            f"input: expected shape (N, C, *) with at least one channel, got {tuple(input.shape)}; add the missing "
            "dimension (unsqueeze)"
        )
    if input.dtype not in _INPUT_DTYPES:
        raise ArgumentError(
            f"input: expected float64, float32, bfloat16 or float16, got {input.dtype}; convert it (input.float())"
        )
    if input.device.type in _DEVICES_WITHOUT_FLOAT64:
        raise UnsupportedDeviceError(
            f"input: device {input.device} has no float64, which the batch statistics are reduced in; move the layer "
            "and its input to cpu or cuda"
        )
    if (running_mean is None) != (running_var is None):
        raise ArgumentError("running_mean, running_var: give both or neither")
    if not training and running_mean is None:
        raise ArgumentError("running_mean: required without training; pass it, or training=True for batch statistics")
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ArgumentError("num_batches_tracked: required with momentum=None; pass it, or a momentum")
    if not eps >= 0:
        raise ArgumentError(f"eps: expected a number of at least 0, got {eps}")
    for name, values in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if values is not None:
            _check_per_channel(name, values, input)


def _check_per_channel(name: str, values: torch.Tensor, input: torch.Tensor) -> None:
    if values.shape != input.shape[1:2]:
        raise ArgumentError(
            f"{name}: expected shape ({input.size(1)},) for the {input.size(1)} channels of input "
            f"{tuple(input.shape)}, got {tuple(values.shape)}; num_features has to equal the channels"
        )
    if values.device != input.device:
        raise ArgumentError(
            f"{name}: on {values.device}, but input is on {input.device}; move one to the other (layer.to(device))"
        )
    half_input = input.dtype in (torch.bfloat16, torch.float16)
    if values.dtype != input.dtype and not (half_input and values.dtype == torch.float32):
        raise ArgumentError(
            f"{name}: expected {input.dtype}{' or torch.float32' if half_input else ''} for this input, got "
            f"{values.dtype}; convert the layer (layer.to(dtype)) or the input"
        )
