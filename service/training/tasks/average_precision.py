"""How good detections are: average precision as the COCO benchmark defines it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
"""T = 10 overlaps from which a detection counts as right."""

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Detections of some images, each compared with what is there.

    Attributes:
        scores: (n,).
        labels: classes, (n,).
        right: at each overlap, whether it found an object that no better one had found, (n, T).
        num_objects: that are there, by class, (K,).
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    right: NDArray[np.bool_]
    num_objects: NDArray[np.int64]


def match_detections(
    overlaps: NDArray[np.float64], labels: NDArray[np.int64], object_labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Assign the detections of an image to its objects: the best detection first, each to the object it overlaps most.

    Args:
        overlaps: intersection over union of detections, best first, and objects, (n, m).
        labels: of the detections, (n,).
        object_labels: (m,).

    Returns:
        Which detections are right at each of the T overlaps, (n, T).
    """
    right = np.zeros((len(labels), len(IOU_THRESHOLDS)), dtype=np.bool_)
    if not len(object_labels):
        return right
    free = np.ones((len(IOU_THRESHOLDS), len(object_labels)), dtype=np.bool_)
    every_threshold = np.arange(len(IOU_THRESHOLDS))
    for detection, label in enumerate(labels):
        overlap = np.where(object_labels == label, overlaps[detection], -1.0)
        candidates = np.where(free & (overlap >= IOU_THRESHOLDS[:, None]), overlap, -1.0)  # (T, m)
        chosen = candidates.argmax(axis=1)
        right[detection] = candidates[every_threshold, chosen] >= 0
        free[every_threshold, chosen] &= ~right[detection]
    return right


def average_precision(findings: Sequence[Findings]) -> dict[str, float]:
    """Return ``ap50`` and ``map``, means over the classes that have objects.

    ``ap50`` counts detections that overlap an object by half as right, ``map`` is the mean over all T overlaps. The
    average precision of a class is the mean, over the recalls 0, 0.01, …, 1, of the best precision at that recall or a
    higher one. Detections with equal scores are taken together, so that neither images' order nor their split matters.

    Args:
        findings: of all images, in any number of parts; of the same K classes.

    Returns:
        Nothing, where there are no objects.
    """
    num_objects = np.sum([part.num_objects for part in findings], axis=0)
    scores = np.concatenate([part.scores for part in findings])
    labels = np.concatenate([part.labels for part in findings])
    right = np.concatenate([part.right for part in findings])
    of_classes = [
        _average_precisions(scores[labels == label], right[labels == label], int(num_objects[label]))
        for label in np.flatnonzero(num_objects)
    ]
    if not of_classes:
        return {}
    mean = np.mean(of_classes, axis=0)  # (T,)
    return {"ap50": float(mean[0]), "map": float(mean.mean())}


def _average_precisions(scores: NDArray[np.float64], right: NDArray[np.bool_], num_objects: int) -> NDArray[np.float64]:
    """Return a class's average precision at each overlap, (T,)."""
    if not len(scores):
        return np.zeros(right.shape[1])
    order = np.argsort(-scores, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    num_right = np.cumsum(right[order], axis=0)[last_of_equals]
    precision = num_right / (last_of_equals + 1)[:, None]
    recall = num_right / num_objects
    best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]  # at this recall or a higher one
    padded = np.concatenate([best, np.zeros((1, best.shape[1]))])
    averages = [
        # 3 of 10 has to reach the recall 0.3, whichever way both are rounded.
        padded[np.searchsorted(recall[:, threshold], _RECALLS - 1e-9), threshold].mean()
        for threshold in range(best.shape[1])
    ]
    return np.array(averages)
