from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
import zlib
from collections import defaultdict
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import torch
import torch.distributed as dist

from syncbn import settings
from syncbn.errors import ArgumentError, CollectiveError, DivergenceError
from syncbn.groups import as_process_group
from syncbn.kernels import Meetings
from syncbn.shared_memory import (
    FORKED,
    FORKED_OUTCOME,
    LABEL_BYTES,
    Absent,
    Arrived,
    Failure,
    Obstacle,
    SharedMemoryExchange,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger("syncbn")


def resolve_group(process_group: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """Finds the group to synchronize over; None where this process has no peers.

    Args:
        process_group: The layer's group, a one-dimensional mesh, or None for the default group as it is at the time
            of the call.

    Raises:
        ArgumentError: If `process_group` was given but torch.distributed is not initialized, if this process is not a
            member of it, if it was destroyed, or if it is a mesh of more dimensions.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ArgumentError(
                "process_group: a group was given, but torch.distributed is not initialized (or was shut down); "
                "call torch.distributed.init_process_group first, or pass process_group=None to normalize locally"
            )
        return None
    if process_group is None:
        process_group = dist.group.WORLD
        assert process_group is not None
    elif not isinstance(process_group, dist.ProcessGroup):
        process_group = as_process_group(process_group)
    return process_group if len(_peers_of(process_group).ranks) > 1 else None


def all_reduce_sum(payload: torch.Tensor, group: ProcessGroup | None, label: str) -> None:
    """Sums `payload` over the group, in place; does nothing where there are no peers.

    Float64 payloads on the CPU go through memory that the ranks share, where the group's CPU backend is gloo and all
    of its ranks are on one host; all others through torch.distributed. The group's own timeout bounds the wait either
    way (as it was at the group's first payload, in shared memory).

    Args:
        payload: Contiguous tensor of the same shape on every rank; undefined after an error.
        group: What `resolve_group` returned.
        label: Which meeting this is, such as "forward of backbone.bn1 (64 channels, torch.float32)"; the same on
            every rank.

    Raises:
        DivergenceError: If ranks came with different labels or lengths. Through torch.distributed that is only
            noticed in debug mode (SYNCBN_DEBUG=1 on every rank), which costs a second collective.
        CollectiveError: If a rank ended or did not come in time, or the backend reports another failure.
    """
    if group is None:
        return
    peers, label = _peers_of(group), _fitting(label)
    try:
        if payload.is_cpu and payload.dtype is torch.float64:
            if not peers.has_decided:
                _decide(group, peers, label)
            if peers.exchange is not None:
                failure = peers.exchange.all_reduce_sum(payload, label)
                if failure is not None:
                    raise _error(failure, peers, label, payload.numel())
                return
        if settings.debug():
            _compare_labels(payload, group, peers, label)
        # Held until the next one: a worker thread of gloo that outlived all other references would free the tensor's
        # Python object, for which it needs the interpreter, which at the process's end is gone.
        peers.reduced_last = payload
        dist.all_reduce(payload, op=dist.ReduceOp.SUM, group=group)
    except CollectiveError:
        raise
    except RuntimeError as error:
        via = "shared memory" if peers.exchange is not None else dist.get_backend(group)
        raise CollectiveError(_message(peers, label, via, payload.numel(), f"{error}. {_USUAL_CAUSES}")) from error


def meetings_in_shared_memory(group: ProcessGroup, forward: str, backward: str) -> Meetings | None:
    """Where an operator can do what `all_reduce_sum` would for float64 payloads on the CPU; None where it cannot.

    Every rank has to come to its next payload by this call or by `all_reduce_sum`.

    Args:
        group: What `resolve_group` returned.
        forward: The label for `all_reduce_sum` in the forward.
        backward: In the backward.

    Raises:
        CollectiveError: If the ranks could not agree how to reduce.
    """
    peers = _peers_of(group)
    if not peers.has_decided:
        _decide(group, peers, _fitting(forward))
    handle = None if peers.exchange is None else peers.exchange.handle
    return None if handle is None else Meetings(handle, _fitting(forward), _fitting(backward))


def is_before_first_meeting(group: ProcessGroup) -> bool:
    """Whether the group's ranks have yet to agree how to reduce, which is itself a meeting."""
    return not _peers_of(group).has_decided


def raise_exchange_failure(handle: int, outcome: int, label: str, num_values: int) -> NoReturn:
    """Raises what `all_reduce_sum` would have raised in the place of an operator that got this outcome."""
    if outcome == FORKED_OUTCOME:
        raise CollectiveError(f"the all-reduce of {label} failed: {FORKED}")
    peers = _peers_of(group_of_exchange(handle))
    assert peers.exchange is not None
    raise _error(peers.exchange.failure(outcome), peers, label, num_values)


def group_of_exchange(handle: int) -> ProcessGroup:
    """The group that `meetings_in_shared_memory` gave this handle for.

    Raises:
        ArgumentError: If it was destroyed.
    """
    with _new_groups:
        for group, peers in _peers.items():
            if peers.exchange is not None and peers.exchange.handle == handle:
                return group
    raise ArgumentError(_DESTROYED)


_USUAL_CAUSES = (
    "Usual causes: another rank ended or raised (look at its log first); the ranks ran different layers or channel "
    "counts; requires_grad of the layer's input and parameters, or the use of its output in the loss, differed "
    "between ranks (SYNCBN_DEBUG=1 on every rank tells which)"
)
_DIVERGENCE_CAUSES = (
    "Every rank has to run the same layers with the same channel counts in the same order, forward and backward; look "
    "for a branch that depends on the rank or its data, for requires_grad that differs, or for an output that only "
    "some ranks use in the loss"
)


class _Peers:
    """What is known of a group for as long as it exists.

    Attributes:
        name: What torch calls it.
        ranks: Global ranks of the members, by their rank in the group.
        rank: Of this process in the group.
        world: The default group at the time, whose end is that of all groups.
        exchange: In shared memory; None before it has been decided on, and where there is none.
        has_decided: Whether the ranks have agreed on that.
        reduced_last: The last payload that went through torch.distributed.
        deciding: Held by the thread that decides.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.name: str = group.group_name
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.rank: int = group.rank()
        self.world = weakref.ref(dist.group.WORLD)
        self.exchange: SharedMemoryExchange | None = None
        self.has_decided = False
        self.reduced_last: torch.Tensor | None = None
        self.deciding = threading.Lock()


# A group must not be kept alive from here: its exchange ends when `destroy_process_group`, and every layer that holds
# the group, have let go of it. A peer that waits for one that left meanwhile does so until the group's timeout.
_peers: weakref.WeakKeyDictionary[ProcessGroup, _Peers] = weakref.WeakKeyDictionary()
_new_groups = threading.Lock()  # held where `_peers` grows or is walked


def _forsake_exchanges() -> None:
    for peers in _peers.values():
        if peers.exchange is not None:
            peers.exchange.forsake()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forsake_exchanges)


def _peers_of(group: ProcessGroup) -> _Peers:
    if not isinstance(group, dist.ProcessGroup):  # torch's constant for "not a member"
        raise ArgumentError(
            f"process_group: global rank {dist.get_rank()} is not a member of it; give every rank a group that "
            "contains it"
        )
    peers = _peers.get(group)
    if peers is None:
        with _new_groups:
            peers = _peers[group] = _new_peers(group)
    if peers.world() is not dist.group.WORLD:
        raise ArgumentError(_DESTROYED)
    return peers


_DESTROYED = (
    "process_group: it was destroyed, or belongs to an earlier init_process_group; make the group again and give it "
    "to the layers"
)


def _new_peers(group: ProcessGroup) -> _Peers:
    try:
        return _Peers(group)
    except (KeyError, ValueError, RuntimeError) as error:  # torch knows the groups that are not destroyed
        raise ArgumentError(_DESTROYED) from error


def _decide(group: ProcessGroup, peers: _Peers, label: str) -> None:
    with peers.deciding:
        if peers.has_decided:
            return
        timeout_s = _gloo_timeout_s(group)
        if timeout_s is None:
            _log.debug("group %s: its CPU backend is not gloo, so it reduces itself", peers.name)
        else:
            try:
                _set_up_exchange(group, peers, timeout_s)
            except RuntimeError as error:
                raise CollectiveError(
                    f"the ranks could not agree how to reduce before the {label}, the group's first meeting; on "
                    f"{_names(peers, [peers.rank])} of {len(peers.ranks)}: {error}. {_USUAL_CAUSES}"
                ) from error
        peers.has_decided = True


def _set_up_exchange(group: ProcessGroup, peers: _Peers, timeout_s: float) -> None:
    def gather(values: list[int]) -> list[list[int]]:
        mine = torch.tensor(values, dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in peers.ranks]
        dist.all_gather(rows, mine, group=group)
        return [row.tolist() for row in rows]

    made = SharedMemoryExchange.set_up(peers.rank, len(peers.ranks), timeout_s, gather)
    if isinstance(made, SharedMemoryExchange):
        peers.exchange = made
        _log.debug("group %s: its %d ranks reduce in shared memory", peers.name, len(peers.ranks))
        return
    ranks_of: dict[Obstacle, list[int]] = defaultdict(list)
    for rank, obstacle in enumerate(made):
        if obstacle is not Obstacle.NONE:
            ranks_of[obstacle].append(rank)
    reasons = "; ".join(f"{_names(peers, ranks)}: {obstacle}" for obstacle, ranks in ranks_of.items())
    _log.info("group %s: reduces through gloo, not in shared memory (%s)", peers.name, reasons)


def _gloo_timeout_s(group: ProcessGroup) -> float | None:
    """The timeout of the group's collectives on the CPU; None where these are not gloo's."""
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # as of a group for GPUs alone
        return None
    if backend.name() != "gloo":
        return None
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    timeout = getattr(getattr(backend, "options", None), "_timeout", dist.default_pg_timeout)
    seconds: float = timeout.total_seconds()
    return seconds


_Meeting: TypeAlias = "tuple[str, int]"  # label, number of values


def _compare_labels(payload: torch.Tensor, group: ProcessGroup, peers: _Peers, label: str) -> None:
    header = payload.numel().to_bytes(_LENGTH_BYTES, "little") + label.encode().ljust(LABEL_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(payload.device)
    rows = [torch.empty_like(mine) for _ in peers.ranks]
    dist.all_gather(rows, mine, group=group)
    headers = [bytes(row.tolist()) for row in rows]
    if len(set(headers)) > 1:
        raise _divergence([_meeting(header) for header in headers], peers)


_LENGTH_BYTES = 8


def _meeting(header: bytes) -> _Meeting:
    return header[_LENGTH_BYTES:].rstrip(b"\0").decode(), int.from_bytes(header[:_LENGTH_BYTES], "little")


@functools.lru_cache(maxsize=4096)  # a training step comes with the same ones
def _fitting(label: str) -> str:
    """The label in at most LABEL_BYTES; one that is too long keeps its ends and gets a checksum of the whole."""
    if label.isascii() and len(label) <= LABEL_BYTES:
        return label
    text = label.encode()
    if len(text) <= LABEL_BYTES:
        return label
    start, end = text[:60].decode(errors="ignore"), text[-120:].decode(errors="ignore")
    return f"{start}…{end} #{zlib.crc32(text):08x}"


def _error(failure: Failure, peers: _Peers, label: str, num_values: int) -> CollectiveError:
    meetings = {
        rank: (where.label, where.num_values) for rank, where in enumerate(failure.ranks) if isinstance(where, Arrived)
    }
    gone = [rank for rank, where in enumerate(failure.ranks) if where == Absent(is_gone=True)]
    late = [rank for rank, where in enumerate(failure.ranks) if where == Absent(is_gone=False)]
    if failure.outcome == "diverged":
        return _divergence([meetings[rank] for rank in range(len(peers.ranks))], peers)
    what = []
    if failure.outcome == "refused":
        what.append(
            "an earlier exchange failed, after which none works on this group (restart, or give the layers a group "
            "from syncbn.new_sync_group)"
        )
    if gone:
        what.append(f"{_names(peers, gone)} ended or left the group")
    if late:
        what.append(f"{_names(peers, late)} did not come in time")
    if not what:  # a rank came after the others had given up, and before this one looked
        what.append("not every rank came in time")
    what.append(f"there: {_places(meetings, peers)}")
    return CollectiveError(_message(peers, label, "shared memory", num_values, f"{', '.join(what)}. {_USUAL_CAUSES}"))


def _divergence(meetings: list[_Meeting], peers: _Peers) -> DivergenceError:
    return DivergenceError(
        f"the ranks have diverged: {_places(dict(enumerate(meetings)), peers)}. {_DIVERGENCE_CAUSES}"
    )


def _places(meetings: dict[int, _Meeting], peers: _Peers) -> str:
    ranks_at: dict[_Meeting, list[int]] = defaultdict(list)
    for rank, meeting in meetings.items():
        ranks_at[meeting].append(rank)
    return "; ".join(
        f"{_names(peers, ranks)} in the {label} with {num_values} values"
        for (label, num_values), ranks in ranks_at.items()
    )


def _message(peers: _Peers, label: str, via: str, num_values: int, what: str) -> str:
    return (
        f"the all-reduce of {label} failed on {_names(peers, [peers.rank])} of {len(peers.ranks)} "
        f"({via}, {num_values} values): {what}"
    )


def _names(peers: _Peers, ranks: list[int]) -> str:
    """Ranks of a group by their global ranks, which logs and launchers go by."""
    listed = ", ".join(str(peers.ranks[rank]) for rank in ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
