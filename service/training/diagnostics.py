"""What is watched beside the loss, every so many steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from service.domain.batch_plan import BatchPlan
from service.domain.spec import JobSpec
from service.training.input_drift import InputDrift
from service.training.optimization import GradientNoise
from service.training.optimization.gradient_noise import PartGradients, watched_gradients
from service.training.optimization.gradient_norms import gradient_norms
from service.training.world import World
from syncbn import StatisticsMonitor, SyncBatchNorm, monitor


class Diagnostics:
    """Watches a model on the steps that the specification asks for; on the others it costs nothing.

    ``norm``: for each SyncBatchNorm layer, how far the ranks' statistics are from those of the batch.
    ``gradient_noise``: from the squared norms of each rank's part of the gradient (McCandlish et al. 2018).
    ``input_drift``: how the moments of each layer's input move (Ioffe & Szegedy 2015).

    Args:
        spec: the job.
        model: not wrapped.
        world: the ranks.

    Attributes:
        noise: the noise scale so far; None where it is not asked for.
    """

    noise: GradientNoise | None

    def __init__(self, spec: JobSpec, model: nn.Module, world: World) -> None:
        self._options = spec.diagnostics
        self._model = model
        self._world = world
        watches_norm = spec.diagnostics.norm and world.size > 1 and not spec.compile
        self._has_sync = watches_norm and any(isinstance(layer, SyncBatchNorm) for layer in model.modules())
        self._monitor: StatisticsMonitor | None = None
        self._drift = InputDrift(model, world) if spec.diagnostics.input_drift else None
        self.noise = GradientNoise() if spec.diagnostics.gradient_noise else None
        self._plan: BatchPlan | None = None

    def begin(self, step: int, plan: BatchPlan) -> None:
        """Begin a step; all ranks call it together, as ``end``."""
        self._plan = plan if step % self._options.every_steps == 0 else None
        if self._plan is None:
            return
        if self._has_sync:
            self._monitor = monitor(self._model, every=1)
        if self._drift is not None:
            self._drift.begin()
        self._parts = torch.zeros(3, dtype=torch.float64, device=self._world.device)

    @contextmanager
    def backward(self, *, num_samples: int, factor: float) -> Iterator[None]:
        """Look at the gradient that one backward brings on this rank.

        Args:
            num_samples: of this rank in the micro-step.
            factor: what makes it the gradient of the mean loss over them.
        """
        if self._plan is None or self.noise is None:
            yield
            return
        with watched_gradients(self._model) as squares:
            yield
        self._parts += torch.stack(
            [
                torch.ones_like(squares[0]),
                torch.stack(squares).sum() * factor**2,
                torch.ones_like(squares[0]) / num_samples,
            ]
        )

    def end(self, *, gradient_norm: float, weight: float) -> dict[str, float]:
        """Return what the step has shown, by name of the metric; nothing where it was not watched.

        Args:
            gradient_norm: of the whole mini-batch, before clipping.
            weight: of the mini-batch, that its loss was divided by.
        """
        plan, self._plan = self._plan, None
        if plan is None:
            return {}
        found = {name: float(norm) for name, norm in gradient_norms(self._model).items()}
        if self._monitor is not None:
            found |= self._norm_metrics(self._monitor)
            self._monitor.close()
            self._monitor = None
        if self._drift is not None:
            found |= self._drift.end()
        if self.noise is not None and plan.world_size * plan.num_micro_steps > 1:
            num_parts, squared_norms, inverse_sizes = self._world.sum_tensor(self._parts).tolist()
            parts = PartGradients(num_parts=round(num_parts), squared_norms=squared_norms, inverse_sizes=inverse_sizes)
            # Of the mean over samples, as the parts are, also where a loss is a mean over pixels or boxes.
            squared_norm = (gradient_norm * (weight or 1.0) / plan.size) ** 2
            if math.isfinite(squared_norm) and math.isfinite(squared_norms):
                self.noise.observe(parts, num_samples=plan.size, squared_norm=squared_norm)
            found |= {f"train/{name}": value for name, value in self.noise.metrics.items()}
        return found

    def _norm_metrics(self, watch: StatisticsMonitor) -> dict[str, float]:
        found = {}
        reports = [report for report in watch.report().values() if report.num_samples]
        for report in reports:
            assert report.between_rank_share is not None
            found[f"norm/{report.name}/between_rank_share"] = report.between_rank_share
            # None where this rank's group is this rank alone.
            found[f"norm/{report.name}/sync_time_s"] = report.sync_time_s or 0.0
        if reports:
            shares = [report.between_rank_share or 0.0 for report in reports]
            found["norm/between_rank_share"] = sum(shares) / len(shares)
            found["norm/sync_time_s"] = sum(report.sync_time_s or 0.0 for report in reports)
            equal = [
                report.running_statistics_equal for report in reports if report.running_statistics_equal is not None
            ]
            found["norm/running_statistics_equal"] = float(all(equal))
        return found
