from __future__ import annotations

import contextlib
import os
import secrets
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, Self

import torch

from syncbn import native, settings

if sys.platform == "linux":
    import fcntl

LABEL_BYTES = 200  # as in exchange.cpp
FORKED_OUTCOME = 5  # as in exchange.cpp
FORKED = "a forked child is no rank of its parent's process group; start ranks as processes"
Gather = Callable[[list[int]], list[list[int]]]
"""Hands this rank's integers to every rank of the group; returns those of all, by rank."""


class Obstacle(IntEnum):
    """Why a rank cannot take part; sent between ranks."""

    NONE = 0
    SWITCHED_OFF = 1
    NO_NATIVE_LIBRARY = 2
    NO_KERNEL_SUPPORT = 3
    NOT_SHARED = 4

    def __str__(self) -> str:
        return _REASONS[self]


_REASONS = {
    Obstacle.NONE: "ready",
    Obstacle.SWITCHED_OFF: "SYNCBN_SHARED_MEMORY=0",
    Obstacle.NO_NATIVE_LIBRARY: "the native library is not loaded",
    Obstacle.NO_KERNEL_SUPPORT: "needs Linux with memfd_create and pidfd_open (5.3), and a /proc of its own processes",
    Obstacle.NOT_SHARED: "cannot open the memory of the group's first rank: another host, container or user",
}


@dataclass(frozen=True, kw_only=True)
class Absent:
    """A rank that had not arrived when the others gave up.

    Attributes:
        is_gone: Whether its process has ended or has left the group.
    """

    is_gone: bool


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """A rank that had arrived: the label it came with, and how many values it brought."""

    label: str
    num_values: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an all-reduce did not take place.

    Attributes:
        outcome: "refused" means that the ranks had given up in an earlier meeting, which `ranks` then describes.
        ranks: Where each rank of the group was, by rank.
    """

    outcome: Literal["diverged", "not_all_came", "refused"]
    ranks: list[Arrived | Absent]


class SharedMemoryExchange:
    """All-reduce of small float64 payloads between the ranks of one host, in memory that they share.

    Each rank sums the payloads of all in rank order, so that the results are equal bit for bit. Ranks that come with
    different labels or lengths all learn so in that very call. After any failure the exchange refuses every further
    use, on every rank.

    The memory has no name: no file is left, however the ranks end.
    """

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle
        self._finalizer = weakref.finalize(self, torch.ops.syncbn_native.exchange_close, handle)
        self._finalizer.atexit = False  # peers see the process end
        self._all_reduce_sum = torch.ops.syncbn_native.exchange_all_reduce_sum.default

    @classmethod
    def set_up(cls, rank: int, world_size: int, timeout_s: float, gather: Gather) -> Self | list[Obstacle]:
        """Makes the exchange of a group; every rank of it has to call, whether it can take part or not.

        That the ranks share a host is proven, not inferred: each opens the memory of rank 0 through /proc and finds
        there the random number that rank 0 sent through the group. Either all ranks use it or none.

        Args:
            rank: Of this process in the group.
            world_size: Number of ranks in the group.
            timeout_s: How long a call waits for the others.
            gather: A collective of the group; called twice.

        Returns:
            The exchange, or what kept each rank from it, by rank.
        """
        with contextlib.ExitStack() as opened:
            nonce = secrets.randbits(63)
            fd = -1
            obstacle = _own_obstacle()
            if obstacle is Obstacle.NONE and rank == 0:
                try:
                    fd = _create_memory(nonce, world_size)
                    opened.callback(os.close, fd)  # once all have opened it, or have failed to
                except OSError:
                    obstacle = Obstacle.NO_KERNEL_SUPPORT
            namespace = _pid_namespace() if obstacle is Obstacle.NONE else 0
            rows = gather([obstacle, os.getpid(), namespace, fd, nonce])
            if any(row[0] for row in rows):
                return [Obstacle(row[0]) for row in rows]

            exchange: Self | None = None
            try:
                exchange = cls(_attach(rank, rows, timeout_s))
            except (OSError, RuntimeError):  # RuntimeError: the operator's, for a failed mmap
                obstacle = Obstacle.NOT_SHARED
            votes = [Obstacle(vote) for (vote,) in gather([obstacle])]
            return votes if exchange is None or any(votes) else exchange

    def all_reduce_sum(self, payload: torch.Tensor, label: str) -> Failure | None:
        """Sums `payload` over the ranks, in place.

        Args:
            payload: Contiguous float64 tensor on the CPU.
            label: Which meeting this is, at most `LABEL_BYTES`.

        Returns:
            None, or why it did not take place; `payload` is then undefined.
        """
        if self._handle is None:
            raise RuntimeError(FORKED)
        outcome = self._all_reduce_sum(self._handle, payload, label)
        return None if outcome == 0 else self.failure(outcome)

    @property
    def handle(self) -> int | None:
        """Of the operators' exchange; None in a forked child."""
        return self._handle

    def forsake(self) -> None:
        """Ends the use of it in a forked child, where the memory is not mapped, without touching what is shared."""
        self._handle = None
        self._finalizer.detach()

    def failure(self, outcome: int) -> Failure:
        """What the operator's outcome, other than 0, means."""
        where, num_values, labels = torch.ops.syncbn_native.exchange_report(self._handle)
        return Failure(
            outcome=_OUTCOMES[outcome],
            ranks=[
                Arrived(label=label, num_values=num) if arrived == 1 else Absent(is_gone=arrived == 2)
                for arrived, num, label in zip(where, num_values, labels, strict=True)
            ],
        )


# As exchange.cpp numbers them.
_OUTCOMES: dict[int, Literal["diverged", "not_all_came", "refused"]] = {
    1: "diverged",
    2: "not_all_came",
    3: "refused",
}


def _own_obstacle() -> Obstacle:
    if not settings.shared_memory():
        return Obstacle.SWITCHED_OFF
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        return Obstacle.NO_KERNEL_SUPPORT
    if not native.available():
        return Obstacle.NO_NATIVE_LIBRARY
    try:
        # A /proc of another PID namespace would lead to other processes' files.
        sees_itself = os.readlink("/proc/self") == str(os.getpid())
        os.close(os.pidfd_open(os.getpid()))
        _pid_namespace()
    except OSError:
        return Obstacle.NO_KERNEL_SUPPORT
    return Obstacle.NONE if sees_itself else Obstacle.NO_KERNEL_SUPPORT


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _create_memory(nonce: int, world_size: int) -> int:
    fd = os.memfd_create(_memory_name(nonce), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # Allocated now: writing to memory that is promised but not there would be a SIGBUS.
        os.posix_fallocate(fd, 0, torch.ops.syncbn_native.exchange_bytes(world_size))
        os.pwrite(fd, _nonce_bytes(nonce), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _attach(rank: int, rows: list[list[int]], timeout_s: float) -> int:
    """Maps rank 0's memory; returns the handle of the exchange."""
    _, first_pid, first_namespace, first_fd, nonce = rows[0]
    if any(namespace != first_namespace for _, _, namespace, _, _ in rows):
        raise OSError("the ranks are in different PID namespaces")
    path = f"/proc/{first_pid}/fd/{first_fd}"
    # Looked at before it is opened: on another host this could be any file of any process.
    if not os.readlink(path).startswith(f"/memfd:{_memory_name(nonce)}"):
        raise OSError(f"{path} is not the memory of this group")
    with contextlib.ExitStack() as opened:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        opened.callback(os.close, fd)
        if os.pread(fd, len(_nonce_bytes(nonce)), 0) != _nonce_bytes(nonce):
            raise OSError(f"{path} does not hold this group's number")
        with contextlib.ExitStack() as watched:
            pidfds = [-1] * len(rows)
            for peer, (_, pid, *_) in enumerate(rows):
                if peer != rank:
                    pidfds[peer] = os.pidfd_open(pid)
                    watched.callback(os.close, pidfds[peer])
            handle: int = torch.ops.syncbn_native.exchange_open(fd, rank, len(rows), timeout_s, pidfds)
            watched.pop_all()  # the exchange's own from here on
    return handle


def _memory_name(nonce: int) -> str:
    return f"syncbn-{nonce:016x}"


def _nonce_bytes(nonce: int) -> bytes:
    return nonce.to_bytes(8, "little")
