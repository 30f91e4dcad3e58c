"""What a dataset's builder is given beside the job's arguments."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataContext:
    """Where a rank finds files, and the job's seed.

    Attributes:
        seed: of the job.
        uploads: files that the user uploaded, by SHA-256 (hexadecimal), on this node.
        cache_dir: where copies of remote files are kept; ranks of a node may share it.
    """

    seed: int
    uploads: Mapping[str, Path]
    cache_dir: Path
