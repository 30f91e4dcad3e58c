"""What a checkpoint costs training: ResNet-50 with SGD and momentum, one process, CPU.

    python -m benchmarks.checkpointing
    python -m benchmarks.checkpointing --quick   # few steps of a small image; nothing is written

Three ways take turns in the same process, round after round, on the same model:

- none: no checkpoint,
- ours: `CheckpointWriter`, which copies and lets a thread write,
- synchronous: `write_checkpoint` in the training thread, the same files.

A turn is `--every` steps with one checkpoint after the first of them, and ends when that is on the disk. Blocked is
how long the training thread was held up by it; a turn's time, and the CPU time of all its threads, which tells more
where others use the machine too, are over those of `none` in the same round. Each of the two is first made to prove
that what it wrote is read back bit by bit. Last, checkpoints after each step show what the one set of buffers costs
where writing cannot keep up: how long a save waits for the one before it.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import results
from service.domain.rank_protocol import RankTask, Staged
from service.domain.spec import parse_spec
from service.training.checkpoint_writer import CheckpointWriter
from service.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from service.training.errors import CheckpointFailed
from service.training.models import build_model

TARGET = 0.05  # of the time of the steps, blocked
NONE, OURS, SYNCHRONOUS = "none", "ours", "synchronous"


class Training:
    """Steps of ResNet-50 on random images.

    Args:
        batch_size: samples of a step.
        image_size: height and width, in pixels.
    """

    def __init__(self, *, batch_size: int, image_size: int, staging_dir: Path) -> None:
        spec = parse_spec(
            {
                "name": "benchmark",
                "model": {"factory": "builtin:resnet50"},
                "dataset": {"factory": "builtin:digits"},
                "batch": {"size": batch_size},
                "steps": 1,
            }
        )
        self.task = RankTask(
            job_id="benchmark",
            attempt=1,
            spec=spec,
            rank=0,
            world_size=1,
            rendezvous_host="127.0.0.1",
            rendezvous_port=1,
            rendezvous_fd=None,
            interface=None,
            num_threads=torch.get_num_threads(),
            staging_dir=str(staging_dir),
            resume_dir=None,
            collective_timeout_s=1.0,
        )
        shape = (3, image_size, image_size)
        self.model = build_model(spec.model, input_shape=shape, num_outputs=1000, task="classification", seed=0)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self._inputs = torch.randn(batch_size, *shape)
        self._targets = torch.randint(0, 1000, (batch_size,))
        self.steps_done = 0

    def step(self) -> None:
        """Take one."""
        self._optimizer.zero_grad()
        F.cross_entropy(self.model(self._inputs), self._targets).backward()
        self._optimizer.step()
        self.steps_done += 1

    def capture(self) -> Checkpoint:
        """Return the present state; its tensors are the live ones."""
        return Checkpoint(step=self.steps_done, model=self.model.state_dict(), optimizer=self._optimizer.state_dict())


def turn(training: Training, way: str, every: int, writer: CheckpointWriter) -> dict[str, float]:
    """Take the steps of a turn; return its seconds, those of a median step, and those blocked."""
    blocked_s, steps_s = 0.0, []
    started, started_cpu = time.perf_counter(), time.process_time()
    for number in range(every):
        step_started = time.perf_counter()
        training.step()
        steps_s.append(time.perf_counter() - step_started)
        if number == 0 and way != NONE:
            blocked_s = save(training, way, writer)
        _remove(writer.outcomes(wait=False))
    _remove(writer.outcomes(wait=True))
    return {
        "turn_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - started_cpu,
        "step_s": statistics.median(steps_s),
        "blocked_s": blocked_s,
    }


def _remove(written: Sequence[Staged | CheckpointFailed]) -> None:
    for outcome in written:
        if isinstance(outcome, CheckpointFailed):
            raise outcome
        shutil.rmtree(outcome.directory)


def save(training: Training, way: str, writer: CheckpointWriter) -> float:
    if way == OURS:
        return writer.save(training.capture(), {})
    started = time.perf_counter()
    directory = write_checkpoint(training.capture(), training.task, {})
    blocked_s = time.perf_counter() - started
    shutil.rmtree(directory)
    return blocked_s


def check(training: Training, writer: CheckpointWriter) -> dict[str, float]:
    """Prove that both ways write what there is, while training goes on; return the first save's seconds, and bytes."""
    expected = {name: value.clone() for name, value in training.model.state_dict().items()}
    directory = write_checkpoint(training.capture(), training.task, {})
    _require_equal(read_checkpoint(directory, job_id="benchmark"), expected)
    size_bytes = sum(path.stat().st_size for path in directory.iterdir())
    shutil.rmtree(directory)
    first_s = writer.save(training.capture(), {})
    training.step()
    (staged,) = writer.outcomes(wait=True)
    _require_equal(read_checkpoint(Path(staged.directory), job_id="benchmark"), expected)
    shutil.rmtree(staged.directory)
    return {"first_save_s": first_s, "size_bytes": size_bytes}


def _require_equal(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    if found.model.keys() != expected.keys() or not all(
        torch.equal(found.model[name], value) for name, value in expected.items()
    ):
        raise SystemExit("What was written is not what is read back.")


def after_each_step(training: Training, writer: CheckpointWriter, num_steps: int) -> float:
    """Return the median seconds blocked where each step is followed by a checkpoint."""
    blocked = []
    for _ in range(num_steps):
        training.step()
        blocked.append(writer.save(training.capture(), {}))
        _remove(writer.outcomes(wait=False))
    _remove(writer.outcomes(wait=True))
    return statistics.median(blocked[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of training")
    parser.add_argument("--quick", action="store_true", help="few steps of a small image; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.every, options.batch_size, options.image_size = 1, 2, 2, 32
    torch.set_num_threads(options.threads)
    measured: dict[str, list[dict[str, float]]] = {NONE: [], OURS: [], SYNCHRONOUS: []}
    with tempfile.TemporaryDirectory() as directory:
        training = Training(batch_size=options.batch_size, image_size=options.image_size, staging_dir=Path(directory))
        with CheckpointWriter(training.task) as writer:
            training.step()
            facts = check(training, writer)
            for number in range(options.rounds):
                for way in _rotated(list(measured), number):
                    measured[way].append(turn(training, way, options.every, writer))
            each_step_s = after_each_step(training, writer, 3 if options.quick else 8)
    _report(options, measured, facts, each_step_s)


def _rotated(ways: list[str], number: int) -> list[str]:
    """Each way is as often the first."""
    number %= len(ways)
    return ways[number:] + ways[:number]


def _report(
    options: argparse.Namespace,
    measured: dict[str, list[dict[str, float]]],
    facts: dict[str, float],
    each_step_s: float,
) -> None:
    def median(way: str, value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(value, measured[way]))

    step_s = median(NONE, lambda one: one["step_s"])
    figures: dict[str, Any] = {"step_s": step_s, "blocked_when_after_each_step_s": each_step_s, **facts}
    rows = []
    for way in measured:
        blocked_s = median(way, lambda one: one["blocked_s"])
        ratio, cpu_ratio = (
            statistics.median(one[key] / none[key] for one, none in zip(measured[way], measured[NONE], strict=True))
            for key in ("turn_s", "cpu_s")
        )
        figures[way] = {
            "blocked_s": blocked_s,
            "blocked_over_step": blocked_s / step_s,
            "blocked_over_training": blocked_s / (step_s * options.every),
            "turn_over_none": ratio,
            "cpu_over_none": cpu_ratio,
            "turns": measured[way],
        }
        rows.append(
            [
                way,
                f"{blocked_s * 1e3:.1f} ms",
                f"{blocked_s / step_s:.1%}",
                f"{blocked_s / (step_s * options.every):.2%}",
                f"{ratio:.3f}×",
                f"{cpu_ratio:.3f}×",
            ]
        )
    header = [
        "way",
        "blocked by one checkpoint",
        "of one step",
        f"of all steps (ours ≤ {TARGET:.0%})",
        "time of a turn",
        "CPU time",
    ]
    report = (
        f"ResNet-50 with SGD and momentum, {options.batch_size} images of {options.image_size}², {options.threads} "
        f"threads, step {step_s * 1e3:.0f} ms; a checkpoint of {facts['size_bytes'] / 1e6:.0f} MB every "
        f"{options.every} steps; medians of {options.rounds} rounds.\n\n{results.table(header, rows)}\n\n"
        f"The first save, which allocates the buffers, blocked for {facts['first_save_s'] * 1e3:.0f} ms. With a "
        f"checkpoint after each step a save blocks for {each_step_s * 1e3:.0f} ms, most of it waiting."
    )
    if options.quick:
        print(report)
    else:
        results.record("checkpointing", {"configuration": vars(options), "figures": figures}, report)


if __name__ == "__main__":
    main()
