"""The manifest of a checkpoint: what it is, and the SHA-256 and size of every file of it.

Neither safetensors nor ``torch.load`` notices a flipped bit, so the manifest is what tells a whole checkpoint from a
damaged one. It is written last.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from service.domain.errors import CorruptCheckpoint
from service.domain.job import CheckpointFile

MANIFEST_NAME = "manifest.json"
_CHUNK_BYTES = 1 << 20


class Manifest(BaseModel):
    """Contents of ``manifest.json``.

    Attributes:
        step: optimizer steps done.
        spec_sha256: hash of the job's specification.
        metrics: values reported with the checkpoint.
        versions: of what wrote it, such as ``torch``.
        files: every other file of the directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    job_id: str
    attempt: int
    step: int
    spec_sha256: str
    world_size: int
    metrics: dict[str, float]
    versions: dict[str, str]
    files: tuple[CheckpointFile, ...]


def describe_file(path: Path) -> CheckpointFile:
    """Hash a local file."""
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return CheckpointFile(name=path.name, size_bytes=size_bytes, sha256=digest.hexdigest())


def write_manifest(
    directory: Path,
    *,
    job_id: str,
    attempt: int,
    step: int,
    spec_sha256: str,
    world_size: int,
    metrics: Mapping[str, float],
    versions: Mapping[str, str],
) -> Manifest:
    """Describe every file of a local directory in its manifest, and make all of it durable.

    Args:
        directory: holds the files of the checkpoint, and no directories.
        job_id: whose it is.
        attempt: which attempt wrote it.
        step: optimizer steps done.
        spec_sha256: hash of the job's specification.
        world_size: ranks of the attempt.
        metrics: finite values to keep with it.
        versions: of the libraries that wrote it.

    Returns:
        The manifest as written.
    """
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST_NAME)
    for path in paths:
        _sync(path)
    manifest = Manifest(
        job_id=job_id,
        attempt=attempt,
        step=step,
        spec_sha256=spec_sha256,
        world_size=world_size,
        metrics=dict(metrics),
        versions=dict(versions),
        files=tuple(describe_file(path) for path in paths),
    )
    target = directory / MANIFEST_NAME
    target.write_text(manifest.model_dump_json(indent=2) + "\n")
    _sync(target)
    _sync(directory)
    return manifest


def verify_directory(directory: Path) -> Manifest:
    """Check every file of a local checkpoint against its manifest.

    Raises:
        CorruptCheckpoint: a file is missing, or differs in size or hash, or the manifest makes no sense.
        OSError: the directory cannot be read, which says nothing about the checkpoint.
    """
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise CorruptCheckpoint(f"{directory / MANIFEST_NAME} cannot be read: {error}") from error
    for expected in manifest.files:
        try:
            found = describe_file(directory / expected.name)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{directory / expected.name} cannot be read: {error}") from error
        if found != expected:
            raise CorruptCheckpoint(
                f"{directory / expected.name} has {found.size_bytes} bytes with SHA-256 {found.sha256}; its manifest "
                f"says {expected.size_bytes} bytes with {expected.sha256}."
            )
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
