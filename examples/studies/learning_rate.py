"""Steps to a target accuracy at growing learning rates, with batch norm and without.

    python examples/studies/learning_rate.py            # about two minutes on two idle cores
    python examples/studies/learning_rate.py --quick    # a few steps, to try it

After section 4.2 of Ioffe & Szegedy (2015), where batch norm let the rate grow thirtyfold. The rate stays constant, so
that it is the only thing that differs. docs/studies.md tells what the plot shows.
"""

import argparse
import sys
from statistics import fmean

import curves
from report import table, write_json
from service_jobs import Curve, Run, connect, given, job, parse_arguments, run_jobs

BASE_RATE = 0.005
TARGET = 0.95  # test accuracy
METRIC = "eval/accuracy"
KINDS = {"sync": "with batch norm", "none": "without"}
COLORS = {1: curves.SKY, 3: curves.BLUE, 10: curves.ORANGE, 30: curves.RED}

Runs = dict[tuple[str, int, int], Run]


def main() -> int:
    arguments = parse_arguments(__doc__)
    factors = (30,) if arguments.quick else (1, 3, 10, 30)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    steps = 4 if arguments.quick else 300
    specs = {
        (kind, factor, seed): job(
            name=f"learning-rate {kind} {factor}x",
            model={"factory": "builtin:small-cnn", "args": {"channels": [16, 32, 64, 128]}},
            dataset={"factory": "builtin:digits", "args": {"test_fraction": 0.5}},
            batch={"size": 32},
            norm={"kind": kind},
            optimizer={"name": "sgd", "learning_rate": BASE_RATE * factor},
            schedule={"name": "constant"},
            evaluation={"every_steps": 2 if arguments.quick else 10, "batch_size": 512},
            nonfinite="stop",
            steps=steps,
            seed=seed,
        )
        for kind in KINDS
        for factor in factors
        for seed in seeds
    }
    with connect(arguments) as client:
        runs = run_jobs(client, specs, metrics=[METRIC], may_fail=True)
    show(runs, factors, seeds)
    found = {
        "seeds": seeds,
        "target": TARGET,
        "runs": [
            {
                "norm": kind,
                "factor": factor,
                "seed": seed,
                "steps_to_target": steps_to(accuracy(run), TARGET),
                "diverged_after_steps": None if run.succeeded else run.job.step,
                "message": run.job.message,
                "steps": accuracy(run).steps,
                "accuracy": accuracy(run).values,
            }
            for (kind, factor, seed), run in runs.items()
        ],
        "jobs": given({f"{kind}, {factor}x": spec for (kind, factor, _), spec in specs.items()}),
    }
    write_json(arguments.output, "learning_rate", found)
    draw(runs, factors, seeds, arguments)
    return 0


def accuracy(run: Run) -> Curve:
    """Return a run's accuracy; one that diverged before the first evaluation has none."""
    return run.curves.get(METRIC, Curve(steps=(), values=()))


def steps_to(curve: Curve, target: float) -> int | None:
    """Return the first step at which a curve was at the target; None if it never was."""
    return next((step for step, value in zip(curve.steps, curve.values, strict=True) if value >= target), None)


def show(runs: Runs, factors: tuple[int, ...], seeds: tuple[int, ...]) -> None:
    rows = []
    for kind, name in KINDS.items():
        for factor in factors:
            own = [runs[kind, factor, seed] for seed in seeds]
            reached = [steps_to(accuracy(run), TARGET) for run in own]
            ends = [accuracy(run).last for run in own if run.succeeded]
            rows.append(
                [
                    f"{name}, {factor}×",
                    f"{BASE_RATE * factor:g}",
                    ", ".join(outcome(run, step) for run, step in zip(own, reached, strict=True)),
                    f"{fmean(ends):.3f}" if len(ends) == len(own) else "–",
                ]
            )
    header = ["", "learning rate", f"steps to {TARGET:.0%}, each seed", "accuracy at the end, mean"]
    print(f"\n{table(header, rows)}", flush=True)


def outcome(run: Run, reached: int | None) -> str:
    """Say when a run was at the target, or why it never was."""
    if not run.succeeded:
        return f"diverged at step {run.job.step}" + (f" (at target at {reached})" if reached else "")
    return "not reached" if reached is None else str(reached)


def draw(runs: Runs, factors: tuple[int, ...], seeds: tuple[int, ...], arguments: argparse.Namespace) -> None:
    figure, (axes,) = curves.panels(columns=2, height=3.8)
    for panel, (kind, name) in zip(axes, KINDS.items(), strict=True):
        panel.set_title(name)
        panel.set_xlabel("optimizer steps")
        panel.axhline(TARGET, color=curves.BLACK, linewidth=0.9, linestyle=":")
        for factor in factors:
            for seed in seeds:
                run = runs[kind, factor, seed]
                curve = accuracy(run)
                label = f"{factor}×" if seed == seeds[0] else None
                panel.plot(curve.steps, curve.values, color=COLORS[factor], linewidth=1.2, label=label)
                if not run.succeeded and curve.steps:
                    panel.plot(curve.steps[-1], curve.last, "X", color=COLORS[factor], markersize=9)
        panel.set_ylim(0, 1.02)
    axes[0].set_ylabel("test accuracy")
    axes[0].legend(title=f"rate, times {BASE_RATE:g}", loc="lower right")
    if any(not run.succeeded for run in runs.values()):
        axes[1].plot([], [], "X", color=curves.BLACK, markersize=9, label="diverged")
        axes[1].legend(handles=axes[1].lines[-1:], loc="lower right")
    axes[0].annotate(f"{TARGET:.0%}", (1, TARGET), xytext=(3, 3), textcoords="offset points", ha="left", fontsize=8)
    curves.save(figure, arguments.output, "learning_rate")


if __name__ == "__main__":
    sys.exit(main())
