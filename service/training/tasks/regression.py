"""Real values for each sample."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn import functional as F

from service.training.data.source import Batch
from service.training.errors import BadSample
from service.training.tasks.shapes import describe, in_loss_precision, scores_of
from service.training.tasks.task import Loss, Ratio, Task, TaskMetrics, WorldGather, WorldSum


class Regression(Task):
    """Predictions (N, D) and targets (N, D) or, with D = 1, (N,), floating point; the mean is over N·D values.

    Args:
        loss: squares (``mse``), absolute values (``l1``), or squares that turn to lines (``huber``; Huber 1964).
        huber_delta: where they turn.
    """

    name = "regression"

    def __init__(self, *, loss: Literal["mse", "l1", "huber"] = "mse", huber_delta: float = 1.0) -> None:
        functions: dict[str, Callable[..., torch.Tensor]] = {
            "mse": F.mse_loss,
            "l1": F.l1_loss,
            "huber": F.huber_loss,
        }
        self._function = functions[loss]
        self._settings = {"delta": huber_delta} if loss == "huber" else {}

    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check targets; see ``Task``."""
        targets = batch.targets
        expected: list[tuple[int, ...]] = [(len(batch.inputs), num_outputs)]
        if num_outputs == 1:
            expected.append((len(batch.inputs),))
        fits = isinstance(targets, torch.Tensor) and targets.is_floating_point() and tuple(targets.shape) in expected
        if not fits:
            raise BadSample(
                f"dataset: task regression takes targets of floating point, {' or '.join(map(str, expected))}; they "
                f"are {describe(targets)}."
            )
        finite = targets.isfinite()
        if not finite.all():
            place = finite.logical_not().nonzero()[0].tolist()
            raise BadSample(
                f"dataset: the target of sample {place[0]} of the batch is {float(targets[tuple(place)])}. Leave such "
                "samples out."
            )

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - see Task
        """Compare; see ``Task``. The weight is the number of values."""
        predictions, values = _aligned(outputs, targets)
        weight = float(values.numel())
        error = (predictions.detach() - values).abs().sum()
        return Loss(
            sum=self._function(predictions, values, reduction="sum", **self._settings),
            weight=weight,
            metrics={"mae": Ratio(sum=error, weight=weight)},
        )

    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation; see ``Task``."""
        return _Metrics(num_outputs=num_outputs, device=device)


class _Metrics(TaskMetrics):
    def __init__(self, *, num_outputs: int, device: torch.device) -> None:
        # Per output, shape (D,), but for the count; the second moment is about the mean so far, as a sum of squares
        # would lose a small spread about a large mean.
        zeros = torch.zeros(num_outputs, dtype=torch.float64, device=device)
        self._count = 0
        self._squares, self._errors, self._mean, self._spread = (zeros.clone() for _ in range(4))

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - see TaskMetrics
        predictions, values = (tensor.double() for tensor in _aligned(outputs, targets))
        self._squares += (predictions - values).square().sum(dim=0)
        self._errors += (predictions - values).abs().sum(dim=0)
        # Merged as in Chan et al. 1983, equation 2.1.
        count, mean = len(values), values.mean(dim=0)
        total = self._count + count
        delta = mean - self._mean
        self._spread += (values - mean).square().sum(dim=0) + delta.square() * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total

    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return ``mse`` and ``mae`` over all values, and ``r2``, the mean over the outputs whose targets differ."""
        count = torch.tensor([self._count], dtype=torch.float64, device=self._mean.device)
        sums = world_sum(torch.cat([count, self._mean * self._count, self._squares, self._errors]))
        total, (means, squares, errors) = sums[0], sums[1:].reshape(3, -1)
        if not total:
            return {}
        spread = world_sum(self._spread + self._count * (self._mean - means / total).square())
        metrics = {"mse": float((squares / total).mean()), "mae": float((errors / total).mean())}
        differs = spread > 0
        if differs.any():
            metrics["r2"] = float((1 - squares[differs] / spread[differs]).mean())
        return metrics


def _aligned(outputs: object, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and targets, both (N, D): a column beside a row would silently be spread over both."""
    values = in_loss_precision(targets.reshape(len(targets), -1))
    predictions = outputs[:, None] if isinstance(outputs, torch.Tensor) and outputs.ndim == 1 else outputs
    scores = scores_of(
        predictions, shape=tuple(values.shape), task=Regression.name, expected=f"values {tuple(values.shape)}"
    )
    return scores, values
