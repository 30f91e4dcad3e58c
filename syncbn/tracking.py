"""What becomes of a batch's statistics beyond the batch: folded in at once, collected for later, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from syncbn.kernels import backend_for
from syncbn.moments import RunningStatistics

# Takes a layer's reduced `[Σx, Σx², n]`, shape (2C + 1,), in place of its running statistics.
Collector: TypeAlias = Callable[[torch.Tensor], None]


_ANY_EPS = 1.0


def track(running: RunningStatistics, payload: torch.Tensor, collector: Collector | None) -> None:
    """Folds a batch in, or hands it to a collector.

    Args:
        running: Where to fold it in.
        payload: Reduced `[Σx, Σx², n]`, shape (2C + 1,).
        collector: Takes it instead.
    """
    if is_recomputation():
        return
    if collector is None:
        backend_for(payload).finalize(payload, _ANY_EPS, running)  # for what it folds in; the statistics are not needed
    else:
        collector(payload.clone())


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing's second forward does."""
    inside_backward: bool = torch._C._current_graph_task_id() != -1
    return inside_backward
