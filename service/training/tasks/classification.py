"""One class for each sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from service.training.data.source import Batch
from service.training.errors import BadFactory, BadSample
from service.training.tasks.class_counts import ClassCounts, class_scores
from service.training.tasks.shapes import describe, scores_of
from service.training.tasks.task import Loss, Ratio, Task, TaskMetrics, WorldGather, WorldSum

TOP = 5
MIN_CLASSES_FOR_TOP = 10


class Classification(Task):
    """Cross-entropy of logits (N, K) and classes (N,), int64.

    Args:
        label_smoothing: share of each target that is spread over all classes (Szegedy et al. 2016, section 7).
        class_weights: of the K classes; a sample counts as much as the weight of its class.
    """

    name = "classification"

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        self._label_smoothing = label_smoothing
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)

    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check targets; see ``Task``."""
        targets = batch.targets
        if not isinstance(targets, torch.Tensor) or targets.ndim != 1 or targets.dtype != torch.int64:
            raise BadSample(
                f"dataset: task classification takes one class for each sample, int64; its targets are "
                f"{describe(targets)}."
            )
        if self._class_weights is not None and len(self._class_weights) != num_outputs:
            raise BadSample(
                f"task.class_weights: {len(self._class_weights)} of them, but the dataset has {num_outputs} classes. "
                "Give one for each."
            )
        outside = (targets < 0) | (targets >= num_outputs)
        if outside.any():
            place = int(outside.nonzero()[0])
            raise BadSample(
                f"dataset: sample {place} of the batch has class {int(targets[place])}, outside 0 to "
                f"{num_outputs - 1}. Correct the label, or the dataset's number of classes."
            )

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - see Task
        """Compare; see ``Task``. The weight is the samples, or the sum of their classes' weights."""
        scores = scores_of(outputs, shape=(len(targets), -1), task=self.name, expected="logits (N, K)")
        right = (scores.detach().argmax(dim=1) == targets).sum()
        weights = self._weights_on(scores)
        if weights is not None and len(weights) != scores.shape[1]:
            raise BadFactory(
                f"task.class_weights: {len(weights)} of them, but the model has {scores.shape[1]} outputs."
            )
        return Loss(
            sum=F.cross_entropy(
                scores, targets, weight=weights, reduction="sum", label_smoothing=self._label_smoothing
            ),
            weight=float(len(targets)) if weights is None else weights[targets].sum(),
            metrics={"accuracy": Ratio(sum=right, weight=float(len(targets)))},
        )

    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation; see ``Task``."""
        return _Metrics(num_outputs=num_outputs, device=device)

    def _weights_on(self, scores: torch.Tensor) -> torch.Tensor | None:
        if self._class_weights is None:
            return None
        if self._class_weights.device != scores.device:  # only the first time: a transfer in each step would wait
            with torch.inference_mode(False):  # what an evaluation moves, training has to be able to use
                self._class_weights = self._class_weights.to(scores.device)
        return self._class_weights.to(scores.dtype)


class _Metrics(TaskMetrics):
    def __init__(self, *, num_outputs: int, device: torch.device) -> None:
        self._num_classes = num_outputs
        self._counts = ClassCounts(num_classes=num_outputs, device=device)
        self._right_in_top = torch.zeros((), dtype=torch.int64, device=device)
        self._has_top = num_outputs >= MIN_CLASSES_FOR_TOP

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - see TaskMetrics
        scores = scores_of(
            outputs,
            shape=(len(targets), self._num_classes),
            task=Classification.name,
            expected=f"logits (N, {self._num_classes})",
        )
        self._counts.update(scores.argmax(dim=1), targets)
        if self._has_top:
            self._right_in_top += (scores.topk(TOP, dim=1).indices == targets[:, None]).sum()

    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return ``accuracy``, ``macro_f1`` over the classes that occur, and ``top5_accuracy`` from ten classes on."""
        vector = world_sum(torch.cat([self._right_in_top.to(torch.float64).reshape(1), self._counts.vector]))
        scores = class_scores(vector[1:])
        num_samples = float(scores["there"].sum())
        if not num_samples:
            return {}
        metrics = {
            "accuracy": float(scores["right"].sum()) / num_samples,
            "macro_f1": float(scores["dice"].mean()),
        }
        if self._has_top:
            metrics["top5_accuracy"] = float(vector[0]) / num_samples
        return metrics
