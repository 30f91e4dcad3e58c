"""Checkpoints on the node's own disk: written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from service.domain.rank_protocol import RankTask
from service.storage.manifest import MANIFEST_NAME, Manifest, write_manifest
from service.training.errors import CheckpointFailed, CheckpointMismatch

MODEL_NAME = "model.safetensors"
TRAINING_STATE_NAME = "training_state.pt"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that the next step depends on.

    The position in the schedule and in the sample order, and the seeds of every random generator, are pure functions
    of the job's seed and ``step``; so they need no room of their own.

    Attributes:
        step: optimizer steps done.
        model: parameters and buffers, with the names of the plain ``torch.nn`` model.
        optimizer: its ``state_dict()``.
        state: whatever else the next step depends on, by name: average of the weights, loss scale, patience left.
            Dictionaries, lists, tensors, numbers and strings; nothing that would have to run code to load.
    """

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(
    checkpoint: Checkpoint, task: RankTask, metrics: Mapping[str, float], *, extra_dir: Path | None = None
) -> Path:
    """Write a checkpoint below the staging directory, durably.

    Args:
        checkpoint: what to write.
        task: whose it is, and where.
        metrics: finite values to keep with it.
        extra_dir: its files become part of the checkpoint, by being moved there.

    Returns:
        Its directory, which appears under this name only when whole.

    Raises:
        CheckpointFailed: the disk does not take it; nothing is left behind.
    """
    staging = Path(task.staging_dir)
    target = staging / str(checkpoint.step)
    unfinished = None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{checkpoint.step}-", dir=staging))
        unfinished.chmod(0o755)
        safetensors.torch.save_file(_apart(checkpoint.model), unfinished / MODEL_NAME)
        training_state = {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "seed": task.spec.seed,
            "optimizer": checkpoint.optimizer,
            "state": checkpoint.state,
        }
        torch.save(training_state, unfinished / TRAINING_STATE_NAME)
        if extra_dir is not None:
            for path in extra_dir.iterdir():
                shutil.move(path, unfinished / path.name)
        write_manifest(
            unfinished,
            job_id=task.job_id,
            attempt=task.attempt,
            step=checkpoint.step,
            spec_sha256=task.spec.sha256,
            world_size=task.world_size,
            metrics=metrics,
            versions={"torch": torch.__version__},
        )
        unfinished.rename(target)
        _sync_directory(staging)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointFailed(
            f"the checkpoint of step {checkpoint.step} could not be written below {staging}: {error}. "
            "Check the free space and the permissions there."
        ) from error
    return target


def read_checkpoint(directory: Path, *, job_id: str) -> Checkpoint:
    """Read a checkpoint whose files were verified before.

    Args:
        directory: a local copy.
        job_id: the job that wrote it, as its manifest has to say.

    Raises:
        CheckpointMismatch: it is another job's, or a later version wrote it.
    """
    manifest = Manifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
    if manifest.job_id != job_id:
        raise CheckpointMismatch(
            f"{directory} is step {manifest.step} of {manifest.job_id}, not of {job_id}. Continue from a checkpoint of "
            "this job."
        )
    state = torch.load(directory / TRAINING_STATE_NAME, map_location="cpu", weights_only=True)
    if state["format_version"] > FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{directory} has format version {state['format_version']}; this release reads versions up to "
            f"{FORMAT_VERSION}. Continue it with the release that wrote it, or a later one."
        )
    return Checkpoint(
        step=state["step"],
        model=safetensors.torch.load_file(directory / MODEL_NAME),
        optimizer=state["optimizer"],
        state=state.get("state", {}),  # version 1 had none
    )


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors as their file takes them: contiguous, and none of them in the memory of another."""
    found: dict[str, torch.Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
