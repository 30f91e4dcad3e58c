"""Batch norm beside dropout; and the trained model one sample at a time against 64 at once.

    python examples/studies/dropout_and_inference.py            # about a minute on two idle cores
    python examples/studies/dropout_and_inference.py --quick    # a few steps, to try it

The second part downloads a checkpoint through the client and runs it in this process. docs/studies.md tells what both
show.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import curves
import torch
from report import Spread, table, write_json
from safetensors.torch import load_file
from service_jobs import Run, connect, given, job, parse_arguments, run_jobs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.client.client import Client
from service.domain.spec import JobSpec
from service.storage.manifest import verify_directory
from service.training.data import InMemorySource, build_dataset
from service.training.models import build_model

DROPOUT = 0.3
RECIPES = {
    "neither": ("none", 0.0),
    "dropout": ("none", DROPOUT),
    "batch norm": ("sync", 0.0),
    "batch norm and dropout": ("sync", DROPOUT),
}
COLORS = {
    "neither": curves.BLACK,
    "dropout": curves.ORANGE,
    "batch norm": curves.BLUE,
    "batch norm and dropout": curves.GREEN,
}
MODELS = {
    "builtin:mlp": {"hidden_sizes": [128, 128], "dropout": DROPOUT},
    "builtin:small-cnn": {"channels": [16, 32, 64, 128], "dropout": DROPOUT},
}
BATCH = 64

Runs = Mapping[tuple[str, int], Run]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outputs on the held-out samples in evaluation mode, one at a time against 64 at once.

    Attributes:
        float32: largest difference of an output.
        float64: the same with weights and inputs in float64.
        largest_output: by magnitude, to compare with.
        norm_layers: the same of each batch norm alone, given the same input either way, in float32.
        labels_equal: whether both predict the same labels.
        training_mode: the largest difference, 64 at once, of training mode from evaluation mode: the model's own
            batch statistics and dropout instead of what it has learned for inference.
    """

    float32: float
    float64: float
    largest_output: float
    norm_layers: float
    labels_equal: bool
    training_mode: float


def main() -> int:
    arguments = parse_arguments(__doc__)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    steps = 4 if arguments.quick else 400
    specs = {
        (name, seed): job(
            name=f"dropout {name}",
            model={"factory": "builtin:mlp", "args": {"hidden_sizes": [128, 128], "dropout": dropout}},
            dataset={"factory": "builtin:digits", "args": {"test_fraction": 0.5}},
            batch={"size": 32},
            norm={"kind": kind},
            optimizer={"name": "sgd", "learning_rate": 0.02},
            schedule={"warmup_steps": min(20, steps)},
            evaluation={"every_steps": 2 if arguments.quick else 20, "batch_size": 512},
            steps=steps,
            seed=seed,
        )
        for name, (kind, dropout) in RECIPES.items()
        for seed in seeds
    }
    trained = {
        (factory, 0): job(
            name=f"inference {factory.removeprefix('builtin:')}",
            model={"factory": factory, "args": arguments_of},
            dataset={"factory": "builtin:digits"},
            batch={"size": 32},
            optimizer={"name": "sgd", "learning_rate": 0.02},
            steps=steps,
        )
        for factory, arguments_of in MODELS.items()
    }
    with connect(arguments) as client:
        runs = run_jobs(client, specs | trained, metrics=["eval/accuracy", "eval/loss"])
        compared = {factory: compare(client, runs[factory, 0]) for factory in MODELS}
    show(runs, compared, seeds)
    found = {
        "seeds": seeds,
        "final": {
            metric: {name: [runs[name, seed].curves[metric].last for seed in seeds] for name in RECIPES}
            for metric in ("eval/accuracy", "eval/loss")
        },
        "one_against_64": {factory: asdict(comparison) for factory, comparison in compared.items()},
        "jobs": given({name: spec for (name, _), spec in (specs | trained).items()}),
    }
    write_json(arguments.output, "dropout_and_inference", found)
    draw(runs, seeds, arguments)
    return 0


def compare(client: Client, run: Run) -> Comparison:
    """Download a model, and compare its outputs one sample at a time with those of 64 at once."""
    with tempfile.TemporaryDirectory() as folder:
        client.download(run.job.id, to=Path(folder))
        verify_directory(Path(folder))
        weights = load_file(Path(folder) / "model.safetensors")
    model, images = rebuild(run.job.spec, weights)
    model.eval()
    with torch.no_grad():
        many, one = outputs(model, images, BATCH), outputs(model, images, 1)
        many_64, one_64 = (outputs(model.double(), images.double(), size) for size in (BATCH, 1))
        norms = norm_difference(model.float(), images[:BATCH])
        model.train()
        other = outputs(model, images, BATCH)
    return Comparison(
        float32=difference(many, one),
        float64=difference(many_64, one_64),
        largest_output=float(many.abs().max()),
        norm_layers=norms,
        labels_equal=bool((many.argmax(1) == one.argmax(1)).all()),
        training_mode=difference(other, many),
    )


def rebuild(spec: JobSpec, weights: dict[str, torch.Tensor]) -> tuple[nn.Module, torch.Tensor]:
    """Return the plain model with a checkpoint's weights, and the held-out inputs, (N, 1, 8, 8), of a job on digits."""
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    assert isinstance(dataset.held_out, InMemorySource)
    images = dataset.held_out.inputs.float()
    shape = tuple(images.shape[1:])
    model = build_model(
        spec.model, input_shape=shape, num_outputs=dataset.num_outputs, task="classification", seed=spec.seed
    )
    model.load_state_dict(weights)
    return model, images


def outputs(model: nn.Module, images: torch.Tensor, size: int) -> torch.Tensor:
    """Return the outputs, (N, classes), computed so many samples at a time."""
    return torch.cat([model(part) for part in torch.split(images, size)])


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest difference of two tensors of one shape."""
    return float((first - second).abs().max())


def norm_difference(model: nn.Module, images: torch.Tensor) -> float:
    """Return the largest difference of a batch norm's outputs, for the same input one at a time and at once."""
    found = []

    def look(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layer_alone = torch.cat([layer.forward(part) for part in torch.split(inputs[0], 1)])
        # What follows may have worked in place; the layer has not.
        found.append(difference(layer_alone, output))

    hooks = [layer.register_forward_hook(look) for layer in model.modules() if isinstance(layer, _BatchNorm)]
    model(images)
    for hook in hooks:
        hook.remove()
    return max(found)


def show(runs: Runs, compared: Mapping[str, Comparison], seeds: tuple[int, ...]) -> None:
    rows = [
        [
            name,
            Spread.of([runs[name, seed].curves["eval/accuracy"].last for seed in seeds]).show(3),
            Spread.of([runs[name, seed].curves["eval/loss"].last for seed in seeds]).show(3),
        ]
        for name in RECIPES
    ]
    print(f"\n{table(['', 'test accuracy: mean (lowest–highest)', 'test loss'], rows)}")
    header = [
        "batch 1 against batch 64",
        "float32",
        "float64",
        "batch norms alone, float32",
        "largest output",
        "labels",
        "training mode instead",
    ]
    rows = [
        [
            factory,
            f"{one.float32:.1e}",
            f"{one.float64:.1e}",
            f"{one.norm_layers:.1e}" if one.norm_layers else "0, exactly",
            f"{one.largest_output:.0f}",
            "equal" if one.labels_equal else "differ",
            f"{one.training_mode:.1f}",
        ]
        for factory, one in compared.items()
    ]
    print(f"\n{table(header, rows)}", flush=True)


def draw(runs: Runs, seeds: tuple[int, ...], arguments: argparse.Namespace) -> None:
    figure, ((axes,),) = curves.panels(height=3.8)
    labels = []
    for name, color in COLORS.items():
        own = [runs[name, seed].curves["eval/accuracy"] for seed in seeds]
        spreads = [
            Spread.of([100 * (1 - value) for value in values])
            for values in zip(*(curve.values for curve in own), strict=True)
        ]
        steps = own[0].steps
        axes.plot(steps, [spread.mean for spread in spreads], color=color)
        low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        labels.append((spreads[-1].mean, name, color))
    axes.set_yscale("log")
    ticks = (2, 3, 5, 10, 20, 50)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("test error, %")
    curves.label_ends(axes, labels)
    curves.save(figure, arguments.output, "dropout_and_inference")


if __name__ == "__main__":
    sys.exit(main())
