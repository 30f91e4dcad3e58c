"""Two samples a rank, or one: synchronized over four ranks, the batch in one process, and each rank for itself.

    python examples/studies/small_batches.py            # about five minutes on two idle cores
    python examples/studies/small_batches.py --quick    # a few steps, to try it

Prints two tables: classification of the real digits, 4 ranks × 2 images; and segmentation of canvases of them,
4 ranks × 1 canvas. docs/studies.md tells what they show.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from report import Spread, table, write_json
from service_jobs import Run, connect, given, job, parse_arguments, run_jobs

NUM_RANKS = 4
FIRST_LOSS = "train/loss of step 1"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A way to train the same mini-batches.

    Attributes:
        name: in the table.
        workers: ranks that share them.
        kind: ``norm.kind``.
    """

    name: str
    workers: int
    kind: str


SYNC = Trial(name="4 ranks, synchronized", workers=NUM_RANKS, kind="sync")
ONE_PROCESS = Trial(name="one process, the whole batch", workers=1, kind="sync")
LOCAL = Trial(name="4 ranks, each its own statistics", workers=NUM_RANKS, kind="local")
TRIALS = (SYNC, ONE_PROCESS, LOCAL)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained, and the metric that is compared.

    Attributes:
        title: above the table.
        samples_per_rank: on each of four ranks; a mini-batch has four times as many.
        metric: of the evaluation; higher is better.
        fields: of the job.
    """

    title: str
    samples_per_rank: int
    metric: str
    fields: dict[str, Any]


SUBJECTS = {
    "digits": Subject(
        title="Digits, builtin:small-cnn: 4 ranks × 2 images, one process × 8",
        samples_per_rank=2,
        metric="eval/accuracy",
        fields={
            "model": {"factory": "builtin:small-cnn", "args": {"channels": [16, 32, 64, 128]}},
            "dataset": {"factory": "builtin:digits", "args": {"test_fraction": 0.5}},
            "optimizer": {"name": "sgd", "learning_rate": 0.05},
            "steps": 300,
        },
    ),
    "segmentation": Subject(
        title="Canvases of digits, builtin:unet: 4 ranks × 1 canvas, one process × 4",
        samples_per_rank=1,
        metric="eval/mean_iou",
        fields={
            "task": "segmentation",
            "model": {"factory": "builtin:unet", "args": {"depth": 2, "width": 16}},
            "dataset": {
                "factory": "builtin:digits-segmentation",
                "args": {"height": 16, "width": 16, "scale": 1, "max_digits": 2},
            },
            "optimizer": {"name": "adamw", "learning_rate": 0.01},
            "steps": 800,
        },
    ),
}


def main() -> int:
    arguments = parse_arguments(__doc__)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    specs = {
        (name, trial.name, seed): job(
            name=f"small-batches {name}",
            workers=trial.workers,
            seed=seed,
            batch={"size": subject.samples_per_rank * NUM_RANKS},
            norm={"kind": trial.kind},
            schedule={"warmup_steps": 2 if arguments.quick else 20},
            **(subject.fields | ({"steps": 3} if arguments.quick else {})),
        )
        for name, subject in SUBJECTS.items()
        for trial in TRIALS
        for seed in seeds
    }
    metrics = ["train/loss", *(subject.metric for subject in SUBJECTS.values())]
    with connect(arguments) as client:
        runs = run_jobs(client, specs, metrics=metrics)
    found = {name: finals(name, subject, runs, seeds) for name, subject in SUBJECTS.items()}
    for name, subject in SUBJECTS.items():
        print(f"\n{compared(subject, found[name])}", flush=True)
    jobs = given({f"{name}, {trial}": spec for (name, trial, _), spec in specs.items()})
    write_json(arguments.output, "small_batches", {"seeds": seeds, "results": found, "jobs": jobs})
    return 0


def finals(
    name: str, subject: Subject, runs: Mapping[tuple[str, str, int], Run], seeds: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """Return a subject's metric at the end, and the loss of the first step, of each trial and seed."""

    def of_all(metric: str, place: int) -> dict[str, list[float]]:
        return {
            trial.name: [runs[name, trial.name, seed].curves[metric].values[place] for seed in seeds]
            for trial in TRIALS
        }

    return {subject.metric: of_all(subject.metric, -1), FIRST_LOSS: of_all("train/loss", 0)}


def compared(subject: Subject, found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a subject's table: each trial, and how far it is from one process with the same seed."""
    metric, first_loss = found[subject.metric], found[FIRST_LOSS]
    label = subject.metric.removeprefix("eval/").replace("_", " ")
    header = [subject.title, f"{label}: mean (lowest–highest)", f"{label}, apart", "loss of the first step, apart"]
    rows = [
        [
            trial.name,
            Spread.of(metric[trial.name]).show(3),
            "–" if trial is ONE_PROCESS else f"{farthest(metric[trial.name], metric[ONE_PROCESS.name]):.3f}",
            "–" if trial is ONE_PROCESS else f"{farthest(first_loss[trial.name], first_loss[ONE_PROCESS.name]):.0e}",
        ]
        for trial in TRIALS
    ]
    return table(header, rows)


def farthest(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the largest difference of two runs with the same seed."""
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


if __name__ == "__main__":
    sys.exit(main())
