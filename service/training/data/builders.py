"""Datasets by the names that jobs give them."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from service.domain.spec import DatasetSpec
from service.training.data.context import DataContext
from service.training.data.diabetes import build_diabetes
from service.training.data.digit_canvases import build_digits_detection, build_digits_segmentation
from service.training.data.digits import build_digits
from service.training.data.image_folder import build_image_folder
from service.training.data.npz import build_npz
from service.training.data.parquet import build_parquet
from service.training.data.source import Dataset
from service.training.data.user_dataset import build_user_dataset
from service.training.data.webdataset import build_webdataset

DATASET_BUILDERS: Mapping[str, Callable[[Mapping[str, object], DataContext], Dataset]] = MappingProxyType(
    {
        "builtin:diabetes": build_diabetes,
        "builtin:digits": build_digits,
        "builtin:digits-detection": build_digits_detection,
        "builtin:digits-segmentation": build_digits_segmentation,
        "builtin:image-folder": build_image_folder,
        "builtin:npz": build_npz,
        "builtin:parquet": build_parquet,
        "builtin:webdataset": build_webdataset,
    }
)


def build_dataset(
    spec: DatasetSpec, *, seed: int, uploads: Mapping[str, Path] | None = None, cache_dir: Path | None = None
) -> Dataset:
    """Open the dataset that a specification names.

    Args:
        spec: a builtin factory, or ``module:function`` of the job's own code.
        seed: of the job; for what a user's dataset draws. Splits have seeds of their own, so that jobs with different
            seeds are evaluated on the same samples.
        uploads: files that the user uploaded, by SHA-256 (hexadecimal).
        cache_dir: where copies of remote files are kept, by default one directory per user and node; ranks share it.

    Raises:
        DatasetError: its files cannot be read or do not hold what the arguments say.
        BadSample: a sample does not fit.
        BadFactory: the user's function cannot be imported, called or used.
    """
    context = DataContext(
        seed=seed,
        uploads=uploads or {},
        cache_dir=cache_dir or Path(tempfile.gettempdir()) / f"syncbn-data-{os.getuid()}",
    )
    build = DATASET_BUILDERS.get(spec.factory)
    return build_user_dataset(spec, context) if build is None else build(spec.args, context)
