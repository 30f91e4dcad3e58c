"""Columns of Parquet files."""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.domain.catalog.datasets import ParquetArguments
from service.training.data.arrays import Arrays, dataset_of_arrays
from service.training.data.context import DataContext
from service.training.data.files import local_file
from service.training.data.source import Dataset
from service.training.data.splits import split_rows
from service.training.errors import BadSample, DatasetError


def build_parquet(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Read columns into memory: inputs (columns,), or as ``input_shape`` says; targets are labels or values."""
    options = ParquetArguments.model_validate(dict(arguments))
    parquet = _pyarrow_parquet()
    samples = _read(parquet, options.path, options, context, field="dataset.args.path")
    if options.held_out_path is None:
        rows = split_rows(len(samples[0]), test_fraction=options.test_fraction, seed=options.split_seed)
        training, held_out = ((samples[0][chosen], samples[1][chosen]) for chosen in rows)
    else:
        training = samples
        held_out = _read(parquet, options.held_out_path, options, context, field="dataset.args.held_out_path")
    training, held_out = _number_texts(training, held_out)
    return dataset_of_arrays(
        training, held_out, num_classes=options.num_classes, normalize=options.normalize, where=options.path
    )


def _pyarrow_parquet() -> Any:  # noqa: ANN401 - a module without types
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise DatasetError(
            "dataset.factory: builtin:parquet needs pyarrow, which is not on this node. Install it there: "
            "pip install 'syncbn[parquet]'."
        ) from None


def _read(parquet: Any, path: str, options: ParquetArguments, context: DataContext, *, field: str) -> Arrays:  # noqa: ANN401
    file = local_file(path, context, field=field)
    columns = [*options.inputs, *options.targets]
    try:
        known = parquet.read_schema(file).names
        for name in columns:
            if name not in known:
                part = "inputs" if name in options.inputs else "targets"
                near = get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}? " if near else ""
                raise DatasetError(
                    f"dataset.args.{part}: {path} has no column {name!r}. {hint}It has: {', '.join(known[:50])}."
                )
        # Not the dataset reader, which would take key=value in the path for further columns.
        table = parquet.ParquetFile(file).read(columns=list(dict.fromkeys(columns)))
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise DatasetError(f"{field}: {path} cannot be read as Parquet: {error}") from None
    inputs = _columns(table, options.inputs, path, "inputs")
    if options.input_shape is not None:
        if inputs[:1].size and inputs[0].size != np.prod(options.input_shape):
            raise DatasetError(
                f"dataset.args.input_shape: {'×'.join(map(str, options.input_shape))} are not the {inputs[0].size} "
                f"numbers of an input in {path}."
            )
        inputs = inputs.reshape(-1, *options.input_shape)
    targets = _columns(table, options.targets, path, "targets")
    return inputs, targets[:, 0] if len(options.targets) == 1 and targets.shape[1:] == (1,) else targets


def _columns(table: Any, names: tuple[str, ...], path: str, part: str) -> NDArray[np.generic]:  # noqa: ANN401
    """Return an array (rows, numbers)."""
    arrays = [_column(table.column(name).combine_chunks(), name, path, f"dataset.args.{part}") for name in names]
    if len(arrays) > 1 and any(array.ndim > 1 for array in arrays):
        raise DatasetError(f"dataset.args.{part}: columns of lists of {path} cannot be joined; name one of them.")
    return arrays[0] if arrays[0].ndim > 1 else np.stack(arrays, axis=1)


def _column(column: Any, name: str, path: str, field: str) -> NDArray[np.generic]:  # noqa: ANN401
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise BadSample(f"dataset: column {name} of {path} has no value in row {row}; fill it in or remove the row.")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype != object or not len(values) or isinstance(values[0], str):
        numbers: NDArray[np.generic] = values if values.dtype != object else values.astype(str)
        return numbers
    if not isinstance(values[0], np.ndarray):
        raise DatasetError(
            f"{field}: column {name} of {path} holds {column.type}; numbers, lists of numbers or text are needed."
        )
    for row, value in enumerate(values):
        if value.shape != values[0].shape:
            raise BadSample(
                f"dataset: column {name} of {path} has {len(value)} numbers in row {row}, {len(values[0])} in row 0; "
                "samples of a dataset have one shape."
            )
    return np.stack(values)


def _number_texts(training: Arrays, held_out: Arrays) -> tuple[Arrays, Arrays]:
    """Number labels that are text in sorted order."""
    targets, held_out_targets = training[1], held_out[1]
    if targets.dtype.kind != "U" or targets.ndim != 1:
        return training, held_out
    _, numbers = np.unique(np.concatenate([targets, held_out_targets]), return_inverse=True)
    return (training[0], numbers[: len(targets)]), (held_out[0], numbers[len(targets) :])
