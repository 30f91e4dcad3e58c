"""Checkpoints in run storage: whole or not listed."""

import shutil
import uuid
from pathlib import Path

from service.domain.errors import CorruptCheckpoint, NotFound
from service.domain.job import Checkpoint
from service.domain.journal import CheckpointWritten
from service.storage.layout import checkpoint_dir
from service.storage.manifest import MANIFEST_NAME, describe_file, verify_directory
from service.storage.object_store import ObjectStore


def publish_checkpoint(store: ObjectStore, job_id: str, attempt: int, step: int, staged: Path) -> CheckpointWritten:
    """Copy a staged checkpoint into run storage, its manifest last, after checking it against that manifest.

    Args:
        store: run storage.
        job_id: whose it is.
        attempt: which attempt made it.
        step: optimizer steps done.
        staged: local directory with the files and ``manifest.json``.

    Returns:
        The report of it.

    Raises:
        CorruptCheckpoint: the staged files differ from their manifest.
        OSError: run storage refused a file.
    """
    manifest = verify_directory(staged)
    target = checkpoint_dir(job_id, attempt, step)
    for file in manifest.files:
        store.upload(staged / file.name, f"{target}/{file.name}")
    store.upload(staged / MANIFEST_NAME, f"{target}/{MANIFEST_NAME}")
    described = describe_file(staged / MANIFEST_NAME)
    return CheckpointWritten(
        step=step,
        path=target,
        manifest_sha256=described.sha256,
        files=(*manifest.files, described),
        metrics=manifest.metrics,
    )


def fetch_checkpoint(store: ObjectStore, checkpoint: Checkpoint, cache: Path) -> Path:
    """Return a local directory with a committed checkpoint, verified.

    Args:
        store: run storage.
        checkpoint: which one.
        cache: local directory in which copies are kept; not used where run storage is a local directory.

    Raises:
        CorruptCheckpoint: a file is missing or differs from what was committed.
        OSError: storage does not answer, which says nothing about the checkpoint.
    """
    if store.is_local:
        directory = store.local_path(checkpoint.path)
        _verify(directory, checkpoint)
        return directory
    directory = cache / checkpoint.manifest_sha256
    if directory.exists():
        try:
            _verify(directory, checkpoint)
        except CorruptCheckpoint:
            shutil.rmtree(directory, ignore_errors=True)  # the copy is damaged, not yet what was committed
        else:
            return directory
    _download(store, checkpoint, directory)
    _verify(directory, checkpoint)
    return directory


def _verify(directory: Path, checkpoint: Checkpoint) -> None:
    try:
        found = describe_file(directory / MANIFEST_NAME)
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"The manifest of step {checkpoint.step} cannot be read: {error}") from error
    if found.sha256 != checkpoint.manifest_sha256:
        raise CorruptCheckpoint(f"The manifest of step {checkpoint.step} is not the one that was committed.")
    verify_directory(directory)


def _download(store: ObjectStore, checkpoint: Checkpoint, directory: Path) -> None:
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        for file in checkpoint.files:
            store.download(f"{checkpoint.path}/{file.name}", partial / file.name)
        try:
            partial.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            # Another rank of this node was faster; both copies are the same.
    except NotFound as error:
        raise CorruptCheckpoint(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
