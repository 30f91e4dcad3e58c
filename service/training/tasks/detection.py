"""Boxes with a class each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from service.training.data.source import Batch
from service.training.errors import BadFactory, BadSample
from service.training.tasks.average_precision import Findings, average_precision, match_detections
from service.training.tasks.boxes import (
    areas,
    cell_centres,
    corners,
    generalized_iou,
    pairwise_iou,
    suppress_overlaps,
)
from service.training.tasks.shapes import describe, in_loss_precision
from service.training.tasks.task import Loss, Ratio, Task, TaskMetrics, WorldGather, WorldSum

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
CENTRE_RADIUS = 1.5
"""Cells around a box's centre that learn it, in strides (FCOS, centre sampling)."""
MAX_CANDIDATES, MAX_DETECTIONS = 1000, 100
"""Of an image, before and after overlaps are suppressed; the latter is COCO's."""


class Detection(Task):
    """What an anchor-free one-stage detector learns (FCOS; Tian et al. 2019).

    The model returns ``scores`` (N, K, H', W'), logits, and ``boxes`` (N, 4, H', W'), the distances l, t, r, b ≥ 0, in
    pixels, from the point ((x + 0.5) · stride, (y + 0.5) · stride) of cell (y, x) to the sides of its box. It has an
    attribute ``stride``, the pixels per cell. A sample's target is ``boxes`` (M, 4), corners x1, y1, x2, y2 in pixels,
    and ``labels`` (M,), int64; M may be 0.

    A cell whose point lies in a box, and within 1.5 strides of its centre, learns that box, the smallest where there
    are several; all other cells learn that nothing is there. Classes have the focal loss (Lin et al. 2017), boxes
    1 − GIoU; both are divided by the number of cells that learn a box, over the whole mini-batch.

    Args:
        box_weight: of the boxes' loss beside the classes'.
        score_threshold: less certain detections are dropped, in an evaluation.
        iou_threshold: detections of a class that overlap by more are one.
    """

    name = "detection"

    def __init__(self, *, box_weight: float = 1.0, score_threshold: float = 0.05, iou_threshold: float = 0.5) -> None:
        self._stride = 0
        self._box_weight = box_weight
        self._score_threshold = score_threshold
        self._iou_threshold = iou_threshold

    def prepare(self, model: nn.Module) -> None:
        """Take the stride; see ``Task``."""
        stride = getattr(model, "stride", None)
        if not isinstance(stride, int) or stride < 1:
            raise BadFactory(
                "model.factory: task detection needs a model with an attribute stride, the pixels of the image per "
                f"cell of its outputs; {type(model).__name__} has {stride!r}. Choose a detector, such as "
                "builtin:detector."
            )
        self._stride = stride

    def check(self, batch: Batch, num_outputs: int) -> None:
        """Check boxes; see ``Task``."""
        if not isinstance(batch.targets, list):
            raise BadSample(
                "dataset: task detection takes a dictionary with boxes and labels as each sample's target; the "
                f"targets are {describe(batch.targets)}."
            )
        for place, target in enumerate(batch.targets):
            wrong = _problem(target, num_outputs)
            if wrong is not None:
                raise BadSample(f"dataset: sample {place} of the batch: {wrong}.")

    def loss(self, outputs: Any, targets: Any) -> Loss:  # noqa: ANN401 - see Task
        """Compare; see ``Task``. The weight is the cells that learn a box."""
        scores, distances = _maps(outputs, num_samples=len(targets), num_classes=-1)
        centres = self._centres(distances)
        scores, distances = scores.flatten(2), distances.flatten(2).transpose(1, 2)  # (N, K, L), (N, L, 4)
        learned = [assign_cells(centres, target["boxes"], target["labels"], self._stride) for target in targets]
        has_box = torch.stack([cells.has_box for cells in learned])  # (N, L)
        labels = torch.stack([cells.labels for cells in learned])
        wanted = torch.stack([cells.distances for cells in learned])
        is_class = torch.zeros_like(scores).scatter_(1, labels[:, None], has_box[:, None].to(scores.dtype))
        class_loss = focal_loss(scores, is_class).sum()
        box_loss = ((1 - generalized_iou(distances, wanted)) * has_box).sum()
        weight = has_box.sum()
        return Loss(
            sum=class_loss + self._box_weight * box_loss,
            weight=weight,
            metrics={
                "class_loss": Ratio(sum=class_loss.detach(), weight=weight),
                "box_loss": Ratio(sum=box_loss.detach(), weight=weight),
            },
        )

    def new_metrics(self, *, num_outputs: int, device: torch.device) -> TaskMetrics:
        """Begin an evaluation; see ``Task``."""
        return _Metrics(self, num_classes=num_outputs)

    def detect(self, outputs: Any) -> list["Detections"]:  # noqa: ANN401 - see Task
        """Turn a model's outputs into detections, for each image."""
        scores, distances = _maps(outputs, num_samples=-1, num_classes=-1)
        centres = self._centres(distances)
        certainties = scores.flatten(2).sigmoid()  # (N, K, L)
        return [
            self._detect_one(certainties[image], corners(centres, distances[image].flatten(1).T))
            for image in range(len(scores))
        ]

    def _centres(self, distances: torch.Tensor) -> torch.Tensor:
        assert self._stride, "prepare was not called"
        height, width = distances.shape[2:]
        return cell_centres(height, width, stride=self._stride, like=distances)

    def _detect_one(self, certainties: torch.Tensor, boxes: torch.Tensor) -> "Detections":
        flat = certainties.flatten()
        candidates = (flat > self._score_threshold).nonzero()[:, 0]
        best = flat[candidates].argsort(descending=True, stable=True)[:MAX_CANDIDATES]
        candidates = candidates[best]
        labels, cells = candidates // certainties.shape[1], candidates % certainties.shape[1]
        kept = suppress_overlaps(boxes[cells], flat[candidates], labels, iou_threshold=self._iou_threshold)
        kept = kept[:MAX_DETECTIONS]
        return Detections(boxes=boxes[cells[kept]], scores=flat[candidates[kept]], labels=labels[kept])


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What was found in an image, best first.

    Attributes:
        boxes: corners in pixels, (n, 4); they may reach beyond the image.
        scores: probabilities, (n,).
        labels: classes, int64, (n,).
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedCells:
    """What each of an image's L cells learns.

    Attributes:
        has_box: whether it learns a box, bool, (L,).
        labels: of the box, (L,); 0 without one.
        distances: to the box's sides, (L, 4); 1 without one.
    """

    has_box: torch.Tensor
    labels: torch.Tensor
    distances: torch.Tensor


def assign_cells(centres: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, stride: int) -> LearnedCells:
    """Choose the box that each cell learns (FCOS with centre sampling).

    Args:
        centres: the points of the cells, (L, 2).
        boxes: corners, (M, 4); M may be 0.
        labels: of the boxes, (M,).
        stride: pixels per cell.
    """
    if not len(boxes):
        return LearnedCells(
            has_box=torch.zeros(len(centres), dtype=torch.bool, device=centres.device),
            labels=torch.zeros(len(centres), dtype=torch.int64, device=centres.device),
            distances=torch.ones(len(centres), 4, dtype=centres.dtype, device=centres.device),
        )
    boxes = boxes.to(centres.dtype)
    distances = torch.cat([centres[:, None] - boxes[:, :2], boxes[:, 2:] - centres[:, None]], dim=2)  # (L, M, 4)
    from_middle = (centres[:, None] - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=2)
    candidates = (distances.amin(dim=2) > 0) & (from_middle < CENTRE_RADIUS * stride)
    smallest = areas(boxes).expand_as(candidates).where(candidates, torch.inf).argmin(dim=1)  # the first of equals
    rows = torch.arange(len(centres), device=centres.device)
    has_box = candidates[rows, smallest]
    return LearnedCells(
        has_box=has_box,
        labels=labels[smallest].where(has_box, 0),
        distances=distances[rows, smallest].where(has_box[:, None], 1.0),
    )


def focal_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the focal loss of each score (Lin et al. 2017, equation 5).

    Args:
        scores: logits, any shape.
        targets: 0 or 1, of the same shape and dtype.
    """
    missing = (targets - scores.sigmoid()).abs()  # 1 − p_t
    balance = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    cross_entropy = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return balance * missing**FOCAL_GAMMA * cross_entropy


class _Metrics(TaskMetrics):
    def __init__(self, task: Detection, *, num_classes: int) -> None:
        self._task = task
        self._num_classes = num_classes
        self._findings: list[Findings] = []

    def update(self, outputs: Any, targets: Any) -> None:  # noqa: ANN401 - see TaskMetrics
        _maps(outputs, num_samples=len(targets), num_classes=self._num_classes)
        for found, target in zip(self._task.detect(outputs), targets, strict=True):
            overlaps = pairwise_iou(found.boxes.double(), target["boxes"].double()).cpu().numpy()
            labels, object_labels = found.labels.cpu().numpy(), target["labels"].cpu().numpy()
            self._findings.append(
                Findings(
                    scores=found.scores.double().cpu().numpy(),
                    labels=labels,
                    right=match_detections(overlaps, labels, object_labels),
                    num_objects=np.bincount(object_labels, minlength=self._num_classes),
                )
            )

    def compute(self, world_sum: WorldSum, world_gather: WorldGather) -> dict[str, float]:
        """Return ``ap50`` and ``map``, as COCO defines them."""
        everywhere: list[list[Findings]] = world_gather(self._findings)
        findings = [part for of_rank in everywhere for part in of_rank]
        return average_precision(findings) if findings else {}


def _maps(outputs: object, *, num_samples: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a model's scores and boxes, in the precision in which losses are computed."""
    expected = "a dictionary of scores (N, K, H, W) and boxes (N, 4, H, W)"
    if not isinstance(outputs, Mapping) or not {"scores", "boxes"} <= outputs.keys():
        what = (
            f"a dictionary of {', '.join(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        )
        raise BadFactory(
            f"model.factory: task detection takes {expected}; the model's output is {what}. Choose a detector, such as "
            "builtin:detector."
        )
    scores, boxes = outputs["scores"], outputs["boxes"]
    fits = (
        scores.ndim == 4
        and boxes.shape == (len(scores), 4, *scores.shape[2:])
        and num_samples in (-1, len(scores))
        and num_classes in (-1, scores.shape[1])
    )
    if not fits:
        raise BadFactory(
            f"model.factory: task detection takes {expected}; the model's are {tuple(scores.shape)} and "
            f"{tuple(boxes.shape)}, of {num_samples} samples and {num_classes} classes (-1: any)."
        )
    return in_loss_precision(scores), in_loss_precision(boxes)


def _problem(target: object, num_classes: int) -> str | None:
    """Return what is wrong with a sample's target, if anything."""
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        return "its target is no dictionary with boxes and labels"
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(boxes, torch.Tensor) or not boxes.is_floating_point() or boxes.shape[1:] != (4,):
        return f"boxes are {describe(boxes)}, not of floating point, (M, 4); (0, 4) where nothing is there"
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != (len(boxes),):
        return f"labels are {describe(labels)}, not int64 ({len(boxes)},), one for each box"
    # With NaN no comparison holds.
    proper = (boxes[:, :2] < boxes[:, 2:]).all(dim=1) & boxes.isfinite().all(dim=1)
    if not proper.all():
        box = _first(~proper)
        return f"box {box} is {boxes[box].tolist()}, not x1 < x2 and y1 < y2"
    known = (labels >= 0) & (labels < num_classes)
    if not known.all():
        box = _first(~known)
        return f"box {box} has class {int(labels[box])}, outside 0 to {num_classes - 1}"
    return None


def _first(mask: torch.Tensor) -> int:
    return int(mask.nonzero()[0])
