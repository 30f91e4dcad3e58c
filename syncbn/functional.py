from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from syncbn import activation as _activation
from syncbn import moments, operators
from syncbn.activation import Activation, ActivationName, check_activation
from syncbn.arguments import canonical_mask, check_input, check_options, check_parameters
from syncbn.autograd import Normalize, ToFinalize
from syncbn.collectives import is_before_first_meeting, meetings_in_shared_memory, resolve_group
from syncbn.groups import LOCAL, group_name
from syncbn.kernels import backend_for
from syncbn.moments import RunningStatistics
from syncbn.renormalization import Renormalization, check_renormalization, corrected, correction, refuse_recomputation
from syncbn.steps import Probe, meeting, reduced_moments
from syncbn.tracking import is_recomputation, track

if TYPE_CHECKING:
    from syncbn.groups import Group
    from syncbn.tracking import Collector


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
    process_group: Group = None,
    num_batches_tracked: torch.Tensor | None = None,
    num_nonfinite_batches: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: ActivationName | None = None,
    negative_slope: float = 0.01,
    mask: torch.Tensor | None = None,
    renormalization: Renormalization | None = None,
    name: str = "sync_batch_norm",
) -> torch.Tensor:
    """Batch norm over the samples of every rank of a group (Ioffe & Szegedy 2015, Algorithm 1).

    y = f(γ(x − mean)/σ + β + residual). With `training`, all ranks of the group must call together, each with its own
    samples; one all-reduce in the forward and one in the backward exchange sums per channel. Ranks weigh by what they
    hold: sample counts and spatial sizes may differ, and a rank may be empty (N = 0; it still takes part in both
    collectives, and its parameter gradients are zeros). Where every rank is empty the running statistics stay as they
    are. The gradients of weight and bias are this rank's own part, as data-parallel wrappers expect.

    Whether the backward runs is decided by autograd on each rank alone. So requires_grad of input, weight, bias and
    residual has to agree between ranks, and either all ranks or none may use the output in what they differentiate;
    otherwise some ranks wait in the backward's collective until the group's timeout. Add `0 * output.sum()` to
    the loss of a rank that has no use for it.

    A forward that activation checkpointing runs again, inside a backward, does not count in the running statistics a
    second time. The gradient can itself be differentiated (`create_graph=True`), except under torch.compile.

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
        process_group: Group to synchronize over, or a one-dimensional DeviceMesh; None for the default group. Without
            torch.distributed this process is alone. "local" for this rank alone.
        num_batches_tracked: Counter of the batches in the running statistics, shape (), int64, incremented in place.
        num_nonfinite_batches: Counter of batches with a NaN or an Inf anywhere, shape (), int64. Where it is given
            such batches are counted there and leave the running statistics as they are.
        residual: Added before the activation, shape (N, C, *), in the input's dtype.
        activation: f: None, "relu", "leaky_relu" or "silu", in the same pass over memory.
        negative_slope: Slope of leaky_relu below zero.
        mask: Which positions are valid, bool, shape (N, 1, *) or (N, *). What lies elsewhere, NaN included, takes
            part in nothing: output and gradients are 0 there.
        renormalization: Limits of batch renormalization (Ioffe 2017); None for batch norm.
        name: What to call this layer in errors.

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
    options = Options(
        training=training,
        momentum=momentum,
        eps=eps,
        process_group=process_group,
        activation=Activation(activation, negative_slope),
        renormalization=renormalization,
        name=name,
    )
    running = (running_mean, running_var, num_batches_tracked, num_nonfinite_batches)
    return normalize_batch(input, running, weight, bias, residual, mask, options)


class Options(NamedTuple):
    """What a call is told beside its tensors; `sync_batch_norm` describes the first seven.

    Attributes:
        identity: Of the layer in traced graphs, in place of its name and collector.
        collector: Takes the batch's statistics in place of the running ones.
        probe: Does the forward's all-reduce, to observe it.
    """

    training: bool
    momentum: float | None
    eps: float
    process_group: Group
    activation: Activation
    renormalization: Renormalization | None
    name: str
    identity: torch.Tensor | None = None
    collector: Collector | None = None
    probe: Probe | None = None


def normalize_batch(
    input: torch.Tensor,
    buffers: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """What `sync_batch_norm` does, for callers that have more to say.

    Args:
        input: Shape (N, C, *).
        buffers: running_mean, running_var, num_batches_tracked, num_nonfinite_batches.
        weight: Shape (C,).
        bias: Shape (C,).
        residual: Shape (N, C, *).
        mask: Shape (N, 1, *) or (N, *).
        options: All else.
    """
    mean, var, num_batches, num_nonfinite = buffers
    check_options(options.training, options.momentum, options.eps, mean, num_batches)
    check_activation(*options.activation)
    running = None
    if mean is not None and var is not None:
        running = RunningStatistics(mean, var, num_batches, options.momentum, num_nonfinite)
    if options.training and mask is None and (mean is None) == (var is None) and not torch.compiler.is_compiling():
        output = _train_at_once(input, running, weight, bias, residual, options)
        if output is not None:
            return output
    check_input(input, residual)
    check_parameters(input, mean, var, weight, bias)
    mask = canonical_mask(mask, input)
    if not options.training:
        assert running is not None
        return _evaluate(input, running, weight, bias, residual, mask, options)
    if options.renormalization is not None:
        check_renormalization(options.renormalization, tracks_running_statistics=running is not None)
    train = _train_traced if torch.compiler.is_compiling() else _train
    return train(input, running, weight, bias, residual, mask, options)


def _train_at_once(
    input: torch.Tensor,
    running: RunningStatistics | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    options: Options,
) -> torch.Tensor | None:
    """One operator for the whole of it; None where there is none for this call, or something about it does not fit.

    Checks and steps in Python cost more than the arithmetic of a small batch.
    """
    _, _, eps, process_group, activation, renormalization, name, _, collector, probe = options
    if renormalization is not None or collector is not None or probe is not None or input.dim() < 2:
        return None
    group = None if process_group == LOCAL else resolve_group(process_group)
    meetings = None
    if group is not None:
        if not input.is_cpu:
            return None
        if is_before_first_meeting(group):  # an error is raised before anyone waits for anyone
            check_input(input, residual)
            mean, var = (None, None) if running is None else (running.mean, running.var)
            check_parameters(input, mean, var, weight, bias)
        meetings = meetings_in_shared_memory(group, meeting("forward", name, input), meeting("backward", name, input))
        if meetings is None:
            return None
    folded_in = None if is_recomputation() else running
    return backend_for(input).layer(input, weight, bias, residual, folded_in, eps, activation, meetings)


def _train(
    input: torch.Tensor,
    running: RunningStatistics | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    _, _, eps, process_group, activation, renormalization, name, _, collector, probe = options
    group = None if process_group == LOCAL else resolve_group(process_group)
    if renormalization is not None:
        refuse_recomputation(name, collector)
    with torch.no_grad():
        statistics = payload = reduced_moments(input, mask, group, name, probe)
        to_finalize = None
        if renormalization is None and collector is None:
            to_finalize = ToFinalize(None if is_recomputation() else running)
        else:  # something has to happen between the two passes, or to something else than the running statistics
            statistics = backend_for(input).finalize(payload, eps, None)
            if running is not None:
                if renormalization is not None:
                    r, d = correction(statistics, running.mean, running.var, renormalization, eps)
                track(running, payload, collector)
    if renormalization is not None:
        weight, bias = corrected(weight, bias, r, d)
    output: torch.Tensor = Normalize.apply(  # type: ignore[no-untyped-call]
        input,
        weight,
        bias,
        residual,
        mask,
        statistics,
        activation,
        eps,
        group,
        "" if group is None else meeting("backward", name, input),
        to_finalize,
    )
    return output


def _train_traced(
    input: torch.Tensor,
    running: RunningStatistics | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    """The same steps as operators; a probe is left out, since it takes times."""
    _, _, eps, process_group, activation, renormalization, name, identity, _, _ = options
    group = group_name(process_group)
    name = name if identity is None else ""
    with torch.no_grad():
        payload = operators.reduced_moments(input, mask, group, name, identity)
        statistics = moments.finalize(payload, eps)
        if running is not None:
            if renormalization is not None:
                r, d = operators.correction(
                    statistics, running.mean, running.var, *renormalization, eps, name, identity
                )
            operators.track(
                payload,
                running.mean,
                running.var,
                running.num_batches,
                running.num_nonfinite,
                running.momentum,
                identity,
            )
    if renormalization is not None:
        weight, bias = corrected(weight, bias, r, d)
    output: torch.Tensor = operators.normalize(
        input, weight, bias, residual, mask, statistics, *activation, group, name, identity
    )
    return output


def _evaluate(
    input: torch.Tensor,
    running: RunningStatistics,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: Options,
) -> torch.Tensor:
    if mask is not None:  # before any operation: autograd multiplies a NaN of the padding by 0, which is NaN
        input = torch.where(mask, input, 0)
        residual = None if residual is None else torch.where(mask, residual, 0)
    mean, var = running.mean, running.var
    if len({values.dtype for values in (mean, var, weight, bias) if values is not None}) > 1:
        mean, var = mean.float(), var.float()  # F.batch_norm takes them in one dtype
        weight, bias = (None if values is None else values.float() for values in (weight, bias))
    output = laid_out_as(input, F.batch_norm(input, mean, var, weight, bias, training=False, eps=options.eps))
    if residual is not None:
        output = output + residual
    output = _activation.apply(output, options.activation)
    return output if mask is None else torch.where(mask, output, 0)


def laid_out_as(input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output in the input's layout, which torch's own operations keep for its memory formats alone."""
    if not input.is_contiguous() and output.stride() != torch.empty_like(input, device="meta").stride():
        return torch.empty_like(input).copy_(output)
    return output
