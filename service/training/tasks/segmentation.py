"""One class for each pixel or voxel."""

from typing import Any

import torch
from torch.nn import functional as F

from service.training.data.source import Batch
from service.training.errors import BadSample
from service.training.tasks.class_counts import ClassCounts, class_scores
from service.training.tasks.shapes import describe, scores_of
from service.training.tasks.task import Loss, Ratio, Task, TaskMetrics, WorldGather, WorldSum


class Segmentation(Task):
    """Cross-entropy of logits (N, K, *) and masks (N, *), int64, over the pixels that count; and a Dice loss beside it.

    The Dice loss of a sample is 1 − the mean over classes of (2·Σpg + 1) / (Σp + Σg + 1), with p the probabilities, g
    the one-hot mask and the sums over the sample's own pixels (Milletari et al. 2016 with plain sums in the
    denominator, as Drozdzal et al. 2016); a class that is neither there nor predicted counts as found. Each sample's
    weighs as much as it has pixels that count, so that it adds up over samples as the cross-entropy does, whereas a
    Dice loss over a batch would depend on how samples are batched.

    Args:
        ignore_index: label of pixels that do not count.
        dice_weight: of the Dice loss; 0 leaves it out.
    """

    name = "segmentation"

    def __init__(self, *, ignore_index: int = 255, dice_weight: float = 0.0) -> None:
        self._ignore_index = ignore_index
        self._dice_weight = dice_weight

    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check masks; see ``Task``."""
        masks = batch.targets
        expected = (len(batch.inputs), *batch.inputs.shape[2:])
        if not isinstance(masks, torch.Tensor) or masks.dtype != torch.int64 or masks.shape != expected:
            raise BadSample(
                f"dataset: task segmentation takes masks of the inputs' size, int64 {expected}; its targets are "
                f"{describe(masks)}."
            )
        outside = ((masks < 0) | (masks >= num_outputs)) & (masks != self._ignore_index)
        if outside.any():
            place = tuple(outside.nonzero()[0].tolist())
            raise BadSample(
                f"dataset: sample {place[0]} of the batch has class {int(masks[place])} at {place[1:]}, outside 0 to "
                f"{num_outputs - 1}. Correct the mask, or name the label of pixels that do not count in "
                f"task.ignore_index, which is {self._ignore_index}."
            )

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - see Task
        """Compare; see ``Task``. The weight is the pixels that count."""
        scores = _scores(outputs, targets, num_classes=-1)
        counts = targets != self._ignore_index
        weight = counts.sum()
        right = (scores.detach().argmax(dim=1) == targets) & counts
        total = F.cross_entropy(scores, targets, ignore_index=self._ignore_index, reduction="sum")
        metrics = {"pixel_accuracy": Ratio(sum=right.sum(), weight=weight)}
        if self._dice_weight:
            dice = _dice_losses(scores, targets, counts)
            metrics["dice_loss"] = Ratio(sum=dice.detach(), weight=weight)
            total = total + self._dice_weight * dice
        return Loss(sum=total, weight=weight, metrics=metrics)

    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation; see ``Task``."""
        return _Metrics(num_outputs=num_outputs, device=device, ignore_index=self._ignore_index)


class _Metrics(TaskMetrics):
    def __init__(self, *, num_outputs: int, device: torch.device, ignore_index: int) -> None:
        self._num_classes = num_outputs
        self._ignore_index = ignore_index
        self._counts = ClassCounts(num_classes=num_outputs, device=device)

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - see TaskMetrics
        scores = _scores(outputs, targets, num_classes=self._num_classes)
        self._counts.update(scores.argmax(dim=1), targets, targets != self._ignore_index)

    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return ``pixel_accuracy``; ``mean_iou`` and ``mean_dice`` over the classes that occur.

        Intersections and unions are those of all samples together, not averaged over samples.
        """
        scores = class_scores(world_sum(self._counts.vector))
        num_pixels = float(scores["there"].sum())
        if not num_pixels:
            return {}
        return {
            "pixel_accuracy": float(scores["right"].sum()) / num_pixels,
            "mean_iou": float(scores["iou"].mean()),
            "mean_dice": float(scores["dice"].mean()),
        }


def _scores(outputs: object, targets: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    return scores_of(
        outputs,
        shape=(len(targets), num_classes, *targets.shape[1:]),
        task=Segmentation.name,
        expected=f"logits (N, K, {', '.join(map(str, targets.shape[1:]))}), of the masks' size",
    )


def _dice_losses(scores: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return Σ over samples of its Dice loss times its pixels that count, shape ()."""
    num_classes = scores.shape[1]
    probabilities = (scores.softmax(dim=1) * counts[:, None]).flatten(2)  # (N, K, pixels)
    classes = targets.where(counts, 0).flatten(1)[:, None]  # (N, 1, pixels)
    valid = counts.flatten(1)[:, None].to(scores.dtype)
    overlap = scores.new_zeros(len(scores), num_classes)
    there = scores.new_zeros(len(scores), num_classes)
    # Of a one-hot mask only the ones are added up: it would take K times the masks' memory.
    at_target = probabilities.gather(1, classes)[:, 0]
    overlap = overlap.scatter_add(1, classes[:, 0], at_target)
    there = there.scatter_add(1, classes[:, 0], valid[:, 0])
    dice = (2 * overlap + 1) / (probabilities.sum(dim=2) + there + 1)  # (N, K)
    return ((1 - dice.mean(dim=1)) * counts.flatten(1).sum(dim=1)).sum()
