"""The metrics of an evaluation, on one rank. A failure here is a metric that is defined wrongly.

scikit-learn is the truth, and for average precision cases that were worked out by hand. Both sides add up counts, or a
few hundred float64 values: they differ by rounding alone.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, r2_score, top_k_accuracy_score

from service.training.models.detector import Detector
from service.training.tasks.average_precision import IOU_THRESHOLDS, Findings, average_precision, match_detections
from service.training.tasks.classification import Classification
from service.training.tasks.detection import Detection
from service.training.tasks.regression import Regression
from service.training.tasks.segmentation import Segmentation

CPU = torch.device("cpu")


def evaluated(task, batches, *, num_outputs):
    metrics = task.new_metrics(num_outputs=num_outputs, device=CPU)
    for outputs, targets in batches:
        metrics.update(outputs, targets)
    return metrics.compute(lambda vector: vector, lambda value: [value])


def test_classification():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(200, 12, generator=generator), torch.randint(10, (200,), generator=generator)
    logits[:, 11] = -9  # neither there nor predicted: no part of the mean
    metrics = evaluated(Classification(), zip(logits.split(70), targets.split(70), strict=True), num_outputs=12)
    predictions = logits.argmax(dim=1)
    assert metrics == pytest.approx(
        {
            "accuracy": (predictions == targets).double().mean().item(),
            "macro_f1": f1_score(targets, predictions, average="macro"),
            "top5_accuracy": top_k_accuracy_score(targets, logits, k=5, labels=range(12)),
        },
        rel=1e-12,
    )


def test_few_classes_have_no_top_five():
    metrics = evaluated(Classification(), [(torch.eye(9), torch.arange(9))], num_outputs=9)
    assert metrics == {"accuracy": 1.0, "macro_f1": 1.0}


def test_segmentation():
    generator = torch.Generator().manual_seed(0)
    logits, masks = torch.randn(6, 4, 5, 5, generator=generator), torch.randint(3, (6, 5, 5), generator=generator)
    masks[torch.rand(6, 5, 5, generator=generator) < 0.3] = 9
    metrics = evaluated(Segmentation(ignore_index=9), zip(logits.split(4), masks.split(4), strict=True), num_outputs=4)
    counts = masks != 9
    wanted, predicted = masks[counts], logits.argmax(dim=1)[counts]
    assert metrics == pytest.approx(
        {
            "pixel_accuracy": (wanted == predicted).double().mean().item(),
            "mean_iou": jaccard_score(wanted, predicted, average="macro"),
            "mean_dice": f1_score(wanted, predicted, average="macro"),
        },
        rel=1e-12,
    )


def test_regression():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    predictions = targets + 0.5 * torch.randn(100, 3, generator=generator, dtype=torch.float64)
    metrics = evaluated(Regression(), zip(predictions.split(33), targets.split(33), strict=True), num_outputs=3)
    assert metrics == pytest.approx(
        {
            "mse": (predictions - targets).square().mean().item(),
            "mae": (predictions - targets).abs().mean().item(),
            "r2": r2_score(targets, predictions),
        },
        rel=1e-12,
    )


def test_a_small_spread_about_a_large_mean_is_not_lost():
    targets = 1.7e9 + torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predictions = targets.roll(1, dims=0)
    metrics = evaluated(Regression(), zip(predictions.split(33), targets.split(33), strict=True), num_outputs=1)
    # A target of 1.7e9 is rounded to 2e-7; a difference of squares would be off by hundreds.
    assert metrics["r2"] == pytest.approx(r2_score(targets - 1.7e9, predictions - 1.7e9), rel=1e-5)


def test_what_is_not_defined_is_left_out():
    assert evaluated(Classification(), [], num_outputs=3) == {}
    assert evaluated(Segmentation(), [(torch.zeros(1, 2, 1, 1), torch.full((1, 1, 1), 255))], num_outputs=2) == {}
    assert evaluated(Regression(), [], num_outputs=1) == {}
    assert evaluated(Detection(), [], num_outputs=1) == {}
    assert evaluated(Regression(), [(torch.ones(3, 1), torch.zeros(3, 1))], num_outputs=1) == {"mse": 1.0, "mae": 1.0}


def findings(*detections, num_objects):
    """Detections as (score, label, least overlap at which they are wrong), of classes with so many objects."""
    return Findings(
        scores=np.array([score for score, _, _ in detections], dtype=np.float64),
        labels=np.array([label for _, label, _ in detections], dtype=np.int64),
        right=np.array([overlap > IOU_THRESHOLDS for _, _, overlap in detections]).reshape(-1, 10),
        num_objects=np.array(num_objects),
    )


def test_average_precision_by_hand():
    # Right, wrong, right of 3: precision 1 up to recall 1/3 (34 of the 101 recalls), 2/3 up to 2/3 (33), then 0.
    ap = (34 * 1 + 33 * 2 / 3) / 101
    result = average_precision([findings((0.9, 0, 1), (0.8, 0, 0), (0.7, 0, 1), num_objects=[3])])
    assert result == pytest.approx({"ap50": ap, "map": ap})


def test_a_precision_that_rises_counts_from_the_start():
    # Wrong, right, right of 2: precision 1/2 at recall 1/2, but 2/3 at recall 1.
    result = average_precision([findings((0.9, 0, 0), (0.8, 0, 1), (0.7, 0, 1), num_objects=[2])])
    assert result["ap50"] == pytest.approx(2 / 3)


def test_classes_and_overlaps_are_averaged():
    # One class is found at the overlaps 0.5, 0.55 and 0.6 of the ten; one not at all; one has no objects.
    result = average_precision([findings((0.9, 0, 0.62), (0.8, 2, 0), num_objects=[1, 1, 0])])
    assert result == pytest.approx({"ap50": 0.5, "map": 0.15})


def test_equal_scores_count_together_in_any_order():
    first, second = findings((0.5, 0, 1), num_objects=[1]), findings((0.5, 0, 0), num_objects=[1])
    # One of two is right, at recall 1/2: 51 of the 101 recalls.
    for parts in ([first, second], [second, first]):
        assert average_precision(parts)["ap50"] == pytest.approx(51 * 0.5 / 101)


def test_a_recall_of_three_tenths_reaches_three_tenths():
    result = average_precision([findings(*[(0.9 - i / 100, 0, 1) for i in range(3)], num_objects=[10])])
    assert result["ap50"] == pytest.approx(31 / 101)


def test_each_object_is_found_once_and_by_the_best():
    overlaps = np.array([[0.9, 0.6], [0.97, 0.0], [0.8, 0.7]])
    right = match_detections(overlaps, np.array([0, 0, 0]), np.array([0, 0]))
    # The second overlaps the first object more, but comes later; the third finds the other object, up to 0.7.
    assert right[:, 0].tolist() == [True, False, True]
    # Above 0.9 the first is no longer right, and leaves the object to the second.
    assert right[:, 9].tolist() == [False, True, False]
    # Classes do not mix.
    assert not match_detections(overlaps, np.array([1, 1, 1]), np.array([0, 0])).any()


def test_detection_end_to_end():
    task = Detection()
    task.prepare(Detector(in_channels=1, num_outputs=2, stride=8, width=2, num_blocks=0, head_depth=0))
    scores, boxes = torch.full((2, 2, 3, 3), -9.0), torch.full((2, 4, 3, 3), 4.0)
    scores[0, 0, 1, 1] = 3.0  # (8, 8, 16, 16), as it is there
    scores[1, 0, 0, 0] = 2.0  # (0, 0, 8, 8), of which the object is the upper 5 / 8
    scores[1, 1, 2, 2] = 1.0  # nothing is there
    targets = [
        {"boxes": torch.tensor([[8.0, 8, 16, 16]]), "labels": torch.tensor([0])},
        {"boxes": torch.tensor([[0.0, 0, 8, 5], [0, 0, 2, 2]]), "labels": torch.tensor([0, 1])},
    ]
    metrics = evaluated(task, [({"scores": scores, "boxes": boxes}, targets)], num_outputs=2)
    # Class 0: all at overlaps up to 0.6, half of it (51 recalls) above; class 1: nothing.
    assert metrics == pytest.approx({"ap50": 0.5, "map": (3 * 1 + 7 * 51 / 101) / 10 / 2})
