from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import ArgumentError
from syncbn.groups import LOCAL
from syncbn.kernels import backend_for
from syncbn.module import SyncBatchNorm
from syncbn.moments import RunningStatistics, update_running

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from syncbn.groups import Group

M = TypeVar("M", bound=nn.Module)
B = TypeVar("B")

_log = logging.getLogger(__name__)


def recalibrate(
    module: M,
    batches: Iterable[B],
    *,
    process_group: Group = None,
    forward: Callable[[M, B], object] | None = None,
    num_batches: int | None = None,
) -> M:
    """Computes a model's running statistics anew, exactly, from a pass over some data (PreciseBN).

    The moving average of training lags behind the weights, and weighs the last batches most. Here the statistics of
    each batch norm's input are those of all batches together, pooled by count over batches and ranks (Wu & Johnson
    2021, "Rethinking 'Batch' in BatchNorm", section 3). Use it before an evaluation, and after averaging weights.

    Batch norm layers of this package and of torch.nn normalize with their batch's statistics, synchronized where they
    synchronize in training, and without renormalization; all else is in evaluation mode, and nothing is
    differentiated. A compiled model runs eagerly. Then `running_mean` and `running_var` (unbiased) are set in place,
    and `num_batches_tracked` to the number of batches, the largest of any rank. Modes are as before afterwards; where
    an error ends the pass, so are the running statistics. Left alone are frozen layers, layers that keep no running
    statistics, and, with a warning in the log, those that were never called.

    Positions that a mask leaves out do not count; nor do, in layers with `skip_nonfinite`, batches with a NaN or an
    Inf.

    Every rank of `process_group` has to call it. Where layers synchronize, the ranks also stop together, as soon as
    one of them has no more batches, and the batch that others have already drawn then is left out; that takes a small
    collective per batch. Where none does, each rank runs what it has. Batch sizes may differ either way.

    Args:
        module: The model.
        batches: This rank's data, on the model's device.
        process_group: The ranks to pool over, at least those that layers synchronize over; None for the default
            group, "local" for this rank alone.
        forward: Runs the model on a batch, `forward(module, batch)`. None for `module(batch)`, or `module(batch[0])`
            where the batch is a tuple or a list, as of inputs and targets.
        num_batches: At most so many; None for all.

    Returns:
        `module` itself.

    Raises:
        ArgumentError: If no rank has a batch, a layer's input is not finite, an argument does not fit, or a layer
            synchronizes over ranks that are not in `process_group`.
    """
    if num_batches is not None and num_batches < 1:
        raise ArgumentError(f"num_batches: expected at least 1, or None for all, got {num_batches}")
    group = None if process_group == LOCAL else resolve_group(process_group)
    layers = {
        path or "the module itself": layer
        for path, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not (isinstance(layer, SyncBatchNorm) and layer.frozen)
    }
    together = [path for path, layer in layers.items() if _synchronizes(path, layer, group)]
    tracking = {
        path: layer
        for path, layer in layers.items()
        if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None
    }
    if not tracking:
        return module
    device = next(iter(tracking.values())).running_mean.device  # type: ignore[union-attr]
    # One rank's layers may synchronize where another's, in a group of its own, do not; all have to do the same.
    num_together = torch.tensor([float(bool(together))], dtype=torch.float64, device=device)
    all_reduce_sum(num_together, group, "whether layers synchronize")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_same_statistics_afterwards(tracking.values()))
        stack.enter_context(_only_training(module, layers.values()))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled model has no probes
        sums = [stack.enter_context(_summed(layer)) for layer in tracking.values()]
        done = 0
        for batch in _drawn(itertools.islice(batches, num_batches), group if num_together.item() > 0 else None, device):
            if forward is not None:
                forward(module, batch)
            else:
                module(batch[0] if isinstance(batch, tuple | list) else batch)
            done += 1
    totals, largest = _pooled([each.total for each in sums], done, group, device)
    if largest == 0:
        raise ArgumentError("batches: there was none on any rank; an iterator that was used up before gives none")
    for path, total in zip(tracking, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise ArgumentError(
                f"batches: the input of {path} held a NaN or an Inf; look for it in the data and the weights, or set "
                "the layer's skip_nonfinite to leave such batches out"
            )
    for (path, layer), total in zip(tracking.items(), totals, strict=True):
        if float(total[-1]) > 1:
            _set_statistics(layer, total, largest)
        else:
            _log.warning("%s met fewer than two values per channel; its running statistics stay as they were", path)
    return module


class _Sums:
    """Adds up this rank's `[Σx, Σx², n]` of one layer over batches; the probe of a SyncBatchNorm.

    Attributes:
        total: Shape (2C + 1,), float64.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        size, device = 2 * layer.num_features + 1, layer.running_mean.device
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self._skips_nonfinite = isinstance(layer, SyncBatchNorm) and layer.skip_nonfinite

    def all_reduce(self, payload: torch.Tensor, group: ProcessGroup | None, label: str) -> torch.Tensor:
        local = payload.clone()
        all_reduce_sum(payload, group, label)
        if self._skips_nonfinite:  # as the layer does in training: by what all ranks hold
            local = torch.where(torch.isfinite(payload).all(), local, 0)
        self.total += local
        return payload

    def add_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook, for a layer of torch.nn."""
        input: torch.Tensor = next(itertools.chain(args, kwargs.values()))
        self.total += backend_for(input).moments(input, None)


@contextmanager
def _summed(layer: _BatchNorm) -> Iterator[_Sums]:
    sums = _Sums(layer)
    if not isinstance(layer, SyncBatchNorm):
        handle = layer.register_forward_pre_hook(sums.add_input, with_kwargs=True)
        try:
            yield sums
        finally:
            handle.remove()
        return
    options = {"_probe": sums, "_collector": _drop, "renormalization": None}
    facts = vars(layer)
    before = {name: facts[name] for name in options if name in facts}
    facts.update(options)
    try:
        yield sums
    finally:
        for name in options:
            del facts[name]
        facts.update(before)


def _drop(payload: torch.Tensor) -> None:
    """Keeps a batch out of the running statistics, which are those of other batches than the ones summed up."""


@contextmanager
def _same_statistics_afterwards(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Undoes what layers of torch.nn do to their running statistics in training."""
    buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@contextmanager
def _only_training(module: nn.Module, layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Sets flags, without `train()`: a model's own may do more than that."""
    before = {each: each.training for each in module.modules()}
    training = set(layers)
    try:
        for each in before:
            each.training = each in training
        yield
    finally:
        for each, mode in before.items():
            each.training = mode


def _drawn(batches: Iterable[B], group: ProcessGroup | None, device: torch.device) -> Iterator[B]:
    """The batches, up to the first that not every rank of the group has."""
    end = object()
    iterator = iter(batches)
    while True:
        batch = next(iterator, end)
        num_done = torch.full((1,), float(batch is end), dtype=torch.float64, device=device)
        all_reduce_sum(num_done, group, "the ends of the batches")
        if num_done.item() > 0:
            if batch is not end:
                _log.warning("another rank has no more batches; the rest of this rank's are left out")
            return
        yield batch  # type: ignore[misc]  # not the end


def _pooled(
    totals: list[torch.Tensor], num_batches: int, group: ProcessGroup | None, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], int]:
    """Each layer's sums over all ranks, and the largest number of batches."""
    world_size, rank = (1, 0) if group is None else (group.size(), group.rank())
    counts = torch.zeros(world_size, dtype=torch.float64, device=device)
    counts[rank] = num_batches
    everything = torch.cat([*(total.to(device) for total in totals), counts])
    all_reduce_sum(everything, group, "the sums of recalibration")
    *pooled, counts = everything.split_with_sizes([*(total.numel() for total in totals), world_size])
    return tuple(pooled), int(counts.max())


def _set_statistics(layer: _BatchNorm, total: torch.Tensor, num_batches: int) -> None:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    # A NaN from before would survive any weight.
    mean.zero_()
    var.zero_()
    update_running(RunningStatistics(mean, var, None, momentum=1.0, num_nonfinite=None), total.to(mean.device))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(num_batches)


def _synchronizes(path: str, layer: _BatchNorm, group: ProcessGroup | None) -> bool:
    """Whether a layer meets other ranks in training.

    Raises:
        ArgumentError: If some of them are not in the group that the pass is made over.
    """
    if isinstance(layer, SyncBatchNorm):
        local = layer.process_group == LOCAL or layer.ghost_size is not None
        own = None if local else resolve_group(layer.process_group)  # type: ignore[arg-type]
    elif isinstance(layer, nn.SyncBatchNorm):
        own = resolve_group(layer.process_group)
    else:
        return False
    if own is None:
        return False
    outside = set(dist.get_process_group_ranks(own)).difference(
        [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    )
    if outside:
        raise ArgumentError(
            f"process_group: {path} synchronizes with ranks {sorted(outside)}, which are not in it and would wait for "
            "batches; pass a group that contains them (None for all ranks)"
        )
    return True
