"""Which metrics say how a job is doing, whatever its task."""

from collections.abc import Iterable

# What a step reports beside its loss and the metrics of its task.
_OF_THE_STEP = frozenset(
    {"learning_rate", "gradient_norm", "step_time_s", "data_wait_s", "skipped_steps", "loss_scale"}
    | {"gradient_noise_scale", "gradient_signal", "gradient_noise"}
)


def training_metrics(names: Iterable[str]) -> list[str]:
    """Return the loss of the training steps, and the metrics of the task beside it."""
    return _of("train/", names)


def evaluation_metrics(names: Iterable[str]) -> list[str]:
    """Return the loss of the evaluations, and their metrics."""
    return _of("eval/", names)


def scores(names: Iterable[str]) -> list[str]:
    """Return the metrics of the evaluations beside their loss."""
    return [name for name in evaluation_metrics(names) if name != "eval/loss"]


def _of(prefix: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if name.startswith(prefix) and name.removeprefix(prefix) not in _OF_THE_STEP]
    return sorted(found, key=lambda name: (name != f"{prefix}loss", name))
