"""What synchronizing costs a whole training step: a ResNet-20 under DistributedDataParallel, two processes, CPU.

    python -m benchmarks.resnet_ddp
    python -m benchmarks.resnet_ddp --quick   # a few steps; nothing is written

Steps (forward, backward with DDP's all-reduce of the gradients, SGD with momentum) of the same network with

- local: `nn.BatchNorm2d`, which does not synchronize,
- ours,
- ours through gloo: `SYNCBN_SHARED_MEMORY=0`, as between hosts,
- detectron2's `NaiveSyncBatchNorm`.

First the gradients of every synchronized network are compared with those of `nn.BatchNorm2d` on the whole batch in one
process. Then the networks take turns in the same two processes, one thread each, round after round; a turn is one step
to warm up and a few timed ones, of which the slower rank's mean counts. Ratios are to the local network in the same
round: geometric mean and median over the rounds. Buffers are not broadcast in any of them.
"""

import argparse
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import results
from benchmarks.backends import backends
from benchmarks.peers import Step, detectron2_naive
from syncbn import SyncBatchNorm
from syncbn.collectives import all_reduce_sum
from tests.ranks import run_ranks

NUM_RANKS = 2
LOCAL = "local"
OURS = "ours"
TARGET = 1.15  # ours over local
# Relative, of all gradients together. Where rounding turns one ReLU on or off it is 1e-3 to 3e-3 (1e-6 otherwise);
# without synchronization it is over 0.5.
GRADIENT_TOLERANCE = 1e-2


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Halves the extent where the stride is 2."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def resnet20(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """For images of 32 × 32 (He et al. 2016, section 4.2), with projections: 21 norms; the same weights every time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(inplace=True)]
    inputs = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for position in range(3):
            layers.append(Block(inputs, outputs, stride if position == 0 else 1, norm))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """detectron2's, in training; see `benchmarks.peers`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes over the default group."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return detectron2_naive(
            Step(x, self.weight, self.bias, self.running_mean, self.running_var, group=dist.group.WORLD)
        )


class Trainer:
    """One network, its optimizer, and this rank's batch."""

    def __init__(self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        with warnings.catch_warnings():  # of its new name, which older versions of torch do not know
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
            self.network = DistributedDataParallel(network, broadcast_buffers=False)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        self.images, self.labels = images, labels

    def step(self) -> None:
        """Forward, backward, update."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self) -> None:
        """Leaves the gradient of the whole batch's mean loss in the parameters."""
        F.cross_entropy(self.network(self.images), self.labels).backward()  # type: ignore[no-untyped-call]


class Ratios(NamedTuple):
    """A network's step time.

    Attributes:
        median_s: Of a step.
        geometric_mean: Over rounds, of its time over the local network's.
        median: Of the same.
    """

    median_s: float
    geometric_mean: float
    median: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 4, 8], help="of each rank, per step")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=4, help="timed steps in a turn")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.rounds, arguments.steps = [2], 2, 1
    measured = {samples: measure(samples, arguments.rounds, arguments.steps) for samples in arguments.samples}
    report = table(measured)
    if arguments.quick:
        print(report)
        return
    configuration = {"ranks": NUM_RANKS, "threads": 1, "kernels": backends()[0], **vars(arguments)}
    cells = [
        {"samples_per_rank": samples, "networks": {name: ratios._asdict() for name, ratios in networks.items()}}
        for samples, networks in measured.items()
    ]
    results.record("resnet_ddp", {"configuration": configuration, "cells": cells}, report)


def measure(samples: int, rounds: int, steps: int) -> dict[str, Ratios]:
    """Every network's times, the local one first."""
    timeout_s = 60 + rounds * (steps + 1) * 4.0
    of_ranks = run_ranks(NUM_RANKS, times_of_rank, samples, rounds, steps, timeout_s=timeout_s)
    times_s = {
        name: [max(times) for times in zip(*(rank[name] for rank in of_ranks), strict=True)] for name in of_ranks[0]
    }
    local_s = times_s[LOCAL]
    return {
        name: Ratios(
            median_s=statistics.median(times),
            geometric_mean=statistics.geometric_mean(t / local for t, local in zip(times, local_s, strict=True)),
            median=statistics.median(t / local for t, local in zip(times, local_s, strict=True)),
        )
        for name, times in times_s.items()
    }


def times_of_rank(rank: int, samples: int, rounds: int, steps: int) -> dict[str, list[float]]:
    """Mean seconds of a step in each round, by network."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NUM_RANKS * samples, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (NUM_RANKS * samples,), generator=generator)
    mine = slice(rank * samples, (rank + 1) * samples)
    trainers = {name: Trainer(resnet20(norm), images[mine], labels[mine]) for name, norm in norms().items()}
    check(trainers, images, labels)
    times_s: dict[str, list[float]] = {name: [] for name in trainers}
    gc.disable()
    for turn in range(rounds):
        names = list(trainers)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            trainer = trainers[name]
            dist.barrier()
            trainer.step()
            started = time.perf_counter()
            for _ in range(steps):
                trainer.step()
            times_s[name].append((time.perf_counter() - started) / steps)
    gc.enable()
    return times_s


def norms() -> dict[str, Callable[[int], nn.Module]]:
    """What makes the norms of each network; a group is first used here, which decides how it reduces for good."""
    groups = {}
    for name, setting in ((OURS, "1"), ("ours through gloo", "0")):
        groups[name] = dist.new_group()
        os.environ["SYNCBN_SHARED_MEMORY"] = setting
        all_reduce_sum(torch.zeros(1, dtype=torch.float64), groups[name], "first use")
        del os.environ["SYNCBN_SHARED_MEMORY"]
    ours = {name: partial(SyncBatchNorm, process_group=group) for name, group in groups.items()}
    return {LOCAL: nn.BatchNorm2d, **ours, "detectron2 Naive": NaiveSyncBatchNorm}


def check(trainers: dict[str, Trainer], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Compares the gradients of every network but the local one with those of one process on the whole batch."""
    whole = resnet20(nn.BatchNorm2d)
    F.cross_entropy(whole(images), labels).backward()  # type: ignore[no-untyped-call]
    expected = _gradients(whole)
    for name, trainer in trainers.items():
        trainer.backward()
        error = ((_gradients(trainer.network) - expected).norm() / expected.norm()).item()
        assert name == LOCAL or error <= GRADIENT_TOLERANCE, f"{name}: gradients {error:.1e} off"
        trainer.optimizer.zero_grad()


def _gradients(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


def table(measured: dict[int, dict[str, Ratios]]) -> str:
    """A row for each size of the batch."""
    names = list(next(iter(measured.values())))
    header = ["samples a rank", *(f"{name}, ms" for name in names)]
    header += [f"{name} / {LOCAL}" + (f" (≤ {TARGET:g})" if name == OURS else "") for name in names[1:]]
    rows = [
        [str(samples), *(f"{networks[name].median_s * 1e3:.1f}" for name in names)]
        + [f"{networks[name].geometric_mean:.2f}× (median {networks[name].median:.2f}×)" for name in names[1:]]
        for samples, networks in measured.items()
    ]
    return results.table(header, rows)


if __name__ == "__main__":
    main()
