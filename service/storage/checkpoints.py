"""Checkpoints in run storage: whole or not listed."""

import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from service.domain.errors import CorruptCheckpoint, NotFound, ServiceError
from service.domain.job import Checkpoint
from service.domain.journal import CheckpointWritten
from service.storage.layout import checkpoint_dir, job_dir
from service.storage.manifest import MANIFEST_NAME, describe_file, verify_directory
from service.storage.object_store import ObjectStore

# Copies of one job's checkpoints that a node keeps: the one it continues from, and the one before.
KEPT_COPIES = 2
# A copy that was asked for a moment ago may be about to be read, whoever asks for others meanwhile.
IN_USE_S = 600.0
# A job that has not begun anew on this node for so long has most likely ended.
FORGOTTEN_S = 86_400.0

logger = logging.getLogger(__name__)


def publish_checkpoint(store: ObjectStore, job_id: str, attempt: int, step: int, staged: Path) -> CheckpointWritten:
    """Copy a staged checkpoint into run storage, its manifest last, after checking it against that manifest.

    What cannot be copied whole is taken back: on a full disk, others need the room.

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
        StorageError: run storage refuses this service.
        OSError: run storage did not take a file this time.
    """
    manifest = verify_directory(staged)
    target = checkpoint_dir(job_id, attempt, step)
    try:
        for file in manifest.files:
            store.upload(staged / file.name, f"{target}/{file.name}")
        store.upload(staged / MANIFEST_NAME, f"{target}/{MANIFEST_NAME}")
    except (OSError, ServiceError):
        with suppress(OSError, ServiceError):  # the reason is the error that is on its way
            store.remove(target)
        raise
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
        cache: local directory in which copies are kept, the newest ``KEPT_COPIES`` of each job; not used where run
            storage is a local directory.

    Raises:
        CorruptCheckpoint: a file is missing or differs from what was committed.
        OSError: storage does not answer, which says nothing about the checkpoint.
    """
    if store.is_local:
        directory = store.local_path(checkpoint.path)
        _verify(directory, checkpoint)
        return directory
    directory = cache / checkpoint.job_id / checkpoint.manifest_sha256
    if directory.exists():
        os.utime(directory)  # before it is looked at: it is in use from here on
        try:
            _verify(directory, checkpoint)
        except CorruptCheckpoint:
            shutil.rmtree(directory, ignore_errors=True)  # the copy is damaged, not yet what was committed
        else:
            return directory
    _drop_old_copies(store, cache, keep=directory)
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


def _drop_old_copies(store: ObjectStore, cache: Path, *, keep: Path) -> None:
    """Make room for a copy: drop those of jobs that are gone or forgotten, and all but the newest of the others."""
    try:
        for copies in cache.glob("*"):
            ages = {path: time.time() - path.stat().st_mtime for path in copies.iterdir()}
            is_ours = copies == keep.parent
            is_gone = not is_ours and (
                min(ages.values(), default=0) > FORGOTTEN_S or not store.exists(job_dir(copies.name))
            )
            num_kept = 0 if is_gone else KEPT_COPIES - is_ours
            for path in sorted(ages, key=ages.__getitem__)[num_kept:]:
                if ages[path] > IN_USE_S:
                    shutil.rmtree(path)
            if is_gone:
                with suppress(OSError):  # one is in use
                    copies.rmdir()
    except (OSError, ServiceError) as error:  # another rank of this node does the same; or storage does not answer
        logger.warning("Old copies of checkpoints in %s could not be dropped, will try again: %s", cache, error)


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
