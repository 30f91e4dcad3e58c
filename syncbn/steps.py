"""What eager calls and traced ones have in common, before the normalization itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

from syncbn import settings
from syncbn.collectives import all_reduce_sum
from syncbn.errors import SingleValueError
from syncbn.kernels import backend_for

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


class Probe(Protocol):
    """Takes the place of the forward's all-reduce, to learn more from it."""

    def all_reduce(self, payload: torch.Tensor, group: ProcessGroup | None, label: str) -> torch.Tensor:
        """Sums the local `[Σx, Σx², n]` over the group; the result has the same layout."""
        ...


def reduced_moments(
    input: torch.Tensor, mask: torch.Tensor | None, group: ProcessGroup | None, name: str, probe: Probe | None
) -> torch.Tensor:
    """The payload `[Σx, Σx², n]` over every rank of the group, shape (2C + 1,), float64.

    Args:
        input: Shape (N, C, *).
        mask: Shape (N, 1, *), or None.
        group: Whom to reduce with, or None.
        name: Of the layer, for errors.
        probe: Reduces in place of this function.

    Raises:
        SingleValueError: On CPU, and on any device in debug mode, if the whole group holds one value per channel.
        CollectiveError: If the exchange with the other ranks fails.
    """
    payload = backend_for(input).moments(input, mask)
    if probe is not None:
        payload = probe.all_reduce(payload, group, meeting("forward", name, input))
    elif group is not None:
        all_reduce_sum(payload, group, meeting("forward", name, input))
    # A rank that holds more than one value need not look: reading the count would wait for a device.
    if (input.device.type == "cpu" or settings.debug()) and (mask is not None or input.numel() <= input.size(1)):
        _check_count(payload, input, name)
    return payload


def meeting(direction: str, name: str, input: torch.Tensor) -> str:
    """What ranks have to agree on where they meet in a collective; sample counts and spatial sizes may differ."""
    return _meeting(direction, name, input.size(1), input.dtype)


@functools.lru_cache(maxsize=4096)  # a training step comes with the same ones
def _meeting(direction: str, name: str, channels: int, dtype: torch.dtype) -> str:
    return f"{direction} of {name} ({channels} channels, {dtype})"


def _check_count(payload: torch.Tensor, input: torch.Tensor, name: str) -> None:
    if payload[-1].item() == 1:
        raise SingleValueError(
            f"{name}: batch statistics need more than one value per channel, but the whole group holds one (this "
            f"rank's input has shape {tuple(input.shape)}); use a larger batch, or eval() to normalize with the "
            "running statistics"
        )
