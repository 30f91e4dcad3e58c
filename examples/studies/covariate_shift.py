"""How the distribution of each layer's input moves during training, with batch norm and without.

    python examples/studies/covariate_shift.py            # about a minute on two idle cores
    python examples/studies/covariate_shift.py --quick    # a few steps, to try it

After section 4.1 and figure 1 of Ioffe & Szegedy (2015): three hidden layers of 100 units and mini-batches of 60, on
digits. The moments are those that `diagnostics.input_drift` reports. docs/studies.md tells what the plot shows.
"""

import argparse
import sys
from collections.abc import Mapping

import curves
from report import Spread, table, write_json
from service_jobs import Run, connect, given, job, parse_arguments, run_jobs

# Of the fully connected layers within builtin:mlp with three hidden ones; the first one's input are the images.
LAYERS = {"1": "images", "4": "1st hidden", "7": "2nd hidden", "10": "3rd hidden"}
LAST = "10"
COLORS = {"1": curves.BLACK, "4": curves.SKY, "7": curves.ORANGE, "10": curves.BLUE}
MOMENTS = ("mean", "std", "drift")
KINDS = {"sync": "with batch norm", "none": "without"}

Runs = Mapping[tuple[str, int], Run]


def main() -> int:
    arguments = parse_arguments(__doc__)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    every = 2 if arguments.quick else 10
    specs = {
        (kind, seed): job(
            name=f"covariate-shift {kind}",
            model={"factory": "builtin:mlp", "args": {"hidden_sizes": [100, 100, 100]}},
            dataset={"factory": "builtin:digits"},
            batch={"size": 60},
            norm={"kind": kind},
            optimizer={"name": "sgd", "learning_rate": 0.02},
            schedule={"name": "constant"},
            diagnostics={"norm": False, "input_drift": True, "every_steps": every},
            evaluation={"every_steps": every, "batch_size": 512},
            steps=6 if arguments.quick else 500,
            seed=seed,
        )
        for kind in KINDS
        for seed in seeds
    }
    metrics = ["eval/accuracy", *(f"input/{layer}/{moment}" for layer in LAYERS for moment in MOMENTS)]
    with connect(arguments) as client:
        runs = run_jobs(client, specs, metrics=metrics)
    show(runs, seeds)
    found = {
        "seeds": seeds,
        "runs": [
            {
                "norm": kind,
                "seed": seed,
                "curves": {
                    name: {"steps": curve.steps, "values": [float(f"{value:.4g}") for value in curve.values]}
                    for name, curve in run.curves.items()
                },
            }
            for (kind, seed), run in runs.items()
        ],
        "jobs": given({kind: spec for (kind, _), spec in specs.items()}),
    }
    write_json(arguments.output, "covariate_shift", found)
    draw(runs, seeds, every, arguments)
    return 0


def show(runs: Runs, seeds: tuple[int, ...]) -> None:
    """Print, for the input of each layer, how far it moves between two measurements, and from first to last."""
    rows = []
    for kind, name in KINDS.items():
        for layer, what in LAYERS.items():
            of_layer = [{m: runs[kind, seed].curves[f"input/{layer}/{m}"] for m in MOMENTS} for seed in seeds]
            drifts = [sum(own["drift"].values) / len(own["drift"].values) for own in of_layer]
            changes = [
                f"{own['mean'].values[0]:.2f} → {own['mean'].last:.2f}, {own['std'].values[0]:.2f} → "
                f"{own['std'].last:.2f}"
                for own in of_layer[:1]
            ]
            rows.append([f"{name}: {what}", Spread.of(drifts).show(2), *changes])
    header = ["input of a layer", "drift from one measurement to the next, in σ", "mean; σ: first → last, first seed"]
    print(f"\n{table(header, rows)}", flush=True)
    accuracies = [
        [name, Spread.of([runs[kind, seed].curves["eval/accuracy"].last for seed in seeds]).show(3)]
        for kind, name in KINDS.items()
    ]
    print(f"\n{table(['', 'test accuracy at the end'], accuracies)}", flush=True)


def draw(runs: Runs, seeds: tuple[int, ...], every: int, arguments: argparse.Namespace) -> None:
    figure, (above, below) = curves.panels(2, 2, height=5.8)
    for column, (kind, name) in enumerate(KINDS.items()):
        own = [runs[kind, seed].curves for seed in seeds]
        above[column].set_title(name)
        steps = own[0][f"input/{LAST}/mean"].steps
        for of_seed in own:
            mean, std = (of_seed[f"input/{LAST}/{moment}"].values for moment in ("mean", "std"))
            above[column].plot(steps, mean, color=COLORS[LAST], linewidth=1.2)
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            above[column].fill_between(steps, low, high, color=COLORS[LAST], alpha=0.12, linewidth=0)
        ends = []
        for layer, what in LAYERS.items():
            drifts = [of_seed[f"input/{layer}/drift"] for of_seed in own]
            means = [sum(values) / len(values) for values in zip(*(curve.values for curve in drifts), strict=True)]
            below[column].plot(drifts[0].steps, means, color=COLORS[layer], linewidth=1.2)
            ends.append((means[-1], what, COLORS[layer]))
        below[column].set_xlabel("optimizer steps")
    below[0].set_yscale("log")
    ticks = (0.1, 0.3, 1, 3)
    below[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    below[0].minorticks_off()
    above[0].set_ylabel("output of the 3rd hidden layer:\nmean ± σ")
    below[0].set_ylabel(f"drift of a layer's input\nin {every} steps, σ")
    curves.label_ends(below[-1], ends)
    curves.save(figure, arguments.output, "covariate_shift")


if __name__ == "__main__":
    sys.exit(main())
