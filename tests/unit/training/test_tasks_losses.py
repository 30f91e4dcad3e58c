"""The losses of the builtin tasks. A failure here is a loss that is computed wrongly, or one that does not add up.

Each is compared with a loop over single values in float64. Tolerances: the loops add up in another order, a few hundred
terms of magnitude 1 to 100, which moves the sum by some 1e-13 of itself.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensor, FakeTensorMode

from service.training.errors import BadFactory
from service.training.models.detector import Detector
from service.training.tasks.classification import Classification
from service.training.tasks.detection import Detection
from service.training.tasks.regression import Regression
from service.training.tasks.segmentation import Segmentation

NEAR = 1e-12


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, num_classes, seed=1):
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


def log_softmax(row):
    largest = max(row)
    norm = largest + math.log(sum(math.exp(value - largest) for value in row))
    return [value - norm for value in row]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, (0.5, 2.0, 0.0, 1.5)])
def test_cross_entropy(smoothing, class_weights):
    logits, targets = draw(9, 4), classes(9, num_classes=4)
    loss = Classification(label_smoothing=smoothing, class_weights=class_weights).loss(logits, targets)

    weights = class_weights or (1.0,) * 4
    total = weight = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        logs = log_softmax(row)
        total -= (1 - smoothing) * weights[target] * logs[target]
        total -= smoothing / 4 * sum(w * log for w, log in zip(weights, logs, strict=True))
        weight += weights[target]
    assert float(loss.sum) == pytest.approx(total, rel=NEAR)
    assert float(loss.weight) == pytest.approx(weight, rel=NEAR)
    right = sum(row.index(max(row)) == target for row, target in zip(logits.tolist(), targets.tolist(), strict=True))
    assert float(loss.metrics["accuracy"].sum) == right
    assert loss.metrics["accuracy"].weight == 9


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 2)])
@pytest.mark.parametrize("dice_weight", [0.0, 0.7])
def test_segmentation(shape, dice_weight):
    logits, masks = draw(2, 3, *shape), classes(2, *shape, num_classes=3)
    masks[torch.rand(masks.shape, generator=torch.Generator().manual_seed(5)) < 0.3] = 255
    masks[0][masks[0] == 2] = 1  # a class that is not there
    loss = Segmentation(dice_weight=dice_weight).loss(logits, masks)

    total = weight = 0.0
    for sample_logits, mask in zip(logits, masks, strict=True):
        overlap, predicted, there, pixels = [0.0] * 3, [0.0] * 3, [0.0] * 3, 0
        rows = sample_logits.flatten(1).T.tolist()
        for row, target in zip(rows, mask.flatten().tolist(), strict=True):
            if target == 255:
                continue
            logs = log_softmax(row)
            total -= logs[target]
            pixels += 1
            there[target] += 1
            overlap[target] += math.exp(logs[target])
            for k in range(3):
                predicted[k] += math.exp(logs[k])
        dice = [(2 * overlap[k] + 1) / (predicted[k] + there[k] + 1) for k in range(3)]
        total += dice_weight * (1 - sum(dice) / 3) * pixels
        weight += pixels
    assert float(loss.sum) == pytest.approx(total, rel=NEAR)
    assert float(loss.weight) == weight
    assert ("dice_loss" in loss.metrics) == (dice_weight > 0)


def test_segmentation_without_a_pixel_that_counts_is_zero_and_has_a_gradient():
    logits = draw(1, 3, 2, 2).requires_grad_()
    loss = Segmentation(dice_weight=1.0).loss(logits, torch.full((1, 2, 2), 255))
    loss.sum.backward()
    assert (loss.sum.item(), loss.weight.item()) == (0.0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("name", "of_error"),
    [
        ("mse", lambda e: e * e),
        ("l1", abs),
        ("huber", lambda e: e * e / 2 if abs(e) < 1.5 else 1.5 * (abs(e) - 0.75)),
    ],
)
def test_regression(name, of_error):
    predictions, targets = draw(7, 2), draw(7, 2, seed=2)
    loss = Regression(loss=name, huber_delta=1.5).loss(predictions, targets)
    errors = (predictions - targets).flatten().tolist()
    assert float(loss.sum) == pytest.approx(sum(map(of_error, errors)), rel=NEAR)
    assert loss.weight == 14


def test_a_column_of_predictions_is_not_spread_over_a_row_of_targets():
    predictions, targets = draw(4, 1), draw(4, seed=2)
    expected = float((predictions[:, 0] - targets).square().sum())
    assert float(Regression().loss(predictions, targets).sum) == pytest.approx(expected, rel=NEAR)
    assert float(Regression().loss(predictions[:, 0], targets).sum) == pytest.approx(expected, rel=NEAR)


def detection(**options):
    task = Detection(**options)
    task.prepare(Detector(in_channels=1, num_outputs=2, stride=4, width=2, num_blocks=0, head_depth=0))
    return task


def naive_detection_loss(scores, boxes, targets, *, stride, box_weight):
    """Of one image, cell by cell; scores (K, H, W), boxes (4, H, W)."""
    num_classes, height, width = scores.shape
    class_loss = box_loss = positives = 0.0
    for y in range(height):
        for x in range(width):
            px, py = (x + 0.5) * stride, (y + 0.5) * stride
            learned = None
            for (x1, y1, x2, y2), label in zip(targets["boxes"].tolist(), targets["labels"].tolist(), strict=True):
                inside = x1 < px < x2 and y1 < py < y2
                middle = abs(px - (x1 + x2) / 2) < 1.5 * stride and abs(py - (y1 + y2) / 2) < 1.5 * stride
                area = (x2 - x1) * (y2 - y1)
                if inside and middle and (learned is None or area < learned[0]):
                    learned = (area, label, (px - x1, py - y1, x2 - px, y2 - py))
            for k in range(num_classes):
                p = 1 / (1 + math.exp(-float(scores[k, y, x])))
                if learned is not None and learned[1] == k:
                    class_loss -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    class_loss -= 0.75 * p**2 * math.log(1 - p)
            if learned is None:
                continue
            positives += 1
            ours, wanted = boxes[:, y, x].tolist(), learned[2]
            inner = [min(pair) for pair in zip(ours, wanted, strict=True)]
            outer = [max(pair) for pair in zip(ours, wanted, strict=True)]
            areas = [(b[0] + b[2]) * (b[1] + b[3]) for b in (ours, wanted, inner, outer)]
            union = areas[0] + areas[1] - areas[2]
            box_loss += 1 - (areas[2] / union - (areas[3] - union) / areas[3])
    return class_loss + box_weight * box_loss, positives


TARGETS = [
    # Two that overlap, the smaller inside the larger; one too small to hold the point of a cell.
    {"boxes": [[1, 1, 22, 20], [6, 5, 15, 14], [20.5, 20.5, 21.5, 21.5]], "labels": [0, 1, 0]},
    {"boxes": [], "labels": []},
    {"boxes": [[9, 3, 24, 9]], "labels": [1]},
]


def detection_batch():
    scores, boxes = draw(3, 2, 6, 7), draw(3, 4, 6, 7, seed=3).abs()
    targets = [
        {
            "boxes": torch.tensor(target["boxes"], dtype=torch.float64).reshape(-1, 4),
            "labels": torch.tensor(target["labels"], dtype=torch.int64),
        }
        for target in TARGETS
    ]
    return {"scores": scores, "boxes": boxes}, targets


def test_detection():
    outputs, targets = detection_batch()
    loss = detection(box_weight=1.7).loss(outputs, targets)
    expected = [
        naive_detection_loss(*image, stride=4, box_weight=1.7)
        for image in zip(outputs["scores"], outputs["boxes"], targets, strict=True)
    ]
    assert float(loss.sum) == pytest.approx(sum(total for total, _ in expected), rel=NEAR)
    assert float(loss.weight) == sum(positives for _, positives in expected)
    assert [positives > 0 for _, positives in expected] == [True, False, True]


def test_detection_in_an_empty_image_learns_the_background_alone():
    outputs, targets = detection_batch()
    scores, boxes = outputs["scores"][1:2].requires_grad_(), outputs["boxes"][1:2].requires_grad_()
    loss = detection().loss({"scores": scores, "boxes": boxes}, targets[1:2])
    loss.sum.backward()
    assert float(loss.weight) == 0
    assert scores.grad.abs().min() > 0
    assert torch.equal(boxes.grad, torch.zeros_like(boxes))


def make_batch(name):
    if name == "classification":
        return Classification(label_smoothing=0.1, class_weights=(1.0, 0.3, 2.0)), draw(8, 3), classes(8, num_classes=3)
    if name == "segmentation":
        masks = classes(8, 3, 3, num_classes=3)
        masks[2] = 255
        return Segmentation(dice_weight=0.5), draw(8, 3, 3, 3), masks
    if name == "regression":
        return Regression(loss="huber"), draw(8, 2), draw(8, 2, seed=2)
    outputs, targets = detection_batch()
    return detection(), {key: value[[0, 1, 2, 0, 1, 2, 0, 2]] for key, value in outputs.items()}, [
        targets[place] for place in (0, 1, 2, 1, 0, 2, 1, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["classification", "segmentation", "detection", "regression"])
@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 7)))
def test_any_split_adds_up_to_the_whole(name, cuts):
    task, outputs, targets = make_batch(name)
    bounds = [0, *sorted(cuts), 8]

    def rows(start, end):
        if isinstance(outputs, dict):
            return {key: value[start:end] for key, value in outputs.items()}, targets[start:end]
        return outputs[start:end], targets[start:end]

    whole = task.loss(*rows(0, 8))
    parts = [task.loss(*rows(start, end)) for start, end in itertools.pairwise(bounds)]
    assert whole.adds_up
    assert task.unsuited is None
    assert sum(float(part.sum) for part in parts) == pytest.approx(float(whole.sum), rel=NEAR)
    assert sum(float(part.weight) for part in parts) == pytest.approx(float(whole.weight), rel=NEAR)
    for metric, ratio in whole.metrics.items():
        assert sum(float(part.metrics[metric].sum) for part in parts) == pytest.approx(float(ratio.sum), rel=NEAR)
        assert sum(float(part.metrics[metric].weight) for part in parts) == pytest.approx(float(ratio.weight), rel=NEAR)


def test_half_precision_outputs_are_compared_in_float32():
    for task, outputs, targets in (
        (Classification(), draw(4, 3).bfloat16(), classes(4, num_classes=3)),
        (Segmentation(), draw(2, 3, 2, 2).half(), classes(2, 2, 2, num_classes=3)),
        (Regression(), draw(4, 2).half(), draw(4, 2, seed=2).float()),
    ):
        assert task.loss(outputs, targets).sum.dtype == torch.float32


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (Classification(), torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (Classification(), {"scores": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.int64)),
        (Segmentation(), torch.zeros(2, 3), torch.zeros(2, 4, 4, dtype=torch.int64)),
        (Segmentation(), torch.zeros(2, 3, 2, 2), torch.zeros(2, 4, 4, dtype=torch.int64)),
        (Regression(), torch.zeros(2, 3), torch.zeros(2, 2)),
        (detection(), torch.zeros(2, 3), [{}, {}]),
        (detection(), {"scores": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(2, 4, 4, 5)}, [{}, {}]),
    ],
)
def test_outputs_of_another_task_are_refused(task, outputs, targets):
    with pytest.raises(BadFactory, match=r"model\.factory: task \w+ takes"):
        task.loss(outputs, targets)


def test_a_detector_without_a_stride_is_refused():
    with pytest.raises(BadFactory, match=r"model\.factory: .* attribute stride.* Linear has None"):
        Detection().prepare(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["classification", "segmentation", "detection", "regression"])
def test_nothing_waits_for_the_device(name):
    # A fake tensor has no values: whatever asks for one raises.
    task, outputs, targets = make_batch(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            if isinstance(value, dict):
                return {key: fake(part) for key, part in value.items()}
            return [fake(part) for part in value] if isinstance(value, list) else mode.from_tensor(value)

        loss = task.loss(fake(outputs), fake(targets))
        assert isinstance(loss.sum, FakeTensor)
        if name != "detection":  # whose detections are made on the CPU
            metrics = task.new_metrics(num_outputs=outputs.shape[1], device=torch.device("cpu"))
            metrics.update(fake(outputs), fake(targets))
