"""Targets of classification: whole numbers from 0."""

import numpy as np
from numpy.typing import NDArray

from service.training.errors import BadSample


def check_labels(labels: NDArray[np.integer], num_classes: int, *, what: str, field: str) -> None:
    """Check that labels, (N,), are of 0 to ``num_classes`` - 1.

    Args:
        labels: of N samples.
        num_classes: as the job says.
        what: the labels' name, for errors.
        field: of the job that holds ``num_classes``.

    Raises:
        BadSample: one is not; with the first such sample's number.
    """
    (wrong,) = np.nonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        others = f" ({wrong.size} samples are wrong)" if wrong.size > 1 else ""
        raise BadSample(
            f"dataset: the label of sample {first} of {what} is {int(labels[first])}, not one of 0 to "
            f"{num_classes - 1}{others}. Labels count from 0; correct them, or {field}."
        )


def check_label(label: int, num_classes: int, *, name: str, field: str) -> int:
    """Return a label if it is one of ``num_classes``. Raises ``BadSample``, with the sample's name."""
    if not 0 <= label < num_classes:
        raise BadSample(
            f"dataset: the label of {name} is {label}, not one of 0 to {num_classes - 1}. Labels count from 0; correct "
            f"it, or {field}."
        )
    return label
