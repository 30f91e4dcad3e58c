"""What the builtin tasks expect of models and datasets."""

from typing import Any

import torch

from service.training.errors import BadFactory


def scores_of(outputs: Any, *, shape: tuple[int, ...], task: str, expected: str) -> torch.Tensor:  # noqa: ANN401
    """Return a model's outputs in the precision in which losses are computed: float64 as it is, all else float32.

    Args:
        outputs: of the model.
        shape: what they must have; -1 where any number will do.
        task: its name.
        expected: the shape in words.

    Raises:
        BadFactory: they are no tensor of that shape.
    """
    if not isinstance(outputs, torch.Tensor):
        raise BadFactory(
            f"model.factory: task {task} takes one tensor, {expected}; the model's output is a "
            f"{type(outputs).__name__}. Choose another model, or a task of your own with task.factory."
        )
    fits = outputs.ndim == len(shape) and all(
        wanted in (-1, given) for wanted, given in zip(shape, outputs.shape, strict=True)
    )
    if not fits:
        raise BadFactory(
            f"model.factory: task {task} takes {expected}; the model's output is {tuple(outputs.shape)}. Choose a "
            "model that fits the task."
        )
    return in_loss_precision(outputs)


def in_loss_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the precision in which losses are computed: float64 as it is, all else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def describe(targets: object) -> str:
    """Return what targets are, for a message."""
    if isinstance(targets, torch.Tensor):
        return f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
    return f"a {type(targets).__name__}"
