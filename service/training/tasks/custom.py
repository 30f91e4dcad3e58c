"""A loss, and metrics, of the user's own code."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from service.training.data.source import Batch
from service.training.errors import BadFactory
from service.training.factories import call_factory
from service.training.tasks.task import Loss, Task, TaskMetrics, WorldGather, WorldSum

FIELD = "task.factory"
_METRIC_NAME = re.compile(r"[A-Za-z0-9_.@-]+")


class Custom(Task):
    """What a job names with ``task.factory``: a function that returns an object with the methods below.

    - ``loss(outputs, targets)`` returns ``(sum, weight)``: the sum over the samples, a differentiable tensor (), and
      what the sum over all ranks is divided by. Or it returns a tensor () alone, the mean over the samples, which in
      general does not add up and makes the result depend on the number of ranks.
    - ``metrics(outputs, targets)``, if there is one, returns ``{name: (sum, weight)}``.

    Where its loss compares samples of a batch with each other, so that sums do not add up either, the object says so in
    an attribute ``unsuited``, a sentence.

    Args:
        factory: ``package.module:function``.
        arguments: of it, by name.

    Raises:
        BadFactory: it cannot be imported or called, or returns something else.
    """

    name = "custom"

    def __init__(self, factory: str, arguments: Mapping[str, Any]) -> None:
        self._made: Any = call_factory(factory, arguments, field=FIELD)
        self._factory = factory
        for method, needed in (("loss", True), ("metrics", False)):
            if not (callable(getattr(self._made, method, None)) or (not needed and not hasattr(self._made, method))):
                raise BadFactory(
                    f"{FIELD}: {factory} returned a {type(self._made).__name__}, which has no method "
                    f"{method}(outputs, targets). Return an object that has one."
                )
        self.unsuited = getattr(self._made, "unsuited", None)
        if not isinstance(self.unsuited, str | None):
            raise BadFactory(f"{FIELD}: unsuited of what {factory} returned is no sentence, but {self.unsuited!r}.")

    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check nothing: only the user's code knows what fits."""

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - the user's
        """Compare; see ``Task``."""
        result = self._made.loss(outputs, targets)
        if isinstance(result, torch.Tensor):
            self._check_sum(result)
            num_samples = float(_num_samples(targets))
            return Loss(sum=result * num_samples, weight=num_samples, adds_up=False)
        if not isinstance(result, tuple) or len(result) != 2:
            raise self._bad(f"loss returned a {type(result).__name__}")
        total, weight = result
        self._check_sum(total)
        return Loss(sum=total, weight=self._number(weight, "the weight of the loss"))

    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation; see ``Task``."""
        return _Metrics(self)

    def metrics(self, outputs: object, targets: object) -> dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]:
        """Return the user's metrics of a batch, by name: sum and weight, floats or tensors ()."""
        if not hasattr(self._made, "metrics"):
            return {}
        result = self._made.metrics(outputs, targets)
        if not isinstance(result, Mapping):
            raise self._bad(f"metrics returned a {type(result).__name__}, not {{name: (sum, weight)}}")
        metrics = {}
        for name, ratio in result.items():
            if not isinstance(name, str) or not _METRIC_NAME.fullmatch(name):
                raise self._bad(f"metrics named one {name!r}; use letters, digits and . _ @ -")
            if not isinstance(ratio, tuple) or len(ratio) != 2:
                raise self._bad(f"metric {name} is a {type(ratio).__name__}, not (sum, weight)")
            metrics[name] = (self._number(ratio[0], f"metric {name}"), self._number(ratio[1], f"metric {name}"))
        return metrics

    def _check_sum(self, total: object) -> None:
        if not isinstance(total, torch.Tensor) or total.ndim or not total.is_floating_point():
            what = f"{total.dtype} {tuple(total.shape)}" if isinstance(total, torch.Tensor) else type(total).__name__
            raise self._bad(f"the sum that loss returned is a {what}")

    def _number(self, value: object, what: str) -> torch.Tensor | float:
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            return value.detach()
        if isinstance(value, int | float):
            return float(value)
        raise self._bad(f"{what} is a {type(value).__name__}, neither a number nor a tensor ()")

    def _bad(self, what: str) -> BadFactory:
        return BadFactory(
            f"{FIELD}: {self._factory}: {what}. A loss is (sum, weight): a tensor () and what to divide by."
        )


class _Metrics(TaskMetrics):
    def __init__(self, task: Custom) -> None:
        self._task = task
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - see TaskMetrics
        for name, ratio in self._task.metrics(outputs, targets).items():
            added = tuple(torch.as_tensor(value, dtype=torch.float64) for value in ratio)
            known = self._sums.get(name)
            self._sums[name] = (added[0], added[1]) if known is None else (known[0] + added[0], known[1] + added[1])

    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return sum / weight of each metric that any rank has seen, where it is finite."""
        # A rank without samples knows no names, so vectors would not match.
        own = {name: (float(total), float(weight)) for name, (total, weight) in self._sums.items()}
        everywhere: list[dict[str, tuple[float, float]]] = world_gather(own)
        metrics = {}
        for name in sorted({name for rank in everywhere for name in rank}):
            total = math.fsum(rank[name][0] for rank in everywhere if name in rank)
            weight = math.fsum(rank[name][1] for rank in everywhere if name in rank)
            if weight and math.isfinite(total / weight):
                metrics[name] = total / weight
        return metrics


def _num_samples(targets: Any) -> int:  # noqa: ANN401 - a tensor, or a list of dictionaries
    return len(targets)
