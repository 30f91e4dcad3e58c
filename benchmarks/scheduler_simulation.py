"""The scheduling policy on a simulated cluster: promises checked at every step, shares, utilisation, decision times.

``python -m benchmarks.scheduler_simulation --jobs 10000 --gpus 1000 --days 7 --seed 0``
"""

import argparse
import time
from statistics import median
from typing import Any

from benchmarks import results
from benchmarks.scheduling.invariants import Invariants
from benchmarks.scheduling.plot import draw
from benchmarks.scheduling.simulation import Outcome, Simulation, Step
from benchmarks.scheduling.workload import Load

# Of a queue's part of the GPU time from what its weight gives it, and of what was there, while all queues had work.
SHARE_TOLERANCE = 0.05
LOWEST_UTILISATION = 0.95
# Decisions among so many jobs that wait or run are timed apart.
MANY_JOBS = 10_000


def main() -> None:
    arguments = _parse()
    load = Load(
        num_jobs=arguments.jobs,
        num_gpus=arguments.gpus,
        duration_s=arguments.days * 86400.0,
        load=arguments.load,
        estimates=arguments.estimates,
        seed=arguments.seed,
    )
    invariants = Invariants()
    simulation = Simulation(load, watch=invariants)
    began = time.perf_counter()
    outcome = simulation.run(until_s=load.duration_s)
    took_s = time.perf_counter() - began
    many_s = _time_many(arguments.gpus, arguments.seed)
    shares = shares_of(simulation, outcome)
    utilisation = sum(outcome.gpu_s.values()) / outcome.available_gpu_s
    figures: dict[str, Any] = {
        "load": vars(arguments),
        "took_s": took_s,
        "num_decisions": len(outcome.decisions_s),
        "num_finished": outcome.num_finished,
        "num_preempted": outcome.num_preempted,
        "num_resized": outcome.num_resized,
        "num_lost": outcome.num_lost,
        "share_over_weight": shares,
        "utilisation": utilisation,
        "backlogged_part": outcome.available_gpu_s / (load.num_gpus * load.duration_s),
        "decision_ms": percentiles_ms(outcome.decisions_s),
        "decision_ms_of_many": percentiles_ms(many_s),
        "late_s": {"median": median(invariants.late_s), "max": max(invariants.late_s)} if invariants.late_s else None,
    }
    picture = results.FOLDER / "scheduler_simulation.png"
    draw(simulation, outcome, picture)
    results.record("scheduler_simulation", figures, _report(figures, simulation))
    assert utilisation >= LOWEST_UTILISATION, f"only {utilisation:.1%} of the GPUs were in use while jobs waited"
    for name, share in shares.items():
        assert abs(share - 1.0) <= SHARE_TOLERANCE, f"queue {name} got {share:.3f} of what its weight gives it"


def shares_of(simulation: Simulation, outcome: Outcome) -> dict[str, float]:
    """Return what each queue got of the GPU time, over what its weight gives it; while all had work that waited."""
    total_s = sum(outcome.gpu_s.values())
    weight = sum(queue.weight for queue in simulation.queues)
    return {queue.name: outcome.gpu_s[queue.name] / total_s / (queue.weight / weight) for queue in simulation.queues}


def percentiles_ms(times_s: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the longest of some times, in ms."""
    ordered = sorted(times_s)
    return {
        "median": 1e3 * ordered[len(ordered) // 2],
        "p99": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max": 1e3 * ordered[-1],
    }


def _time_many(num_gpus: int, seed: int) -> list[float]:
    """Return how long decisions take when all jobs are there at once, the first of them on the empty cluster."""
    load = Load(num_jobs=MANY_JOBS, num_gpus=num_gpus, backlog=1.0, seed=seed)
    times_s: list[float] = []

    def watch(_: Simulation, step: Step) -> None:
        if len(step.pending) + len(step.active) > 0.95 * MANY_JOBS:
            times_s.append(step.took_s)

    Simulation(load, watch=watch).run(until_s=3600.0)
    return times_s


def _report(figures: dict[str, Any], simulation: Simulation) -> str:
    def times(name: str) -> str:
        return " / ".join(f"{figures[name][part]:.1f}" for part in ("median", "p99", "max"))

    rows = [
        ["jobs that came to their end", f"{figures['num_finished']} of {simulation.load.num_jobs}"],
        ["decisions", str(figures["num_decisions"])],
        [
            "stopped for others / resized / lost with a node",
            _slashed(figures, "num_preempted", "num_resized", "num_lost"),
        ],
        ["utilisation while every queue had work that waited", f"{figures['utilisation']:.2%}"],
        ["part of the time that this was so", f"{figures['backlogged_part']:.0%}"],
        *(
            [f"share of queue {name} over its weight's", f"{share:.3f}"]
            for name, share in figures["share_over_weight"].items()
        ),
        ["decision (CPU time), median / p99 / longest, ms", times("decision_ms")],
        [f"the same with {MANY_JOBS} jobs at once", times("decision_ms_of_many")],
    ]
    return (
        "Every promise of `benchmarks/scheduling/invariants.py` held at every step. "
        "Picture: `scheduler_simulation.png`.\n\n" + results.table(["figure", "value"], rows)
    )


def _slashed(figures: dict[str, Any], *names: str) -> str:
    return " / ".join(str(figures[name]) for name in names)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--load", type=float, default=1.3, help="GPU time asked for over what there is")
    parser.add_argument("--estimates", choices=("exact", "rough", "none"), default="rough")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
