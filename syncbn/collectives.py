from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from syncbn.errors import ArgumentError, CollectiveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def resolve_group(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """Finds the group to synchronize over; None where this process has no peers.

    Args:
        process_group: The layer's group, or None for the default group as it is at the time of the call.

    Raises:
        ArgumentError: If `process_group` was given but torch.distributed is not initialized, or if this process is
            not a member of it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ArgumentError(
                "process_group: a group was given, but torch.distributed is not initialized (or was shut down); "
                "call torch.distributed.init_process_group first, or pass process_group=None to normalize locally"
            )
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    rank = dist.get_rank(group)
    if rank < 0:
        raise ArgumentError(
            f"process_group: global rank {dist.get_rank()} is not a member of it; give every rank a group that "
            "contains it"
        )
    return group if dist.get_world_size(group) > 1 else None


def all_reduce_sum(payload: torch.Tensor, group: ProcessGroup | None, step: str) -> None:
    """Sums `payload` over the group, in place; does nothing where there are no peers.

    The group's own timeout bounds the wait.

    Args:
        payload: Contiguous tensor of the same shape on every rank.
        group: What `resolve_group` returned.
        step: What is being reduced, for the error's message.

    Raises:
        CollectiveError: If the backend reports a failure.
    """
    if group is None:
        return
    try:
        dist.all_reduce(payload, op=dist.ReduceOp.SUM, group=group)
    except RuntimeError as error:
        raise CollectiveError(
            f"the all-reduce of {step} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} "
            f"({dist.get_backend(group)}, {payload.numel()} values): {error}. Usual causes: another rank ended or "
            "raised (look at its log first); the ranks ran different layers or channel counts; requires_grad of the "
            "layer's input and parameters, or the use of its output in the loss, differed between ranks"
        ) from error
