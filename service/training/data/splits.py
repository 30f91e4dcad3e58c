"""Which samples of a collection are kept for evaluation, and how inputs are standardized."""

import numpy as np
from numpy.typing import NDArray

from service.domain.catalog.datasets import num_held_out
from service.training.errors import DatasetError
from service.training.sampling import permutation


def split_rows(num_samples: int, *, test_fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide a collection's samples at random.

    Args:
        num_samples: of the collection.
        test_fraction: share to keep for evaluation.
        seed: decides which.

    Returns:
        Numbers of the samples to train on, and of those to evaluate.

    Raises:
        DatasetError: none would be left to train on.
    """
    order = permutation(num_samples, seed=seed, purpose="split")
    held_out = num_held_out(num_samples, test_fraction)
    if held_out == num_samples:
        raise DatasetError(
            f"dataset.args.test_fraction: {test_fraction:g} of {num_samples} samples leaves none to train on; "
            + ("lower it." if num_samples else "the dataset is empty.")
        )
    return order[held_out:], order[:held_out]


def channel_statistics(inputs: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each channel, in float64; 1 where a channel does not vary.

    Args:
        inputs: (N, C, *), N ≥ 1.

    Returns:
        Two arrays of shape (C, 1, …) that broadcast over one input.
    """
    axes = (0, *range(2, inputs.ndim))
    mean = inputs.mean(axis=axes, dtype=np.float64, keepdims=True)[0]
    std = inputs.std(axis=axes, dtype=np.float64, keepdims=True)[0]
    return mean, np.where(std > 0, std, 1.0)
