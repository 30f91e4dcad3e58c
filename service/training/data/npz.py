"""Arrays of a NumPy archive."""

from collections.abc import Mapping
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from service.domain.catalog.datasets import NpzArguments
from service.training.data.arrays import dataset_of_arrays
from service.training.data.context import DataContext
from service.training.data.files import DAMAGED_ARCHIVE, local_file
from service.training.data.source import Dataset
from service.training.data.splits import split_rows
from service.training.errors import DatasetError


def build_npz(arguments: Mapping[str, object], context: DataContext) -> Dataset:
    """Read an archive: inputs (N, C, *), targets (N,), (N, K) or (N, H, W). Whole numbers become float32 inputs."""
    options = NpzArguments.model_validate(dict(arguments))
    path = local_file(options.path, context, field="dataset.args.path")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DatasetError(f"dataset.args.path: {options.path} holds one array; save several with numpy.savez.")
    except (*DAMAGED_ARCHIVE, ValueError) as error:
        raise DatasetError(f"dataset.args.path: {options.path} is no NumPy archive (.npz): {error}") from None
    with archive:

        def array(field: str, name: str) -> NDArray[np.generic]:
            return _array(archive, name, path=options.path, field=f"dataset.args.{field}")

        inputs, targets = array("inputs", options.inputs), array("targets", options.targets)
        if len(inputs) != len(targets):
            raise DatasetError(
                f"dataset.args.targets: {options.path} has {len(inputs)} {options.inputs} and {len(targets)} "
                f"{options.targets}; there is one target to each input."
            )
        if options.held_out_inputs is None:
            rows = split_rows(len(inputs), test_fraction=options.test_fraction, seed=options.split_seed)
            training, held_out = ((inputs[chosen], targets[chosen]) for chosen in rows)
        else:
            assert options.held_out_targets is not None
            training = (inputs, targets)
            held_out = (
                array("held_out_inputs", options.held_out_inputs),
                array("held_out_targets", options.held_out_targets),
            )
    return dataset_of_arrays(
        training, held_out, num_classes=options.num_classes, normalize=options.normalize, where=options.path
    )


def _array(archive: Mapping[str, NDArray[np.generic]], name: str, *, path: str, field: str) -> NDArray[np.generic]:
    if name not in archive:
        near = get_close_matches(name, archive, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise DatasetError(f"{field}: {path} has no array {name!r}. {hint}It has: {', '.join(sorted(archive))}.")
    try:
        found = archive[name]
    except (*DAMAGED_ARCHIVE, ValueError) as error:  # ValueError: Python objects, which would have to be unpickled
        raise DatasetError(f"{field}: array {name} of {path} cannot be read: {error}") from None
    if found.ndim == 0:
        raise DatasetError(f"{field}: array {name} of {path} is a single number; its first axis counts samples.")
    return found
