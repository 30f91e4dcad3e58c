"""The process group of an attempt, seen from one of its ranks."""

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Self, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from service.domain.batch_plan import BatchPlan
from service.domain.rank_protocol import RankTask
from service.training.errors import CollectiveFailed, DeviceMissing
from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import CollectiveError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks that train together; a world of one has a process group too.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        device: where this rank computes.
        group: their process group; None for the default one.
        timeout: how long to wait for peers.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(seconds=60)
    _groups: dict[tuple[int, ...], dist.ProcessGroup | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def join(cls, task: RankTask) -> Self:
        """Meet the other ranks.

        Raises:
            DeviceMissing: the job asks for a GPU that is not there.
            CollectiveFailed: a rank did not come in time.
        """
        device = _choose_device(task.spec.resources.gpus_per_rank)
        if task.interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = task.interface
        timeout = timedelta(seconds=task.collective_timeout_s)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                task.rendezvous_host,
                task.rendezvous_port,
                task.world_size,
                is_master=task.rank == 0,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=task.rendezvous_fd,
            )
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "nccl",
                store=store,
                rank=task.rank,
                world_size=task.world_size,
                timeout=timeout,
            )
        except RuntimeError as error:
            raise CollectiveFailed(
                f"rank {task.rank} of {task.world_size} could not meet the others at "
                f"{task.rendezvous_host}:{task.rendezvous_port} within {task.collective_timeout_s:g} s: {error}"
            ) from error
        return cls(rank=task.rank, size=task.world_size, device=device, timeout=timeout)

    def await_all(self) -> None:
        """Wait until every rank has done its work.

        The process group is left to the end of the process: its destructor joins a thread that may want the GIL, which
        DDP holds where it drops the last reference (torch 2.13; one in fifty processes hung).

        Raises:
            RuntimeError: a rank went away instead.
        """
        dist.barrier()

    def seed(self, seed: int) -> None:
        """Seed this rank's default random generators.

        ``torch.manual_seed`` does that too, but where CUDA is not in use it notes each call down with its stack, for
        the day that it may be: half a millisecond and some memory every time.
        """
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up values over the ranks, in float64."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        return [float(total) for total in self.sum_tensor(totals).tolist()]

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Add up a contiguous tensor over the ranks, in place, and return it.

        Float64 on the CPUs of one host goes through memory that the ranks share: 10 µs instead of 400.
        """
        all_reduce_sum(values, resolve_group(self.group), "the sums of the ranks")
        return values

    def gather(self, value: T) -> list[T]:
        """Collect an object that pickles from every rank, by rank."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

    def make_groups(self, plan: BatchPlan) -> None:
        """Make the process groups of a plan, unless they are there.

        Every rank that met at the start calls it together, those outside of this world too.
        """
        if plan.group_sizes in self._groups:
            return
        if plan.num_groups == 1:
            self._groups[plan.group_sizes] = self.group
            return
        groups = [dist.new_group(ranks, timeout=self.timeout) for ranks in plan.groups]
        self._groups[plan.group_sizes] = groups[plan.group_of(self.rank)] if self.rank < plan.world_size else None

    def group_of(self, plan: BatchPlan) -> dist.ProcessGroup | None:
        """Return the ranks that normalize together with this one; None for the default group."""
        return self._groups[plan.group_sizes]

    def first_ranks(self, size: int, plans: Iterable[BatchPlan]) -> "World | None":
        """Return the world of the first ``size`` ranks; None on the others. All ranks call it together.

        Args:
            size: number of ranks.
            plans: what that world may follow.
        """
        part = replace(self, size=size, group=dist.new_group(range(size), timeout=self.timeout), _groups={})
        for plan in plans:
            part.make_groups(plan)
        return part if self.rank < size else None

    def take_buffers_of_first_rank(self, module: nn.Module) -> None:
        """Overwrite every buffer of a module with rank 0's."""
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0, group=self.group)


def is_collective_failure(error: BaseException) -> bool:
    """Tell whether an error came from the exchange with other ranks.

    DDP hands on what gloo raises, a plain ``RuntimeError``; only its text names the source file.
    """
    if isinstance(error, CollectiveFailed | CollectiveError | dist.DistError):
        return True
    return type(error) is RuntimeError and "/gloo/" in str(error)


def _choose_device(gpus_per_rank: int) -> torch.device:
    if gpus_per_rank == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceMissing(
            f"resources.gpus_per_rank is {gpus_per_rank}, but torch {torch.__version__} sees no CUDA device here. "
            "Install a CUDA build of torch on the nodes, or set gpus_per_rank: 0."
        )
    torch.cuda.set_device(0)
    # Without these a float32 result depends on the algorithm that a shape happens to get.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda", 0)
