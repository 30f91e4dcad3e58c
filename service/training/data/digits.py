"""scikit-learn's handwritten digits: 1797 real images, ten classes."""

import gzip
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from service.domain.catalog.datasets import DigitsArguments
from service.training.data.context import DataContext
from service.training.data.source import Dataset, InMemorySource
from service.training.data.splits import split_rows


def build_digits(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Return the digits, standardized by the training split's mean and standard deviation: (1, 8, 8), or (8, 8).

    As a sequence they are (features, steps): a step is a row of the image, its features are the row's pixels.
    """
    del context
    options = DigitsArguments.model_validate(dict(arguments))
    images, digits = read_digits()
    training, held_out = split_rows(len(images), test_fraction=options.test_fraction, seed=options.split_seed)
    mean, std = images[training].mean(), images[training].std()

    def source(rows: NDArray[np.int64]) -> InMemorySource:
        inputs = torch.from_numpy((images[rows] - mean) / std)  # (n, 8 rows, 8 pixels)
        inputs = inputs.unsqueeze(1) if options.layout == "image" else inputs.transpose(1, 2).contiguous()
        return InMemorySource(inputs, torch.from_numpy(digits[rows]))

    return Dataset(training=source(training), held_out=source(held_out), num_outputs=10)


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the images, (1797, 8, 8), whole numbers of 0 to 16, and their digits, (1797,)."""
    # Each row: 64 pixels, row by row, then the digit.
    with gzip.open(sklearn_file("digits.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :64].reshape(-1, 8, 8), table[:, 64].astype(np.int64)


def sklearn_file(name: str) -> Path:
    """Return where scikit-learn keeps a file of data.

    It is found without importing scikit-learn, which takes longer (1.3 s) than all the rest of a rank's start.
    """
    package = find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "datasets" / "data" / name
