from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from syncbn.collectives import all_reduce_sum, resolve_group
from syncbn.errors import ArgumentError
from syncbn.groups import gather_objects
from syncbn.module import SyncBatchNorm
from syncbn.tracking import is_recomputation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def monitor(module: nn.Module, every: int = 100) -> StatisticsMonitor:
    """Watches how far each rank's batch statistics are from the group's, and what synchronizing costs.

    What it needs rides along in the forward's own all-reduce, C + 1 more values, on every `every`-th forward in
    training of each layer; the others stay as they are. So does what the layers compute, to the last bit, where ranks
    exchange through shared memory or are two; NCCL, and gloo between hosts, may sum a longer payload in another order,
    which moves float64 sums by their rounding. Layers of torch.nn are not watched, and under torch.compile no layer
    is.

        with monitor(model) as watch:
            train(model)
            for report in watch.report().values():
                print(report.name, report.between_rank_share, report.sync_time_s)

    Args:
        module: The model, the same on every rank, as is `every`.
        every: Forwards of a layer from one sample to the next; the first is one.

    Raises:
        ArgumentError: If `every` is less than 1, there is no SyncBatchNorm, or one is being watched already.
    """
    return StatisticsMonitor(module, every)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """What a monitor found about a layer. Shares and times are means over samples; None where there was none.

    The share of rank r's mean μᵣ, over nᵣ values, in a channel's variance σ² is Σᵣ nᵣ(μᵣ − μ)² / (N σ²), between 0 and
    1 (the between-group share of a one-way analysis of variance, Fisher 1925): what a batch norm that does not
    synchronize would fail to see. It is not 0 where ranks hold random parts of one batch. Its expectation then is
    (W − 1)/(N − 1), with the W ranks that hold any values, exactly, over all ways to deal N values out. Values of one
    image are alike, so for images a share of the order of W over the number of images is no sign of ranks that differ.

    Attributes:
        name: The layer's path in the model.
        num_samples: Forwards sampled. Not counted are batches of fewer than two values per channel on all ranks
            together, and those with a NaN or an Inf.
        between_rank_share: Mean over channels of the share, minus its expectation. About 0 where ranks hold parts
            of one batch at random; 0 for a layer that does not synchronize.
        between_rank_share_per_channel: The same for each of the C channels.
        raw_between_rank_share: Mean over channels of the share itself.
        sync_time_s: Time of the forward's all-reduce on this rank, in seconds, the wait for slower ranks included.
        running_statistics_equal: Whether the running statistics were the same on every rank, to the last bit, when
            the report was asked for. None for a layer that keeps none.
    """

    name: str
    num_samples: int
    between_rank_share: float | None
    between_rank_share_per_channel: tuple[float, ...] | None
    raw_between_rank_share: float | None
    sync_time_s: float | None
    running_statistics_equal: bool | None


class StatisticsMonitor:
    """Watches the SyncBatchNorm layers of a model until it is closed; see `monitor`."""

    def __init__(self, module: nn.Module, every: int = 100) -> None:
        if every < 1:
            raise ArgumentError(f"every: expected at least 1 forward from one sample to the next, got {every}")
        self._layers = {
            path or "the module itself": layer
            for path, layer in module.named_modules()
            if isinstance(layer, SyncBatchNorm)
        }
        if not self._layers:
            raise ArgumentError("module: has no SyncBatchNorm to watch; call convert_sync_batchnorm on it first")
        for path, layer in self._layers.items():
            if layer._probe is not None:
                raise ArgumentError(f"module: {path} is being watched already; close that monitor first")
        self._probes = {path: _Probe(layer.num_features, every) for path, layer in self._layers.items()}
        for path, layer in self._layers.items():
            layer._probe = self._probes[path]

    def report(self) -> dict[str, LayerReport]:
        """What was found so far, by the layers' paths.

        Every rank of the default group has to call it: running statistics are compared across all of them, in one
        exchange.
        """
        fingerprints = {path: _fingerprint(layer) for path, layer in self._layers.items()}
        everywhere = [fingerprints] if resolve_group(None) is None else gather_objects(fingerprints, None)
        return {
            path: probe.report(
                path,
                None if fingerprints[path] is None else all(one.get(path) == fingerprints[path] for one in everywhere),
            )
            for path, probe in self._probes.items()
        }

    def close(self) -> None:
        """Leaves the layers alone from now on; `report` still tells what was found."""
        for layer in self._layers.values():
            vars(layer).pop("_probe", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Probe:
    """Reduces a layer's payload, and now and then learns something from it."""

    def __init__(self, num_channels: int, every: int) -> None:
        self._num_channels = num_channels
        self._every = every
        self._num_forwards = 0
        self._sums: torch.Tensor | None = None  # of what `_shares` returned, on the layer's device: nothing waits there
        self._times = _Times()

    def all_reduce(self, payload: torch.Tensor, group: ProcessGroup | None, label: str) -> torch.Tensor:
        if is_recomputation():  # of a forward that was seen before
            all_reduce_sum(payload, group, label)
            return payload
        sampled = self._num_forwards % self._every == 0
        self._num_forwards += 1
        if not sampled:
            all_reduce_sum(payload, group, label)
            return payload
        extended = torch.cat((payload, _parts(payload)))  # (3C + 2,)
        if group is None:
            all_reduce_sum(extended, group, label)
        else:
            with self._times.measured(payload.device):
                all_reduce_sum(extended, group, label)
        payload, parts = extended.split_with_sizes((payload.numel(), extended.numel() - payload.numel()))
        shares = _shares(payload, parts)
        self._sums = shares if self._sums is None else self._sums + shares
        return payload

    def report(self, name: str, running_statistics_equal: bool | None) -> LayerReport:
        *shares, expected, num_samples = [0.0] * (self._num_channels + 2) if self._sums is None else self._sums.tolist()
        n = num_samples
        raw = sum(shares) / len(shares)
        return LayerReport(
            name=name,
            num_samples=int(n),
            between_rank_share=(raw - expected) / n if n else None,
            between_rank_share_per_channel=tuple((share - expected) / n for share in shares) if n else None,
            raw_between_rank_share=raw / n if n else None,
            sync_time_s=self._times.mean_s(),
            running_statistics_equal=running_statistics_equal,
        )


def _parts(payload: torch.Tensor) -> torch.Tensor:
    """What has to be summed over ranks beside `[Σx, Σx², n]`: `[(Σx)²/n, n > 0]`, shape (C + 1,)."""
    sums, n = payload[: payload.numel() // 2], payload[-1:]
    return torch.cat((sums * sums / n.clamp_min(1), n.clamp_max(1)))


def _shares(payload: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """The share of each channel, the expectation of a share, and 1; zeros where the batch says nothing.

    Σᵣ nᵣ(μᵣ − μ)² = Σᵣ (Σᵣx)²/nᵣ − (Σx)²/N. A random part of nᵣ values has a mean of variance s²/nᵣ · (1 − nᵣ/N),
    with s² = Nσ²/(N − 1) (Cochran 1977, "Sampling Techniques", Theorem 2.2); summed over ranks, (W − 1)/(N − 1) · Nσ².

    Args:
        payload: Reduced, shape (2C + 1,).
        parts: Reduced, shape (C + 1,).

    Returns:
        Shape (C + 2,), float64.
    """
    num_channels = payload.numel() // 2
    sums, squares, n = payload.split_with_sizes((num_channels, num_channels, 1))
    of_mean = sums * sums / n.clamp_min(1)
    within_and_between = squares - of_mean
    # What raw sums cannot resolve is rounding: a constant channel has no variance to have a share in.
    resolved = within_and_between > squares * 2.0**-44
    share = torch.where(resolved, (parts[:-1] - of_mean) / within_and_between, 0).clamp_(0, 1)
    expected = (parts[-1:] - 1) / (n - 1).clamp_min(1)
    counts = (n > 1) & payload.isfinite().all()
    return torch.where(counts, torch.cat((share, expected, torch.ones_like(n))), 0)


class _Times:
    """Measures, on a GPU without waiting for it: times are read once they are there."""

    def __init__(self) -> None:
        self._sum_s = 0.0
        self._num = 0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        if device.type != "cuda":
            start_s = time.perf_counter()
            yield
            self._add(time.perf_counter() - start_s)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        yield
        end.record(stream)
        self._pending.append((start, end))
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            self._read()

    def mean_s(self) -> float | None:
        while self._pending:
            self._pending[0][1].synchronize()
            self._read()
        return self._sum_s / self._num if self._num else None

    def _read(self) -> None:
        start, end = self._pending.popleft()
        self._add(start.elapsed_time(end) / 1000)

    def _add(self, seconds: float) -> None:
        self._sum_s += seconds
        self._num += 1


def _fingerprint(layer: SyncBatchNorm) -> str | None:
    """A digest of a layer's running statistics, or None if it keeps none."""
    buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    if layer.running_mean is None:
        return None
    digest = hashlib.sha256()
    for buffer in buffers:
        if buffer is not None:
            digest.update(bytes(buffer.detach().reshape(-1).view(torch.uint8).tolist()))
    return digest.hexdigest()
