from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from syncbn.errors import ArgumentError

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import ProcessGroup

T = TypeVar("T")
LOCAL: Literal["local"] = "local"
Group: TypeAlias = "ProcessGroup | DeviceMesh | Literal['local'] | None"


def new_sync_group(
    size: int | Literal["world", "node"] = "world",
    *,
    process_group: ProcessGroup | None = None,
    timeout: timedelta | None = None,
) -> ProcessGroup:
    """Makes the group that this rank's layers synchronize over, with a communicator of its own.

    Collectives of one communicator run one after another; a group of its own keeps the layers from waiting behind
    data-parallel's gradient buckets, which matters on GPUs. Every rank of `process_group` has to call it, in the same
    order among other calls that make groups.

    Args:
        size: Ranks to a group: "world" for all of them, "node" for those of one host, or a number, which has to
            divide their count; consecutive ranks then go together.
        process_group: The ranks to divide; None for all.
        timeout: Of the new group's collectives; None for the backend's default.

    Raises:
        ArgumentError: If torch.distributed is not initialized, or `size` does not fit.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError(
            "new_sync_group: torch.distributed is not initialized; call torch.distributed.init_process_group first"
        )
    ranks: list[int] = dist.get_process_group_ranks(process_group if process_group is not None else dist.group.WORLD)
    parts = _divide(ranks, size, process_group)
    mine = next(part for part in parts if dist.get_rank() in part)
    # By its own ranks alone: where `process_group` is a part of the world, the others do not call.
    group: ProcessGroup = dist.new_group(mine, timeout=timeout, use_local_synchronization=True)
    return group


def gather_objects(value: T, process_group: ProcessGroup | None) -> list[T]:
    """Every rank's value, by rank; pickled, so for what is exchanged once a step at most."""
    values: list[T] = [value] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, group=process_group)
    return values


def lowest_rank(process_group: Group) -> int:
    """The lowest global rank of a group; 0 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    if process_group == LOCAL:
        return dist.get_rank()
    group = dist.group.WORLD if process_group is None else as_process_group(process_group)
    return min(dist.get_process_group_ranks(group))


def group_name(process_group: Group) -> str | None:
    """What stands for a group in a traced graph: its name, "" for the default group, None for this rank alone."""
    if process_group is None:
        return ""
    if process_group == LOCAL:
        return None
    name: str = as_process_group(process_group).group_name
    return name


def group_named(name: str) -> ProcessGroup | None:
    """The group of a name that `group_name` gave; None for the default group."""
    if name == "":
        return None
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


def as_process_group(group: ProcessGroup | DeviceMesh) -> ProcessGroup:
    """The group of a one-dimensional mesh, or the group itself.

    Raises:
        ArgumentError: If the mesh has more dimensions, or it is neither.
    """
    if isinstance(group, str):
        raise ArgumentError(f'process_group: expected a group, a DeviceMesh, "local" or None, got {group!r}')
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            example = f'mesh["{names[0]}"]' if names else 'mesh["dp"], of a mesh with mesh_dim_names'
            raise ArgumentError(
                f"process_group: expected a DeviceMesh of one dimension, got {group.ndim} {tuple(names)}; pass the one "
                f"to synchronize over, {example}"
            )
        return group.get_group()
    return group


def _divide(ranks: list[int], size: int | str, process_group: ProcessGroup | None) -> list[list[int]]:
    if size == "world":
        return [ranks]
    if size == "node":
        hosts = gather_objects(_host_identity(), process_group)
        return [[rank for rank, host in zip(ranks, hosts, strict=True) if host == one] for one in dict.fromkeys(hosts)]
    if not isinstance(size, int) or size < 1 or len(ranks) % size:
        raise ArgumentError(
            f'size: expected "world", "node" or a divisor of the {len(ranks)} ranks, got {size!r}; groups of unequal '
            "size would normalize over unequal batches"
        )
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]


def _host_identity() -> str:
    """One kernel's identity, which containers of one host share and hosts of one name do not."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text() if boot_id.exists() else socket.gethostname()
