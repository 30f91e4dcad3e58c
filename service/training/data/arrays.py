"""Inputs and targets that are read as whole arrays become a dataset."""

import numpy as np
import torch
from numpy.typing import NDArray

from service.training.data.labels import check_labels
from service.training.data.source import Dataset, InMemorySource
from service.training.data.splits import channel_statistics
from service.training.errors import BadSample, DatasetError

Arrays = tuple[NDArray[np.generic], NDArray[np.generic]]
"""Inputs (N, C, *) and targets (N, *) of one split."""


def dataset_of_arrays(
    training: Arrays, held_out: Arrays, *, num_classes: int | None, normalize: bool, where: str
) -> Dataset:
    """Check arrays and hand them on.

    Whole-number targets are labels: one per sample, or a mask of them; floating-point ones are values to predict.

    Args:
        training: at least one sample.
        held_out: may be empty.
        num_classes: None to take it from the labels.
        normalize: standardize each channel by the training split.
        where: the arrays come from, for errors.

    Raises:
        DatasetError: types, lengths or shapes do not fit.
        BadSample: a label is out of range.
    """
    for (inputs, targets), split in ((training, "training"), (held_out, "held-out")):
        if len(inputs) != len(targets):
            raise DatasetError(
                f"dataset: {where} has {len(inputs)} {split} inputs and {len(targets)} {split} targets; there is one "
                "target to each input."
            )
    if not len(training[0]):
        raise DatasetError(f"dataset: {where} has no samples to train on.")
    for index, what in enumerate(("inputs", "targets")):
        first, second = training[index], held_out[index]
        if len(second) and first.shape[1:] != second.shape[1:]:
            raise DatasetError(
                f"dataset: the training {what} of {where} have the shape {first.shape[1:]}, the held-out ones "
                f"{second.shape[1:]}; they have to be the same."
            )
    inputs, held_out_inputs = (_floating(arrays[0], where) for arrays in (training, held_out))
    if inputs.ndim < 2:
        raise DatasetError(
            f"dataset: the inputs of {where} have the shape {inputs.shape}; at least (samples, features) is needed."
        )
    if normalize:
        mean, std = channel_statistics(inputs)
        inputs, held_out_inputs = (((values - mean) / std).astype(inputs.dtype) for values in (inputs, held_out_inputs))
    targets, held_out_targets, num_outputs = _targets(training[1], held_out[1], num_classes, where)
    return Dataset(
        training=InMemorySource(torch.from_numpy(inputs), torch.from_numpy(targets)),
        held_out=InMemorySource(torch.from_numpy(held_out_inputs), torch.from_numpy(held_out_targets)),
        num_outputs=num_outputs,
    )


def _floating(values: NDArray[np.generic], where: str) -> NDArray[np.floating]:
    if values.dtype.kind not in "biuf":
        raise DatasetError(f"dataset: the inputs of {where} are {values.dtype}; numbers are needed.")
    wanted = values.dtype.newbyteorder("=") if values.dtype.kind == "f" else np.dtype(np.float32)
    floating = np.ascontiguousarray(values, wanted)
    finite = np.isfinite(floating).all(axis=tuple(range(1, floating.ndim)))
    if not finite.all():
        raise BadSample(f"dataset: input {int(np.argmin(finite))} of {where} is not finite; remove or repair it.")
    return floating


def _targets(
    training: NDArray[np.generic], held_out: NDArray[np.generic], num_classes: int | None, where: str
) -> tuple[NDArray[np.generic], NDArray[np.generic], int]:
    if training.dtype.kind == "f":
        values, held_out_values = (_floating(targets, where) for targets in (training, held_out))
        # One value per sample is a vector of length one, as a model puts it out.
        values, held_out_values = (v[:, None] if v.ndim == 1 else v for v in (values, held_out_values))
        return values, held_out_values, values.shape[1]
    if training.dtype.kind not in "biu":
        raise DatasetError(
            f"dataset: the targets of {where} are {training.dtype}; use whole numbers for labels and masks, "
            "floating-point numbers for values to predict."
        )
    labels, held_out_labels = (np.ascontiguousarray(targets, np.int64) for targets in (training, held_out))
    field = "dataset.args.num_classes"
    if labels.ndim > 1:  # masks, in which some number may stand for pixels to ignore
        if num_classes is None:
            raise DatasetError(f"{field}: give it, since masks may hold numbers that stand for no class.")
        return labels, held_out_labels, num_classes
    if num_classes is None:
        num_classes = max(2, *(int(part.max()) + 1 for part in (labels, held_out_labels) if len(part)))
    for part, split in ((labels, "training"), (held_out_labels, "held-out")):
        check_labels(part, num_classes, what=f"the {split} targets of {where}", field=field)
    return labels, held_out_labels, num_classes
