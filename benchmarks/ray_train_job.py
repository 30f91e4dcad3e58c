"""Ray Train, as `job_start` measures it: from `TorchTrainer.fit()` to the first step, and from a kill to the next one.

Not run by hand. It starts a Ray of its own, without a dashboard, waits until that is at rest, and then carries out the
same small training several times: model, data, layers, batch, precision and optimizer are those of the job that the
service is given, built by the same functions. It prints one line of JSON.
"""

import argparse
import json
import logging
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from service.domain.spec import JobSpec, parse_spec
from service.training.data import build_dataset
from service.training.models import build_model
from syncbn import convert_sync_batchnorm

SETTLE_S = 5.0
# A kill comes once the training has run for so long, as with the service.
RUN_BEFORE_KILL_S = 3.0
DEADLINE_S = 120.0


def train_loop(config: dict[str, Any]) -> None:
    """Train on this worker; says when its first step was done, and stops when told to or after some steps."""
    spec = parse_spec(config["spec"])
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    torch.set_num_threads(1)
    model, optimizer, inputs, targets = _build(spec)
    stamps = Path(config["directory"])
    attempt = 1 + len(list(stamps.glob(f"*.{rank}")))
    checkpoint = stamps / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    size = spec.batch.size // world_size
    stop = torch.zeros(1)
    for step in range(first, config["num_steps"]):
        start = (step * spec.batch.size + rank * size) % (len(inputs) - spec.batch.size)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[start : start + size]), targets[start : start + size])
        loss.backward()
        optimizer.step()
        if step == first:
            _write(stamps / f"{attempt}.{rank}", json.dumps({"time": time.time(), "pid": os.getpid()}))
        if rank == 0 and step % 20 == 19:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, stamps / ".checkpoint.partial")
            (stamps / ".checkpoint.partial").replace(checkpoint)
        stop.fill_(float((stamps / "stop").exists()))
        dist.all_reduce(stop)
        if stop.item():
            break


def _build(spec: JobSpec) -> tuple[Any, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    whole = dataset.training.batch(np.arange(len(dataset.training)))
    model = build_model(
        spec.model,
        input_shape=tuple(whole.inputs.shape[1:]),
        num_outputs=dataset.num_outputs,
        task=spec.task.name,
        seed=spec.seed,
    )
    model = DistributedDataParallel(convert_sync_batchnorm(model).double(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec.optimizer.learning_rate, momentum=spec.optimizer.momentum)
    return model, optimizer, whole.inputs.double(), whole.targets


def measure_starts(spec: dict[str, Any], *, workers: int, runs: int, pause_s: float) -> list[float]:
    """Return the seconds from `fit()` to the first step of the slowest rank, of each run."""
    times_s = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as directory:
            trainer = _trainer(spec, Path(directory), workers=workers, num_steps=3, max_failures=0)
            time.sleep(pause_s)
            sent_at = time.time()
            trainer.fit()
            stamps = [json.loads((Path(directory) / f"1.{rank}").read_text()) for rank in range(workers)]
            times_s.append(max(stamp["time"] for stamp in stamps) - sent_at)
    return times_s


def measure_restarts(spec: dict[str, Any], *, workers: int, kills: int) -> list[float]:
    """Return the seconds from the death of a rank to the next step of the slowest rank, of each kill."""
    times_s: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)

        def kill_again_and_again() -> None:
            try:
                for attempt in range(1, kills + 1):
                    stamps = _stamps(directory, attempt, workers)
                    time.sleep(RUN_BEFORE_KILL_S)
                    killed_at = time.time()
                    os.kill(stamps[-1]["pid"], signal.SIGKILL)
                    stamps = _stamps(directory, attempt + 1, workers)
                    times_s.append(max(stamp["time"] for stamp in stamps) - killed_at)
            finally:
                (directory / "stop").touch()

        killer = threading.Thread(target=kill_again_and_again)
        killer.start()
        _trainer(spec, directory, workers=workers, num_steps=10**6, max_failures=kills).fit()
        killer.join()
    return times_s


def _trainer(spec: dict[str, Any], directory: Path, *, workers: int, num_steps: int, max_failures: int) -> TorchTrainer:
    return TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec, "directory": str(directory), "num_steps": num_steps},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=False),
        run_config=RunConfig(
            storage_path=str(directory / "runs"), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )


def _stamps(directory: Path, attempt: int, workers: int) -> list[dict[str, Any]]:
    """Wait for what each rank wrote after the first step of an attempt."""
    paths = [directory / f"{attempt}.{rank}" for rank in range(workers)]
    deadline = time.monotonic() + DEADLINE_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"attempt {attempt} does not train"
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in paths]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="of the job, as JSON")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--starts", type=int, required=True)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--pause-s", type=float, required=True)
    arguments = parser.parse_args()
    spec = json.loads(arguments.spec)
    with tempfile.TemporaryDirectory(prefix="rt-") as temp_dir:
        ray.init(
            num_cpus=arguments.workers + 2,  # the controller needs one
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100_000_000,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
        )
        time.sleep(SETTLE_S)
        starts = measure_starts(spec, workers=arguments.workers, runs=arguments.starts, pause_s=arguments.pause_s)
        restarts = measure_restarts(spec, workers=arguments.workers, kills=arguments.kills) if arguments.kills else []
        ray.shutdown()
    print(json.dumps({"ray": ray.__version__, "starts_s": starts, "restarts_s": restarts}))


if __name__ == "__main__":
    main()
