"""Which checkpoints of a job are kept; a pure decision."""

from collections.abc import Sequence

from service.domain.job import Checkpoint
from service.domain.spec import CheckpointSpec, KeepBestSpec


def to_remove(checkpoints: Sequence[Checkpoint], policy: CheckpointSpec) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that no rule keeps, by step.

    Args:
        checkpoints: those of one job that count, in any order.
        policy: of the job: the newest, the best, those of every n-th step; whatever one rule keeps is kept.
    """
    by_step = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    kept = {_key(checkpoint) for checkpoint in by_step[-policy.keep_last :]}
    if policy.keep_best is not None:
        kept |= {_key(checkpoint) for checkpoint in _best(by_step, policy.keep_best)}
    if policy.keep_every_steps is not None:
        kept |= {_key(checkpoint) for checkpoint in by_step if checkpoint.step % policy.keep_every_steps == 0}
    return tuple(checkpoint for checkpoint in by_step if _key(checkpoint) not in kept)


def _best(by_step: Sequence[Checkpoint], policy: KeepBestSpec) -> Sequence[Checkpoint]:
    """Return the best by a metric; of equal ones the earliest, so that a plateau replaces none."""
    measured = [checkpoint for checkpoint in by_step if policy.metric in checkpoint.metrics]
    sign = 1.0 if policy.mode == "min" else -1.0
    return sorted(measured, key=lambda checkpoint: sign * checkpoint.metrics[policy.metric])[: policy.count]


def _key(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.attempt, checkpoint.step
