"""Load a checkpoint of `examples/digits.yaml` into the plain network, and evaluate it: one process, no service.

    python examples/evaluate_checkpoint.py DIRECTORY

The network is built with `torch.nn.BatchNorm2d`. Its input is standardized with the mean and the standard deviation of
the training images, which is what the dataset does; any batch size gives the same outputs.
"""

import argparse
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from service.domain.spec import parse_spec
from service.storage.manifest import verify_directory
from service.training.data import build_dataset
from service.training.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the checkpoint")
    parser.add_argument("--job", type=Path, default=Path(__file__).parent / "digits.yaml", help="what was trained")
    arguments = parser.parse_args()
    manifest = verify_directory(arguments.directory)  # every file is what its SHA-256 says
    spec = parse_spec(yaml.safe_load(arguments.job.read_text()))
    dataset = build_dataset(spec.dataset, seed=spec.seed)
    images, labels = dataset.held_out.inputs, dataset.held_out.targets
    model = build_model(
        spec.model,
        input_shape=tuple(images.shape[1:]),
        num_outputs=dataset.num_outputs,
        task="classification",
        seed=spec.seed,
    )
    model.load_state_dict(load_file(arguments.directory / "model.safetensors"))
    model.eval()
    with torch.no_grad():
        correct = (model(images.float()).argmax(1) == labels).sum().item()
    print(f"step {manifest.step}: test accuracy {correct / len(labels):.4f} ({correct} of {len(labels)} images)")


if __name__ == "__main__":
    main()
