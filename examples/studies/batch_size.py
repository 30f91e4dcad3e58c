"""Test error against the number of samples on a rank, for each way to normalize.

    python examples/studies/batch_size.py            # about ten minutes on two idle cores
    python examples/studies/batch_size.py --quick    # a few steps, to try it

Every job takes the same mini-batches, of 128 images, through the same optimizer, so that one learning rate is right
for all and nothing but the normalization differs. With b images on each of four ranks, a mini-batch is computed in
128 / 4b micro-steps. docs/studies.md tells what the plot shows.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import curves
from report import Spread, table, write_json
from service_jobs import Run, connect, given, job, parse_arguments, run_jobs

from service.client.client import Client
from service.domain.spec import JobSpec

NUM_RANKS = 4
MINI_BATCH = 128
TUNING_SEED = 1000  # none of those that are reported
TUNING_SIZE = 32
METRIC = "eval/accuracy"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to normalize.

    Attributes:
        name: in table and plot.
        kind: ``norm.kind``.
        workers: ranks.
        spans: how many ranks' samples are normalized together; None where b makes no difference.
        tuned_as: ways of one recipe share a learning rate.
        smallest: least b that has statistics: of one value there is no variance.
        color: of its line.
        marker: on its line.
    """

    name: str
    kind: str
    workers: int
    spans: int | None
    tuned_as: str
    smallest: int = 1
    color: str
    marker: str


WAYS = (
    Way(
        name="synchronized, 4 ranks",
        kind="sync",
        workers=NUM_RANKS,
        spans=NUM_RANKS,
        tuned_as="batch norm",
        color=curves.BLUE,
        marker="o",
    ),
    Way(
        name="one process, 4b together",
        kind="sync",
        workers=1,
        spans=NUM_RANKS,
        tuned_as="batch norm",
        color=curves.SKY,
        marker="x",
    ),
    Way(
        name="local, 4 ranks",
        kind="local",
        workers=NUM_RANKS,
        spans=NUM_RANKS,
        tuned_as="batch norm",
        smallest=2,
        color=curves.RED,
        marker="s",
    ),
    Way(
        name="accumulation, b at a time",
        kind="sync",
        workers=1,
        spans=1,
        tuned_as="batch norm",
        smallest=2,
        color=curves.ORANGE,
        marker="+",
    ),
    Way(
        name="group norm",
        kind="group",
        workers=1,
        spans=None,
        tuned_as="group",
        color=curves.GREEN,
        marker="",
    ),
    Way(
        name="frozen from the start",
        kind="frozen",
        workers=1,
        spans=None,
        tuned_as="frozen",
        color=curves.BLACK,
        marker="",
    ),
)


def main() -> int:
    arguments = parse_arguments(__doc__)
    sizes = (2,) if arguments.quick else (1, 2, 4, 8, 16, 32)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    rates = (0.1,) if arguments.quick else (0.02, 0.05, 0.1, 0.2, 0.4)
    steps = 2 if arguments.quick else 80
    with connect(arguments) as client:
        chosen = tune(client, rates, steps)
        specs = {
            (way.name, size if way.spans else MINI_BATCH, seed): spec_of(
                way, size=size, rate=chosen[way.tuned_as], seed=seed, steps=steps
            )
            for way in WAYS
            for size in (sizes if way.spans else sizes[-1:])
            for seed in seeds
            if size >= way.smallest
        }
        runs = run_jobs(client, specs, metrics=[METRIC])
    errors = {
        way.name: {
            size: [100 * (1 - runs[way.name, size, seed].curves[METRIC].last) for seed in seeds]
            for size in (*sizes, MINI_BATCH)
            if (way.name, size, seeds[0]) in runs
        }
        for way in WAYS
    }
    show(errors, chosen, sizes)
    found = {
        "seeds": seeds,
        "learning_rates": chosen,
        "test_error_percent": errors,
        "jobs": given({f"{name}, b = {size}": spec for (name, size, _), spec in specs.items()}),
    }
    write_json(arguments.output, "batch_size", found)
    draw(errors, sizes, arguments)
    return 0


def spec_of(way: Way, *, size: int, rate: float, seed: int, steps: int) -> JobSpec:
    """Return a job with ``size`` samples on each rank at a time."""
    batch: dict[str, Any] = {"size": MINI_BATCH}
    if way.spans is not None:
        # Without the limit, four ranks would compute a normalization batch each, which is faster and as exact.
        batch |= {"normalization_size": way.spans * size, "max_per_rank": way.spans * size // way.workers}
    return job(
        name=f"batch-size {way.kind} {way.workers}x{size}",
        model={"factory": "builtin:small-cnn", "args": {"channels": [16, 32, 64, 128]}},
        dataset={"factory": "builtin:digits", "args": {"test_fraction": 0.5}},
        workers=way.workers,
        batch=batch,
        norm={"kind": way.kind},
        optimizer={"name": "sgd", "learning_rate": rate},
        schedule={"warmup_steps": min(5, steps)},
        nonfinite="stop",
        steps=steps,
        seed=seed,
    )


def tune(client: Client, rates: tuple[float, ...], steps: int) -> dict[str, float]:
    """Return the learning rate of each recipe: of those tried, the one with the best accuracy on a seed of its own."""
    if len(rates) == 1:
        return {way.tuned_as: rates[0] for way in WAYS}
    recipes = {way.tuned_as: way for way in reversed(WAYS) if way.workers == 1}
    specs = {
        (recipe, rate): spec_of(way, size=TUNING_SIZE // (way.spans or 1), rate=rate, seed=TUNING_SEED, steps=steps)
        for recipe, way in recipes.items()
        for rate in rates
    }
    runs = run_jobs(client, specs, metrics=[METRIC], may_fail=True)

    def accuracy(run: Run) -> float:
        return run.curves[METRIC].last if run.succeeded else 0.0

    return {recipe: max(rates, key=lambda rate: accuracy(runs[recipe, rate])) for recipe in recipes}


def show(errors: Mapping[str, Mapping[int, list[float]]], chosen: Mapping[str, float], sizes: tuple[int, ...]) -> None:
    header = ["test error, %: mean (lowest–highest)", "learning rate", *(f"b = {size}" for size in sizes)]
    rows = []
    for way in WAYS:
        if way.spans is None:
            cells = [Spread.of(errors[way.name][MINI_BATCH]).show(1), *(["the same"] * (len(sizes) - 1))]
        else:
            cells = [
                Spread.of(errors[way.name][size]).show(1) if size in errors[way.name] else "undefined" for size in sizes
            ]
        rows.append([way.name, f"{chosen[way.tuned_as]:g}", *cells])
    print(f"\n{table(header, rows)}", flush=True)


def draw(
    errors: Mapping[str, Mapping[int, list[float]]], sizes: tuple[int, ...], arguments: argparse.Namespace
) -> None:
    figure, ((axes,),) = curves.panels(height=4.4)
    labels = []
    for way in WAYS:
        spreads = {size: Spread.of(values) for size, values in errors[way.name].items()}
        if way.spans is None:
            flat = spreads[MINI_BATCH]
            axes.axhline(flat.mean, color=way.color, linestyle="--", linewidth=1.4)
            axes.axhspan(flat.low, flat.high, color=way.color, alpha=0.12, linewidth=0)
            labels.append((flat.mean, way.name, way.color))
            continue
        own = list(spreads)
        axes.plot(own, [spreads[size].mean for size in own], color=way.color, marker=way.marker)
        low, high = [spreads[size].low for size in own], [spreads[size].high for size in own]
        axes.fill_between(own, low, high, color=way.color, alpha=0.15, linewidth=0)
        labels.append((spreads[own[-1]].mean, way.name, way.color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    ticks = (1, 2, 5, 10, 20, 50)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("samples on each of 4 ranks at a time, b")
    axes.set_ylabel("test error, %")
    curves.label_ends(axes, labels)
    curves.save(figure, arguments.output, "batch_size")


if __name__ == "__main__":
    sys.exit(main())
