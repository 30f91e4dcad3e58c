from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import nn

from syncbn.collectives import resolve_group
from syncbn.errors import ArgumentError
from syncbn.groups import LOCAL, gather_objects, group_name, lowest_rank
from syncbn.module import SyncBatchNorm
from syncbn.moments import RunningStatistics, update_running

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Entry(NamedTuple):
    """One layer's statistics of one normalization batch; sorted, entries are in sample order.

    Attributes:
        batch: Index of the normalization batch within the mini-batch.
        origin: Lowest rank of those that normalized together. Consecutive ranks hold consecutive samples.
        layer: Index of the layer within the model.
        call: How many times the layer had run in this batch before, as a recurrent network's do.
    """

    batch: int
    origin: int
    layer: int
    call: int


class DeferredStatistics:
    """Folds batches into a model's running statistics once a step, in sample order, whichever rank ran them when.

    A mini-batch may hold several normalization batches, run one after another (gradient accumulation) or side by side
    in groups of ranks. The moving average depends on their order. While this object is attached, the SyncBatchNorm
    layers of the model leave their running statistics alone; `commit` folds everything in as one process would have
    that ran the normalization batches in the order of their indices.

        deferred = DeferredStatistics(model)
        for step in steps:
            for index, micro_batch in step.my_normalization_batches:
                with deferred.batch(index):
                    loss(model(micro_batch)).backward()
            deferred.commit()
            optimizer.step()

    `momentum=None` and the non-finite guard work as they do without it.

    Args:
        module: The model.
        process_group: The ranks that together run the mini-batch; None for the default group. Nothing is exchanged
            where the layers synchronize over these same ranks, since each then holds all statistics.
    """

    def __init__(self, module: nn.Module, process_group: ProcessGroup | None = None) -> None:
        self._process_group = process_group
        self._layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, SyncBatchNorm) and layer.track_running_stats and layer.running_mean is not None
        ]
        self._pending: dict[_Entry, torch.Tensor] = {}
        self._batch = 0
        for layer in self._layers:
            if layer._collector is not None:
                raise ArgumentError(f"module: another DeferredStatistics is attached to {layer.name}; close it first")
        for index, layer in enumerate(self._layers):
            layer._collector = partial(self._record, index, _origin(layer))

    @contextmanager
    def batch(self, index: int) -> Iterator[None]:
        """Says which normalization batch the forwards inside belong to.

        Args:
            index: Its position within the mini-batch, at least 0. Forwards outside any `batch` belong to batch 0.
        """
        if index < 0:
            raise ArgumentError(f"index: expected a position within the mini-batch, at least 0, got {index}")
        before, self._batch = self._batch, index
        try:
            yield
        finally:
            self._batch = before

    def commit(self) -> None:
        """Folds in what was collected, and starts anew. Every rank of the group has to call it."""
        pending, self._pending = self._pending, {}
        if self._is_spread():
            device = self._layers[0].running_mean.device  # type: ignore[union-attr]
            parts = gather_objects({key: payload.cpu() for key, payload in pending.items()}, self._process_group)
            # Ranks that normalized together hold the same statistics, to the last bit: any one's will do.
            pending = {key: payload.to(device) for part in parts for key, payload in part.items()}
        with torch.no_grad():
            for entry in sorted(pending):
                update_running(_running(self._layers[entry.layer]), pending[entry])

    def discard(self) -> None:
        """Forgets what was collected, as for a step that is not taken."""
        self._pending = {}

    def close(self) -> None:
        """Gives the running statistics back to the layers; what was not committed is forgotten."""
        self.discard()
        for layer in self._layers:
            layer.__dict__.pop("_collector", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, layer: int, origin: int, payload: torch.Tensor) -> None:
        for call in itertools.count():
            entry = _Entry(self._batch, origin, layer, call)
            if entry not in self._pending:
                self._pending[entry] = payload
                return

    def _is_spread(self) -> bool:
        """Whether some statistics are on other ranks only; the same answer on every rank."""
        group = resolve_group(self._process_group)
        if group is None:
            return False
        whole = {group_name(self._process_group), group_name(group)}
        return any(
            layer.ghost_size is not None or group_name(layer.process_group) not in whole for layer in self._layers
        )


def _origin(layer: SyncBatchNorm) -> int:
    local = layer.ghost_size is not None or layer.process_group == LOCAL
    return lowest_rank(LOCAL if local else layer.process_group)


def _running(layer: SyncBatchNorm) -> RunningStatistics:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return RunningStatistics(
        layer.running_mean,
        layer.running_var,
        layer.num_batches_tracked,
        layer.momentum,
        layer._buffers.get("num_nonfinite_batches"),
    )
