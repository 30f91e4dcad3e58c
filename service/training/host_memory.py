"""Copies of a checkpoint in host memory, in buffers that are allocated once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from service.training.checkpoints import Checkpoint
from service.training.errors import BadFactory


class HostMemory:
    """Holds one copy of a checkpoint; the next one takes its place, in the same buffers."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self._used: dict[tuple[object, ...], torch.Tensor] = {}

    def copy(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return a checkpoint with the same values, all of its tensors contiguous and in host memory.

        Args:
            checkpoint: its tensors may lie on GPUs, share memory or change afterwards.

        Raises:
            BadFactory: it holds something of the user's that could not be read back.
        """
        self._used = {}
        copy = replace(
            checkpoint,
            model=self._copy(checkpoint.model, ("model",)),
            optimizer=self._copy(checkpoint.optimizer, ("optimizer",)),
            state=self._copy(checkpoint.state, ("state",)),
        )
        if any(buffer.is_pinned() for buffer in self._used.values()):
            torch.cuda.synchronize()
        self._buffers = self._used
        return copy

    def _copy(self, value: Any, path: tuple[object, ...]) -> Any:  # noqa: ANN401 - a state dict holds anything
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value.detach(), path)
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = [self._copy(item, (*path, index)) for index, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if value is None or isinstance(value, bool | bytes | torch.dtype | torch.device):
            return value
        for plain in (int, float, str):  # NumPy's float64 is a float too, and would run code when it is loaded
            if isinstance(value, plain):
                return plain(value)
        name = ".".join(str(key) for key in path)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise BadFactory(
            f"{name} is a {kind}, which a checkpoint cannot hold: reading it back would run code. Keep tensors, "
            "numbers, strings, lists and dictionaries there."
        )

    def _copy_tensor(self, tensor: torch.Tensor, path: tuple[object, ...]) -> torch.Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=True)
        self._used[path] = buffer
        return buffer
