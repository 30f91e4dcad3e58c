"""What it costs to get samples: the wait of a step of the demo job, and decoding with and without worker processes.

    python -m benchmarks.data_loading

The first part takes steps of `examples/digits.yaml` on one rank, plain and with augmentations, and tells which
share of a step it waits for its batch. The second reads a folder of JPEG images that it makes, by itself and while a
model computes as long as it takes to decode. On two cores two workers and the training process share what there is.
Prints tables and writes JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from benchmarks import results
from service.domain.spec import AugmentationSpec, DatasetSpec, parse_spec
from service.training.data import Batch, Loader, Source, Transform, build_augmentations, build_dataset
from service.training.models import build_model
from service.training.sampling import SampleOrder

DEMO = Path(__file__).parents[1] / "examples" / "digits.yaml"
AUGMENTATIONS = [AugmentationSpec(name="horizontal-flip"), AugmentationSpec(name="random-crop", args={"padding": 1})]


def open_loader(source: Source, *, batch_size: int, transform: Transform | None = None, num_workers: int = 0) -> Loader:
    order = SampleOrder(num_samples=len(source), batch_size=batch_size, seed=0)
    return Loader(
        source,
        rows=lambda step, micro_step: order.minibatch(step),
        num_micro_steps=lambda step: 1,
        epoch_of=lambda step: step // order.steps_per_epoch,
        transform=transform,
        num_workers=num_workers,
        prefetch=2,
        pin_memory=False,
    )


def waits(batches: Iterator[Batch], compute: Callable[[Batch], Any], warmup: int) -> tuple[float, float]:
    """Medians of what a step takes and of what it waits for its batch, in seconds."""
    steps_s, waits_s = [], []
    started = time.perf_counter()
    for batch in batches:
        got = time.perf_counter()
        compute(batch)
        ended = time.perf_counter()
        steps_s.append(ended - started)
        waits_s.append(got - started)
        started = time.perf_counter()
    return statistics.median(steps_s[warmup:]), statistics.median(waits_s[warmup:])


def demo_job(num_steps: int) -> list[dict[str, Any]]:
    spec = parse_spec(yaml.safe_load(DEMO.read_text()))
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    sample = dataset.training.sample(0)
    model = build_model(
        spec.model,
        input_shape=tuple(sample.input.shape),
        num_outputs=dataset.num_outputs,
        task="classification",
        seed=spec.seed,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs.float()), batch.targets).backward()
        optimizer.step()

    rows = []
    for name, transform, num_workers in (
        ("in memory", None, 0),
        ("augmented", build_augmentations(AUGMENTATIONS, 0), 0),
        ("augmented", build_augmentations(AUGMENTATIONS, 0), 1),
    ):
        loader = open_loader(dataset.training, batch_size=spec.batch.size, transform=transform, num_workers=num_workers)
        step_s, wait_s = waits(loader.batches(0, num_steps - 1), step, warmup=num_steps // 5)
        loader.close()
        rows.append({"setting": name, "workers": num_workers, "step_s": step_s, "wait_s": wait_s})
    return rows


def image_folder(num_images: int, side: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        write_images(Path(directory), num_images, side)
        args = {"path": directory, "size": [224, 224], "test_fraction": 0}
        source = build_dataset(DatasetSpec(factory="builtin:image-folder", args=args), seed=0).training
        assert isinstance(source, Source)
        started = time.perf_counter()
        for index in range(16):
            source.sample(index)
        decode_s = (time.perf_counter() - started) / 16
        rows = []
        for num_workers in (0, 1, 2):
            loader = open_loader(source, batch_size=16, num_workers=num_workers)
            last = num_images // 16 - 1
            next(loader.batches(0, 0))  # workers are forked by the first iteration
            started = time.perf_counter()
            for _ in loader.batches(0, last):
                pass
            alone = num_images / (time.perf_counter() - started)
            step_s, wait_s = waits(loader.batches(0, last), lambda batch: busy(16 * decode_s), warmup=4)
            loader.close()
            rows.append(
                {
                    "workers": num_workers,
                    "images_per_s": alone,
                    "decode_s": decode_s,
                    "step_s": step_s,
                    "wait_s": wait_s,
                }
            )
    return rows


def write_images(folder: Path, num_images: int, side: int) -> None:
    generator = np.random.default_rng(0)
    for number in range(num_images):
        # Smooth, as photographs are: noise would take far longer to decode.
        coarse = generator.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8)
        path = folder / str(number % 4) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)


def busy(duration_s: float) -> None:
    """What a GPU would do: it takes time, but none of this machine's cores."""
    time.sleep(duration_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a rank with one CPU
    demo = demo_job(arguments.steps)
    folder = image_folder(arguments.images, arguments.side)
    report = "\n\n".join(
        [
            results.table(
                ["demo job, one rank", "loading.workers", "step", "wait for the batch", "share"],
                [
                    [
                        row["setting"],
                        str(row["workers"]),
                        f"{row['step_s'] * 1e3:.2f} ms",
                        f"{row['wait_s'] * 1e6:.0f} µs",
                        f"{row['wait_s'] / row['step_s']:.1%}",
                    ]
                    for row in demo
                ],
            ),
            results.table(
                [f"JPEG {arguments.side}×{arguments.side} → 224×224", "images/s", "wait in a step as long as decoding"],
                [
                    [
                        f"{row['workers']} workers" if row["workers"] else "0 workers: one thread reads ahead",
                        f"{row['images_per_s']:.0f}",
                        f"{row['wait_s'] / row['step_s']:.1%}",
                    ]
                    for row in folder
                ],
            ),
        ]
    )
    configuration = vars(arguments) | {"batch_size": 16, "prefetch": 2, "torch_threads": 1}
    results.record("data_loading", {"configuration": configuration, "demo": demo, "image_folder": folder}, report)


if __name__ == "__main__":
    main()
