"""scikit-learn's diabetes data: ten measurements of 442 patients and how far the disease went in a year."""

import gzip
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from service.domain.catalog.datasets import DiabetesArguments
from service.training.data.context import DataContext
from service.training.data.digits import sklearn_file
from service.training.data.source import Dataset, InMemorySource
from service.training.data.splits import channel_statistics, split_rows


def build_diabetes(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Return the patients: inputs (10,) standardized by the training split, targets (1,), float64."""
    del context
    options = DiabetesArguments.model_validate(dict(arguments))
    measurements, progress = _read()
    training, held_out = split_rows(len(measurements), test_fraction=options.test_fraction, seed=options.split_seed)
    mean, std = channel_statistics(measurements[training])
    inputs = (measurements - mean) / std
    if options.standardize_targets:
        mean, std = channel_statistics(progress[training])
        progress = (progress - mean) / std

    def source(rows: NDArray[np.int64]) -> InMemorySource:
        return InMemorySource(torch.from_numpy(inputs[rows]), torch.from_numpy(progress[rows]))

    return Dataset(training=source(training), held_out=source(held_out), num_outputs=1)


def _read() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    with gzip.open(sklearn_file("diabetes_data_raw.csv.gz")) as file:
        measurements = np.loadtxt(file)
    with gzip.open(sklearn_file("diabetes_target.csv.gz")) as file:
        progress = np.loadtxt(file)
    return measurements, progress.reshape(-1, 1)
