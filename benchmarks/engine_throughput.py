"""What the training engine costs over a script written by hand: samples a second, two processes, CPU.

    python -m benchmarks.engine_throughput
    python -m benchmarks.engine_throughput --quick   # a few steps; nothing is written

The engine runs a job in the processes that the service would start, with metrics reported every step, diagnostics on,
and everything else at its default. The script is what a user of torchrun writes: the same model with our SyncBatchNorm
under DistributedDataParallel, the same optimizer, schedule and batch from tensors in memory, and nothing else: no
metrics, no clipping, no checks.

Runs of the two take turns; of each, the time between two late steps counts, not the start. First the losses of both
are compared, so that they are known to do the same work.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import results
from service.domain.journal import Metrics
from service.domain.spec import JobSpec
from service.training.data import InMemorySource, build_dataset
from service.training.models import build_model
from service.training.optimization import learning_rate_factor
from service.training.sampling import SampleOrder
from syncbn import convert_sync_batchnorm
from tests.integration.training.gang import Gang
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="about how long each run is timed")
    parser.add_argument("--quick", action="store_true", help="a few steps; nothing is written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 0.5
    cells = [measure(name, arguments.rounds, arguments.seconds) for name in JOBS]
    header = ["job", "engine, samples/s", "script, samples/s", "ratio, median", "lowest", "highest"]
    rows = [
        [
            cell["job"],
            f"{statistics.median(cell['engine']):.0f}",
            f"{statistics.median(cell['script']):.0f}",
            f"{cell['ratio']:.3f}",
            f"{min(cell['ratios']):.3f}",
            f"{max(cell['ratios']):.3f}",
        ]
        for cell in cells
    ]
    report = results.table(header, rows) + f"\n\nTarget: a ratio of at least {TARGET}."
    if arguments.quick:
        print(report)
        return
    results.record(
        "engine_throughput", {"configuration": {"ranks": NUM_RANKS, **vars(arguments)}, "cells": cells}, report
    )


def measure(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Samples a second of both, by round."""
    first = 20
    spec = _spec(name, steps=first + 20)
    losses_of_engine, rate = _engine(spec, first)
    losses_of_script, _ = _script(spec, first)
    for ours, theirs in zip(losses_of_engine[:NUM_COMPARED], losses_of_script[:NUM_COMPARED], strict=True):
        assert abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs), (losses_of_engine[:5], losses_of_script[:5])
    spec = _spec(name, steps=first + max(20, round(seconds * rate / spec.batch.size)))
    rates: dict[str, list[float]] = {"engine": [], "script": []}
    for turn in range(rounds):
        for way in (_engine, _script) if turn % 2 else (_script, _engine):
            rates[way.__name__[1:]].append(way(spec, first)[1])
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["script"], strict=True)]
    return {"job": name, **rates, "ratios": ratios, "ratio": statistics.median(ratios), "steps": spec.steps}


def _spec(name: str, *, steps: int) -> JobSpec:
    common = {"name": "throughput", "dataset": {"factory": "builtin:digits"}, "workers": NUM_RANKS, "steps": steps}
    return JobSpec.model_validate({**common, "checkpoint": {"every_steps": 10**9}, **JOBS[name]})


def _engine(spec: JobSpec, first: int) -> tuple[list[float], float]:
    """Losses, and samples a second from step ``first`` to the last."""
    assert spec.steps is not None
    with (
        tempfile.TemporaryDirectory() as directory,
        Gang(spec, world_size=NUM_RANKS, staging_dir=Path(directory)) as gang,
    ):
        gang.wait_for_step(first)
        started = time.perf_counter()
        gang.deadline_s = 600.0
        gang.wait_for_step(spec.steps)
        took_s = time.perf_counter() - started
        gang.wait_for_the_end()
        losses = gang.ranks[0].curve("train/loss")
        seen = max(message.step for message in gang.ranks[0].of(Metrics))
    assert seen == spec.steps
    return losses, (spec.steps - first) * spec.batch.size / took_s


def _script(spec: JobSpec, first: int) -> tuple[list[float], float]:
    (losses, took_s), _ = run_ranks(NUM_RANKS, _train, spec.model_dump_json(), first, timeout_s=600)
    assert spec.steps is not None
    return losses, (spec.steps - first) * spec.batch.size / took_s


def _train(rank: int, spec_json: str, first: int) -> tuple[list[float], float]:
    """The script; its losses of the first steps are those of the whole batch, to compare them."""
    spec = JobSpec.model_validate_json(spec_json)
    assert spec.steps is not None
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    assert isinstance(dataset.training, InMemorySource)
    images, labels = dataset.training.inputs.float(), dataset.training.targets
    model = build_model(spec.model, input_shape=(1, 8, 8), num_outputs=10, task="classification", seed=spec.seed)
    convert_sync_batchnorm(model)
    with warnings.catch_warnings():  # of its new name, which older versions of torch do not know
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
        network = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec.optimizer.learning_rate, momentum=0.9, fused=True)
    samples = _order(spec, len(labels))
    per_rank = spec.batch.size // NUM_RANKS
    losses: list[float] = []
    started = 0.0
    for step in range(spec.steps):
        if step == first:
            started = time.perf_counter()
        rows = samples[step][rank * per_rank : (rank + 1) * per_rank]
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = spec.optimizer.learning_rate * learning_rate_factor(
            spec.schedule, step=step, num_steps=spec.steps
        )
        optimizer.step()
        optimizer.zero_grad()
        if step < NUM_COMPARED:
            whole = loss.detach().clone()
            torch.distributed.all_reduce(whole)
            losses.append(float(whole) / NUM_RANKS)
    return losses, time.perf_counter() - started


def _order(spec: JobSpec, num_samples: int) -> list[torch.Tensor]:
    order = SampleOrder(num_samples=num_samples, batch_size=spec.batch.size, seed=spec.seed)
    assert spec.steps is not None
    return [torch.from_numpy(order.minibatch(step).copy()) for step in range(spec.steps)]


if __name__ == "__main__":
    main()
