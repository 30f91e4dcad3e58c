"""What the training engine costs over a script written by hand: samples a second, two processes, CPU.

    python -m benchmarks.engine_throughput
    python -m benchmarks.engine_throughput --quick   # a few steps; nothing is written

The engine takes the steps of a job as it does in the service: samples from its loader, checks, metrics of every step
sent over a socket, diagnostics on, everything else at its default. The script is what a user of torchrun writes: the
same model with our SyncBatchNorm under DistributedDataParallel, the same optimizer, schedule and batches from tensors
in memory, and nothing else: no metrics, no checks.

First the losses of both are compared, so that they are known to do the same work. Then they take turns in the same two
processes, one thread each, round after round; a turn is one step to warm up and some timed ones, of which the slower
rank's time counts. Ratios are of one round.
"""

import argparse
import gc
import socket
import statistics
import subprocess
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmarks import results
from service.domain.journal import Metrics
from service.domain.spec import JobSpec
from service.training.channel import Channel
from service.training.data import InMemorySource, build_dataset
from service.training.models import build_model
from service.training.optimization import learning_rate_factor
from service.training.sampling import SampleOrder
from service.training.tasks import build_task
from service.training.trainer import Trainer, wrap
from service.training.world import World
from syncbn import convert_sync_batchnorm
from tests.ranks import run_ranks

NUM_RANKS = 2
TARGET = 0.97  # engine over script
NUM_COMPARED = 5
# Of the first losses, in float32: the same sums in another order.
LOSS_TOLERANCE = 1e-4

JOBS: dict[str, dict[str, Any]] = {
    "small-resnet, 16": {"model": {"factory": "builtin:small-resnet"}, "batch": {"size": 16}},
    "small-resnet, 64": {"model": {"factory": "builtin:small-resnet"}, "batch": {"size": 64}},
    "resnet18, 8": {"model": {"factory": "builtin:resnet18", "args": {"stem": "cifar"}}, "batch": {"size": 8}},
    "resnet18, 32": {"model": {"factory": "builtin:resnet18", "args": {"stem": "cifar"}}, "batch": {"size": 32}},
}


class Engine:
    """A rank of the service's training, without its checkpoints."""

    def __init__(self, spec: JobSpec, world: World) -> None:
        dataset = build_dataset(spec.dataset, seed=spec.seed)
        self._trainer = Trainer(spec=spec, dataset=dataset, task=build_task(spec.task), world=world)
        self._trainer.settle()
        ours, theirs = socket.socketpair()
        self._reader = subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL)
        theirs.close()
        self._channel = Channel(ours.detach())
        self._reports = world.rank == 0

    def step(self) -> float:
        """Take a step and report it; return the loss of the mini-batch."""
        result = self._trainer.step(stop=self._channel.stop_requested())
        if self._reports:
            self._channel.send_soon(Metrics.of(self._trainer.steps_done, result.metrics))
        return result.loss

    def close(self) -> None:
        """End what it started."""
        self._trainer.close()
        self._channel.close()
        self._reader.wait()


class Script:
    """What a user of torchrun writes."""

    def __init__(self, spec: JobSpec, world: World) -> None:
        dataset = build_dataset(spec.dataset, seed=spec.seed)
        assert isinstance(dataset.training, InMemorySource)
        self._spec = spec
        self._images, self._labels = dataset.training.inputs.float(), dataset.training.targets
        model = build_model(spec.model, input_shape=(1, 8, 8), num_outputs=10, task="classification", seed=spec.seed)
        self._network = wrap(convert_sync_batchnorm(model), world, finds_unused=False)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=spec.optimizer.learning_rate, momentum=0.9, fused=True)
        self._order = SampleOrder(num_samples=len(self._labels), batch_size=spec.batch.size, seed=spec.seed)
        share = spec.batch.size // world.size
        self._mine = slice(world.rank * share, (world.rank + 1) * share)
        self._step = 0

    def step(self) -> torch.Tensor:
        """Take a step; return the loss of this rank's samples."""
        rows = torch.from_numpy(self._order.minibatch(self._step)[self._mine].copy())
        loss = F.cross_entropy(self._network(self._images[rows]), self._labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        assert self._spec.steps is not None
        self._optimizer.param_groups[0]["lr"] = self._spec.optimizer.learning_rate * learning_rate_factor(
            self._spec.schedule, step=self._step, num_steps=self._spec.steps
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._step += 1
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.4, help="about how long a turn takes")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 2, 0.05
    cells = [measure(name, arguments.rounds, arguments.seconds) for name in JOBS]
    header = ["job", "engine, samples/s", "script, samples/s", "ratio, median", "quartiles"]
    rows = [
        [
            cell["job"],
            f"{cell['size'] / statistics.median(cell['engine_s']):.0f}",
            f"{cell['size'] / statistics.median(cell['script_s']):.0f}",
            f"{cell['ratio']:.3f}",
            "{:.3f}–{:.3f}".format(*cell["quartiles"]),
        ]
        for cell in cells
    ]
    report = results.table(header, rows) + f"\n\nTarget: a ratio of at least {TARGET}."
    if arguments.quick:
        print(report)
        return
    configuration = {"ranks": NUM_RANKS, "threads": 1, **vars(arguments)}
    results.record("engine_throughput", {"configuration": configuration, "cells": cells}, report)


def measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Seconds a step of both, by round, and the engine's samples a second over the script's."""
    common = {"name": "throughput", "dataset": {"factory": "builtin:digits"}, "workers": NUM_RANKS, "steps": 10**6}
    spec = JobSpec.model_validate({**common, **JOBS[name]})
    of_ranks = run_ranks(
        NUM_RANKS, _times_of_rank, spec.model_dump_json(), rounds, seconds, timeout_s=120 + rounds * seconds * 10
    )
    engine_s, script_s = ([max(times) for times in zip(*of_way, strict=True)] for of_way in zip(*of_ranks, strict=True))
    ratios = [script / engine for engine, script in zip(engine_s, script_s, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4)
    return {
        "job": name,
        "size": spec.batch.size,
        "engine_s": engine_s,
        "script_s": script_s,
        "ratio": statistics.median(ratios),
        "quartiles": [first, third],
    }


def _times_of_rank(rank: int, spec_json: str, rounds: int, seconds: float) -> tuple[list[float], list[float]]:
    spec = JobSpec.model_validate_json(spec_json)
    world = World(rank=rank, size=NUM_RANKS, device=torch.device("cpu"))
    engine, script = Engine(spec, world), Script(spec, world)
    _check(engine, script, world)
    started = time.perf_counter()
    script.step()
    num_steps = max(3, round(world.sum([seconds / (time.perf_counter() - started)])[0] / NUM_RANKS))
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for turn in range(rounds):
        for way in (0, 1) if turn % 2 else (1, 0):
            step = (engine.step, script.step)[way]
            dist.barrier()
            step()
            began = time.perf_counter()
            for _ in range(num_steps):
                step()
            times[way].append((time.perf_counter() - began) / num_steps)
        gc.collect()
    gc.enable()
    engine.close()
    return times


def _check(engine: Engine, script: Script, world: World) -> None:
    for _ in range(NUM_COMPARED):
        ours, theirs = engine.step(), world.sum([float(script.step())])[0] / NUM_RANKS
        assert abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs), (ours, theirs)


if __name__ == "__main__":
    main()
