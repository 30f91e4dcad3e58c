"""What each task says of samples that do not fit it. A failure here is a bad sample that gets through, or a message
that does not tell which one it is."""

import pytest
import torch

from service.training.data.source import Batch
from service.training.errors import BadSample
from service.training.tasks.classification import Classification
from service.training.tasks.detection import Detection
from service.training.tasks.regression import Regression
from service.training.tasks.segmentation import Segmentation

INPUTS = torch.zeros(2, 1, 3, 4)
MASKS = torch.zeros(2, 3, 4, dtype=torch.int64)
BOX = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 1.0]]), "labels": torch.tensor([1])}
NO_BOX = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def changed(masks, value):
    masks = masks.clone()
    masks[1, 2, 0] = value
    return masks


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(), torch.tensor([0, 1])),
        (Segmentation(), MASKS),
        (Segmentation(), changed(MASKS, 255)),
        (Segmentation(ignore_index=-1), changed(MASKS, -1)),
        (Detection(), [BOX, NO_BOX]),
        (Regression(), torch.zeros(2, 2)),
    ],
)
def test_good_samples_pass(task, targets):
    task.check(Batch(inputs=INPUTS, targets=targets), 2)


def test_a_single_value_needs_no_column():
    Regression().check(Batch(inputs=INPUTS, targets=torch.zeros(2)), 1)


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        (Classification(), torch.tensor([0, 2]), "sample 1 of the batch has class 2, outside 0 to 1"),
        (Classification(), torch.tensor([-1, 0]), "sample 0 of the batch has class -1"),
        (Classification(), torch.tensor([0.0, 1.0]), r"its targets are float32 \(2,\)"),
        (Classification(), MASKS, r"int64 \(2, 3, 4\)"),
        (Classification(), [BOX, BOX], "its targets are a list"),
        (Classification(class_weights=(1, 2, 3)), torch.tensor([0, 1]), r"task\.class_weights: 3 of them"),
        (Segmentation(), changed(MASKS, 2), r"sample 1 of the batch has class 2 at \(2, 0\).*task\.ignore_index"),
        (Segmentation(), MASKS[:, :2], r"int64 \(2, 3, 4\); its targets are int64 \(2, 2, 4\)"),
        (Segmentation(), MASKS.float(), "float32"),
        (Detection(), MASKS, "a dictionary with boxes and labels"),
        (Detection(), [BOX, {"boxes": BOX["boxes"]}], "sample 1 of the batch: its target is no dictionary"),
        (Detection(), [NO_BOX, {**BOX, "boxes": torch.zeros(0)}], r"sample 1 .*boxes are float32 \(0,\)"),
        (Detection(), [{**BOX, "boxes": BOX["boxes"].long()}, BOX], "sample 0 .*boxes are int64"),
        (Detection(), [BOX, {**BOX, "labels": torch.tensor([0, 1])}], r"labels are int64 \(2,\), not int64 \(1,\)"),
        (Detection(), [BOX, {**BOX, "boxes": torch.tensor([[2.0, 0, 2, 1]])}], "box 0 is .*not x1 < x2"),
        (Detection(), [BOX, {**BOX, "boxes": torch.tensor([[float("nan"), 0, 2, 1]])}], "box 0 is .*nan"),
        (Detection(), [BOX, {**BOX, "labels": torch.tensor([2])}], "box 0 has class 2, outside 0 to 1"),
        (Regression(), torch.zeros(2), r"\(2, 2\); they are float32 \(2,\)"),
        (Regression(), torch.zeros(2, 2, dtype=torch.int64), "int64"),
        (Regression(), torch.tensor([[0.0, 1], [2, float("inf")]]), "sample 1 of the batch is inf"),
    ],
)
def test_bad_samples_are_named(task, targets, message):
    with pytest.raises(BadSample, match=message):
        task.check(Batch(inputs=INPUTS, targets=targets), 2)
