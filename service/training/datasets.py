"""The builtin datasets: what ``domain.catalog.DATASETS`` names."""

import gzip
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from service.domain.catalog import DigitsArguments
from service.domain.spec import DatasetSpec
from service.training.sampling import permutation


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """One split of a dataset.

    Attributes:
        inputs: (N, C, *), float64.
        targets: (N,), int64, class indices.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def select(
        self, rows: NDArray[np.int64] | slice, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs (n, C, *) of the given dtype and targets (n,) of some rows, on a device."""
        chosen = rows if isinstance(rows, slice) else torch.from_numpy(rows.copy())
        return self.inputs[chosen].to(device=device, dtype=dtype), self.targets[chosen].to(device=device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """What a job trains on and what it is evaluated on."""

    training: Samples
    held_out: Samples
    num_classes: int


def build_dataset(spec: DatasetSpec) -> Dataset:
    """Read the dataset that a specification names."""
    return DATASET_BUILDERS[spec.factory](spec.args)


def _digits(arguments: Mapping[str, object]) -> Dataset:
    options = DigitsArguments.model_validate(dict(arguments))
    # Each row: 64 pixels of 0–16, row by row, then the digit.
    with gzip.open(_digits_file()) as file:
        table = np.loadtxt(file, delimiter=",")
    order = permutation(len(table), seed=options.split_seed, purpose="split")
    num_held_out = round(len(table) * options.test_fraction)
    held_out, training = table[order[:num_held_out]], table[order[num_held_out:]]
    mean, std = training[:, :64].mean(), training[:, :64].std()

    def samples(rows: NDArray[np.float64]) -> Samples:
        pixels = (rows[:, :64] - mean) / std
        return Samples(
            inputs=torch.from_numpy(pixels.reshape(-1, 1, 8, 8)),  # (N, 64) to (N, 1, 8, 8)
            targets=torch.from_numpy(rows[:, 64].astype(np.int64)),
        )

    return Dataset(training=samples(training), held_out=samples(held_out), num_classes=10)


def _digits_file() -> Path:
    # Found without importing scikit-learn, which takes longer (1.3 s) than all the rest of a rank's start.
    package = find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"


DATASET_BUILDERS: Mapping[str, Callable[[Mapping[str, object]], Dataset]] = MappingProxyType(
    {"builtin:digits": _digits}
)
