"""How others synchronize batch norm, written anew from their formulas, and ours, under the same arguments.

Each updates the running statistics in place and is differentiable with respect to x, weight and bias. Half inputs are
computed in float32, and the output is in the input's dtype.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from syncbn import sync_batch_norm


class Step(NamedTuple):
    """The arguments of one training step.

    Attributes:
        x: Shape (N, C, *).
        weight: γ, shape (C,), float32.
        bias: β, shape (C,), float32.
        running_mean: Shape (C,), float32.
        running_var: Shape (C,), float32.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variance.
        group: Whom to synchronize with; None for this process alone.
    """

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    momentum: float = 0.1
    eps: float = 1e-5
    group: dist.ProcessGroup | None = None


def ours(step: Step) -> torch.Tensor:
    """This library; "local" where there is no group, even if torch.distributed is initialized."""
    return sync_batch_norm(
        step.x,
        step.running_mean,
        step.running_var,
        step.weight,
        step.bias,
        training=True,
        momentum=step.momentum,
        eps=step.eps,
        process_group="local" if step.group is None else step.group,
    )


def torch_local(step: Step) -> torch.Tensor:
    """`F.batch_norm`, which knows this process only."""
    x, weight, bias, running_mean, running_var, momentum, eps, group = step
    assert group is None
    return F.batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum=momentum, eps=eps)


def plain_sums(step: Step) -> torch.Tensor:
    """Σx, Σx² and n in float32, one all-reduce each way, var = Σx²/n − mean²; what fairscale does, weighed by count."""
    x, weight, bias, eps = step.x.float(), step.weight, step.bias, step.eps
    dims, channels = _reduced_dims(x), x.size(1)
    count = x.new_full((1,), x.numel() // channels)
    total = _all_reduce_sum(torch.cat([x.sum(dims), x.square().sum(dims), count]), step.group)
    n = total[-1]
    mean = total[:channels] / n
    var = total[channels:-1] / n - mean.square()
    _update_running(step, mean, var * (n / (n - 1)))
    scale = torch.rsqrt(var + eps) * weight
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x) + _per_channel(bias, x)
    return y.to(step.x.dtype)


def detectron2_naive(step: Step, weighted: bool = False) -> torch.Tensor:
    """detectron2's `NaiveSyncBatchNorm`: E[x] and E[x²] in float32, averaged over the ranks, y = x · scale + shift.

    The forward gathers and adds, the backward all-reduces. The running variance is the biased one, as it is there.

    Args:
        step: N > 0 on every rank.
        weighted: Whether ranks weigh by N (`stats_mode="N"`); alike otherwise, which is right if all hold as much.
    """
    x, dims, channels, group = step.x.float(), _reduced_dims(step.x), step.x.size(1), step.group
    means = torch.cat([x.mean(dims), (x * x).mean(dims)])
    if weighted:
        total = _gather_sum(torch.cat([means * x.size(0), means.new_full((1,), x.size(0))]), group)
        means = total[:-1] / total[-1]
    elif group is not None:
        means = _gather_sum(means, group) * (1 / dist.get_world_size(group))
    mean, mean_square = means[:channels], means[channels:]
    var = mean_square - mean * mean
    _update_running(step, mean, var)
    scale = step.weight * torch.rsqrt(var + step.eps)
    shift = step.bias - mean * scale
    return (x * _per_channel(scale, x) + _per_channel(shift, x)).to(step.x.dtype)


def torch_sync(step: Step) -> torch.Tensor:
    """`torch.nn.SyncBatchNorm`'s formula, which itself refuses CPU tensors.

    Each rank's mean and 1/σ travel as float32 and are merged one rank after another (Chan et al. 1979), as
    `torch.batch_norm_gather_stats_with_counts` does. The local pass is `torch.var_mean`, which sums in float64 on
    CPU: more exact than the float32 pass that the GPU kernel makes, so its errors here are at most those of torch.
    """
    y: torch.Tensor = _TorchSync.apply(step.x, step.weight, step.bias, step)  # type: ignore[no-untyped-call]
    return y


class _TorchSyncContext(FunctionCtx):
    saved_tensors: tuple[torch.Tensor, ...]
    group: dist.ProcessGroup | None


class _TorchSync(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _TorchSyncContext,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        x_, eps, group = x.float(), step.eps, step.group
        var, mean = torch.var_mean(x_, _reduced_dims(x), correction=0)
        local = torch.cat([mean, torch.rsqrt(var + eps), mean.new_full((1,), x.numel() // x.size(1))])
        mean, var, n = _merge(_gather(local, group), x.size(1), eps)
        _update_running(step, mean, var * (n / (n - 1)))
        invstd = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, invstd, n)
        ctx.group = group
        y = _per_channel(weight, x) * (x_ - _per_channel(mean, x)) * _per_channel(invstd, x) + _per_channel(bias, x)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: _TorchSyncContext, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, invstd, n = ctx.saved_tensors
        dy_, centered, dims = dy.float(), x.float() - _per_channel(mean, x), _reduced_dims(x)
        sums = torch.stack([dy_.sum(dims), (dy_ * centered).sum(dims)])  # (2, C)
        grad_bias, grad_weight = sums[0].clone(), sums[1] * invstd
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_centered = sums / n
        slope = mean_dy_centered * invstd.square()
        dx = (dy_ - _per_channel(mean_dy, x) - centered * _per_channel(slope, x)) * _per_channel(invstd * weight, x)
        return dx.to(x.dtype), grad_weight, grad_bias, None


def _merge(ranks: list[torch.Tensor], num_channels: int, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, biased variance and count of all ranks, from each one's `[mean, 1/σ, n]`, in float32 throughout."""
    n = ranks[0].new_zeros(())
    mean = sum_of_squares = ranks[0].new_zeros(num_channels)
    for rank in ranks:
        rank_mean, rank_invstd, count = rank[:num_channels], rank[num_channels:-1], rank[-1]
        rank_var = rank_invstd.reciprocal().square() - eps
        share = 1 / (n + count)
        sum_of_squares = sum_of_squares + rank_var * count + (rank_mean - mean).square() * n * count * share
        mean = n * share * mean + count * share * rank_mean
        n = n + count
    return mean, sum_of_squares / n, n


class _GroupContext(FunctionCtx):
    group: dist.ProcessGroup


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GroupContext, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: _GroupContext, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _GatherSum(_AllReduceSum):
    @staticmethod
    def forward(ctx: _GroupContext, local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return torch.stack(_gather(local, group)).sum(0)


def _all_reduce_sum(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return local
    total: torch.Tensor = _AllReduceSum.apply(local, group)  # type: ignore[no-untyped-call]
    return total


def _gather_sum(local: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return local
    total: torch.Tensor = _GatherSum.apply(local, group)  # type: ignore[no-untyped-call]
    return total


def _gather(local: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    if group is None:
        return [local]
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    return ranks


def _update_running(step: Step, mean: torch.Tensor, var: torch.Tensor) -> None:
    with torch.no_grad():
        step.running_mean.lerp_(mean.detach(), step.momentum)
        step.running_var.lerp_(var.detach(), step.momentum)


def _reduced_dims(x: torch.Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))
