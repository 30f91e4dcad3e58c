"""Arithmetic of boxes, and detections made from maps. A failure here is a wrong overlap, or a detection that should
have been dropped or kept."""

import pytest
import torch

from service.training.models.detector import Detector
from service.training.tasks.boxes import cell_centres, corners, generalized_iou, pairwise_iou, suppress_overlaps
from service.training.tasks.detection import MAX_DETECTIONS, Detection


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = 20 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + 1 + 8 * torch.rand(count, 2, generator=generator, dtype=torch.float64)], dim=1)


def naive_iou(first, second):
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(area) - width * height)


def test_centres_lie_half_a_stride_into_their_cells():
    centres = cell_centres(2, 3, stride=4, like=torch.zeros((), dtype=torch.float64))
    assert centres.tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]
    assert corners(centres[1:2], torch.tensor([[1.0, 2, 3, 4]]).double()).tolist() == [[5, 0, 9, 6]]


def test_iou():
    first, second = random_boxes(12, 0), random_boxes(9, 1)
    expected = [[naive_iou(one, other) for other in second.tolist()] for one in first.tolist()]
    assert torch.allclose(pairwise_iou(first, second), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)
    assert pairwise_iou(first, first[:0]).shape == (12, 0)
    empty = torch.zeros(1, 4)
    assert pairwise_iou(empty, empty).item() == 0


@pytest.mark.parametrize(
    ("predicted", "wanted", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], 1.0),
        ([1, 1, 1, 1], [2, 2, 2, 2], 0.25),  # one within the other: the IoU
        ([2, 1, 2, 1], [1, 2, 1, 2], 4 / 12 - (16 - 12) / 16),  # a cross
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.0),
    ],
)
def test_generalized_iou(predicted, wanted, expected):
    value = generalized_iou(torch.tensor(predicted).double(), torch.tensor(wanted).double())
    assert value.item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("seed", range(8))
def test_suppression_is_the_greedy_one(seed):
    boxes = random_boxes(60, seed)
    generator = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(60, generator=generator), torch.randint(2, (60,), generator=generator)
    kept = []
    for place in sorted(range(60), key=lambda place: -scores[place].item()):
        if all(
            labels[place] != labels[better] or naive_iou(boxes[place].tolist(), boxes[better].tolist()) <= 0.3
            for better in kept
        ):
            kept.append(place)
    assert 0 < len(kept) < 60
    assert suppress_overlaps(boxes, scores, labels, iou_threshold=0.3).tolist() == kept


def test_what_beats_is_beaten_itself_does_not_count():
    # Of three in a row, the first beats the second, which would have beaten the third.
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = suppress_overlaps(boxes, scores, torch.zeros(3, dtype=torch.int64), iou_threshold=0.3)
    assert kept.tolist() == [0, 2]


def detector_task(**options):
    task = Detection(**options)
    task.prepare(Detector(in_channels=1, num_outputs=2, stride=8, width=2, num_blocks=0, head_depth=0))
    return task


def test_detections_are_made_from_maps():
    scores, boxes = torch.full((2, 2, 2, 3), -9.0), torch.ones(2, 4, 2, 3)
    scores[0, 1, 0, 2], boxes[0, :, 0, 2] = 2.0, torch.tensor([4.0, 3, 2, 1])  # point (20, 4)
    scores[0, 0, 0, 2] = 1.0  # the same box for the other class
    scores[0, 1, 0, 1], boxes[0, :, 0, 1] = 1.0, torch.tensor([-4.0, 3, 10, 1])  # point (12, 4): the same box again
    empty, found = detector_task().detect({"scores": scores.flip(0), "boxes": boxes.flip(0)})
    assert len(empty.scores) == 0
    assert found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [[16, 1, 22, 5], [16, 1, 22, 5]]
    assert found.scores.tolist() == pytest.approx(
        [torch.tensor(2.0).sigmoid().item(), torch.tensor(1.0).sigmoid().item()]
    )


def test_an_image_has_at_most_a_hundred_detections():
    outputs = {"scores": torch.zeros(1, 2, 40, 40), "boxes": torch.ones(1, 4, 40, 40)}
    (found,) = detector_task().detect(outputs)
    assert len(found.scores) == MAX_DETECTIONS
